import zlib

import numpy as np
import pytest
import torch


@pytest.fixture
def fill():
    """Fill a network as tests/golden/README.md says."""

    def value(name, shape):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape)
        if len(shape) == 4:
            return random.standard_normal(shape) * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
        if len(shape) == 2:
            return random.standard_normal(shape) * np.sqrt(1 / shape[1])
        if name.endswith("running_var"):
            return 0.5 + random.random(shape)
        if name.endswith(".weight"):
            return 0.25 + 0.5 * random.random(shape)
        return 0.1 * random.standard_normal(shape)

    def fill(model):
        state = {name: torch.tensor(value(name, tuple(t.shape))) for name, t in model.state_dict().items()}
        model.load_state_dict(state)
        return model

    return fill
