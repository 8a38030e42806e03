"""Maps of traced networks never shrink below what the rest of the network can take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpctl.instance import Instance
from sdpctl.models import create_model
from sdpctl.models.chain import average_shrink
from sdpctl.models.registry import architecture
from sdpctl.models.traced import traced

NETWORKS = ("timm/test_convnext", "torchvision/squeezenet1_1", "torchvision/alexnet", "torchvision/resnet18")


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    with torch.device("meta"):
        return create_model(request.param).to("meta").eval()


def test_every_instance_runs(network):
    points = network.points

    @settings(deadline=None, max_examples=25, database=None)
    @given(st.lists(st.floats(1e-3, 1), min_size=len(points), max_size=len(points)), st.integers(64, 100), st.integers(64, 100))
    def check(ratios, height, width):
        instance = Instance(tuple(zip(points, ratios, strict=True)))
        assert network(torch.empty(2, 3, height, width, device="meta"), instance).shape == (2, 1000)

    check()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_least_map_is_the_smallest_that_works(name):
    with torch.device("meta"):
        network = create_model(name).to("meta").eval()
    pieces, segments = traced(architecture(name)).pieces, network.segments()
    state, found = torch.empty(1, 3, 96, 96, device="meta"), []
    for number, segment in enumerate(segments[:-1]):
        state = segment.body(state, lambda bn, x_NCHW, **_: bn(x_NCHW))

        def works(side, channels=state.shape[1], rest=segments[number + 1 :]):
            try:
                out = torch.empty(1, channels, side, side, device="meta")
                for later in rest:
                    out = later.body(out, lambda bn, x_NCHW, **_: bn(x_NCHW))
            except RuntimeError:
                return False
            return out.shape == (1, 1000)

        if segment.point is not None:
            assert works(pieces[number].least)
            assert not any(works(side) for side in range(1, pieces[number].least))
            found.append(pieces[number].least)
    assert len(found) == len(network.points)


def test_a_side_stops_at_the_least(double):
    x_NCHW = torch.randn(1, 2, 9, 4)
    assert average_shrink(x_NCHW, 0.5, 3).shape[2:] == (4, 3)
    assert average_shrink(x_NCHW, 0.1, 3).shape[2:] == (3, 3)
    assert average_shrink(x_NCHW, 0.1, 6).shape[2:] == (6, 4)
    assert average_shrink(x_NCHW, 0.9, 9) is x_NCHW
