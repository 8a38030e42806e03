"""The command line, run within the process of the tests, which has torch loaded already."""

import io
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from sdpctl.cli import main
from sdpctl.signals import STOPPING


def called(folder, *arguments, **environment):
    """Run the command line in a folder as a process of its own would; this one has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    signals = {signum: signal.getsignal(signum) for signum in STOPPING}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sdpctl", *map(str, arguments)])
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    for signum, handler in signals.items():
        signal.signal(signum, handler)
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())


def document(folder, *arguments, **environment):
    done = called(folder, *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
