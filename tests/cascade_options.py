"""Cascades with figures that fit one another, and a network to choose cascades of."""

from itertools import accumulate

from sdpctl.cascade import Cascade
from sdpctl.export.description import CascadeOption

EASY = """
name: easy
model: {arch: resnet8, in_channels: 1}
data: {dataset: digits, image_size: 8, batch_size: 64, workers: 0}
sdpoint: {ratios: [0.5], points: [stem, layer1.0]}
train: {epochs: 1, lr: 0.1, validate: {every: 0}}
calibrate: {batches: 8}
"""
"""A recipe whose network is trained, and whose cascade is chosen, in seconds."""


def cascade_option(text, member_macs, full_macs, *, left=None, heldout_left=None, top1=50.0, heldout_top1=51.0):
    """Return a cascade whose mean MACs are those that its shares give; by default every image reaches the last member."""
    left = left or (0.0,) * (len(member_macs) - 1) + (100.0,)
    heldout_left = heldout_left or left
    spent = list(accumulate(member_macs))
    mean, heldout = (
        round(sum(share / 100 * macs for share, macs in zip(shares, spent, strict=True))) for shares in (left, heldout_left)
    )
    return CascadeOption(
        cascade=Cascade.parse(text),
        macs=mean,
        relative=mean / full_macs,
        worst_macs=spent[-1],
        member_macs=tuple(member_macs),
        left=left,
        top1=top1,
        loss=0.5,
        heldout_top1=heldout_top1,
        heldout_macs=heldout,
        heldout_left=heldout_left,
    )
