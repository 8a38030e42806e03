"""Random numbers as pure functions of a seed and a name.

Nothing in sdpctl draws from a generator whose state depends on what ran before: a draw is named, for example
`("draw", step)` or `("augment", epoch, index)`, and is the same in any process, on any worker, after any interruption.
"""

import hashlib
import random


def derive(seed: int, *name: str | int) -> int:
    """Return 63 bits that depend on the seed and the name alone, to seed another generator with."""
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *name: str | int) -> random.Random:
    """Return a generator that belongs to this name."""
    return random.Random(derive(seed, *name))
