"""`sdpctl init`."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdpctl.cli.command import Session, command
from sdpctl.cli.files import check_output, write_file
from sdpctl.cli.row_table import RowTable
from sdpctl.errors import DataError
from sdpctl.untrusted import printable

if TYPE_CHECKING:
    from sdpctl.cli.rows import FindingRow
    from sdpctl.data.survey import Survey

NAMED = 3
"""Maximum number of images or classes that a finding names; the JSON document has all."""


@command("init", "force", "dry_run", "json_", "quiet")
def init(
    session: Session,
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder that holds your images.")] = Path(),
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at a folder of images, say what is in it, and write a recipe that fits it.

    Nothing in the folder is changed.
    """
    check_output(output, force=session.force)
    from sdpctl.cli.tables import finding_table, split_table
    from sdpctl.data.survey import survey
    from sdpctl.recipe.first import first_recipe

    def watch(found: Any, total: int) -> Iterator[Any]:
        with session.output.progress(f"looking at {total:,} images", total) as bar:
            for result in found:
                yield result
                bar.advance()

    seen = survey(folder, watch)
    findings = [*_findings(seen)]
    text = first_recipe(seen, _root(seen.root), str(output), at_hand=_at_hand())
    if not session.dry_run:
        write_file(output, text.encode())
    stops = any(finding.kind == "stop" for finding in findings)
    document = _document(seen) | {
        "findings": [finding.record() for finding in findings],
        "recipe": str(output),
        "written": not session.dry_run,
        "runs": not stops,
    }
    tables: list[RowTable[Any]] = [split_table(seen), *([finding_table(findings)] if findings else [])]
    session.output.result(session.command, document, tables)
    run = f"sdpctl run {shlex.quote(str(output))}"
    written = "would be written" if session.dry_run else "is written"
    then = f"first see to what is marked `stop`, then run `{run}`" if stops else f"next: {run}"
    session.output.note(f"{output} {written}; {then}")


def _root(root: Path) -> str:
    """Return the value of `data.root`: relative to the current folder if the root is within it.

    Raises:
        DataError: if the path is not UTF-8, which a recipe must be.
    """
    text = os.path.relpath(root) if root.absolute().is_relative_to(Path.cwd()) or not root.is_absolute() else str(root)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{printable(text)}: the name of this folder is not UTF-8; rename the folder") from None
    return f"./{text}" if text.startswith("~") else text


def _at_hand() -> bool:
    """Return whether the cache of huggingface_hub has the weights that the recipe would fine-tune; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    from sdpctl.recipe.first import FINE_TUNED

    return isinstance(try_to_load_from_cache(".".join(FINE_TUNED), "model.safetensors"), str)


def _document(seen: "Survey") -> dict[str, Any]:
    groups, (train, test) = seen.groups, seen.counts
    return {
        "root": printable(str(seen.root)),
        "arrangement": dict(seen.arrangement),
        "parts": list(seen.parts),
        "classes": [{"name": name, "train": train[i], "test": test[i]} for i, name in enumerate(seen.classes)],
        "sizes": [{"image": printable(name), "width": width, "height": height} for width, height, name in seen.sizes],
        "colours": dict(seen.modes),
        "turned": sum(facts.turned for facts in seen.looked.values()),
        "unreadable": {printable(name): reason for name, reason in seen.unreadable.items()},
        "duplicates": {
            key: [[printable(name) for name in names] for names in getattr(groups, key)]
            for key in ("within", "across", "labelled")
        },
        "other_files": dict(seen.others),
        "loose_images": seen.loose,
    }


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(name) for name in names[:NAMED]) + more


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _findings(seen: "Survey") -> Iterator["FindingRow"]:
    """Yield what a user should know: `stop` before the recipe runs, `check` before its result is trusted, and `note`."""
    from sdpctl.cli.rows import FindingRow
    from sdpctl.recipe.first import ENLARGED, UNEQUAL, VERY_UNEQUAL, Choice

    choice = Choice.of(seen)
    parts, divided = seen.parts, "test_share" in seen.arrangement

    def row(kind: str, found: str, advice: str) -> FindingRow:
        return FindingRow(kind=kind, found=found, advice=advice)

    for part in (0, 1):
        if emptied := seen.emptied(part):
            advice = "remove the damaged files" if divided else "add images, or remove the damaged files"
            yield row("stop", f"no image of {_some(emptied)} in {parts[part]} can be decoded", advice)
    if seen.unreadable:
        named = _some([f"{name} ({why})" for name, why in seen.unreadable.items()])
        advice = "the recipe leaves them out (data.skip_unreadable); replace or remove them"
        yield row("check", f"{_images(len(seen.unreadable))} cannot be decoded: {named}", advice)
    nowhere = [name for name in seen.lacking(0) if name in seen.lacking(1)]
    for part, effect in ((0, "the network never learns it"), (1, "its accuracy stays unknown")):
        if lacking := [name for name in seen.lacking(part) if name not in nowhere]:
            advice = f"add images; until then {effect} (data.partial)"
            yield row("check", f"class without images in {parts[part]}: {_some(lacking)}", advice)
    if nowhere:
        yield row("check", f"class without any image: {_some(nowhere)}", "remove these folders, or add images")
    yield from _duplicates(seen)
    for names in seen.similar:
        alike = ", ".join(map(repr, names))
        yield row(
            "check", f"classes with nearly the same name: {alike}", "if they are one class, move the images into one folder"
        )
    if divided:
        found = f"no test images: the recipe tests {seen.arrangement['test_share']:.0%} of each class (data.test_share)"
        yield row("note", found, "for test images of your own, make the folders train and val with the classes in each")
    if choice.ratio >= UNEQUAL:
        counts = seen.counts[0]
        small, large = (counts.index(of(count for count in counts if count)) for of in (min, max))
        found = (
            f"unequal classes: {printable(seen.classes[large])} has {counts[large]:,} training images, "
            f"{printable(seen.classes[small])} has {counts[small]:,}"
        )
        balances = "the recipe balances them (data.balance: sampler)"
        yield row(
            "check", found, balances if choice.ratio >= VERY_UNEQUAL else "data.balance=sampler draws each class as often"
        )
    few = [name for name, count in zip(seen.classes, seen.counts[0], strict=True) if 0 < count < 10]
    if few:
        yield row("check", f"fewer than 10 training images: {_some(few)}", "add images: so few teach a network little")
    if tiny := seen.smaller(choice.image_size / ENLARGED):
        found = f"{_images(len(tiny))} enlarged more than {ENLARGED} times: {_some(tiny)}"
        yield row("check", found, f"remove them, or lower data.image_size ({choice.image_size})")
    if seen.nested:
        yield row("note", f"folders within classes: {_some(seen.nested)}", "their images count for the outer folder's class")
    if seen.loose:
        yield row("note", f"{_images(seen.loose)} in no class folder", "they are not used; move them into a class folder")
    if seen.unused:
        yield row("note", f"folders beside {' and '.join(parts)}: {_some(seen.unused)}", "they are not used")
    if seen.others:
        named = ", ".join(f"{count:,} {printable(suffix)}" for suffix, count in sorted(seen.others.items()))
        yield row("note", f"files that are not images: {named}", "they are ignored")
    if turned := sum(facts.turned for facts in seen.looked.values()):
        yield row("note", f"{_images(turned)} stored turned or mirrored (EXIF)", "photographs are turned upright")
    if transparent := sum(facts.transparent for facts in seen.looked.values()):
        yield row("note", f"{_images(transparent)} with transparency", "it is dropped: the network sees the colours under it")


def _duplicates(seen: "Survey") -> Iterator["FindingRow"]:
    from sdpctl.cli.rows import FindingRow

    groups = seen.groups

    def row(images: Sequence[Sequence[str]], where: str, advice: str) -> FindingRow:
        first = " = ".join(printable(name) for name in images[0][:NAMED])
        sets = "1 image occurs" if len(images) == 1 else f"{len(images):,} images occur"
        return FindingRow(kind="check", found=f"{sets} {where}: {first}", advice=advice)

    if groups.across:
        advice = "remove one of each: the test would be too easy"
        yield row(groups.across, f"both in {seen.parts[0]} and in {seen.parts[1]}", advice)
    if groups.labelled:
        yield row(groups.labelled, "in several classes", "keep the right one: the others are wrong labels")
    if groups.within:
        yield row(groups.within, "more than once in a class", "remove the copies: they count more than other images")
