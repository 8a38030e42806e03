"""A recipe with the fingerprint of its data and the digests of the checkpoints that it names. The recipe is not changed."""

from dataclasses import dataclass, replace
from typing import Any

from sdpctl.recipe.schema import Recipe


@dataclass(frozen=True)
class Resolved:
    """A recipe, with the fingerprint of its data and the digests of the checkpoints that it names on this machine.

    Args:
        recipe: the recipe as the user wrote it, or as an artifact records it.
        fingerprint: fingerprint of the data that was found; None if the data was not looked at yet.
        init: digest of the checkpoint that the training begins with; None if it begins with random weights.
        teacher: digest of the checkpoint that teaches; None without a teacher, or if `full` teaches itself.
    """

    recipe: Recipe
    fingerprint: str | None = None
    init: str | None = None
    teacher: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what a result depends on, as plain data: the recipe without local keys, with fingerprint and digest added."""
        recipe = self.recipe
        if self.fingerprint is not None:
            recipe = recipe.changed(data={"fingerprint": self.fingerprint})
        if self.init is not None:
            recipe = recipe.changed(train={"init": self.init})
        if self.teacher is not None and recipe.train.distill is not None:
            recipe = recipe.changed(train={"distill": replace(recipe.train.distill, teacher=self.teacher)})
        return recipe.identity()

    def parts(self, *sections: str) -> dict[str, Any]:
        """Return some sections of the identity, by name."""
        identity = self.identity()
        return {section: identity[section] for section in sections}
