"""Images that were resized once: `data.cache`.

A cache is a file: the pixels of all images (H, W, C), a table of their heights and widths, and a trailer with the number of
images, the size of the pixels and the hash of the table. It is written under a different name while a lock is held, and renamed
when it is whole. So a reader sees a whole file or none, and of several processes one writes. The kernel releases the lock of a
process that dies; the next process begins again. With `cache: ram`, the file is in anonymous memory.

Suffixes of tensor names: N images, C channels, H height, W width.
"""

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdpctl.data.pixels import Middle
from sdpctl.data.workers import Loader, received, slot_size
from sdpctl.errors import DataError, ResourceError
from sdpctl.untrusted import open_regular

_MAGIC = b"sdpctl images 1\n"
_TRAILER = struct.Struct("<16sQQ32s")  # magic, number of images, bytes of the pixels, SHA-256 of the table
_AT_A_TIME = 64
"""Number of images that a worker resizes at a time."""


@dataclass(frozen=True)
class Content:
    """What a cache holds: everything that its pixels depend on.

    Args:
        fingerprint: fingerprint of the data set.
        images: hash of the names of the images.
        mode: `RGB` or `L`.
        decoder: decoder of the files.
        side: the shorter side of an image, in pixels.
        size: height and width of the central part, in pixels; None if the whole image is kept.
        interpolation: interpolation of resizing.
    """

    fingerprint: str
    images: str
    mode: str
    decoder: str
    side: int
    size: int | None
    interpolation: str

    @classmethod
    def of(cls, fingerprint: str, names: Sequence[str], mode: str, decoder: str, middle: Middle, *, whole: bool) -> "Content":
        """Return the content of a cache.

        Args:
            fingerprint: fingerprint of the data set.
            names: names of the images, relative to the data set's folder.
            mode: `RGB` or `L`.
            decoder: decoder of the files.
            middle: how the images are resized.
            whole: whether whole images are kept.
        """
        images = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
        size = None if whole else middle.size
        return cls(fingerprint, images, mode, decoder, middle.side, size, middle.interpolation)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return 3 if self.mode == "RGB" else 1

    @property
    def key(self) -> str:
        """The name of the file, without its suffix."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Resized(Sequence[Tensor]):
    """The images of a cache, as uint8 tensors (C, H, W) that share its memory.

    Args:
        memory: the content of the file.
        channels: number of channels.
        count: number of images.

    Raises:
        ValueError: if the content is not a whole cache of this many images.
    """

    def __init__(self, memory: mmap, channels: int, count: int) -> None:
        if len(memory) < _TRAILER.size:
            raise ValueError("it ends early")
        magic, found, size, digest = _TRAILER.unpack(memory[-_TRAILER.size :])
        if magic != _MAGIC or found != count or len(memory) != size + 8 * count + _TRAILER.size:
            raise ValueError("its length does not match its trailer")
        table = memory[size : size + 8 * count]
        if hashlib.sha256(table).digest() != digest:
            raise ValueError("its table does not match its hash")
        self.sizes_N2 = torch.frombuffer(bytearray(table), dtype=torch.int32).view(-1, 2).to(torch.int64)
        ends_N = (self.sizes_N2.prod(1) * channels).cumsum(0)
        if int(self.sizes_N2.min()) < 1 or int(ends_N[-1]) != size:
            raise ValueError("its table does not match its pixels")
        self.starts = [0, *ends_N.tolist()]
        self.channels = channels
        self.pixels = torch.frombuffer(memory, dtype=torch.uint8, count=size)

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, index: Any) -> Any:
        height, width = self.sizes_N2[index].tolist()
        return self.pixels[self.starts[index] : self.starts[index + 1]].view(height, width, self.channels).permute(2, 0, 1)


class _Work(Dataset[object]):
    """Resizes image files, a few at a time.

    Args:
        images: paths of the files.
        load: returns a resized image, uint8 (C, H, W).
    """

    def __init__(self, images: Sequence[Path], load: Callable[[Path], Tensor]) -> None:
        self.images, self.load = images, load

    def __getitem__(self, index: int) -> object:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | DataError:
        """Return the pixels one after the other, and the heights and widths; or the error that the caller must raise."""
        try:
            images = [self.load(self.images[index]) for index in indices]
        except DataError as error:
            return error
        flat = torch.cat([image_CHW.permute(1, 2, 0).reshape(-1) for image_CHW in images])
        return flat, torch.tensor([image_CHW.shape[1:] for image_CHW in images], dtype=torch.int32)


@dataclass(frozen=True)
class Cache:
    """Where resized images are kept.

    Args:
        folder: folder of the files; None for memory.
        fingerprint: fingerprint of the data set.
        watch: takes batches of resized images and the number of all batches; yields the batches and shows the progress.
        note: tells the user something.
    """

    folder: Path | None
    fingerprint: str
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, _: batches
    note: Callable[[str], None] = lambda _: None

    @property
    def plain(self) -> dict[str, str | None]:
        """The folder and the fingerprint as plain data, from which `of` makes the same cache in a different process."""
        return {"folder": None if self.folder is None else str(self.folder.absolute()), "fingerprint": self.fingerprint}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Cache":
        """Return the cache that `plain` describes."""
        return cls(None if plain["folder"] is None else Path(plain["folder"]), plain["fingerprint"])

    def resized(self, content: Content, images: Sequence[Path], load: Callable[[Path], Tensor], processes: int) -> Resized:
        """Return resized images; resize them now if no earlier command did.

        Args:
            content: what the cache holds.
            images: paths of the files.
            load: returns a resized image, uint8 (C, H, W).
            processes: number of worker processes.

        Raises:
            DataError: if an image cannot be decoded.
            ResourceError: if the file cannot be written, or memory is short.
        """
        if self.folder is None:
            _check_memory(content, len(images))
            with os.fdopen(os.memfd_create("sdpctl"), "w+b") as file:
                self._write(file, content, images, load, processes)
                return _opened(file, content, len(images))
        path = self.folder / f"{content.key}.images"
        if (found := self._found(path, content, len(images))) is not None:
            return found
        with _writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path.with_suffix(".lock")):
                if (found := self._found(path, content, len(images))) is not None:
                    return found
                partial = path.with_suffix(".partial")
                try:
                    with partial.open("w+b") as file:
                        self._write(file, content, images, load, processes)
                        file.flush()
                        os.fsync(file.fileno())
                        resized = _opened(file, content, len(images))
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                return resized

    def _found(self, path: Path, content: Content, count: int) -> Resized | None:
        """Return the images of an existing file; None if there is none, or if it is damaged, which the user is told."""
        try:
            with open_regular(path) as file:
                return _opened(file, content, count)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            self.note(f"{path}: this cache of images is damaged ({reason}); it is made again")
            return None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold a lock; wait for a different process that holds it."""
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.note(f"{path}: waiting for a different process that resizes the same images")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(
        self, file: BinaryIO, content: Content, images: Sequence[Path], load: Callable[[Path], Tensor], processes: int
    ) -> None:
        keys = [list(range(i, min(i + _AT_A_TIME, len(images)))) for i in range(0, len(images), _AT_A_TIME)]
        channels, long = content.channels, content.size or 2 * content.side
        size = slot_size(_AT_A_TIME * channels * long * (content.size or content.side), 8 * _AT_A_TIME)
        loader = Loader(_Work(images, load), workers=processes, batches=keys, size=size)
        digest, table, pixels = hashlib.sha256(), [], 0
        for fetched in self.watch(received(loader), len(keys)):
            if isinstance(fetched, DataError):
                raise fetched
            flat, sizes_N2 = fetched
            pixels += file.write(flat.numpy())
            table.append(sizes_N2.numpy().tobytes())
            digest.update(table[-1])
        file.write(b"".join(table))
        file.write(_TRAILER.pack(_MAGIC, len(images), pixels, digest.digest()))
        file.flush()


def _opened(file: BinaryIO, content: Content, count: int) -> Resized:
    return Resized(mmap(file.fileno(), 0, access=ACCESS_COPY), content.channels, count)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a `ResourceError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: this cache of images cannot be written ({error.strerror}); set data.cache=none, or choose a different "
            "store with --store"
        ) from error


def _check_memory(content: Content, count: int) -> None:
    """Refuse a cache that needs more memory than is available.

    Raises:
        ResourceError: if it needs more; the message says what to set.
    """
    least = count * content.channels * (content.size or content.side) ** 2
    if least > (available := available_memory()):
        raise ResourceError(
            f"data.cache=ram: {count:,} images of {content.size or content.side} px take at least {least / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB of memory are available; set data.cache=disk or data.cache=none"
        )


def available_memory() -> int:
    """Return the memory that this process may still use, in bytes: of the machine, or less if a control group limits it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    of_machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except FileNotFoundError:
        return of_machine
    return of_machine if most == "max" else min(of_machine, int(most) - int(used))
