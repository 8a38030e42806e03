"""The sections `train`, `calibrate`, `evaluate` and `profile` of a recipe, and how instances are run. Needs no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sdpctl.bounds import LARGEST_IMAGE, MOST
from sdpctl.errors import shown
from sdpctl.section import NameIn, Ratios, Section, each_once
from sdpctl.tracking.catalog import TRACKERS

Precision = Literal["fp32", "bf16"]
Estimator = Literal["cumulative", "ema"]


def _auto_or_truth(value: object) -> object:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not a choice; write auto, true or false")
    return value


def _one_or_several(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Tracker = Annotated[str, NameIn(TRACKERS)]
Trackers = Annotated[
    tuple[Tracker, ...],
    BeforeValidator(_one_or_several, json_schema_input_type=Tracker | tuple[Tracker, ...]),
    AfterValidator(each_once),
]
"""Different trackers; a single one needs no list."""

Compile = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_truth)]


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """How instances are run through the tree.

    Args:
        precision: `fp32`, or `bf16` under autocast.
        memory: maximum bytes of the feature maps, without the weights; by default about twice what `full` needs.
        estimator: of calibration: with `cumulative`, every batch has the same weight; `ema` has momentum 0.1 as in the public
            code, so that about the last 19 batches count.
        keep_full: of calibration: the path of `full` keeps the network's own running statistics. These are right for a network
            that was trained without SDPoint; SDPoint training mixes the statistics of all instances.
    """

    precision: Precision = "fp32"
    memory: int | None = None
    estimator: Estimator = "cumulative"
    keep_full: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(Section):
    """Validation on the holdout during training; statistics are calibrated anew each time.

    Args:
        every: epochs between two validations; 0 for none.
        instances: the instances to score.
        batches: calibration batches.
    """

    every: Annotated[int, Field(ge=0, le=MOST)] = 1
    instances: Annotated[tuple[str, ...], Field(min_length=1)] = ("full",)
    batches: Annotated[int, Field(ge=1, le=MOST)] = 8


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Section):
    """How often a training saves what it needs to be resumed; not part of a result.

    Args:
        epochs: epochs between two saves.
        minutes: minutes after which a training saves within an epoch.
    """

    epochs: Annotated[int, Field(ge=1, le=MOST)] = 1
    minutes: Annotated[float, Field(gt=0)] = 10


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Section):
    """Knowledge distillation (Hinton et al. 2015): an instance also learns from the probabilities of a more accurate one.

    Args:
        teacher: `self`, the instance `full` of the same step, through which no gradient flows (Yu & Huang 2019); or a
            checkpoint by tag or digest, whose `full` teaches every instance. The checkpoint's digest is recorded.
        temperature: divides the logits of teacher and student. The divergence is multiplied by its square, so that the size of
            the gradient does not depend on it.
        weight: share of the loss that compares with the teacher's probabilities, by Kullback-Leibler divergence; the rest
            compares with the labels.
    """

    teacher: str = "self"
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    """Stochastic gradient descent.

    Args:
        epochs: passes over the training images; 0 commits the initial weights.
        lr: learning rate after the warm-up.
        lr_body: learning rate of every parameter except those of the classifier, with the same schedule and warm-up; by default
            `lr`. With 0, only the classifier learns.
        layer_decay: layer-wise decay of the learning rate: segment i of n has the rate lr * layer_decay^(n-1-i), so that the
            last has `lr` and earlier ones less (Bao et al. 2022).
        momentum: momentum of SGD.
        weight_decay: on every parameter, as in the public code.
        schedule: `step` multiplies the rate by `gamma` at each milestone, `cosine` lets it fall to 0 (Loshchilov & Hutter 2017,
            without restarts), both by training step.
        milestones: epochs, counted from 0, at whose start the rate falls.
        gamma: factor at a milestone.
        warmup_epochs: epochs over which the rate rises linearly to its value (Goyal et al. 2017).
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016).
        mixup: alpha of mixup, which blends pairs of images and labels (Zhang et al. 2018); off by default. With `cutmix` too,
            each batch gets one of the two, with equal probability. Calibration batches are not mixed.
        cutmix: alpha of CutMix, which pastes a part of an image into a different one (Yun et al. 2019); off by default.
            Calibration batches are not mixed.
        ema: decay of an exponential moving average of the weights and running statistics, updated after each step; off by
            default. The averaged weights are the ones that are validated and stored.
        precision: `fp32`, or `bf16` under autocast; validation uses it too.
        compile: compile the segments of the network before they train (torch.compile): the first steps take minutes, the others
            are faster on a GPU, and slower on most CPUs. `auto` compiles on a GPU if the training is long enough to pay for it.
            Not part of a result, whose last digits alone depend on it.
        sync_bn: of several processes: batch norms use the mean and the variance of the whole batch, as with one process;
            otherwise each process normalises its part of a batch by itself.
        channels_last: keep weights and feature maps as NHWC in memory.
        distill: let instances also learn from a teacher; off by default.
        init: a checkpoint to begin with, by tag or digest; or weights of a library, as timm/resnet50.a1_in1k or
            torchvision/resnet50.IMAGENET1K_V2, which are fetched and stored once, and whose data.mean, data.std and
            data.interpolation are used unless the recipe sets them. The checkpoint's digest is recorded.
        validate: validation on the holdout.
        checkpoint: how often the training is saved; not part of a result.
        track: programs that show curves, `tensorboard` or `mlflow` or both, of this training and of what is made from it; not
            part of a result.
    """

    epochs: Annotated[int, Field(ge=0, le=MOST)] = 10
    lr: Annotated[float, Field(gt=0)] = 0.1
    lr_body: Annotated[float, Field(ge=0)] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST)], ...], Field(max_length=100)] = ()
    gamma: Annotated[float, Field(gt=0, le=1000)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0.01, le=100)] | None = None
    cutmix: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Precision = "fp32"
    compile: Compile = "auto"
    sync_bn: bool = False
    channels_last: bool = True
    distill: DistillSettings | None = None
    init: str | None = None
    validate: ValidateSettings = ValidateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    track: Trackers = ()


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Section):
    """Training of what belongs to one instance alone: its classifier, and batch norms that no other instance passes.

    The other instances are those of the grid, and all that are calibrated.

    Args:
        instances: the instances to fine-tune, each separately; instances that are not calibrated are left out.
        steps: training steps of an instance.
        lr: learning rate of the first step; it falls to 0 as a cosine. The momentum is 0.9.
    """

    instances: Annotated[tuple[str, ...], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1, le=MOST)] = 300
    lr: Annotated[float, Field(gt=0)] = 0.01


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Section):
    """BatchNorm statistics of the instances.

    Args:
        batches: batches of training images.
        batch_size: images of a batch; data.batch_size by default.
        augment: `none`: the images are transformed as test images are; by default they are augmented as in training.
        image_size: height and width of the images, in pixels; data.image_size by default. A network that is evaluated at a
            different evaluate.image_size needs statistics of this size.
        estimator: `cumulative`, every batch weighs the same, or `ema`, momentum 0.1.
        keep: `full`: its path keeps the network's own running statistics, which are right for weights from a plain training.
        precision: `fp32`, or `bf16` under autocast.
        finetune: train the classifier and the batch norms of some instances before their statistics are gathered; off by
            default.
    """

    batches: Annotated[int, Field(ge=1, le=MOST)] = 32
    batch_size: Annotated[int, Field(ge=2, le=MOST)] | None = None
    augment: Literal["none"] | None = None
    image_size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] | None = None
    estimator: Estimator = "cumulative"
    keep: Literal["full"] | None = None
    precision: Precision = "fp32"
    finetune: FinetuneSettings | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Section):
    """Scores on the test split.

    Args:
        batch_size: images of a batch, which several processes share.
        batches: batches of images drawn from the seed; every image by default.
        image_size: height and width of a test image and of a held-out image, in pixels, also in a search, an export and
            `predict`; MACs are counted at this size. data.image_size by default. Training and its validation use
            data.image_size, and calibration calibrate.image_size.
        precision: `fp32`, or `bf16` under autocast.
        predictions: keep the class that each instance predicts for each image, and small pictures of images that only costly
            instances get right; a report shows confusions and these images.
    """

    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 256
    batches: Annotated[int, Field(ge=1, le=MOST)] | None = None
    image_size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] | None = None
    precision: Precision = "fp32"
    predictions: bool = False


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Section):
    """An optional stage: the costs of the instances as an artifact of their own.

    Args:
        ratios: ratios of the instances; those of `sdpoint` by default.
    """

    ratios: Ratios | None = None
