"""Run the command line on hostile input many times, and say what must never happen.

Each command runs in a forked child of a process that has loaded torch once, so that thousands of them take minutes. An attack
is a script: `python tests/attacks/attack_recipes.py --count 4000`; `test_attacks.py` runs each with a small count.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 9, 129, 130, 143}
"""Exit codes of sdpctl/cli/README.md, without 1, which is a bug."""

HANGS = 10.0
"""Seconds after which a command is said to hang."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (negative: the signal that ended it), what it printed, how long it took."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    def faults(self, allowed: frozenset[int] | set[int] = frozenset(DOCUMENTED)) -> list[str]:
        """Return what must never happen: a traceback, a bug, an undocumented exit code, a hang."""
        found = []
        if "Traceback" in self.out + self.err:
            found.append("a traceback")
        if "this is a bug" in self.err:
            found.append("a bug")
        if self.seconds >= HANGS:
            found.append(f"a hang of {self.seconds:.1f} s")
        elif self.code not in allowed:
            found.append(f"exit code {self.code}")
        if self.code not in (0, *range(128, 160)) and not self.err.strip():
            found.append("a failure without a word")
        return found


def run(arguments: Sequence[object], folder: Path, *, limit: float = HANGS) -> Outcome:
    """Run the command line in a folder, in a forked child that is killed after `limit` seconds."""
    words = tuple(map(str, arguments))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        child = os.fork()
        if not child:
            become(words, folder, out.fileno(), err.fileno())
        code: int | None = None
        while code is None:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - began > limit:
                os.killpg(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            else:
                time.sleep(0.002)
        seconds = time.monotonic() - began
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Outcome(words, code, texts[0], texts[1], seconds)


def become(words: Sequence[str], folder: Path, out: int, err: int) -> None:
    """Become the command line, in a forked child; does not return."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["sdpctl", *words]
        from sdpctl.cli import main

        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001  it is shown as Python would show it
            sys.excepthook(*sys.exc_info())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def attack(cases: Callable[[int, Path], Iterator[list[str]]], preload: Sequence[str] = ()) -> None:
    """Run an attack from its command line: print each fault, then one closing line, and exit 1 where there was one.

    Args:
        cases: of a seed and an empty folder: yields for each case what went wrong, nothing where all went well.
        preload: modules that are imported once, before the first fork.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)  # else commands would ignore what `nohup` or a shell's `&` ignores
    for module in ("sdpctl.cli", *preload):
        __import__(module)
    number = faulty = 0
    with tempfile.TemporaryDirectory() as folder:
        for faults in cases(options.seed, Path(folder)):
            number += 1
            faulty += bool(faults)
            for fault in faults:
                print(f"case {number}: {fault}", flush=True)  # noqa: T201
            if number == options.count:
                break
    print(f"{number} cases, {faulty} with faults")  # noqa: T201
    raise SystemExit(bool(faulty))
