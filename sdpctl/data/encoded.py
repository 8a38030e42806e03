"""JPEGs that are decoded on the device: the decoder `nvjpeg`.

Worker processes read files and draw the parts; the device decodes, resizes, turns and flips. Images that are not JPEGs, and
images that the device refuses, are decoded on the CPU as with the decoder `torchvision`. If the device is a CPU, torchvision.io
decodes in place of nvJPEG.

Suffixes of tensor names: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sdpctl.data.catalog import Interpolation
from sdpctl.data.pixels import MODES, Jpeg, Part, Turn, Wanted, central, resized


@dataclass(frozen=True)
class Task:
    """What the device has to do for an image.

    Args:
        content: the bytes of a JPEG, uint8; or the pixels of an image (C, H, W) that is ready.
        wanted: what is needed of the stored image.
        turn: how the part becomes upright, or flipped.
    """

    content: Tensor
    wanted: Wanted | None = None
    turn: Turn | None = None

    @classmethod
    def of(cls, jpeg: Jpeg, wanted: Wanted, *, flip: bool) -> "Task":
        """Return the task for a JPEG.

        Args:
            jpeg: the file.
            wanted: what is needed of the upright image.
            flip: whether the part is flipped from left to right.
        """
        turn = jpeg.turn._replace(columns=jpeg.turn.columns != flip)
        return cls(jpeg.content, jpeg.turn.undone(wanted, jpeg.height, jpeg.width), turn)


def packed(tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Return the contents of tasks one after the other, uint8, and a table of integers with a row for each task."""
    rows = []
    for task in tasks:
        wanted = (0,) * 6 if task.wanted is None else (*task.wanted.part, task.wanted.height, task.wanted.width)
        rows.append((task.content.numel(), *wanted, *(task.turn or (0, 0, 0))))
    return torch.cat([task.content.reshape(-1) for task in tasks]), torch.tensor(rows)


def finished(
    content: Tensor,
    table: Tensor,
    *,
    mode: str,
    size: int,
    interpolation: Interpolation,
    device: torch.device,
    again: Callable[[int], Tensor],
) -> Tensor:
    """Do the tasks of a batch.

    Args:
        content: contents of the tasks, on the CPU.
        table: their table.
        mode: `RGB` or `L`.
        size: height and width of an image, in pixels; of larger images the central part is taken.
        interpolation: interpolation of resizing.
        device: the device that decodes, and that the images are on.
        again: returns the image of a task that the device refuses, uint8 (C, H, W) on the CPU.

    Returns:
        uint8 (N, C, H, W) in channels_last.
    """
    rows = table.tolist()
    ends = list(accumulate(row[0] for row in rows))
    contents = [content[end - row[0] : end] for end, row in zip(ends, rows, strict=True)]
    jpegs = [i for i, row in enumerate(rows) if row[5]]
    decoded = dict(zip(jpegs, _decoded([contents[i].clone() for i in jpegs], mode, device), strict=True))
    channels = 3 if mode == "RGB" else 1
    shape_NCHW = (len(rows), channels, size, size)
    batch_NCHW = torch.empty(shape_NCHW, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    for i, (_, *part, height, width, exchanged, vertical, horizontal) in enumerate(rows):
        if i not in decoded:
            batch_NCHW[i] = contents[i].view(channels, size, size)
        elif (image_CHW := decoded[i]) is None:
            batch_NCHW[i] = again(i)
        else:
            image_CHW = resized(image_CHW, Wanted(Part(*part), height, width), interpolation)
            turn = Turn(bool(exchanged), bool(vertical), bool(horizontal))
            batch_NCHW[i] = central(turn.applied(image_CHW), size)
    return batch_NCHW


def _decoded(contents: list[Tensor], mode: str, device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs on a device; None for those that the device refuses."""
    try:
        return list(_decode(contents, mode, device)) if contents else []
    except RuntimeError:
        return [_alone(content, mode, device) for content in contents]


def _alone(content: Tensor, mode: str, device: torch.device) -> Tensor | None:
    try:
        return _decode([content], mode, device)[0]
    except RuntimeError:
        return None


def _decode(contents: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        decoded: list[Tensor] = torch.ops.image.decode_jpegs_cuda(contents, MODES[mode], device)
        return decoded
    return [torch.ops.image.decode_jpeg(content, MODES[mode], False) for content in contents]
