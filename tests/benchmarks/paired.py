"""Time two ways of doing the same, in turn, and print the ratio with its spread."""

import statistics
import time
from collections.abc import Callable


def paired(ours: Callable[[], object], theirs: Callable[[], object], *, runs: int) -> str:
    """Run both `runs` times in turn after one warm-up each.

    Returns:
        Median seconds of both, and the ratio of each pair: median, least and most.
    """
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(runs)]
    ratios = sorted(b / a for a, b in pairs)
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return (
        f"ours {mine:.3f} s, the alternative {other:.3f} s, ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {runs} pairs)"
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
