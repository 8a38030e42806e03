"""Compiled training: each segment of a chain is a graph of its own, so that an instance needs no graph of its own.

A segment has two functions: its body with its shrink at ratio 1, and its body alone, for steps whose instance shrinks there. If
a shrink pools at ratio 1, the body alone is compiled: torch's own kernels of pooling are faster than compiled ones. A function
has a graph for each size of map, or one graph whose height and width are symbols. Graphs for one size are faster; 35 instances
of ResNet-50 have some forty of them. Segments of equal structure share their graphs.
"""

import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sdpctl.engine.settings import Compile
from sdpctl.engine.together import Link, Together
from sdpctl.errors import ModelError, ResourceError
from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Segment
from sdpctl.models.state import State, tensors

MOST_GRAPHS = 1024
"""Maximum number of graphs of a network. Torch would otherwise refuse the ninth graph of one function."""

PAYS = 10**17
"""MACs of a training from which compiling pays on a GPU: it takes minutes, and saves a quarter of the time."""

_CONFIG: dict[str, Any] = {
    "recompile_limit": MOST_GRAPHS,
    "accumulated_recompile_limit": MOST_GRAPHS,
    "specialize_int": True,  # only the sizes of maps are symbols
}


def compiles(choice: Compile, model: Chain, device: torch.device, macs: int, *, synchronises: bool = False) -> bool:
    """Return whether the segments of a network are compiled: with `auto`, on a GPU, if it pays.

    Args:
        choice: the key `train.compile`.
        model: the network.
        device: where it trains.
        macs: MACs of all forward passes of the training.
        synchronises: whether batch norms exchange statistics with other processes, in the middle of a segment.

    Raises:
        ModelError: if the network must be compiled and cannot be.
        ResourceError: if the network must be compiled, and this machine has no compiler for the device.
    """
    if choice == "auto":
        able = model.repeats and not synchronises and _lacking(device) is None
        return device.type == "cuda" and macs >= PAYS and able
    if choice and synchronises:
        raise ModelError("train.compile=true excludes train.sync_bn=true under torchrun; set one of them to false")
    if choice and not model.repeats:
        raise ModelError(
            "this network draws a different structure for each step and cannot be compiled; set train.compile=false"
        )
    if choice and (lacking := _lacking(device)) is not None:
        raise ResourceError(f"train.compile=true needs {lacking}, which is not here; install it, or set train.compile=false")
    return choice


def _lacking(device: torch.device) -> str | None:
    """Return the compiler that is missing for a device."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler})"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton"
    return None


class Compiled(Together):
    """The forward pass of a training step with compiled segments.

    Args:
        model: the chain; it is not changed.
        dynamic: whether one graph takes maps of all sizes, for instances with many points below 1, whose maps have many sizes.
    """

    def __init__(self, model: Chain, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        logging.getLogger("torch").setLevel(logging.ERROR)  # torch's compiler logs what concerns its authors alone
        self.graphs = 0
        """Number of graphs that were compiled so far."""
        super().__init__(model)

    def whole_of(self, segment: Segment) -> Link:
        """Return a segment's body with its shrink at ratio 1, compiled."""
        return self._compiled(super().whole_of(segment))

    def body_of(self, segment: Segment) -> Link:
        """Return a segment's body, compiled."""
        return self._compiled(super().body_of(segment))

    def _compiled(self, link: Link) -> Link:
        return torch.compile(link, backend=self._compile, fullgraph=True, dynamic=None if self.dynamic else False)

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
        return compiled

    def entered(self, state: State) -> None:
        """Make height and width symbols if one graph takes maps of all sizes."""
        for x in tensors(state) if self.dynamic else ():
            for side in range(2, x.dim()):
                torch._dynamo.maybe_mark_dynamic(x, side)

    def __call__(self, x_NCHW: Tensor, instances: Sequence[Instance]) -> tuple[Tensor, ...]:
        """Run instances as in training; see `Together`."""
        with torch._dynamo.config.patch(_CONFIG):
            return super().__call__(x_NCHW, instances)
