"""The forward pass of a training step: one instance, or several instances whose common prefix runs once.

Two instances of one batch are the same network up to the first point at which their ratios differ, batch norms in training mode
included. The part before is computed once, and its maps are kept once for the backward pass, which adds up the gradients of all
instances. What a network draws at random in the shared part, such as dropout, is shared too. Each segment runs for all
instances before the next segment does. Each instance normalises its maps by the mean and the variance of these maps, and each
run of a batch norm updates the running statistics.

Names of tensors: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sdpctl.instance import Instance
from sdpctl.models.chain import Chain, Norm, Segment, batch_norm
from sdpctl.models.state import State, copied

Link = Callable[[State], State]


class Together:
    """The forward pass of one or several instances of a chain on one batch, with gradients.

    Args:
        model: the chain.
        norm: how each batch norm is applied.
    """

    def __init__(self, model: Chain, norm: Norm = batch_norm) -> None:
        self.model, self.norm = model, norm
        self.whole: list[Link] = [self.whole_of(segment) for segment in model.segments()]
        """Each segment's body with its shrink at ratio 1."""
        self.bodies: list[Link] = [self.body_of(segment) for segment in model.segments()]

    def whole_of(self, segment: Segment) -> Link:
        """Return a segment's body with its shrink at ratio 1."""
        norm = self.norm

        def passed(state: State) -> State:
            out = segment.body(state, norm)
            return out if segment.shrink is None else segment.shrink(out, 1.0)

        return passed

    def body_of(self, segment: Segment) -> Link:
        """Return a segment's body."""
        norm = self.norm

        def passed(state: State) -> State:
            return segment.body(state, norm)

        return passed

    def entered(self, state: State) -> None:
        """Prepare a state that a segment is about to take."""

    def __call__(self, x_NCHW: Tensor, instances: Sequence[Instance]) -> tuple[Tensor, ...]:
        """Run instances as in training.

        Args:
            x_NCHW: normalised images.
            instances: different instances of the chain's points.

        Returns:
            The logits of each instance, (N, K).
        """
        groups: list[tuple[State, list[Instance]]] = [(self.model.begun(x_NCHW), list(instances))]
        for segment, whole, body in zip(self.model.segments(), self.whole, self.bodies, strict=True):
            passed: list[tuple[State, list[Instance]]] = []
            for state, members in groups:
                self.entered(state)
                passed += _passed(segment, state, _by_ratio(segment, members), whole, body)
            groups = passed
        logits = {instance: state for state, members in groups for instance in members}
        return tuple(logits[instance] for instance in instances)


def _by_ratio(segment: Segment, members: Sequence[Instance]) -> dict[float, list[Instance]]:
    """Return the instances by their ratio at a segment, the smallest first."""
    found: dict[float, list[Instance]] = {}
    for member in members:
        found.setdefault(1.0 if segment.point is None else member.ratio(segment.point), []).append(member)
    return dict(sorted(found.items()))


def _passed(
    segment: Segment, state: State, by_ratio: dict[float, list[Instance]], whole: Link, body: Link
) -> list[tuple[State, list[Instance]]]:
    """Pass a state through a segment, and shrink the result by each ratio."""
    if list(by_ratio) == [1.0] and not segment.pools:
        return [(whole(state), by_ratio[1.0])]
    out = body(state)
    assert segment.shrink is not None  # without a point every ratio is 1
    *others, last = by_ratio
    # A shrink may modify its input in place if no pixel is pooled, and pooling keeps its input for the backward pass.
    shrunk = [(segment.shrink(copied(out), ratio), by_ratio[ratio]) for ratio in others]
    return [*shrunk, (segment.shrink(out, last), by_ratio[last])]
