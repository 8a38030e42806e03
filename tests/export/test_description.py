"""Cascades in a description: they come back as they were written, and figures that cannot be are named."""

import copy
import json
import re

import pytest
from cascade_options import cascade_option

from sdpctl.export.description import Description, Input, Option
from sdpctl.instance import Instance
from sdpctl.models.registry import architecture
from sdpctl.models.settings import ModelSettings

MACS = {"stem@0.5": 1000, "layer2.0@0.5": 1600, "layer3.1@0.75": 3900, "full": 4000}


CASCADES = (
    cascade_option(
        "stem@0.5~1.25:0.75/layer2.0@0.5", (1000, 900), 4000, left=(75.0, 25.0), heldout_left=(80.0, 20.0), top1=80.0
    ),
    cascade_option("mean/stem@0.5:0.9/layer3.1@0.75:0.5/full~0.5", (1000, 3500, 100), 4000, left=(60.0, 30.5, 9.5)),
)


def description(cascades=CASCADES, heldout_images=40):
    return Description(
        name="net",
        network=ModelSettings(arch="resnet20", num_classes=2, in_channels=1, stem="small"),
        input=Input(size=8, resize=8, mean=(0.5,), std=(0.25,)),
        classes=("a", "b"),
        options=tuple(
            Option(
                instance=Instance.parse(text),
                macs=macs,
                params=9,
                relative=macs / 4000,
                top1=70.0,
                top5=None,
                loss=1.0,
                heldout_top1=71.0 if heldout_images else None,
            )
            for text, macs in MACS.items()
        ),
        full_macs=4000,
        checkpoint="1",
        statistics="2",
        test_images=80,
        heldout_images=heldout_images,
        cascades=cascades,
    )


@pytest.mark.parametrize("heldout_images", [0, 40])
def test_cascades_are_read_as_they_were_written(heldout_images):
    written = description(heldout_images=heldout_images)
    assert Description.parse(json.loads(json.dumps(written.document()))) == written


def test_the_document_of_a_cascade_is_plain():
    (first, _) = json.loads(json.dumps(description().document()))["cascades"]
    assert first == {
        "cascade": "stem@0.5~1.25:0.75/layer2.0@0.5",
        "macs": 1225,
        "relative": 1225 / 4000,
        "worst_macs": 1900,
        "member_macs": [1000, 900],
        "left": [75.0, 25.0],
        "top1": 80.0,
        "loss": 0.5,
        "heldout_top1": 51.0,
        "heldout_macs": 1180,
        "heldout_left": [80.0, 20.0],
    }


def test_without_cascades_the_document_is_that_of_a_bundle_without_them():
    document = description(cascades=()).document()
    assert "cascades" not in document
    assert document.keys() == description().document().keys() - {"cascades"}
    assert Description.parse(document) == Description.parse(document | {"cascades": None})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((0, "cascade"), "full", "cascades[0].cascade: a cascade has 2 to 16 members, got 1"),
        ((0, "cascade"), 7, "cascades[0].cascade: expected the text of a cascade, found 7"),
        ((0, "cascade"), "stem@0.50:0.75/full", "cascades[0].cascade: this cascade is written stem@0.5:0.75/full"),
        ((0, "cascade"), "stem@0.5:0/full", "cascades[0].cascade: 0.0: a threshold is a probability"),
        ((0, "cascade"), "stem@0.5:1.5/full", "cascades[0].cascade: 1.5: a threshold is a probability"),
        ((0, "cascade"), "stem@0.5:0.5/layer1.0@0.5", "cascades[0].cascade: layer1.0@0.5 is not among the options"),
        ((0, "cascade"), "stem@0.5:0.5/layer2.0@0.5:0.5/full", "cascades[0].member_macs: expected a number for each of 3"),
        (
            (0, "cascade"),
            "stem@0.5~1e-300:0.5/full",
            "cascades[0].cascade: expected temperatures from 0.001 to 1000, found 1e-300",
        ),
        (
            (0, "cascade"),
            "stem@0.5:0.5/full~1e+30",
            "cascades[0].cascade: expected temperatures from 0.001 to 1000, found 1e+30",
        ),
        ((0, "left"), [75.0, 20.0], "cascades[0].left: expected shares that add up to 100, found 95"),
        ((0, "left"), [70.0, 30.0], "cascades[0].macs: by left it is 1,270, found 1,225"),
        ((0, "heldout_left"), [70.0, 30.0], "cascades[0].heldout_macs: by heldout_left it is 1,270, found 1,180"),
        ((0, "heldout_left"), [70.0, 20.0, 10.0], "cascades[0].heldout_left: expected a number for each of 2 members, found 3"),
        ((0, "left"), [175.0, -75.0], "cascades[0].left[0]: expected a number from 0 to 100"),
        ((0, "member_macs"), [1001, 899], "cascades[0].member_macs[0]: stem@0.5 has 1,000 MACs, found 1,001"),
        ((0, "member_macs"), [1000, 1601], "cascades[0].member_macs[1]: layer2.0@0.5 has 1,600 MACs, found 1,601"),
        ((0, "worst_macs"), 1800, "cascades[0].worst_macs: the members add up to 1,900, found 1,800"),
        ((0, "macs"), 1300, "cascades[0].macs: by left it is 1,225, found 1,300"),
        ((0, "macs"), float("nan"), "cascades[0].macs: expected a whole number"),
        ((0, "heldout_top1"), None, "cascades[0].heldout_top1: expected a number from 0 to 100"),
        ((0, "surprise"), 1, "cascades[0].'surprise': unknown key"),
        ((1,), description().document()["cascades"][0], "cascades[1].cascade: stem@0.5~1.25:0.75/layer2.0@0.5 occurs twice"),
        ((1, "cascade"), "stem@0.5:0.9/layer3.1@0.75:0.5/layer3.1@0.75", "cascades[1].cascade: "),
    ],
)
def test_figures_that_cannot_be_are_named(path, value, said):
    document = copy.deepcopy(description().document())
    part = document["cascades"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        Description.parse(document)


def test_the_cheapest_on_held_out_images_comes_first():
    with pytest.raises(ValueError, match=r"^cascades\[1\]\.heldout_macs: the cheapest cascade comes first$"):
        description(cascades=CASCADES[::-1]).check()


def test_an_empty_list_and_too_many_are_refused():
    document = description().document()
    for rows in ([], document["cascades"][:1] * 501):
        with pytest.raises(ValueError, match="cascades: expected a list of 1 to 500 items"):
            Description.parse(document | {"cascades": rows})


def test_members_that_are_one_network_are_refused():
    document = description().document()
    everywhere = str(Instance(tuple((point, 0.5) for point in architecture("resnet20").points("small"))))
    document["options"] += [document["options"][-1] | {"instance": text} for text in ("all@0.5", everywhere)]
    row = document["cascades"][0] | {"member_macs": [4000, 900], "worst_macs": 4900, "macs": 4225, "heldout_macs": 4180}
    document["cascades"] = [row | {"cascade": f"{everywhere}:0.5/layer2.0@0.5"}]
    assert Description.parse(document)
    document["cascades"] = [row | {"cascade": f"{everywhere}:0.5/all@0.5"}]
    with pytest.raises(ValueError, match=r"^cascades\[0\]\.cascade: .* and all@0\.5 are the same network"):
        Description.parse(document)
