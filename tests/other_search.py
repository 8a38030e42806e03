"""A search by another process, which writes down what each pass scored, and may die or wait."""

import os
from contextlib import contextmanager

from forked import Forked

OTHER = """
import os, signal, sys, time
from pathlib import Path
from sdpctl.search.scoring import Scorer
log, dies, awaited = open(sys.argv[1], "a"), int(sys.argv[2]), Path(sys.argv[3])
score, passes = Scorer.score, 0
def counted(self, instances):
    global passes
    passes += 1
    fresh = [str(instance) for instance in instances if instance not in self.known]
    while passes == 2 and not awaited.exists():
        time.sleep(0.01)
    scores = score(self, instances)
    if passes == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    print(*fresh, file=log, flush=True)
    return scores
Scorer.score = counted
sys.argv = ["sdpctl", *sys.argv[4:]]
from sdpctl.cli import main
main()
"""


@contextmanager
def another_search(path, log, overrides, dies=0, awaited="/"):
    """Run `sdpctl search tiny` beside this process.

    Args:
        path: folder of the store.
        log: file that gets the networks of each pass.
        overrides: `--set` options.
        dies: number of the pass, from 1, in which it dies once the networks are scored and before that is written down.
        awaited: file that it waits for in its second pass.
    """
    sets = [part for override in overrides for part in ("--set", override)]
    process = Forked(["-c", OTHER, log, dies, awaited, "search", "tiny", "-q", "--store", path, *sets], path.parent, os.environ)
    try:
        yield process
    finally:
        process.kill()
