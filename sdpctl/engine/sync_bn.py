"""Batch norms over the whole batch of several ranks, on any device; torch's `SyncBatchNorm` runs on GPUs only.

Names of tensors: N images of this rank, C channels, H height, W width, R ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdpctl.engine.distributed import Ranks
from sdpctl.models.chain import WHOLE, Norm, Part, affine, batch_norm, finished

_PIXELS = (0, 2, 3)


class _Normalise(torch.autograd.Function):
    """Normalise a map by the mean and the variance of all ranks' maps together.

    The variance is merged from those of the ranks (Chan et al. 1979), which loses no digits as a sum of squares would.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide_NCHW = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        count = wide_NCHW.numel() // wide_NCHW.shape[1]
        var_C, mean_C = torch.var_mean(wide_NCHW, _PIXELS, correction=0)
        counts = torch.full_like(mean_C[:1], count)
        gathered = torch.stack(ranks.gathered(torch.cat([counts, mean_C, var_C])))
        counts_R1 = gathered[:, :1]
        mean_RC, var_RC = gathered[:, 1:].chunk(2, dim=1)
        total = counts_R1.sum()
        mean_C = (counts_R1 * mean_RC).sum(0) / total
        var_C = (counts_R1 * (var_RC + (mean_RC - mean_C).square())).sum(0) / total
        scale_C = (var_C + eps).rsqrt()
        ctx.ranks, ctx.has = ranks, (weight_C is not None, bias_C is not None)
        ctx.save_for_backward(x_NCHW, weight_C, mean_C, scale_C, total)
        factor_C = scale_C if weight_C is None else scale_C * weight_C
        shift_C = -mean_C * factor_C if bias_C is None else bias_C - mean_C * factor_C
        out_NCHW = torch.addcmul(_over(shift_C), wide_NCHW, _over(factor_C)).to(x_NCHW.dtype)
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return out_NCHW, mean_C, var_C, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad_NCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C, mean_C, scale_C, total = ctx.saved_tensors
        grad_NCHW = out_grad_NCHW.to(mean_C.dtype)
        normal_NCHW = (x_NCHW.to(mean_C.dtype) - _over(mean_C)) * _over(scale_C)
        own = torch.cat([grad_NCHW.sum(_PIXELS), (grad_NCHW * normal_NCHW).sum(_PIXELS)])
        bias_grad_C, weight_grad_C = own.clone().chunk(2)
        ctx.ranks.add_up(own)
        sum_C, product_C = (own / total).chunk(2)
        factor_C = scale_C if weight_C is None else scale_C * weight_C
        x_grad_NCHW = (grad_NCHW - _over(sum_C) - normal_NCHW * _over(product_C)) * _over(factor_C)
        has_weight, has_bias = ctx.has
        return (
            x_grad_NCHW.to(x_NCHW.dtype),
            weight_grad_C if has_weight else None,
            bias_grad_C if has_bias else None,
            None,
            None,
        )


def _over(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def synchronised(ranks: Ranks) -> Norm:
    """Return the norm of a training step that normalises by the whole batch of all ranks.

    The result, its gradients and the running statistics are those of `nn.BatchNorm2d` on the whole batch; the ranks may have
    parts of different sizes. Each norm takes one exchange in the forward pass and one in the backward pass.
    """

    def norm(
        bn: nn.BatchNorm2d,
        x_NCHW: Tensor,
        part: Part = WHOLE,
        *,
        own: bool = False,
        plus: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        if not bn.training:
            return batch_norm(bn, x_NCHW, part, own=own, plus=plus, relu=relu)
        out_NCHW: Tensor
        out_NCHW, mean_C, var_C, total = _Normalise.apply(x_NCHW, *affine(bn, part), bn.eps, ranks)
        if bn.running_mean is not None and bn.running_var is not None:
            whole = isinstance(part, slice) and part == WHOLE
            if whole and bn.num_batches_tracked is not None:  # as the module counts its own calls
                bn.num_batches_tracked.add_(1)
            momentum = bn.momentum
            if momentum is None:
                assert bn.num_batches_tracked is not None
                momentum = 1 / float(bn.num_batches_tracked)
            with torch.no_grad():
                bn.running_mean[part] = bn.running_mean[part].lerp(mean_C, momentum)
                bn.running_var[part] = bn.running_var[part].lerp(var_C * total / (total - 1), momentum)
        return finished(out_NCHW, plus, relu)

    return norm
