"""The proxy of a search: a regression on the networks scored so far, which predicts the reward of any other network."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import BayesianRidge

from sdpctl.instance import Instance
from sdpctl.search.space import Space

Floats = NDArray[np.float64]


class Proxy:
    """A Bayesian ridge regression of the rewards.

    The features of a network are the one-hot ratio of each point, the logarithm of the size after each point, its square, the
    area there, and the MACs and their logarithm. The squares and areas let the accuracy fall faster as maps get small.

    Args:
        space: the space of networks.
        rewards: rewards of the networks scored so far.
    """

    def __init__(self, space: Space, rewards: Mapping[Instance, float]) -> None:
        self.space = space
        features = self._features(list(rewards))
        self._mean, self._spread = features.mean(0), features.std(0)
        self._spread[self._spread == 0] = 1
        self.ridge = BayesianRidge().fit((features - self._mean) / self._spread, np.array(list(rewards.values())))

    def features(self, networks: Sequence[Instance]) -> Floats:
        """Return the features of networks, standardised by those of the scored networks: (networks, features)."""
        standardised: Floats = (self._features(networks) - self._mean) / self._spread
        return standardised

    def draws(self, noise: np.random.Generator, count: int) -> Floats:
        """Draw weights of the features from the posterior: (count, features)."""
        return noise.multivariate_normal(self.ridge.coef_, self.ridge.sigma_, size=count, method="eigh")

    def _features(self, networks: Sequence[Instance]) -> Floats:
        return np.array([self._row(network) for network in networks])

    def _row(self, network: Instance) -> list[float]:
        space, one_hot, sizes, size = self.space, [], [], 1.0
        for point in space.points:
            ratio = network.ratio(point)
            one_hot += [float(ratio == other) for other in space.ratios[point][1:]]
            size *= ratio
            sizes += [math.log(size), math.log(size) ** 2, size**2]
        share = space.cost(network) / space.full
        return [*one_hot, *sizes, share, math.log(share)]
