"""Three processes compute what one does; `ranks_at_work.py` is what each of them runs."""

from pathlib import Path

import pytest
import torch
from rank_processes import ended, start
from ranks_at_work import TRAININGS

from sdpctl.data.loader import share_of
from sdpctl.engine.device import pick_device
from sdpctl.engine.distributed import ALONE, GradientSums, Ranks, device_of_rank, launched, the_ranks
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.train import Trainer
from sdpctl.errors import ResourceError
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.models.chain import batch_norm

RANKS = 3


@pytest.fixture(scope="module")
def done(make_once):
    """What each of three ranks computed, together and alone."""

    def fill(folder):
        script = Path(__file__).parent / "ranks_at_work.py"
        for process in ended(start(RANKS, [script, folder / "done"], folder)):
            assert process.returncode == 0, process.stderr

    folder = make_once("ranks", fill)
    return [torch.load(folder / f"done.{rank}", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("case", "batches"),
    [("cumulative", 5), ("fewer batches than ranks", 2), ("ema", 5), ("ema, fewer batches than ranks", 2), ("kept", 4)],
)
def test_statistics_are_those_of_one_process(done, case, batches):
    alone = done[0]["statistics"]["alone"][case]
    assert (alone["batches"], alone["images"]) == (batches, 6 * batches)
    assert len({name.split("/")[1] for name in alone["tensors"]}) == 19  # of 21 instances, those that end in the last block
    for each in done:
        together = each["statistics"]["together"][case]
        assert (together["batches"], together["images"]) == (batches, 6 * batches)
        for name, t in alone["tensors"].items():
            torch.testing.assert_close(together["tensors"][name], t, rtol=1e-6, atol=1e-6, msg=name)


def test_kept_statistics_are_not_touched(done):
    own = done[0]["statistics"]["together"]["kept"]["tensors"]
    for name, t in done[0]["statistics"]["alone"]["kept"]["tensors"].items():
        if "/full/" in name:
            assert own[name].equal(t), name


@pytest.mark.parametrize("images", [1, 2, 7, 20])
def test_every_image_is_scored_once(done, images):
    alone = done[0]["scores"]["alone"][images]
    assert len(alone["rows"]) == 21
    assert sum(alone["images"]) == images
    for each in done:
        together = each["scores"]["together"][images]
        assert together["images"] == alone["images"]
        assert together["by class"] == alone["by class"]
        assert together["kept"] == alone["kept"]
        for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
            assert mine[:4] == theirs[:4]
            assert mine[4] == pytest.approx(theirs[4], abs=1e-6)


@pytest.mark.parametrize("images", [1, 2, 7, 20])
def test_cascades_and_logits_of_all_ranks_are_those_of_one(done, images):
    alone = done[0]["cascades"]["alone"][images]
    assert alone["logits"].shape == (4, images, 8)
    for each in done:
        together = each["cascades"]["together"][images]
        assert together["labels"] == alone["labels"]
        torch.testing.assert_close(together["logits"], alone["logits"], rtol=0, atol=1e-5)
        for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
            assert (mine[:3], mine[4]) == (theirs[:3], theirs[4])
            assert mine[3] == pytest.approx(theirs[3], abs=1e-6)
    if images == 20:
        assert all(min(row[4]) < 20 for row in alone["rows"])
        assert max(sum(count > 0 for count in row[4]) for row in alone["rows"]) > 1


@pytest.mark.parametrize("case", TRAININGS)
def test_the_gradients_of_a_step_are_those_of_the_whole_batch(done, case):
    alone = done[0]["trainings"]["alone"][case]
    for each in done:
        together = each["trainings"]["together"][case]
        for mine, theirs in zip(together["gradients"][0], alone["gradients"][0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # the loss itself is computed in float32
            assert theirs.abs().max() > 1e-3 or case == "weights"
        assert together["metrics"]["accuracy"] == alone["metrics"]["accuracy"]
        assert together["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-3)


@pytest.mark.parametrize("case", TRAININGS)
def test_all_ranks_have_the_same_weights_to_the_bit(done, case):
    first, *others = (each["trainings"]["together"][case] for each in done)
    for other in others:
        assert other["metrics"] == first["metrics"]
        for name, t in first["state"].items():
            assert other["state"][name].equal(t), name


def test_synchronised_norms_are_those_of_the_whole_batch(done):
    for case, alone in done[0]["norms"]["alone"].items():
        for rank, each in enumerate(done):
            together = each["norms"]["together"][case]
            for mine, theirs in zip(together["made"], alone["made"], strict=True):
                torch.testing.assert_close(mine, theirs[share_of(7, rank, RANKS)], rtol=1e-12, atol=1e-12)
            for kind in ("gradients", "state"):
                assert together[kind].keys() == alone[kind].keys()
                for name, t in alone[kind].items():
                    torch.testing.assert_close(together[kind][name], t, rtol=1e-12, atol=1e-12, msg=f"{case}: {name}")


def test_without_sync_bn_each_rank_normalises_its_part(done):
    ghosts = done[0]["unsynchronised"]["alone"]
    for each in done:
        for mine, theirs in zip(each["unsynchronised"]["together"], ghosts, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    whole = done[0]["trainings"]["alone"]["plain"]["gradients"][0]
    assert any((mine - theirs).abs().max() > 1e-3 for mine, theirs in zip(ghosts, whole, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_the_parts_of_a_batch(count, ranks):
    parts = [range(count)[share_of(count, rank, ranks)] for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("several", [False, True])
def test_masks_of_images_differ_between_ranks_and_masks_of_a_batch_agree(several, monkeypatch):
    model = create_model("twopipe", num_classes=4, masks="random", widths=(4, 4, 4, 4, 4))
    monkeypatch.setattr(model, "draws_for_each_image", several)
    seeds = {
        Trainer(model, TrainSettings(), lambda _: (FULL,), 1, ranks=Ranks(rank, 3), batch_size=6)._mask_seed()
        for rank in range(3)
    }
    assert len(seeds) == (3 if several else 1)
    assert Trainer(model, TrainSettings(), lambda _: (FULL,), 1)._mask_seed() in seeds


def test_networks_that_draw_for_each_image():
    assert create_model("timm/resnet10t", num_classes=4, dropout=0.2).draws_for_each_image
    assert not create_model("twopipe", num_classes=4).draws_for_each_image


def test_a_single_process_has_no_use_for_sync_bn():
    settings = TrainSettings(sync_bn=True)
    trainer = Trainer(create_model("resnet20", num_classes=4), settings, lambda _: (FULL,), 1)
    assert trainer.forward.norm is batch_norm


class Doubling(Ranks):
    """Two ranks with the same numbers, in one process; it remembers what was added up."""

    def __init__(self):
        super().__init__(0, 2)
        self.added = []

    def begin_adding(self, tensor):
        self.added.append(tensor)
        return lambda: tensor.mul_(2)


def test_buckets_of_gradients_never_change_and_parameters_without_a_gradient_are_left_out():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
    ranks = Doubling()
    sums = GradientSums(ranks, layers.parameters(), most=30)
    sizes = []
    for used in (layers, layers, (layers[0], layers[2])):
        layers.zero_grad(set_to_none=True)
        x = torch.ones(1, 4)
        for layer in used:
            x = layer(x)
        x.sum().backward()
        own = [None if parameter.grad is None else parameter.grad.clone() for parameter in layers.parameters()]
        sums.finish()
        for parameter, grad in zip(layers.parameters(), own, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None:
                assert parameter.grad.equal(2 * grad)
        sizes.append([len(t) for t in ranks.added])
        ranks.added.clear()
    assert sizes == [[24, 20, 20, 16], [24, 20, 20, 16], [4, 16, 4, 16]]


def test_a_single_process_adds_nothing():
    t = torch.ones(2)
    ALONE.add_up(t)
    ALONE.begin_adding(t)()
    assert ALONE.gathered(t) == [t]
    assert t.tolist() == [1, 1]
    assert the_ranks() is ALONE


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR or MASTER_PORT is missing"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "torchrun"),
        ({"WORLD_SIZE": "two"}, "is not a number"),
    ],
)
def test_an_environment_of_half_a_torchrun(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=words):
        launched()


def test_one_process_of_torchrun_is_a_single_process(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() is None


class TestDevices:
    @pytest.fixture(autouse=True)
    def _second_of_four(self, monkeypatch):
        environment = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        for name, value in (environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
            monkeypatch.setenv(name, value)

    @staticmethod
    def with_gpus(monkeypatch, count):
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_process_has_a_gpu_of_its_own(self, monkeypatch, name):
        self.with_gpus(monkeypatch, 2)
        assert device_of_rank(name) == torch.device("cuda", 1)

    @pytest.mark.parametrize(("name", "gpus"), [("auto", 0), ("cpu", 2)])
    def test_without_gpus_all_processes_share_the_cpu(self, monkeypatch, name, gpus):
        self.with_gpus(monkeypatch, gpus)
        assert device_of_rank(name) is None
        assert pick_device(name) == torch.device("cpu")

    def test_fewer_gpus_than_processes(self, monkeypatch):
        self.with_gpus(monkeypatch, 1)
        with pytest.raises(ResourceError, match="2 processes need as many GPUs, and this machine has 1; start with"):
            pick_device("auto")

    def test_one_gpu_for_all(self, monkeypatch):
        self.with_gpus(monkeypatch, 2)
        with pytest.raises(ResourceError, match="device=cuda:1 is one GPU for 2 processes; set device=cuda"):
            pick_device("cuda:1")
