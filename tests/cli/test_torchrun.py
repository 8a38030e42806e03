"""Commands that torchrun starts as several processes: one result, one line, one exit code; stopped, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import called, document
from rank_processes import ended, start
from safetensors.torch import load

from sdpctl.cli.output import Output
from sdpctl.engine.distributed import Ranks
from sdpctl.errors import DataError, IntegrityError
from sdpctl.kinds import HISTORY, STATISTICS
from sdpctl.plan import Plan
from sdpctl.recipe.load import load_recipe
from sdpctl.stages.context import Context
from sdpctl.stages.layers import read_records
from sdpctl.stages.train import Train
from sdpctl.store import Store

RECIPE = """
name: small
device: cpu
model: {arch: resnet20, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 127, workers: 0, augment: crop}
sdpoint: {ratios: [0.5], points: [stem, layer2.0]}
train: {epochs: 2, lr: 0.05, ema: 0.9, mixup: 0.2, validate: {instances: [full, layer2.0@0.5], batches: 3}}
calibrate: {batches: 5}
evaluate: {batch_size: 100}
search: {strategy: random, evaluations: 4, images: 40, rescore: 1, rescore_images: 20}
"""
LONGER = ["--set", "train.epochs=6", "--set", "train.validate.every=3"]
OFTEN = ["--set", "train.checkpoint.minutes=0.001"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def trained(make_once):
    """A store with the network that one process trained."""

    def fill(path):
        (path / "small.yaml").write_text(RECIPE)
        document(path, "train", "small.yaml", "--store", "store", OMP_NUM_THREADS="1")

    return make_once("trained-small", fill) / "store"


def ranks(folder, *arguments, count=2, **options):
    """Run a command as several processes; return how each ended. Only rank 0 may print. Options are those of `start`."""
    first, *others = ended(start(count, ["-m", "sdpctl", *arguments], folder, **options))
    for other in others:
        assert (other.stdout, other.stderr) == ("", "")
    return [first, *others]


def torchrun(folder, *arguments, options=(), count=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", *options, "-m", "sdpctl", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=180, check=False)


def our_lines(text):
    return [line for line in text.splitlines() if line.startswith("sdpctl: ")]


def copied(store, folder):
    subprocess.run(["cp", "-r", store, folder / "store"], check=True)


def test_a_table_of_two_processes_is_that_of_one(trained, folder):
    copied(trained, folder)
    subprocess.run(["cp", "-r", trained, folder / "alone"], check=True)
    done = torchrun(folder, "eval", "small", "--store", "store", "--json")
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)  # nothing else is on stdout
    alone = document(folder, "eval", "small", "--store", "alone", OMP_NUM_THREADS="1")
    assert together["images"] == alone["images"]
    for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
        assert mine["top1"] == theirs["top1"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert {k: v for k, v in mine.items() if k != "loss"} == {k: v for k, v in theirs.items() if k != "loss"}
    # One process finds what two made: the number of processes is in no key.
    found = called(folder, "eval", "small", "--store", "store", "--json")
    assert json.loads(found.stdout)["digest"] == together["digest"]
    assert "in the store already" in found.stderr


def test_two_processes_calibrate_and_fine_tune_as_one(trained, folder):
    copied(trained, folder)
    subprocess.run(["cp", "-r", trained, folder / "alone"], check=True)
    finetune = "{instances: [stem@0.5, full, layer2.0@0.5], steps: 3, lr: 0.05}"
    images = f"calibrate={{batches: 3, batch_size: 50, image_size: 12, augment: none, finetune: {finetune}}}"
    arguments = ["eval", "small", "--json", "--set", images, "--set", "evaluate.image_size=12"]
    first, other = ranks(folder, *arguments, "--store", "store", OMP_NUM_THREADS="1")
    assert (first.returncode, other.returncode) == (0, 0), first.stderr
    assert "3 instances fine-tuned in 3 steps" in first.stderr
    together, alone = json.loads(first.stdout), document(folder, *arguments[:2], *arguments[3:], "--store", "alone")
    for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    stores = [Store(folder / name) for name in ("store", "alone")]
    ours, single = (load(store.read(store.resolve("small.bn"), STATISTICS)) for store in stores)
    assert ours.keys() == single.keys()
    for name, values in single.items():
        if "running" in name:
            torch.testing.assert_close(ours[name], values)
        else:
            assert torch.equal(ours[name], values)
    assert any(name.endswith("fc.bias") for name in single)


def test_a_cascade_chosen_by_two_processes_is_that_of_one(trained, folder):
    copied(trained, folder)
    subprocess.run(["cp", "-r", trained, folder / "alone"], check=True)
    words = ("search", "small", "--cascade", "--max-macs", "70%", "--json", "--store")
    first, other = ranks(folder, *words, "store")
    assert (first.returncode, other.returncode) == (0, 0), first.stderr
    together, alone = json.loads(first.stdout), document(folder, *words[:-2], "--store", "alone", OMP_NUM_THREADS="1")
    assert together["best"]["cascade"] == alone["best"]["cascade"]
    for mine, theirs in zip([together["best"], *together["front"]], [alone["best"], *alone["front"]], strict=True):
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), abs=1e-5)
        assert mine == theirs
    cascade = together["best"]["cascade"]
    first, _ = ranks(folder, "eval", "small", "--instances", cascade, "--json", "--store", "store")
    (row,) = (row for row in json.loads(first.stdout)["rows"] if row["instance"] == cascade)
    assert {key: row[key] for key in ("macs", "top1", "left")}.items() <= together["best"].items()


def test_a_whole_run_of_three_processes(folder):
    first, *others = ranks(folder, "run", "small.yaml", "--store", "store", "--json", count=3)
    assert first.returncode == 0, first.stderr
    assert [other.returncode for other in others] == [0, 0]
    assert set(json.loads(first.stdout)) >= {"train", "calibrate-bn", "eval-instances", "search"}
    store = Store(folder / "store")
    assert list(store.verify()) == []
    history = read_records(store, store.resolve("small"), HISTORY)
    assert [record["ranks"] for record in history] == [3, 3]
    tags = {artifact.tag for artifact in store.artifacts() if artifact.tag}
    assert tags == {"small", "small.bn", "small.eval", "small.search", "small.search.50pct"}


def test_several_instances_learn_from_a_teacher_in_two_processes_as_in_one(trained, folder):
    """With norms of the whole batch, the weights differ by the rounding of float32, which a few steps magnify little."""
    keys = ["name=taught", "sdpoint.draw=sandwich", "train.distill.teacher=small", "train.epochs=1", "train.ema=null"]
    keys += ["train.lr=0.001", "train.mixup=null", "train.sync_bn=true", "train.validate.every=0"]
    options = [word for key in keys for word in ("--set", key)]
    copied(trained, folder)
    subprocess.run(["cp", "-r", trained, folder / "alone"], check=True)
    first, _ = ranks(folder, "train", "small.yaml", "--store", "store", "--json", *options)
    assert first.returncode == 0, first.stderr
    document(folder, "train", "small.yaml", "--store", "alone", *options, OMP_NUM_THREADS="1")
    stores = Store(folder / "store"), Store(folder / "alone")
    losses = [read_records(store, store.resolve("taught"), HISTORY)[-1]["loss"] for store in stores]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "none.yaml"], 2, "none.yaml"),
        (["train", "small.yaml", "--store", "new", "--set", "train.lr=1e30", "--set", "train.mixup=null"], 9, "not finite"),
    ],
)
def test_a_mistake_is_one_line_and_one_exit_code(folder, arguments, code, words):
    first, other = ranks(folder, *arguments)
    assert first.stdout == ""
    (line,) = our_lines(first.stderr)
    assert words in line
    assert "Traceback" not in first.stderr
    assert (first.returncode, other.returncode) == (code, code)


def test_a_batch_of_fewer_than_two_images_for_a_process(folder):
    recipe = load_recipe(folder / "small.yaml", ["data.batch_size=5"])
    context = Context(path=folder / "store", report=Output(quiet=True), ranks=Ranks(0, 3))
    with pytest.raises(DataError, match=r"data.batch_size=5 leaves one of 3 processes fewer than two images"):
        Plan(context).run(Train(recipe))


def test_without_work_the_followers_end_with_the_command(folder):
    first, other = ranks(folder, "train", "small.yaml", "--store", "store", "--dry-run")
    assert (first.returncode, other.returncode) == (0, 0), first.stderr
    assert "train resnet20" in first.stdout
    assert not (folder / "store").exists()


FAILING = """
import os
from sdpctl.data.loader import ImageData
from sdpctl.errors import DataError
if os.environ["RANK"] == "1":
    def fail(*_):
        raise DataError("cat.png: this image cannot be decoded")
    ImageData.test = fail
from sdpctl.cli import main
main()
"""


def test_a_failure_of_a_follower_is_one_line_of_rank_0(trained, folder):
    copied(trained, folder)
    first, other = ended(start(2, ["-c", FAILING, "eval", "small", "--store", "store"], folder))
    assert our_lines(first.stderr) == ["sdpctl: rank 1: cat.png: this image cannot be decoded"]
    assert "Traceback" not in first.stderr
    assert (other.stdout, other.stderr) == ("", "")
    assert (first.returncode, other.returncode) == (7, 7)


def partial(store):
    """Return the digest of the unfinished training in a store; None if there is none."""
    try:
        return next((a.digest for a in Store(store).artifacts() if a.tag == "small.partial"), None)
    except IntegrityError:
        return None


def training(folder, store, *more):
    return ["-m", "sdpctl", "train", "small.yaml", "--store", store, *LONGER, "-q", *more]


def saved_again(store, processes, before=None):
    """Wait until a training saves something new."""
    deadline = time.monotonic() + 120
    while partial(store) in (None, before) and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def stopped(folder, signum, *victims):
    """Go on with a training, wait until it has saved something new, send some ranks a signal; return how each ended."""
    store = folder / "store"
    before = partial(store)
    processes = start(2, training(folder, "store", *OFTEN, "--resume"), folder, TORCHELASTIC_RUN_ID="test")
    saved_again(store, processes, before)
    for rank in victims:
        processes[rank].send_signal(signum)
    began = time.monotonic()
    done = ended(processes, timeout=60)
    assert time.monotonic() - began < 30
    assert list(Store(store).verify()) == []
    assert partial(store) not in (None, before)
    assert done[1].stderr == ""
    return done


@pytest.fixture(scope="module")
def uninterrupted(make_once):
    """The digest of a training by two processes that nothing disturbs."""

    def fill(folder):
        (folder / "small.yaml").write_text(RECIPE)
        first, _ = ended(start(2, training(folder, "store"), folder))
        assert first.returncode == 0, first.stderr
        (folder / "digest").write_text(first.stdout.strip())

    return (make_once("uninterrupted-ranks", fill) / "digest").read_text()


def test_stopped_in_every_way_and_resumed_one_digest(folder, uninterrupted):
    for victims in ((0, 1), (1,)):  # the signal reaches the group, or a follower only
        first, other = stopped(folder, signal.SIGTERM, *victims)
        assert (first.returncode, other.returncode) == (143, 143)
        (line,) = our_lines(first.stderr)
        assert re.search(r"interrupted; \w{12} is saved", line)

    first, other = stopped(folder, signal.SIGKILL, 1)
    assert (first.returncode, other.returncode) == (7, -signal.SIGKILL)
    (line,) = first.stderr.splitlines()
    assert "a process was killed" in line

    first, other = stopped(folder, signal.SIGKILL, 0)
    assert (first.returncode, other.returncode) == (-signal.SIGKILL, 7)
    assert first.stderr == ""

    first, _ = ended(start(2, training(folder, "store", "--resume"), folder))
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == uninterrupted


INTERRUPTED = """
import os, signal
from sdpctl.data.loader import ImageData
whole = ImageData.holdout
def holdout(self, batch_size):
    for batch in whole(self, batch_size):
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
ImageData.holdout = holdout
from sdpctl.cli import main
main()
"""


def test_stopped_while_all_validate_and_resumed_one_digest(folder, uninterrupted):
    words = training(folder, "store")[2:]
    first, other = ended(start(2, ["-c", INTERRUPTED, *words], folder, TORCHELASTIC_RUN_ID="test"))
    assert (first.returncode, other.returncode) == (143, 143)
    assert len(our_lines(first.stderr)) == 1
    first, _ = ended(start(2, training(folder, "store", "--resume"), folder))
    assert first.stdout.strip() == uninterrupted, first.stderr


def test_a_process_that_hangs_ends_all_after_a_signal(folder):
    """Each is a real process: what torch says of a lost connection depends on how torch was loaded."""
    processes = start(2, training(folder, "store", *OFTEN), folder, fresh=True, TORCHELASTIC_RUN_ID="test")
    saved_again(folder / "store", processes)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1)  # rank 0 waits for rank 1
    processes[0].send_signal(signal.SIGTERM)
    try:
        assert processes[0].wait(timeout=40) == 7
    finally:
        processes[1].send_signal(signal.SIGCONT)
    first, other = ended(processes)
    (line,) = first.stderr.splitlines()
    assert "rank 1 was killed or hangs; what was saved is kept" in line
    assert (other.returncode, other.stderr) == (7, "")
    assert list(Store(folder / "store").verify()) == []


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def test_no_process_outlives_torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *training(folder, "store", *OFTEN)]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr)
    saved_again(folder / "store", [process])
    left = children(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)
    assert len(our_lines((folder / "stderr").read_text())) == 1
    assert list(Store(folder / "store").verify()) == []


def test_torchrun_restarts_a_training(folder, uninterrupted):
    """Rank 1 is killed once; torchrun starts both anew, and they go on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += training(folder, "store", *OFTEN, "--resume")
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    saved_again(folder / "store", [process])
    os.kill(children(process)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.strip() == uninterrupted
    assert len(our_lines(stderr)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_end_with_the_table_of_one(folder):
    """The whole run on NCCL: one process finds the same accuracies again, up to a few images."""
    arguments = ["small.yaml", "--json", "--set", "train.sync_bn=true", "--set", "device=cuda"]
    first, _ = ranks(folder, "run", *arguments, "--store", "store", fresh=True)
    assert first.returncode == 0, first.stderr
    copied(folder / "store", folder / "one")
    alone = document(folder, "eval", "small", "--store", "one/store", "--force", "--set", "device=cuda:0")
    together = json.loads(first.stdout)["eval-instances"]
    for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="a machine with one GPU is needed")
def test_two_processes_on_one_gpu_are_refused(folder):
    first, other = ranks(folder, "train", "small.yaml", "--store", "store", "--set", "device=cuda", fresh=True)
    (line,) = our_lines(first.stderr)
    assert "2 processes need as many GPUs, and this machine has 1" in line
    assert (first.returncode, other.returncode) == (7, 7)
