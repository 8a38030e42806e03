import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpctl.errors import InstanceError
from sdpctl.instance import Instance, pareto_optimal
from sdpctl.models.registry import ARCHITECTURES, architecture

ratios = st.floats(min_value=1e-6, max_value=1, allow_nan=False)
point_names = st.sampled_from(architecture("resnet101").points())
module_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,20}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,20}){0,4}", fullmatch=True)
"""Names of modules in a network of any library; those of torchvision's regnets have a hyphen."""
instances = st.dictionaries(point_names, ratios).map(lambda choices: Instance(tuple(choices.items())))


@given(instances)
def test_text_reads_back_as_the_same_instance(instance):
    assert Instance.parse(str(instance)) == instance


@given(st.dictionaries(module_names, ratios, max_size=8))
def test_points_named_by_modules_of_any_kind_read_back(choices):
    instance = Instance(tuple(choices.items()))
    assert Instance.parse(str(instance)) == instance
    assert str(Instance.parse(str(instance))) == str(instance)


@given(st.dictionaries(point_names, ratios).flatmap(lambda d: st.tuples(st.just(d), st.permutations(list(d.items())))))
def test_order_of_writing_does_not_matter(case):
    choices, shuffled = case
    assert Instance(tuple(choices.items())) == Instance(tuple(shuffled))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("block1.block1-10@0.5+block1.block1-9@0.5", "block1.block1-9@0.5+block1.block1-10@0.5"),
        ("features.0-bn@1e-1", "features.0-bn@0.1"),
        ("10.conv@0.5+9.conv@0.5", "9.conv@0.5+10.conv@0.5"),
        ("layer2.3@0.5", "layer2.3@0.5"),
        ("layer3.2@0.5+layer1.0@0.75", "layer1.0@0.75+layer3.2@0.5"),
        ("layer3.10@0.5+layer3.2@0.5", "layer3.2@0.5+layer3.10@0.5"),
        ("layer1.0@0.5+maxpool@.75", "maxpool@0.75+layer1.0@0.5"),
        ("layer1.0@5e-1 + stem@0.5", "stem@0.5+layer1.0@0.5"),
        ("layer1.0@1", "full"),
        ("layer1.0@1.0+layer1.1@0.5", "layer1.1@0.5"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(Instance.parse(text)) == canonical


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_canonical_order_is_network_order(arch):
    points = architecture(arch).points()
    everything = Instance(tuple((point, 0.5) for point in reversed(points)))
    assert [point for point, _ in everything.choices] == list(points)


@pytest.mark.parametrize(
    "text", ["", "layer1.0", "@0.5", "layer1.0@", "layer1.0@x", "layer1.0@0", "layer1.0@1.5", "layer1.0@-1", "layer1.0@nan"]
)
def test_what_is_no_instance(text):
    with pytest.raises(InstanceError):
        Instance.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "layer\u00b2@0.5",
        "layer\u0663@0.5",
        "layer1.0@\u0660.\u0665",
        "layer1.0@0.5_0",
        f"layer{'1' * 5000}@0.5",
        f"layer1.0@0.{'1' * 5000}",
        "x" * 100_000,
        "+".join(f"layer1.{i}@0.5" for i in range(20_000)),
    ],
)
def test_hostile_text_is_no_instance_and_is_cut(text):
    with pytest.raises(InstanceError) as caught:
        Instance.parse(text)
    assert len(str(caught.value)) < 250


def test_a_point_given_twice():
    with pytest.raises(InstanceError, match=r"layer1\.0 is given twice"):
        Instance.parse("layer1.0@0.5+layer1.0@0.75")


def test_a_point_the_network_lacks():
    with pytest.raises(InstanceError, match=r"no point 'layer9\.0'; it has maxpool, layer1\.0"):
        Instance.parse("layer9.0@0.5").check(architecture("resnet18").points())


@given(st.dictionaries(instances, st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_optimal_is_what_nothing_beats(scored):
    def beaten(cost, score):
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in scored.values())

    assert pareto_optimal(scored) == {instance for instance, both in scored.items() if not beaten(*both)}


@pytest.mark.parametrize("point", ["a²", "layer" + "1" * 5000, "x" * 201])
def test_a_point_is_named_by_few_plain_letters_and_digits(point):
    with pytest.raises(InstanceError, match="is not an instance"):
        Instance.parse(f"{point}@0.5")


def test_an_endless_text_is_not_an_instance():
    with pytest.raises(InstanceError, match=r"is not an instance: it has 80,004 characters"):
        Instance.parse("full" + "+a@0.5xx" * 10_000)
