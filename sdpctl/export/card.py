"""The model card, for the people who receive the files.

Names of classes, files and recipes are untrusted text: each is written in a code span or block that it cannot leave.
"""

import re

from sdpctl.export.catalog import FORMATS
from sdpctl.export.check import DIFFERENCE
from sdpctl.export.description import Description, Input
from sdpctl.export.format import format_of
from sdpctl.export.precision import OWN, Accuracies, runtime_name
from sdpctl.fields import is_name
from sdpctl.untrusted import printable


def card(
    description: Description,
    form: str,
    recipe: str,
    origin: str,
    *,
    accuracies: Accuracies | None = None,
    check: str | None = None,
) -> str:
    """Write the card of an export.

    Args:
        description: the description of the export.
        form: name of its format.
        recipe: the resolved recipe as YAML.
        origin: sentences on where weights and statistics come from, Markdown.
        accuracies: accuracies in the precision of the files; None for float32.
        check: a second runtime in which the files were checked.

    Returns:
        Markdown.
    """
    network, options, classes = description.network, description.options, len(description.classes)
    result, results, bound = "logit", "logits", f"{DIFFERENCE:g} of the largest, or of 1"
    if FORMATS[form].holds_cascade:
        what = f"as a cascade of {len(options)} of its instances"
        result, results, bound = "probability", "probabilities", f"{DIFFERENCE:g}"
    elif FORMATS[form].several:
        what = f"with {len(options)} of its instances"
    else:
        what = f"at the instance {code(str(options[0].instance))}"
    what += "" if accuracies is None else f", in {accuracies.name}"
    lines = [
        f"# {description.name if is_name(description.name) else code(description.name)}",
        "",
        f"A {network.arch} for images of {classes} classes, {what}. It is an SDPoint network (Kuen et "
        "al., CVPR 2018): the same weights run at many costs, by shrinking the feature map at one point or several.",
        "",
        "## Input",
        "",
        *_input(description.input, network.in_channels),
        "",
        f"Output: {results} of {classes} classes, in this order:",
        f"{', '.join(map(code, description.classes))}.",
        "",
        "## What it costs and how well it does",
        "",
        f"It has {options[0].params:,} parameters. MACs are of one image; top-1 and top-5 in per cent of "
        f"{description.test_images:,} test images"
        + (f", held-out top-1 of {description.heldout_images:,} images to choose on." if description.heldout_images else "."),
        "",
        *_table(description),
        "",
        *_accuracies(accuracies),
        *_cascades(description, in_bundle=form == "bundle"),
        "## Data and training",
        "",
        origin,
        "",
        f"- weights: {code(description.checkpoint)}",
        f"- statistics: {code(description.statistics)}",
        "",
        *_block("yaml", recipe.rstrip()),
        "",
        "## How to load it",
        "",
        format_of(form).loading(_images(description.input, network.in_channels)).rstrip(),
        "",
        _checked(f"no {result} was off by more than {bound}", accuracies, check),
        "",
    ]
    return "\n".join(lines)


def code(text: str) -> str:
    """Return text as a Markdown code span, its control characters escaped."""
    shown = printable(text) or "(empty)"
    fence = "`" * (_longest_run(shown) + 1)
    edges = {shown[0], shown[-1]} & {"`", " "}
    padding = " " if edges and not shown.isspace() else ""  # Markdown strips one space, unless the span is only spaces
    return f"{fence}{padding}{shown}{padding}{fence}"


def _accuracies(accuracies: Accuracies | None) -> list[str]:
    """Return the accuracies in a lower precision beside those in float32; nothing for float32."""
    if accuracies is None:
        return []
    how = {
        "fp16": "Weights and activations are float16; input and output keep their types.",
        "int8": f"Weights are int8 with a scale for each output channel, activations uint8. Their ranges are those of "
        f"{accuracies.calibration_images:,} training images without augmentation."
        if accuracies.calibration_images
        else "",
    }[accuracies.name]
    rows = [f"| {accuracies.name} | {runtime_name(runtime)} | {top1:.2f} |" for runtime, top1 in accuracies.top1.items()]
    return [
        f"The accuracies above are those of the network in float32. {how} "
        f"Top-1 in per cent of the same {accuracies.images:,} test images in both precisions:",
        "",
        "| precision | run by | top-1 |",
        "|---|---|---:|",
        f"| float32 | {OWN} | {accuracies.float32_top1:.2f} |",
        *rows,
        "",
    ]


def _checked(agrees: str, accuracies: Accuracies | None, check: str | None) -> str:
    """Return the sentence on the check of the files."""
    second = "" if check is None else f" in {OWN} and in {runtime_name(check)}"
    if accuracies is None:
        return f"Before it was written, it was run outside on real images{second}: {agrees}."
    return (
        f"Before it was written, its float32 form was run outside on real images: {agrees}. In {accuracies.name} it was run on "
        f"all test images{second}, and may lose at most {accuracies.max_drop:g} points of top-1."
    )


def _block(language: str, text: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", *map(printable, text.split("\n")), fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _images(takes: Input, channels: int) -> str:
    kind = "uint8, 0 to 255" if takes.raw else "float32, normalised"
    return f"{kind}, (N, {channels}, {takes.size}, {takes.size})"


def _input(takes: Input, channels: int) -> list[str]:
    how = "" if takes.interpolation == "bilinear" else f" ({takes.interpolation} interpolation)"
    steps = [f"scale the shorter side to {takes.resize} px{how}, take the central {takes.size} x {takes.size} px"]
    steps.append(f"{'RGB' if channels == 3 else 'grey'}, channels first")
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (takes.mean, takes.std))
    normalise = f"divide by 255, subtract the mean ({mean}), divide by the standard deviation ({std})"
    steps.append(f"nothing else: the network itself will {normalise}" if takes.raw else normalise)
    return [f"`images`: {_images(takes, channels)}; N is free. From an image:", "", *(f"- {step}" for step in steps)]


def _cascades(description: Description, *, in_bundle: bool) -> list[str]:
    """Return the section on cascades; nothing without cascades."""
    if not description.cascades:
        return []
    lines = [
        "In a cascade, each image begins with the first member. A member answers the image if its highest probability is at "
        "least the number after the colon; otherwise the image goes on to the next member. The number after `~` is the "
        "temperature, by which the logits are divided, and `mean/` says that the probabilities of all members so far are "
        "averaged. MACs are means over images, and `worst` is an image that all members see. Cascades were chosen on held-out "
        "images.",
        "",
        "| cascade | mean MACs | of `full` | worst | answered by each | top-1 | held-out mean MACs | held-out top-1 |",
        f"|---|{'---:|' * 7}",
    ]
    for option in description.cascades:
        shares = ", ".join(f"{share:.1f} %" for share in option.left)
        cells = [f"{option.macs:,}", f"{100 * option.relative:.1f} %", f"{option.worst_macs:,}", shares]
        cells += [f"{option.top1:.2f}", f"{option.heldout_macs:,}", f"{option.heldout_top1:.2f}"]
        lines.append(f"| {code(str(option.cascade))} | {' | '.join(cells)} |")
    if in_bundle:
        lines += [
            "",
            '`model(x, max_macs="50%", cascade=True)` runs the most accurate of them whose mean MACs on held-out images are '
            "within the budget, and returns log-probabilities.",
        ]
    return [*lines, ""]


def _table(description: Description) -> list[str]:
    top5 = any(option.top5 is not None for option in description.options)
    heldout = bool(description.heldout_images)
    names = ["MACs", "of `full`", "top-1", *(["top-5"] if top5 else []), *(["held-out top-1"] if heldout else [])]
    lines = [f"| instance | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for option in description.options:
        cells = [f"{option.macs:,}", f"{100 * option.relative:.1f} %", f"{option.top1:.2f}"]
        cells += [f"{option.top5:.2f}"] if top5 else []
        cells += [f"{option.heldout_top1:.2f}"] if heldout else []
        instance = code(str(option.instance)).replace("|", "\\|")
        lines.append(f"| {instance} | {' | '.join(cells)} |")
    return lines
