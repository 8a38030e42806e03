"""PreResNet (He et al. 2016, "Identity mappings"): batch norm and ReLU come before each convolution.

Parameters are named as in the public SDPoint code, so that its checkpoints load; a block's point acts on the sum.
"""

from torch import Tensor, nn

from sdpctl.models.chain import Norm, average_shrink
from sdpctl.models.resnet import Block, ResNet


class PreBlock(Block):
    """A block whose shortcut, if it has a convolution, takes the output of the first batch norm and ReLU."""

    @staticmethod
    def normalised_channels(layer: nn.Conv2d) -> int:
        """Return the number of channels of a convolution's batch norm, which precedes the convolution."""
        return layer.in_channels

    def body(self, x_NCHW: Tensor, norm: Norm) -> Tensor:
        """Return the sum of shortcut and residual branch."""
        out, shortcut = x_NCHW, x_NCHW
        for i in range(1, self.depth + 1):
            activated = norm(self.bn(i), out, own=i > 1, relu=True)
            if i == 1 and self.downsample is not None:
                shortcut = self.shortcut(activated, norm)
            out = self.get_submodule(f"conv{i}")(activated)
        return out.add_(shortcut)

    def shrink(self, x_NCHW: Tensor, ratio: float) -> Tensor:
        """Shrink the sum."""
        return average_shrink(x_NCHW, ratio)


class PreResNet(ResNet):
    """A pre-activation ResNet: the head has its own batch norm, `bn2`."""

    block = PreBlock
    head_modules = ("bn2", "fc")

    def add_head(self, channels: int, num_classes: int) -> None:
        """Add the modules of the head."""
        self.bn2 = nn.BatchNorm2d(channels)
        super().add_head(channels, num_classes)

    def head(self, x_NCHW: Tensor, norm: Norm) -> Tensor:
        """Return logits, (N, K)."""
        return super().head(norm(self.bn2, x_NCHW, relu=True), norm)
