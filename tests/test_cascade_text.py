import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpctl.cascade import Branch, Cascade, is_cascade
from sdpctl.errors import InstanceError
from sdpctl.instance import Instance
from sdpctl.models.registry import architecture

POINTS = architecture("resnet20").points()
ratios = st.floats(min_value=1e-6, max_value=1, allow_nan=False)
instances = st.dictionaries(st.sampled_from(POINTS), ratios, max_size=4).map(lambda choices: Instance(tuple(choices.items())))
probabilities = st.floats(min_value=1e-9, max_value=1, allow_nan=False)
temperatures = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)


@st.composite
def cascades(draw):
    members = tuple(draw(st.lists(instances, min_size=2, max_size=5, unique=True)))
    thresholds = tuple(draw(probabilities) for _ in members[1:])
    return Cascade(members, thresholds, tuple(draw(temperatures) for _ in members), draw(st.booleans()))


@given(cascades())
def test_text_reads_back_as_the_same_cascade(cascade):
    assert Cascade.parse(str(cascade)) == cascade
    assert is_cascade(str(cascade))
    assert not any(is_cascade(str(member)) for member in cascade.members)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("stem@0.5:0.9/full", "stem@0.5:0.9/full"),
        (" stem@.5:.9 / full~1.0 ", "stem@0.5:0.9/full"),
        ("stem@0.50~1.0:0.90/full~1.25", "stem@0.5:0.9/full~1.25"),
        ("mean/layer2.0@0.5+layer1.0@0.75:9e-1/full", "mean/layer1.0@0.75+layer2.0@0.5:0.9/full"),
        ("stem@0.5:1/layer1.0@0.5~2:0.25/full", "stem@0.5:1.0/layer1.0@0.5~2.0:0.25/full"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(Cascade.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("full", "a cascade has 2 to 16 members, got 1"),
        ("stem@0.5/full", "write each member except the last with its threshold"),
        ("stem@0.5:0.9/full:0.5", "write each member except the last with its threshold"),
        ("stem@0.5:0.9", "write each member except the last"),
        ("", "is not a cascade"),
        ("stem@0.5:0.9/", "is not a cascade"),
        ("stem@0.5:0/full", "a threshold is a probability above 0"),
        ("stem@0.5:1.5/full", "a threshold is a probability above 0"),
        ("stem@0.5~0:0.5/full", "a temperature is a number above 0"),
        ("stem@0.5:1-1/full", "are numbers"),
        ("stem@0.5~1e999:0.9/full", "a temperature is a number above 0"),
        ("full:0.9/full", "occurs once"),
        ("stem@2:0.9/full", "a ratio must be above 0"),
        ("/".join(["full:0.5"] + [f"stem@0.{i}:0.5" for i in range(10, 26)] + ["stem@0.5"]), "2 to 16 members"),
    ],
)
def test_other_texts_are_refused_with_what_to_write(text, reason):
    with pytest.raises(InstanceError, match=reason):
        Cascade.parse(text)


def test_a_member_continues_from_the_longest_prefix_that_an_earlier_member_shares():
    cascade = Cascade.parse("layer1.1@0.5:0.9/layer2.1@0.5:0.9/layer2.1@0.75:0.9/stem@0.5:0.9/full")
    assert cascade.branches(POINTS) == (
        Branch(0, "layer1.1"),
        Branch(1, "layer2.1"),
        Branch(0, "stem"),
        Branch(1, "layer2.1"),
    )


def test_points_that_the_network_lacks_and_members_that_are_one_network_are_refused():
    with pytest.raises(InstanceError, match=r"no point 'layer9\.0'"):
        Cascade.parse("layer9.0@0.5:0.9/full").check(POINTS)
    everything = "+".join(f"{point}@0.5" for point in POINTS)
    with pytest.raises(InstanceError, match="are the same network"):
        Cascade.parse(f"all@0.5:0.9/{everything}").check(POINTS)
