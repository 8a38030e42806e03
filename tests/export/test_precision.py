"""ONNX models in lower precisions: against arithmetic in numpy, and what is refused."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdpctl.errors import BudgetError
from sdpctl.export.precision import Accuracies, check_accuracies, to_fp16, to_int8, with_properties

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 3, 3, 3), dtype=np.float32) * np.float32([[[[0.01]]], [[[0.1]]], [[[1]]], [[[10]]]])
IMAGES = RNG.standard_normal((50, 3, 8, 8), dtype=np.float32)


def model():
    """One convolution, whose output channels differ by a factor of 1,000."""
    shapes = {"images": ["batch", 3, 8, 8], "logits": ["batch", 4, 6, 6]}
    given, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    weight = numpy_helper.from_array(WEIGHT, "weight")
    graph = helper.make_graph([helper.make_node("Conv", ["images", "weight"], ["logits"])], "g", [given], [out], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made.metadata_props.add(key="name", value="one")
    return made.SerializeToString()


def run(content, images):
    return onnxruntime.InferenceSession(content).run(None, {"images": images})[0]


def convolved(images_NCHW, weight_OIHW):
    windows = np.lib.stride_tricks.sliding_window_view(images_NCHW, (3, 3), axis=(2, 3))
    return np.einsum("nchwyx,ocyx->nohw", windows, weight_OIHW)


def of_uint8(values, seen):
    """Round values to the 256 steps between the least and the greatest value that was seen, as the operators do."""
    low, high = min(seen.min(), 0), max(seen.max(), 0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale, scale


def test_int8_is_what_its_formulas_say():
    lower = to_int8(model(), IMAGES, batch=16, name="images")
    outside = 2 * RNG.standard_normal((7, 3, 8, 8), dtype=np.float32)  # beyond the range of the calibration images
    scale_O = np.abs(WEIGHT).max((1, 2, 3), keepdims=True) / 127
    images, _ = of_uint8(outside, IMAGES)
    wanted, step = of_uint8(convolved(images, np.round(WEIGHT / scale_O) * scale_O), convolved(IMAGES, WEIGHT))
    found = run(lower, outside)
    assert np.abs(found - wanted).max() <= 1.01 * step  # a value between two steps may be rounded to either
    assert (np.abs(found - wanted) < 0.01 * step).mean() > 0.99
    assert np.abs(found - convolved(outside, WEIGHT)).max() > 3 * step


def test_int8_has_a_scale_for_each_channel_and_keeps_the_rest():
    lower = onnx.load_from_string(to_int8(model(), IMAGES, batch=16, name="images"))
    onnx.checker.check_model(lower, full_check=True)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in lower.graph.initializer}
    (scale,) = (value for name, value in kept.items() if name.startswith("weight") and value.shape == (4,) and value.any())
    np.testing.assert_allclose(scale, np.abs(WEIGHT).max((1, 2, 3)) / 127, rtol=1e-6)
    assert [opset.domain for opset in lower.opset_import] == [""]
    assert {each.key: each.value for each in lower.metadata_props} == {"name": "one"}
    assert [value.type.tensor_type.elem_type for value in (*lower.graph.input, *lower.graph.output)] == [TensorProto.FLOAT] * 2


def test_int8_depends_on_the_images_and_on_nothing_else():
    first = to_int8(model(), IMAGES, batch=16, name="images")
    assert to_int8(model(), IMAGES, batch=7, name="images") == first
    assert to_int8(model(), 2 * IMAGES, batch=16, name="images") != first


def test_fp16_rounds_weights_and_keeps_input_and_output():
    lower = to_fp16(model())
    read = onnx.load_from_string(lower)
    assert [value.type.tensor_type.elem_type for value in (*read.graph.input, *read.graph.output)] == [TensorProto.FLOAT] * 2
    (weight,) = (numpy_helper.to_array(tensor) for tensor in read.graph.initializer)
    np.testing.assert_array_equal(weight, WEIGHT.astype(np.float16))
    wanted = convolved(IMAGES.astype(np.float16).astype(np.float32), WEIGHT.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(run(lower, IMAGES), wanted, atol=2**-10 * np.abs(wanted).max())


def test_accuracies_become_a_property():
    accuracies = lost(0.5)
    labelled = onnx.load_from_string(with_properties(model(), {"precision": json.dumps(accuracies.document())}))
    said = json.loads({each.key: each.value for each in labelled.metadata_props}["precision"])
    check_accuracies(said, "")
    assert Accuracies(**said) == accuracies


def lost(points, max_drop=1.0, **more):
    return Accuracies(
        name="int8",
        images=1000,
        float32_top1=90.0,
        top1={"onnxruntime": 90.0 - points} | more,
        max_drop=max_drop,
        calibration_images=256,
    )


@pytest.mark.parametrize(("points", "max_drop"), [(-3, 0), (0, 0), (0.1 + 0.2, 0.3), (1, 1)])
def test_a_loss_up_to_the_limit_is_accepted(points, max_drop):
    assert lost(points, max_drop).require("x") == lost(points, max_drop)


def test_a_greater_loss_is_refused_in_one_line_in_any_runtime():
    with pytest.raises(BudgetError) as caught:
        lost(1.1).require("digits.export.onnx-int8")
    assert caught.value.exit_code == 8
    assert str(caught.value) == (
        "digits.export.onnx-int8: on 1,000 test images top-1 is 90.00 % in float32 and 88.90 % in int8 in onnxruntime; a loss "
        "of 1.10 points is more than --max-drop 1; nothing was written, raise --max-drop or export.calibration_images, or "
        "export float32"
    )
    with pytest.raises(BudgetError, match=r"85\.00 % in int8 in OpenVINO"):
        lost(0, openvino=85.0).require("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "int4"}, "name"),
        ({"top1": {}}, r"top1\.onnxruntime"),
        ({"top1": {"onnxruntime": 101}}, r"top1\.onnxruntime"),
        ({"images": 0}, "images"),
        ({"other": 1}, "other"),
    ],
)
def test_a_damaged_document_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_accuracies(lost(0).document() | change, "precision")
