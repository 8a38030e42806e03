"""Fine-tuning as a part of the calibration: what is stored, what finds it, and what runs with it."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from stage_calls import calibrate, document, evaluate, export, search
from torch.nn import functional as F

import sdpctl
from sdpctl.data.loader import ImageData
from sdpctl.data.reader import Located
from sdpctl.engine.calibrate import CalibratedNorms
from sdpctl.engine.tree import Tree
from sdpctl.errors import DivergedError, RecipeError, UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.plan import Plan
from sdpctl.stages.calibrate import Calibrate
from sdpctl.stages.layers import read_model, read_statistics
from sdpctl.stages.network import open_network
from sdpctl.stages.train import train_key

TUNED = "calibrate.finetune={instances: [stem@0.5, full], steps: 6, lr: 0.05}"
STEM = Instance.parse("stem@0.5")


def statistics_of(artifact, context, recipe):
    return read_statistics(context.store, artifact, read_model(context.store, context.tagged("tiny"), recipe.model))


def rows(artifact, context):
    return {row["instance"]: row for row in document(artifact, context)["rows"]}


def test_the_tuned_change_and_the_others_do_not(is_trained, context, listener):
    plain = rows(evaluate(open_network("tiny", context), context), context)
    network = open_network("tiny", context, [TUNED])
    artifact = evaluate(network, context)
    tuned = rows(artifact, context)
    assert {name for name in plain if plain[name] != tuned[name]} == {"stem@0.5", "full"}
    assert tuned["stem@0.5"]["macs"] == plain["stem@0.5"]["macs"]
    (note,) = (note for note in listener.notes if "fine-tuned" in note)
    assert note.startswith("tiny.bn: 2 instances fine-tuned in 6 steps on 768 images each, in ")
    nodes = document(context.tagged("tiny.bn"), context)
    assert nodes["tuned"]["full"] == ["layer2.1.bn1.weight", *nodes["tuned"]["full"][1:]]  # no point comes after layer2.0
    assert set(nodes["tuned"]) == {"stem@0.5", "full"}


def test_its_steps_are_those_of_a_plain_loop_over_its_batches(is_trained, context):
    network = open_network("tiny", context, ["calibrate.finetune={instances: [stem@0.5], steps: 12, lr: 0.05}"])
    recipe = network.recipe
    found = statistics_of(calibrate(network, context), context, recipe).tuned
    model = read_model(context.store, context.tagged("tiny"), recipe.model).double().train()
    names = {name for _, name in found}
    assert names == {name for name, _ in model.named_parameters() if ".bn" in name or name.startswith("fc.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    data = ImageData(recipe.data, Located((), {}), torch.device("cpu"), in_channels=1, seed=0)
    batches = list(data.finetuning("stem@0.5", 12, recipe.preparation))
    assert len(batches) == 12 > data.steps_per_epoch
    for x_NCHW, labels_N in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x_NCHW.double(), STEM), labels_N).backward()
        optimizer.step()
        schedule.step()
    for (node, name), values in found.items():
        assert node == STEM
        torch.testing.assert_close(values.double(), model.get_parameter(name), rtol=1e-3, atol=1e-3)


def test_each_pass_over_the_images_has_an_order_of_its_own(context, tiny):
    data = ImageData(tiny().data, Located((), {}), torch.device("cpu"), in_channels=1, seed=0)
    steps = data.steps_per_epoch
    labels = [labels_N.tolist() for _, labels_N in data.finetuning("full", 2 * steps, tiny().preparation)]
    other = [labels_N.tolist() for _, labels_N in data.finetuning("stem@0.5", steps, tiny().preparation)]
    assert len({str(each) for each in [*labels, *other]}) == 3 * steps
    again = [labels_N.tolist() for _, labels_N in data.finetuning("full", steps, tiny().preparation)]
    assert again == labels[:steps]


def test_keys(is_trained, context, tiny):
    plain, tuned = (calibrate(open_network("tiny", context, each), context) for each in ([], [TUNED]))
    assert plain.key != tuned.key
    assert calibrate(open_network("tiny", context, [TUNED]), context).digest == tuned.digest
    assert train_key(context.workspace.resolve(tiny(TUNED))) == train_key(context.workspace.resolve(tiny()))
    assert "finetune" not in tiny().identity()["calibrate"]
    assert tiny(TUNED).identity()["calibrate"]["finetune"] == {"instances": ["stem@0.5", "full"], "steps": 6, "lr": 0.05}
    forced = calibrate(open_network("tiny", context, [TUNED]), context, force=True)
    assert forced.digest == tuned.digest


def test_instances_that_are_not_calibrated_are_left_out(is_trained, context):
    network = open_network("tiny", context, [TUNED])
    few = calibrate(network, context, ["layer2.0@0.5", "full"])
    assert set(document(few, context)["tuned"]) == {"full"}
    grid = calibrate(network, context)  # what belongs to `full` does not depend on which instances are calibrated
    wanted, found = (statistics_of(each, context, network.recipe).tuned for each in (grid, few))
    assert all(torch.equal(values, wanted[key]) for key, values in found.items())
    alone = statistics_of(calibrate(network, context, ["full"]), context, network.recipe).tuned
    assert alone.keys() == found.keys()
    none = calibrate(network, context, ["layer2.0@0.5"])
    assert "tuned" not in document(none, context)
    told = "tiny.bn: calibrate.finetune lists 1 instance outside this calibration; no fine-tuning of stem@0.5"
    assert context.report.notes.count(told) == 1  # of three calibrations without it
    assert Calibrate(network).task(context) == "fine-tune 2 instances, then calibrate 3 instances on at most 384 images"
    assert Calibrate(network, [FULL]).task(context).startswith("fine-tune 1 instance, then calibrate 1 instance")


def test_a_ratio_that_is_not_in_the_grid_is_told_before_the_calibration(is_trained, context):
    network = open_network("tiny", context, ["calibrate.finetune={instances: [stem@0.6, all@0.5, full]}"])
    assert Plan(dataclasses.replace(context, dry_run=True)).run(Calibrate(network)) is None
    assert context.report.notes[-1].endswith("lists 2 instances outside this calibration; no fine-tuning of stem@0.6, all@0.5")
    calibrate(open_network("tiny", context, [TUNED]), context)
    assert sum("outside this calibration" in note for note in context.report.notes) == 1


def test_a_search_does_not_depend_on_it(is_trained, context, quick_sqlite):
    settings = "search={evaluations: 2, images: 20, rescore: 1, rescore_images: 20, calibration_batches: 1, strategy: uniform}"
    found = search(open_network("tiny", context, [settings]), context)
    assert search(open_network("tiny", context, [settings, TUNED]), context).digest == found.digest


@pytest.mark.parametrize("form", ["onnx", "torch-export", "bundle"])
def test_exports_run_with_it(is_trained, context, tmp_path, form):
    """The stage runs the files outside and compares logits; here they are compared once more with those of the tree."""
    calibrate(open_network("tiny", context, [TUNED]), context)
    chosen = "instances: [stem@0.5, layer2.0@0.5]" if form == "bundle" else "instance: stem@0.5"
    artifact = export(open_network("tiny", context, [f"export={{format: {form}, {chosen}}}"]), context)
    network = open_network("tiny", context)
    model = read_model(context.store, context.tagged("tiny"), network.recipe.model).eval()
    statistics = statistics_of(context.tagged("tiny.bn"), context, network.recipe)
    x_NCHW = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = Tree(model, [STEM]).walk(x_NCHW, CalibratedNorms(model, statistics))[STEM]
        statistics.tuned.clear()
        without = Tree(model, [STEM]).walk(x_NCHW, CalibratedNorms(model, statistics))[STEM]
    assert "batch norms of stem@0.5 were fine-tuned by themselves" in context.store.read(artifact, "card.md").decode()
    files = {title: context.store.read(artifact, title) for title in artifact.layers}
    if form == "bundle":
        found = sdpctl.load(artifact.digest, store=context.path, device="cpu")(x_NCHW, instance="stem@0.5")
    else:
        (path,) = (tmp_path / name for name in files if name.endswith((".onnx", ".pt2")))
        path.write_bytes(files[path.name])
        if form == "onnx":
            (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": np.asarray(x_NCHW)})
            found = torch.from_numpy(logits)
        else:
            found = torch.export.load(path).module()(x_NCHW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - without).abs().max()) > 0.01


def test_a_tag_runs_with_it(is_trained, context):
    network = open_network("tiny", context, [TUNED])
    table = rows(evaluate(network, context), context)
    evaluate(open_network("tiny", context), context, split="holdout")
    model = sdpctl.load("tiny", store=context.path, device="cpu")
    data = ImageData(network.recipe.data, Located((), {}), torch.device("cpu"), in_channels=1, seed=0)
    x_NCHW, labels_N = map(torch.cat, zip(*data.test(100), strict=True))
    for name in ("stem@0.5", "layer2.0@0.5", "full"):
        assert F.cross_entropy(model(x_NCHW, instance=name), labels_N).item() == pytest.approx(table[name]["loss"], rel=1e-4)


def test_a_rate_that_is_too_high_leaves_nothing(is_trained, context):
    before = {artifact.digest for artifact in context.store.artifacts()}
    with pytest.raises(DivergedError, match=r"lower calibrate\.finetune\.lr"):
        calibrate(open_network("tiny", context, [TUNED, "calibrate.finetune.lr=1e30"]), context)
    assert {artifact.digest for artifact in context.store.artifacts()} == before


def test_what_is_refused(tiny, is_trained, context):
    with pytest.raises(RecipeError, match=r"calibrate\.finetune\.instances\.0: .*the network has no point 'layer9'"):
        tiny("calibrate.finetune={instances: [layer9@0.5]}")
    with pytest.raises(RecipeError, match=r"`keep: full` and a fine-tuning of `full` exclude each other"):
        tiny(TUNED, "calibrate.keep=full")
    with pytest.raises(RecipeError, match=r"calibrate\.finetune\.instances"):
        tiny("calibrate.finetune={steps: 3}")
    calibrate(open_network("tiny", context), context)
    with pytest.raises(UsageError, match="has its statistics already"):
        open_network("tiny.bn", context, [TUNED])
