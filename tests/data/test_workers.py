"""Processes that load data: what becomes of one that dies or cannot send."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from sdpctl.data.workers import Loader, _Deaths, received, slot_size
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


def load(make, workers, *, batches=([0, 1], [2]), size=128):
    found = []
    for batch in received(Loader(Made(make), workers=workers, batches=batches, size=size)):
        found.append(tuple(part.clone() for part in batch) if isinstance(batch, tuple) else batch)
    return found


def test_batches_are_the_same_with_workers_and_without():
    def make(keys):
        return torch.tensor(keys, dtype=torch.uint8), torch.tensor(keys)

    for one, other in zip(load(make, 0), load(make, 2), strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.dtype, a.tolist()) == (b.dtype, b.tolist())


def parts_of(keys):
    """Return tensors of several dtypes and layouts that depend on the keys; of some keys, larger ones, or empty ones."""
    count = 40 if keys[0] == 5 else len(keys)
    pixels_NCHW = torch.arange(count * 3 * 4 * 5).add(keys[0]).to(torch.uint8).view(count, 3, 4, 5)
    return (
        pixels_NCHW.to(memory_format=torch.channels_last) if keys[0] % 2 else pixels_NCHW,
        torch.tensor(keys),
        torch.full((0 if keys[0] == 3 else 2, 7), float(keys[0])),
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_of_any_size_and_layout_arrive_in_order(workers):
    """The batch of key 5 is larger than a slot, and goes through the pipe."""
    keys = [[number] for number in range(23)]
    found = load(parts_of, workers, batches=keys, size=slot_size(60, 8, 56))
    for batch, key in zip(found, keys, strict=True):
        for part, wanted in zip(batch, parts_of(key), strict=True):
            assert part.dtype == wanted.dtype
            assert torch.equal(part, wanted)
    assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in found if batch[1][0] % 2)


def test_a_batch_is_whole_until_the_next_one_is_asked_for():
    """The workers load ahead as far as they may meanwhile, and do not write into its slot."""
    keys = [[number] for number in range(20)]
    for key, batch in zip(keys, received(Loader(Made(parts_of), workers=2, batches=keys, size=4096)), strict=True):
        time.sleep(0.05)
        assert all(map(torch.equal, batch, parts_of(key)))


def test_a_pass_that_was_left_does_not_disturb_the_next_one():
    loader = Loader(Made(parts_of), workers=2, batches=[[number] for number in range(12)], size=4096)
    for _ in range(3):
        batches = received(loader)
        next(batches)
        batches.close()
    assert [int(batch[1]) for batch in received(loader)] == list(range(12))


def test_dev_shm_is_not_used():
    def shared(keys):
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
        files = [line for line in mapped if "/dev/shm/sem." not in line]  # the locks of the queues
        return torch.tensor([len(files)]), torch.zeros(1 if keys == [2] else 10_000)

    before = set(Path("/dev/shm").iterdir())
    assert [int(count) for count, _ in load(shared, 2)] == [0, 0]
    assert set(Path("/dev/shm").iterdir()) <= before


def test_workers_print_nothing(capfd):
    def make(keys):
        os.write(2, b"Corrupt JPEG data: premature end of data segment")
        return (torch.tensor(keys),)

    load(make, 1)
    assert capfd.readouterr() == ("", "")


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
