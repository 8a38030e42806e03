"""Notes for a user on how far the accuracy of instances can be trusted: few images, or equal scores."""

from collections.abc import Iterable, Sequence

FEW_IMAGES = 100
"""Below this number of images, one image changes an accuracy by more than one percentage point."""


def few_images_note(images: int) -> str | None:
    """Return a note if an accuracy was measured on few images, otherwise None."""
    few = 0 < images < FEW_IMAGES
    return f"{images} images are few: one image is {100 / images:.3g} percentage points" if few else None


def count_tied(scores: Iterable[float], score: float) -> int:
    """Return how many of the scores equal `score`."""
    return sum(other == score for other in scores)


def choice_notes(scores: Sequence[float], chosen: float, images: int) -> list[str]:
    """Return notes on what makes a choice on held-out images uncertain; a single candidate needs none.

    Args:
        scores: top-1 accuracy of each candidate, in per cent.
        chosen: accuracy of the chosen candidate, the cheapest of the equally accurate ones.
        images: number of held-out images.
    """
    if len(scores) < 2:
        return []
    notes = []
    if (equal := count_tied(scores, chosen)) > 1:
        notes.append(f"{equal} instances tie at {chosen:.2f} % on {images:,} held-out images; the cheapest of them is chosen")
    if (few := few_images_note(images)) is not None:
        notes.append(f"the choice is made on held-out images; {few}")
    return notes
