"""What is to be said of a choice on few images, or among instances that are equally accurate."""

from collections.abc import Iterable, Sequence

FEW = 100
"""Images below which the accuracy of instances is said to be coarse."""


def coarse(images: int) -> str | None:
    """Return what is to be said where few images decide, else None."""
    return f"{images} images are few: one image is {100 / images:.3g} percentage points" if 0 < images < FEW else None


def tied(scores: Iterable[float], score: float) -> int:
    """Return how many scores are equal to one of them."""
    return sum(other == score for other in scores)


def doubts(scores: Sequence[float], chosen: float, images: int) -> list[str]:
    """Return what makes a choice on held-out images uncertain, in lines; a single candidate is not a choice.

    Args:
        scores: top-1 accuracy of all candidates, in per cent.
        chosen: that of the candidate that was chosen, the cheapest of those that are equally accurate.
        images: held-out images.
    """
    if len(scores) < 2:
        return []
    lines = []
    if (equal := tied(scores, chosen)) > 1:
        lines.append(f"{equal} instances tie at {chosen:.2f} % on {images:,} held-out images; the cheapest of them is chosen")
    if (said := coarse(images)) is not None:
        lines.append(f"the choice is made on held-out images; {said}")
    return lines
