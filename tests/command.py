"""The command line in tests: run within their process, or as a process where the process itself is tested."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from sdpctl.cli import main
from sdpctl.signals import STOPPING

HEAVY = {
    *("PIL", "gymnasium", "numpy", "onnx", "onnxruntime", "optuna", "ptflops", "pydantic", "safetensors", "sklearn"),
    *("sqlalchemy", "stable_baselines3", "timm", "torch", "torchvision"),
}
"""Packages that take long to import: help and completion do without them."""


def exit_code(folder, arguments, environment, out, err):
    """Run the command line in a folder, within this process, which has loaded torch already; it prints to two streams."""
    signals = {signum: signal.getsignal(signum) for signum in STOPPING}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sdpctl", *map(str, arguments)])
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for signum, handler in signals.items():
                signal.signal(signum, handler)
    return ended.value.code or 0


def called(folder, *arguments, **environment):
    """Run the command line within this process, and return what a process of its own would."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2)]
    code = exit_code(folder, arguments, environment, *streams)
    return subprocess.CompletedProcess(arguments, code, *(stream.buffer.getvalue().decode() for stream in streams))


def document(folder, *arguments, **environment):
    """Run a command that succeeds, and return the document that it prints."""
    done = called(folder, *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def one_line(done, code, *words):
    """Check that a mistake ended with its code and a single line on stderr that holds these words; return the line."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("sdpctl: "))
    for word in words:
        assert word in line, line
    return line


def completed(folder, line):
    """Complete a command line as bash asks for it, in a process that must load nothing heavy; return the words offered."""
    script = (
        "import sys, runpy\n"
        "try:\n    runpy.run_module('sdpctl', run_name='__main__')\nexcept SystemExit: pass\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    env = os.environ | {"_SDPCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def light(folder, *commands):
    """Run commands in one process that must load nothing heavy; return what each printed."""
    script = (
        "import json, sys, typer.testing, sdpctl.cli as cli\n"
        "runner = typer.testing.CliRunner()\n"
        f"done = [runner.invoke(cli.app, words) for words in {[list(words) for words in commands]}]\n"
        "assert [result.exit_code for result in done] == [0] * len(done), [result.output for result in done]\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(json.dumps([result.output for result in done]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
