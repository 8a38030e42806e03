"""A trained policy: a small network that gives each action at a point a score, and walks any space of networks with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from sdpctl.instance import Instance
from sdpctl.search.environment import ENTRIES, Observer, Walk
from sdpctl.search.space import Space

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
"""The activations between the layers of a policy, by name."""

HEATS = (1, 2, 4, 8)
"""What the temperature is multiplied by, one after another, until a policy has proposed enough different networks."""


@dataclass(frozen=True)
class Shaped:
    """The architecture of a policy, as plain data.

    Args:
        actions: number of actions.
        hidden: widths of the hidden layers.
        activation: name of the activation in `ACTIVATIONS`.
        temperature: divides the scores before a walk draws its actions by their softmax.
    """

    actions: int
    hidden: tuple[int, ...]
    activation: str
    temperature: float

    def blank(self) -> dict[str, Tensor]:
        """Return weights of this architecture on the meta device."""
        found = {}
        for number, (width, after) in enumerate(pairwise([len(ENTRIES), *self.hidden, self.actions])):
            found[f"{number}.weight"] = torch.empty((after, width), device="meta")
            found[f"{number}.bias"] = torch.empty(after, device="meta")
        return found


class Policy:
    """Scores the actions of a walk, and proposes networks by them.

    Args:
        shaped: the architecture.
        weights: the weights and biases of the linear layers: `0.weight`, `0.bias`, `1.weight`, ..., the first layer first.
    """

    def __init__(self, shaped: Shaped, weights: dict[str, Tensor]) -> None:
        self.shaped, self.weights = shaped, weights
        self._activation = ACTIVATIONS[shaped.activation]

    @torch.no_grad()
    def scores(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score of each action: (observations, actions)."""
        x = torch.from_numpy(observations)
        for number in range(len(self.shaped.hidden) + 1):
            x = x if number == 0 else self._activation(x)
            x = linear(x, self.weights[f"{number}.weight"], self.weights[f"{number}.bias"])
        scores: NDArray[np.float32] = x.numpy()
        return scores

    def walks(
        self, space: Space, budgets: Sequence[int], random: np.random.Generator | None = None, heat: float = 1.0
    ) -> list[Walk]:
        """Walk a space once under each budget.

        Args:
            space: the space of networks.
            budgets: maximum MACs of each network.
            random: draws each action by its score; None takes the action of the highest score.
            heat: multiplies the temperature, so that drawn walks differ more.

        Raises:
            BudgetError: if no network is within a budget.
        """
        observer, walks = Observer(space), [Walk(space, budget) for budget in budgets]
        for _ in space.points:
            scores = self.scores(np.stack([observer.look(walk) for walk in walks]))
            if random is not None:  # the largest of scores with Gumbel noise is a draw from their softmax
                scores = scores / (heat * self.shaped.temperature) + random.gumbel(size=scores.shape).astype(np.float32)
            masks = np.stack([walk.mask() for walk in walks])
            for walk, action in zip(walks, np.where(masks, scores, -np.inf).argmax(1).tolist(), strict=True):
                walk.take(action)
        return walks

    def proposals(self, space: Space, budget: int, count: int, random: np.random.Generator) -> list[Instance]:
        """Return different networks within a budget: that of the highest scores first, then drawn ones.

        Args:
            space: the space of networks.
            budget: maximum MACs of a network.
            count: number of networks wanted.
            random: draws the walks.

        Returns:
            At most `count` networks; fewer if the walks lead to fewer.
        """
        found = dict.fromkeys([self.walks(space, [budget])[0].instance])
        for heat in HEATS:
            if len(found) < count:
                found |= dict.fromkeys(walk.instance for walk in self.walks(space, [budget] * 2 * count, random, heat))
        return list(found)[:count]
