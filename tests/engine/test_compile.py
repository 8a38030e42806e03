import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from sdpctl.engine.compile import PAYS, Compiled, compiles
from sdpctl.engine.settings import TrainSettings
from sdpctl.engine.together import Together
from sdpctl.engine.train import Trainer
from sdpctl.errors import ModelError, ResourceError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.sdpoint import sdpoint_instances

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler raises and ignores some warnings of its own

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def traced(monkeypatch):
    """Run the traced graphs without a compiler, which would take minutes; they are counted as ever."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph.forward)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steps(forward, model, instances, images):
    """Return the logits and gradients of a step of each instance."""
    found = []
    for instance in instances:
        model.zero_grad()
        (logits_NK,) = forward(images, (instance,))
        F.cross_entropy(logits_NK, torch.arange(len(images)) % 3).backward()
        found.append([logits_NK.detach(), *(p.grad.clone() for p in model.parameters())])
    return found


def network(arch):
    torch.manual_seed(0)
    return create_model(arch, num_classes=3).double().channels_last().train()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("arch", ["resnet20", "preresnet18", "twopipe"])
def test_traced_segments_compute_what_the_network_computes(arch, dynamic, traced):
    model, twin = network(arch), network(arch)
    grid = sdpoint_instances(model)[:: 3 if len(model.points) > 1 else 1]
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = steps(Compiled(model, dynamic=dynamic), model, grid, images)
    for ours, theirs in zip(found, steps(Together(twin), twin, grid, images), strict=True):
        for here, there in zip(ours, theirs, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9 * float(there.abs().max()))
    for here, there in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(here, there)


def test_thirty_five_instances_need_few_graphs_and_no_further_ones(traced):
    torch.manual_seed(0)
    model = create_model("resnet50", num_classes=3).train()
    grid, images = sdpoint_instances(model), torch.randn(2, 3, 64, 64)
    for dynamic, most in ((True, 30), (False, 60)):
        torch.compiler.reset()
        forward = Compiled(model, dynamic=dynamic)
        with torch.no_grad():
            for instance in grid:
                forward(images, [instance])
            graphs = forward.graphs
            assert len(model.segments()) < graphs <= most
            for instance in grid:
                forward(images, [instance])
        assert forward.graphs == graphs  # nothing is compiled twice, and nothing has fallen back


def test_a_segment_that_cannot_be_traced_is_an_error_and_not_eager(traced, monkeypatch):
    model = network("resnet20")
    body = type(model.get_submodule("layer1.0")).body

    def breaking(self, x_NCHW, norm):
        torch._dynamo.graph_break()
        return body(self, x_NCHW, norm)

    monkeypatch.setattr(type(model.get_submodule("layer1.0")), "body", breaking)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        Compiled(model, dynamic=False)(torch.randn(2, 3, 32, 32, dtype=torch.float64), [FULL])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="this machine has no C++ compiler")
def test_a_compiled_training_ends_where_an_uncompiled_one_does():
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    shrunk = Instance.parse("layer2.0@0.5")
    drawn = [(FULL,), (shrunk,), (FULL, shrunk)]
    ends = []
    for compiled in (True, False):
        model = network("resnet20")
        forward = Compiled(model, dynamic=True) if compiled else None
        trainer = Trainer(model, TrainSettings(lr=0.01), drawn.__getitem__, 3, compiled=forward)
        for _ in trainer.steps([(images, torch.arange(4) % 3)] * 3):
            pass
        assert (trainer.graphs > 0, trainer.compile_seconds > 0, trainer.compile_steps > 0) == (compiled,) * 3
        assert trainer.compile_steps < 3
        ends.append((trainer.finish_epoch(), model.state_dict()))
    (ours, here), (theirs, there) = ends
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_auto_compiles_where_it_pays(monkeypatch):
    model = create_model("resnet20", num_classes=3)
    monkeypatch.setattr("sdpctl.engine.compile._lacking", lambda _: None)
    assert compiles("auto", model, GPU, PAYS)
    assert not compiles("auto", model, GPU, PAYS - 1)
    assert not compiles("auto", model, CPU, PAYS)
    assert compiles(True, model, CPU, 1)
    assert not compiles(False, model, GPU, PAYS)
    random_masks = create_model("twopipe", num_classes=3, masks="random")
    assert not compiles("auto", random_masks, GPU, PAYS)
    with pytest.raises(ModelError, match=r"set train\.compile=false"):
        compiles(True, random_masks, CPU, 1)


def test_without_a_compiler_auto_does_not_compile_and_true_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = create_model("resnet20", num_classes=3)
    assert not compiles("auto", model, GPU, PAYS)
    with pytest.raises(ResourceError, match=r"train.compile=true needs a C\+\+ compiler \(no-such-compiler\), which is not"):
        compiles(True, model, CPU, 1)
