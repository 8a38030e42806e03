"""Images that were resized once: the same batches as without a cache, whatever becomes of the file or of the process."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdpctl.data import cache as cache_module
from sdpctl.data.cache import Cache, Content, available_memory
from sdpctl.data.files import locate
from sdpctl.data.loader import ImageData, drawn_part, training_transforms
from sdpctl.data.pixels import Middle, resized
from sdpctl.data.settings import DataSettings
from sdpctl.errors import DataError, ResourceError
from sdpctl.randomness import derive

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def open_cached(photos, tmp_path):
    """Open the photographs, with a cache if one is named."""

    def open_(kind="none", *, scored_size=None, note=lambda _: None, root=photos, **chosen):
        usual = {"image_size": 8, "batch_size": 8, "workers": 0, "augment": "crop-flip"}
        settings = DataSettings(dataset="imagefolder", root=str(root), cache=kind, **(usual | chosen))
        folder = tmp_path / "cache" if kind == "disk" else None
        cache = None if kind == "none" else Cache(folder, "a fingerprint", note=note)
        located, device = locate("imagefolder", root), torch.device("cpu")
        return ImageData(settings, located, device, in_channels=3, seed=0, scored_size=scored_size, cache=cache)

    return open_


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def files(folder, suffix=".images"):
    return sorted((folder / "cache").glob(f"*{suffix}"))


KINDS = pytest.mark.parametrize("kind", ["ram", "disk"])


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
@pytest.mark.parametrize("scored_size", [None, 10])
def test_batches_are_those_without_a_cache(decoder, augment, workers, scored_size, kind, open_cached):
    keys = {"augment": augment, "decoder": decoder, "scored_size": scored_size, "workers": workers}
    plain, cached = (open_cached(which, **keys) for which in ("none", kind))
    for _ in range(2):
        assert same(cached.training(1), plain.training(1))
        assert same(cached.calibration(2), plain.calibration(2))
        assert same(cached.holdout(4), plain.holdout(4))
        assert same(cached.test(5), plain.test(5))


@KINDS
def test_distortions_are_those_without_a_cache(kind, open_cached):
    keys = {"auto_augment": "trivial", "random_erasing": 0.5}
    assert same(open_cached(kind, **keys).training(0), open_cached(**keys).training(0))


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_resized_crops_are_those_of_presized_images(workers, kind, open_cached):
    keys = {"augment": "resized-crop", "workers": workers}
    uncached, presized, cached = (
        open_cached(which, presize=presize, **keys) for which, presize in (("none", None), ("none", True), (kind, None))
    )
    assert same(cached.training(0), presized.training(0))
    assert not same(cached.training(0), uncached.training(0))
    assert same(cached.holdout(4), uncached.holdout(4))
    assert same(cached.test(5), uncached.test(5))
    assert same(open_cached(kind, presize=False, **keys).training(0), uncached.training(0))


def test_a_presized_crop_by_hand(open_cached, photos):
    """Resize(9) of the whole image, then RandomResizedCrop(8) of the result, drawn from (seed, epoch, index)."""
    data = open_cached(augment="resized-crop", presize=True)
    crop, _ = training_transforms("resized-crop", 8)
    paths = sorted((photos / "train").rglob("*.jpg"))
    keys = data._order("0")[:8]
    (x_NCHW, _), *_ = data.training(0)
    for (_, index), x_CHW in zip(keys, x_NCHW, strict=True):
        image_CHW = Middle(9, 8, "bilinear").of(paths[index], "RGB", "torchvision", whole=True)
        assert min(image_CHW.shape[1:]) == 9
        torch.default_generator.manual_seed(derive(0, "augment", "0", index))
        part_CHW = resized(image_CHW, drawn_part(crop, *image_CHW.shape[1:]), "bilinear")
        part_CHW = part_CHW.flip(2) if torch.rand(1) < 0.5 else part_CHW
        torch.testing.assert_close(data._training.normalise(part_CHW[None])[0], x_CHW)


def test_training_and_holdout_share_a_file_and_later_commands_decode_nothing(open_cached, tmp_path, monkeypatch):
    for augment in ("crop-flip", "resized-crop"):
        data = open_cached("disk", augment=augment)
        wanted = [list(batches) for batches in (data.training(0), data.holdout(4), data.test(4))]
        with monkeypatch.context() as patched:
            patched.setattr(Middle, "of", lambda *_, **__: pytest.fail("an image is decoded again"))
            again = open_cached("disk", augment=augment)
            found = [list(batches) for batches in (again.training(0), again.holdout(4), again.test(4))]
        assert all(map(same, found, wanted))
    assert len(files(tmp_path)) == 4
    assert files(tmp_path, ".partial") == []


@pytest.mark.parametrize(
    "changed",
    [{"decoder": "pil"}, {"image_size": 9}, {"interpolation": "bicubic"}, {"augment": "resized-crop"}, {"resize": 12}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_pixels_are_in_another_file(changed, open_cached, tmp_path):
    for keys in ({}, changed):
        assert same(open_cached("disk", **keys).test(4), open_cached(**keys).test(4))
    assert len(files(tmp_path)) == 2


def test_the_key_depends_on_everything():
    content = Content("a", "b", "RGB", "pil", 9, 8, "bilinear")
    others = ["c", "d", "L", "torchvision", 7, None, "bicubic"]
    fields = list(vars(content))
    keys = {content.key, *(Content(**{**vars(content), name: value}).key for name, value in zip(fields, others, strict=True))}
    assert len(keys) == 8


DAMAGES = {
    "ends early": lambda content: content[:-100],
    "empty": lambda _: b"",
    "pixels missing": lambda content: content[64:],
    "table changed": lambda content: content[:-70] + bytes([content[-70] ^ 1]) + content[-69:],
    "a different file": lambda content: b"x" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(damage, open_cached, tmp_path):
    wanted = list(open_cached("disk").test(4))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    notes = []
    assert same(open_cached("disk", note=notes.append).test(4), wanted)
    assert path.read_bytes() == whole
    assert all(note.startswith(f"{path}: this cache of images is damaged (") for note in notes)
    assert all(note.endswith("); it is made again") for note in notes)
    assert notes


def test_a_link_to_a_device_is_not_read(open_cached, tmp_path):
    list(open_cached("disk").test(4))
    (path,) = files(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    notes = []
    list(open_cached("disk", note=notes.append).test(4))
    assert path.is_file()
    assert not path.is_symlink()
    assert "not a regular file but a device" in notes[0]


def test_an_image_that_cannot_be_decoded_leaves_no_file(open_cached, tmp_path):
    root = tmp_path / "images"
    for part, count in (("train", 4), ("val", 1)):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((32, 32), 50).save(root / part / label / f"{i}.jpg")
    bad = root / "train" / "b" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])
    for workers in (0, 2):
        data = open_cached("disk", root=root, batch_size=2, workers=workers)
        with pytest.raises(DataError, match=r"2\.jpg: this image cannot be decoded \(image file is truncated"):
            next(data.training(0))
    assert files(tmp_path, "s") == files(tmp_path, "l") == []


def test_a_full_disk_is_an_error_and_leaves_no_file(open_cached, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(ResourceError) as caught:
        next(open_cached("disk").test(4))
    (lock,) = files(tmp_path, ".lock")
    path = lock.with_suffix(".images")
    assert str(caught.value) == (
        f"{path}: this cache of images cannot be written (No space left on device); set data.cache=none, or choose a different "
        "store with --store"
    )
    assert files(tmp_path) == files(tmp_path, ".partial") == []


def test_images_that_do_not_fit_into_memory_are_refused(open_cached, monkeypatch):
    monkeypatch.setattr(cache_module, "available_memory", lambda: 2000)
    with pytest.raises(ResourceError) as caught:
        next(open_cached("ram").test(4))
    assert str(caught.value) == (
        "data.cache=ram: 12 images of 8 px take at least 0.0 GiB, and 0.0 GiB of memory are available; set data.cache=disk or "
        "data.cache=none"
    )


def test_available_memory_is_what_the_kernel_says():
    free = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemFree" in line).split()[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total
    assert free > 0


SCRIPT = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import torch
    from sdpctl.data.cache import Cache, Content
    from sdpctl.data.pixels import Middle

    folder, images, gate = map(Path, sys.argv[1:])
    paths = sorted(images.rglob("*.jpg"))
    middle = Middle(9, 8, "bilinear")

    def load(path):
        while not gate.exists():
            time.sleep(0.02)
        return middle.of(path, "RGB", "torchvision")

    content = Content.of("f", [path.name for path in paths], "RGB", "torchvision", middle, whole=False)
    found = Cache(folder, "f", note=lambda text: print(text, flush=True)).resized(content, paths, load, 2)
    print(len(found), int(sum(image.sum(dtype=torch.int64) for image in found)))
""")


def start(folder, photos, gate):
    """Start a process that resizes the images once the file `gate` is there."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(photos / "train"), str(gate)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def waits_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_is_killed_leaves_a_cache_that_the_next_one_makes(photos, tmp_path):
    folder, gate = tmp_path / "cache", tmp_path / "gate"
    killed = start(folder, photos, gate)
    waits_for(lambda: list(folder.glob("*.partial")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(folder.glob("*.images")) == []
    gate.touch()
    done = start(folder, photos, gate)
    last = done.communicate(timeout=120)[0].splitlines()[-1]
    assert done.returncode == 0
    assert last.startswith("61 ")
    assert [path.suffix for path in sorted(folder.iterdir())] == [".images", ".lock"]


def test_of_two_processes_one_resizes_and_both_have_the_images(photos, tmp_path):
    folder, gate = tmp_path / "cache", tmp_path / "gate"
    first = start(folder, photos, gate)
    waits_for(lambda: list(folder.glob("*.partial")))
    second = start(folder, photos, gate)
    assert "waiting for a different process that resizes the same images" in second.stdout.readline()
    gate.touch()
    first_line, second_line = (process.communicate(timeout=120)[0] for process in (first, second))
    assert first_line == second_line
    assert first_line.startswith("61 ")


def test_the_memory_of_a_cache_is_shared_with_the_workers(open_cached):
    """The images are in one mapping, which forked processes inherit; none of them is copied."""
    data = open_cached("ram")
    next(data.training(0))
    images = data._training.stored()
    assert images is data._holdout.stored()
    assert images[0].data_ptr() == images.pixels.data_ptr()


def test_a_lock_that_is_released_ends_the_waiting(open_cached, tmp_path):
    list(open_cached("disk").test(4))
    (path,) = files(tmp_path)
    path.unlink()
    notes = []
    with path.with_suffix(".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        list(open_cached("disk", note=notes.append).test(4))
    assert len(notes) == 1
