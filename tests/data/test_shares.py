"""Several processes share the images: together they have the batches of one process, and each image once."""

import pytest
import torch

RANKS = pytest.mark.parametrize("ranks", [2, 3, 5])


@pytest.fixture
def shares(open_data, photos):
    """Open the photographs as one process does, and as each of several does."""

    def opened(ranks, **chosen):
        chosen = {"augment": "crop-flip", "holdout": 0.2, "batch_size": 11} | chosen
        alone = open_data("imagefolder", photos, **chosen)
        each = [open_data("imagefolder", photos, rank=rank, ranks=ranks, **chosen) for rank in range(ranks)]
        return alone, each

    return opened


def equal(mine, theirs):
    return mine[0].equal(theirs[0]) and mine[1].equal(theirs[1])


@RANKS
def test_the_parts_of_a_training_batch_are_the_batch_of_one_process(ranks, shares):
    alone, each = shares(ranks)
    whole = list(alone.training(3, start=1))
    parts = [list(share.training(3, start=1)) for share in each]
    assert len(whole) == alone.steps_per_epoch - 1 > 1
    for i, batch in enumerate(whole):
        here = [share[i] for share in parts]
        assert equal(tuple(map(torch.cat, zip(*here, strict=True))), batch)
        sizes = [len(labels_N) for _, labels_N in here]
        assert max(sizes) - min(sizes) == 1


@RANKS
def test_each_process_calibrates_on_every_nth_batch_of_one_process(ranks, shares):
    alone, each = shares(ranks)
    whole = list(alone.calibration(4))
    for rank, share in enumerate(each):
        mine = list(share.calibration(4))
        assert len(mine) == len(whole[rank::ranks])
        assert all(map(equal, mine, whole[rank::ranks]))


@RANKS
@pytest.mark.parametrize("name", ["test", "holdout", "holdout_part", "few"])
def test_every_image_is_scored_by_one_process(ranks, name, shares):
    def images(data, batch_size):
        passes = {
            "test": lambda: data.test(batch_size),
            "holdout": lambda: data.holdout(batch_size),
            "holdout_part": lambda: data.holdout_part(1, 8, batch_size),
            "few": lambda: data.holdout_part(0, 2, batch_size),
        }
        return list(passes[name]())

    alone, each = shares(ranks)
    x_NCHW, labels_N = map(torch.cat, zip(*images(alone, 4), strict=True))
    scored = 0
    for rank, share in enumerate(each):
        batches = images(share, 4)
        assert len(batches) == share.batches_to_score(len(labels_N), 4)
        scored += sum(len(labels_N) for _, labels_N in batches)
        if len(labels_N) > rank:
            mine = tuple(map(torch.cat, zip(*batches, strict=True)))
            assert equal(mine, (x_NCHW[rank::ranks], labels_N[rank::ranks]))
    assert scored == len(labels_N)


def test_examples_are_those_of_one_process(shares):
    alone, each = shares(2)
    assert all(share.examples(5).equal(alone.examples(5)) for share in each)
