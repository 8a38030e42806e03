"""Random numbers as pure functions of a seed and a name.

No draw in sdpctl depends on what ran before it. Each draw has a name, for example `("draw", step)`, and gives the same value in
any process, on any worker, and after any interruption.
"""

import hashlib
import random


def derive(seed: int, *name: str | int) -> int:
    """Return a 63-bit seed for a generator; it depends only on `seed` and `name`."""
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *name: str | int) -> random.Random:
    """Return a generator whose state depends only on `seed` and `name`."""
    return random.Random(derive(seed, *name))
