"""Processes that load data: what becomes of one that dies or cannot send."""

import signal

import pytest
import torch
from torch.utils.data import Dataset

from sdpctl.data.workers import Loader, _Deaths, received
from sdpctl.errors import LoaderError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Made(Dataset):
    def __init__(self, make):
        self.make = make

    def __getitems__(self, keys):
        return self.make(keys)


def load(make, workers):
    return list(received(Loader(Made(make), workers=workers, batches=[[0, 1], [2]], size=128)))


def test_batches_are_the_same_with_workers_and_without():
    def make(keys):
        return torch.tensor(keys, dtype=torch.uint8), torch.tensor(keys)

    for one, other in zip(load(make, 0), load(make, 2), strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.dtype, a.tolist()) == (b.dtype, b.tolist())


def test_what_cannot_be_sent_is_not_waited_for():
    with pytest.raises(LoaderError, match=r"lower data\.workers \(0 loads without such processes\)"):
        load(lambda keys: lambda: keys, 1)


def test_an_error_of_the_data_stays_what_it_is():
    def make(keys):
        raise ValueError("this image")

    with pytest.raises(ValueError, match="this image"):
        load(make, 1)


def test_a_death_is_told_where_a_batch_is_awaited_and_nowhere_else():
    def torchs(signum, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    deaths = _Deaths()
    deaths._torchs = torchs
    deaths._told(signal.SIGCHLD, None)
    with pytest.raises(RuntimeError, match="Killed"), deaths.awaited():
        pytest.fail("a batch is awaited in vain")
    with deaths.awaited(), pytest.raises(RuntimeError, match="Killed"):
        deaths._told(signal.SIGCHLD, None)
