"""What a cascade saves where it is used: its time in the runtime and in onnxruntime against that of `full`, beside its MACs.

It is also compared with its members run alone, which compute what they share twice. Weights are fresh and images are noise, on
which times do not depend; the threshold is the median confidence, so that half of the images leave at the first member.

python tests/benchmarks/bench_cascade_export.py [ARCH [SIZE]]
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from paired import paired

from sdpctl import create_model
from sdpctl.cascade import Cascade
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.cascade import added_macs
from sdpctl.engine.cost import Costs
from sdpctl.export.bundle import Bundle, only_needed
from sdpctl.export.description import CascadeOption, Description, Input, Option
from sdpctl.export.format import Source
from sdpctl.export.network import INPUT, one_instance
from sdpctl.export.onnx import onnx_session, to_onnx
from sdpctl.export.onnx_cascade import OnnxCascadeFormat
from sdpctl.instance import FULL, Instance
from sdpctl.models.settings import ModelSettings
from sdpctl.runtime import Runtime

IMAGES, BATCHES, RUNS = 32, (1, 32), 9
CLASSES = 10


def describe(model, arch, size, instances, costs):
    return Description(
        name=arch,
        network=ModelSettings(arch=arch, num_classes=CLASSES, in_channels=3, stem=model.stem),
        input=Input(size=size, resize=size, mean=(0.5,) * 3, std=(0.25,) * 3),
        classes=tuple(map(str, range(CLASSES))),
        options=tuple(
            Option(instance=i, macs=costs.of(i).macs, params=1, relative=1, top1=0, top5=None, loss=0, heldout_top1=0)
            for i in instances
        ),
        full_macs=costs.of(FULL).macs,
        checkpoint="",
        statistics="",
        test_images=0,
        heldout_images=1,
    )


def option_of(cascade, member_macs):
    """Return a cascade's entry; half of the images leave at the first member."""
    mean, worst = round(sum(member_macs) - member_macs[1] / 2), sum(member_macs)
    figures = {"top1": 0, "loss": 0, "heldout_top1": 0, "relative": 1, "left": (50.0, 50.0), "heldout_left": (50.0, 50.0)}
    return CascadeOption(cascade=cascade, macs=mean, heldout_macs=mean, worst_macs=worst, member_macs=member_macs, **figures)


def loaded(files, folder):
    """Return the program of an exported cascade as a module."""
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
    spec = importlib.util.spec_from_file_location("run", Path(folder) / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(arch, size, first):
    """Print the times of a cascade of an instance and `full`."""
    torch.manual_seed(0)
    model = create_model(arch, num_classes=CLASSES).eval()
    costs = Costs(model, (3, size, size))
    x_NCHW = torch.randn(IMAGES, 3, size, size)
    statistics = calibrate(model, [first, FULL], [(torch.randn(16, 3, size, size), None)])
    described = describe(model, arch, size, (first, FULL), costs)
    weights = dict(model.state_dict())
    runtime = Runtime(Bundle(described, weights, statistics), device="cpu")
    confidence_N = runtime(x_NCHW, instance=first).softmax(1).amax(1).sort().values
    threshold = float(confidence_N[IMAGES // 2 - 1 : IMAGES // 2 + 1].mean())
    cascade = Cascade((first, FULL), (threshold,), (1.0, 1.0))
    member_macs = added_macs(cascade, costs)
    described = replace(described, cascades=(option_of(cascade, member_macs),))

    def source(options, cascades):
        one = replace(described, options=options, cascades=cascades)
        return Source(model=model, statistics=only_needed(statistics, model, one), description=one, weights=None, card="")

    sessions = [
        onnx_session(to_onnx(one_instance(source((o,), ())), replace(described, options=(o,)))) for o in described.options
    ]
    with TemporaryDirectory() as folder:
        program = loaded(OnnxCascadeFormat().write(source(described.options, described.cascades)), folder)
    full, mean = costs.of(FULL).macs, member_macs[0] + member_macs[1] / 2
    twice = costs.of(first).macs + full / 2
    print(
        f"{arch} at {size} px, {first} and then full for half of the images: {mean:,.0f} MACs an image; ratios of MACs: full "
        f"{full / mean:.2f}, members alone {twice / mean:.2f}"
    )
    log_p_NK, left_N = runtime.run_cascade(x_NCHW, cascade)
    probabilities, left = program.classify(x_NCHW.numpy())
    assert (left == left_N.numpy()).all()
    assert left.sum() == IMAGES // 2
    assert np.abs(probabilities - log_p_NK.exp().numpy()).max() < 1e-5
    alone = [runtime(x_NCHW, instance=i).log_softmax(1) for i in cascade.members]
    assert (log_p_NK - torch.stack(alone)[left_N, range(IMAGES)]).abs().max() < 1e-4

    def ask_runtime(instance, x):
        return runtime(x, instance=instance).softmax(1).numpy()

    def ask_session(instance, x):
        logits = sessions[cascade.members.index(instance)].run(None, {INPUT: x.numpy()})[0]
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def members(ask, x):
        stays = ask(first, x).max(1) < threshold
        return ask(FULL, x[torch.from_numpy(stays)]) if stays.any() else None

    for batch in BATCHES:
        parts = x_NCHW.split(batch)
        for where, ask, ours in (
            ("runtime", ask_runtime, lambda x: runtime.run_cascade(x, cascade)),
            ("onnxruntime", ask_session, lambda x: program.classify(x.numpy())),
        ):
            for what, theirs in (
                ("full", lambda x, ask=ask: ask(FULL, x)),
                ("members alone", lambda x, ask=ask: members(ask, x)),
            ):
                result = paired(
                    lambda ours=ours, parts=parts: [ours(x) for x in parts],
                    lambda theirs=theirs, parts=parts: [theirs(x) for x in parts],
                    runs=RUNS,
                )
                print(f"  {where}, batch {batch}, {IMAGES} images, the alternative {what}: {result}")


def main():
    arch, size = (*sys.argv[1:], *("resnet20", "32")[len(sys.argv) - 1 :])
    torch.set_num_threads(1)
    points = create_model(arch, num_classes=CLASSES).points
    for point in (points[0], points[len(points) // 4], points[len(points) // 2]):
        compare(arch, int(size), Instance.parse(f"{point}@0.5"))


if __name__ == "__main__":
    main()
