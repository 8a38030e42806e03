"""The first recipe for a folder of images: a network, a size and a schedule that suit the images, with comments."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from sdpctl.recipe.load import dump_yaml, parse_recipe
from sdpctl.untrusted import printable

if TYPE_CHECKING:
    from sdpctl.data.survey import Survey

SMALL = 80
"""Median of the shorter sides, in pixels, up to which images are small: they are cropped at random from a padded image."""

LARGE = 128
"""Height and width at which larger images are trained, in pixels; on a CPU, larger ones take long."""

STEPS = 2800
"""About the number of training steps: as many as `clothing-resnet18` takes."""

UNEQUAL, VERY_UNEQUAL = 3, 10
"""Ratios of the largest to the smallest class from which classes are unequal, and from which the recipe balances them."""

FINE_TUNED = ("timm/tf_efficientnet_lite0", "in1k")
"""The network that the recipe fine-tunes, and the name of its weights."""

ENLARGED = 2
"""Factor by which an image is enlarged from which it is called tiny."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What suits a folder of images.

    Args:
        small: whether the images are small.
        image_size: height and width of an image as the network sees it, in pixels.
        batch_size: images of a batch.
        holdout: share of each class that is held out.
        epochs: training epochs.
        ratio: the number of training images of the largest class, divided by that of the smallest class.
    """

    small: bool
    image_size: int
    batch_size: int
    holdout: float
    epochs: int
    ratio: float

    @classmethod
    def of(cls, survey: "Survey") -> "Choice":
        """Choose for a folder that was looked at."""
        small = survey.side <= SMALL
        counts = [count for count in survey.counts[0] if count]
        holdout = 0.1 if min(counts) >= 10 else 0.2
        images = sum(count - round(holdout * count) for count in counts)
        most = 64 if small else 32
        batch = next((size for size in (64, 32, 16, 8, 4) if size <= most and 10 * size <= images), 4 if images >= 4 else 2)
        return cls(
            small=small,
            image_size=min(64, max(16, 4 * round(survey.side / 4))) if small else LARGE,
            batch_size=batch,
            holdout=holdout,
            epochs=min(100, max(20, round(STEPS * batch / max(1, images)))),
            ratio=max(counts) / min(counts),
        )


def recipe_name(folder: str) -> str:
    """Return the name of a folder as the name of a recipe, which has ASCII letters, digits, `-` and `_` only."""
    plain = unicodedata.normalize("NFKD", folder).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].rstrip("-") or "images"


def first_recipe(survey: "Survey", root: str, output: str, *, at_hand: bool) -> str:
    """Write a recipe that trains on a folder of images.

    Args:
        survey: what the folder holds.
        root: the value of `data.root`.
        output: path of the recipe, for its comments.
        at_hand: whether the weights of `FINE_TUNED` are in the cache of this machine: then the recipe fine-tunes them.

    Raises:
        RecipeError: if a path cannot be written in a recipe.
    """
    choice, name = Choice.of(survey), recipe_name(survey.root.resolve().name)
    tuned = at_hand and not choice.small and not survey.grey
    lines = [*_header(survey, choice, printable(output), tuned=tuned), *_keys({"name": name})]
    lines += _section("model", *_model(survey, choice, tuned=tuned))
    lines += _section("data", *_data(survey, choice, root))
    lines += _section("train", *_train(choice, tuned=tuned))
    if not tuned and not choice.small:
        lines += _suggestion(choice)
    lines += _section("evaluate", ({"batch_size": 64}, ""))
    text = "\n".join(lines) + "\n"
    parse_recipe(text, printable(output))
    return text


Entry = tuple[dict[str, Any], str]
"""A key with its value, and a comment; an empty comment is left out."""


def _keys(entry: dict[str, Any], comment: str = "", indent: str = "") -> list[str]:
    ((key, value),) = entry.items()
    several = isinstance(value, dict | list)
    written = dump_yaml(value).strip() if several else dump_yaml([value]).strip()[1:-1]  # without the brackets of the list
    lines = [indent + line for line in f"{key}: {written}".split("\n")]
    return [*lines[:-1], f"{lines[-1]:<32}  # {printable(comment)}"] if comment else lines


def _section(name: str, *entries: Entry) -> list[str]:
    return [f"{name}:", *(line for entry, comment in entries for line in _keys(entry, comment, "  "))]


def _header(survey: "Survey", choice: Choice, output: str, *, tuned: bool) -> Iterator[str]:
    train, test = map(sum, survey.counts)
    network = "EfficientNet-Lite0 with pretrained weights" if tuned else "ResNet-20" if choice.small else "ResNet-18"
    what = "fine-tuned on" if tuned else "trained on"
    yield f"# {network}, {what} {len(survey.classes)} classes: {train:,} images for training, {test:,} for the test."
    yield "#"
    yield f"#   sdpctl run {quote(output)}"
    yield f"#   sdpctl run {quote(output)} --set train.epochs=2 --set name=short   # a quick look first"
    yield "#"
    yield "# `sdpctl init` chose the values from the images. Every key is described in recipes/README.md of sdpctl."


def _model(survey: "Survey", choice: Choice, *, tuned: bool) -> Iterator[Entry]:
    if tuned:
        yield {"arch": FINE_TUNED[0]}, ""
    elif choice.small:
        yield {"arch": "resnet20"}, "for small images; resnet56 is larger"
    else:
        yield {"arch": "resnet18"}, "resnet50 is larger, and `sdpctl models` lists all"
    if survey.grey:
        yield {"in_channels": 1}, "all images are grey"


def _data(survey: "Survey", choice: Choice, root: str) -> Iterator[Entry]:
    yield {"dataset": "imagefolder"}, ""
    yield {"root": root}, ""
    if "folders" in survey.arrangement:
        yield {"folders": list(survey.arrangement["folders"])}, "training and test images"
    if "test_share" in survey.arrangement:
        yield {"test_share": survey.arrangement["test_share"]}, "of each class is tested: the folder has no test images"
    if survey.lacking(0) or survey.lacking(1):
        yield {"partial": True}, "a class may lack images in one split"
    if survey.unreadable:
        yield {"skip_unreadable": True}, f"damaged images: {len(survey.unreadable):,}; remove this key once they are gone"
    side = f"the median of the shorter sides is {survey.side} px"
    yield {"image_size": choice.image_size}, side if choice.small else f"{side}; on a GPU, 224"
    if choice.small:
        yield {"augment": "crop-flip"}, "`crop` if a mirrored image means something else, as with digits"
    else:
        yield {"augment": "resized-crop"}, "random parts, mirrored half of the time"
    if choice.ratio >= VERY_UNEQUAL:
        yield {"balance": "sampler"}, f"the largest class has {choice.ratio:.1f} times as many images as the smallest"
    yield {"batch_size": choice.batch_size}, ""
    yield {"holdout": choice.holdout}, "of each class is kept out of training, to choose instances by"


def _train(choice: Choice, *, tuned: bool) -> Iterator[Entry]:
    epochs = max(5, choice.epochs // 4) if tuned else choice.epochs
    if tuned:
        yield {"init": f"{FINE_TUNED[0]}.{FINE_TUNED[1]}"}, "these weights are in the cache of this machine"
    yield {"epochs": epochs}, "more for a better result, fewer for a quick look"
    yield {"lr": _rounded((0.02 if tuned else 0.05) * choice.batch_size / 32)}, "in proportion to the batch size"
    if tuned:
        yield {"lr_body": _rounded(0.005 * choice.batch_size / 32)}, "for everything except the new classifier"
    yield {"schedule": "cosine"}, ""
    yield {"warmup_epochs": max(1, epochs // 20)}, ""
    yield {"label_smoothing": 0.1}, ""
    yield {"validate": {"every": 5}}, "epochs between two looks at the images of the holdout"


def _suggestion(choice: Choice) -> Iterator[str]:
    scale = choice.batch_size / 32
    yield "# Pretrained weights are more accurate with few images. timm fetches them on the first run; use these lines instead:"
    yield f"#   model: {{arch: {FINE_TUNED[0]}}}"
    yield f"#   train: {{init: {'.'.join(FINE_TUNED)}, epochs: {max(5, choice.epochs // 4)}, lr: {_rounded(0.02 * scale)},"
    yield f"#           lr_body: {_rounded(0.005 * scale)}, schedule: cosine, warmup_epochs: 1, label_smoothing: 0.1}}"


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
