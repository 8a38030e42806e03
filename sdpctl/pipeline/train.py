"""Training as a stage: what it needs to start, to go on, to stop, and to be kept."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdpctl.errors import (
    DataError,
    DivergedError,
    IntegrityError,
    LoaderError,
    NotFoundError,
    RecipeError,
    RunInterruptedError,
    UsageError,
)
from sdpctl.instance import FULL, Instance
from sdpctl.pipeline.artifacts import (
    HISTORY,
    MODEL,
    RECIPE,
    TRAINING_STATE,
    initial_model,
    lines,
    read_records,
)
from sdpctl.pipeline.context import Context, grid, named, recipe_layer, recipe_of, short, stage_key
from sdpctl.pipeline.interruption import Interruption
from sdpctl.randomness import derive
from sdpctl.recipe.schema import Recipe
from sdpctl.sdpoint import Draw, draw_independent, draw_listed, draw_single
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

GROWN = 1.1
"""Factor by which a loss is above what it was before, or that of guessing, where it is said to grow."""

FINITE_EVERY = 50
"""Steps between two looks at whether the loss is finite: each waits for the device."""


def train(recipe: Recipe, context: Context, *, resume: bool = False) -> Artifact | None:
    """Train a network, one instance a step, and commit its checkpoint as `<name>`.

    Args:
        recipe: what to train, and on what.
        context: where, and who is told.
        resume: go on from `<name>.partial`, where the same recipe left one; `context.force` starts afresh instead.

    Returns:
        The checkpoint; None on a dry run that would have trained.

    Raises:
        DataError: where the data is not there, or not what was promised.
        DivergedError: where the loss is no longer finite; the last good checkpoint stays.
        LoaderError: where processes that load data died; what was learnt is committed.
        RunInterruptedError: after a signal; what was learnt is committed.
        UsageError: where `<name>.partial` of a different recipe was to be resumed; it names the keys that differ.
    """
    context.find_store()
    recipe = resolved(context.workspace.fingerprint(recipe), context)
    key = train_key(recipe)
    if (found := context.known(key, recipe.name)) is not None:
        layer = recipe_layer(recipe)
        if context.dry_run or context.store.read(found, RECIPE) == layer:
            return found
        # Trained for a recipe that differed elsewhere: the checkpoint that this one would have led to, digest and all.
        layers = {title: context.store.read(found, title) for title in (MODEL, HISTORY)} | {RECIPE: layer}
        layers |= context.workspace.left_out(recipe)
        kept = context.store.commit("checkpoint", layers, key=key, tag=recipe.name)
        context.report.note(f"{recipe.name}: the same weights with this recipe, {short(kept)}")
        return kept
    resume = resume and not context.force
    if resume:
        _check_resumable(recipe, context)
    context.prepare()
    run = _Run(recipe, context)
    if context.dry_run:
        context.report.note(f"{recipe.name}: would train {run.plan()}")
        return None
    with Interruption() as interruption:
        return run.finish(interruption, resume=resume)


def resolved(recipe: Recipe, context: Context) -> Recipe:
    """Return the recipe with the digest of the checkpoint that its training begins with.

    Raises:
        NotFoundError: where there is no such checkpoint.
    """
    ref = recipe.train.init
    if ref is None:
        return recipe
    artifact = context.store.resolve(ref)
    if artifact.kind != "checkpoint":
        raise NotFoundError(f"train.init={ref} is of kind {artifact.kind}, no checkpoint; `sdpctl store ls` lists those")
    return recipe.changed(train={"init": artifact.digest})


def trained_parts(recipe: Recipe) -> dict[str, Any]:
    """Return what a training depends on; name, calibration and evaluation do not matter to it."""
    identity = recipe.identity()
    return {part: identity[part] for part in ("seed", "model", "data", "sdpoint", "train")}


def train_key(recipe: Recipe, *, finished: bool = True) -> str:
    """Return the key of a training."""
    return stage_key("checkpoint", recipe=trained_parts(recipe), finished=finished)


def partial_tag(recipe: Recipe) -> str:
    """Return the tag of what can be resumed."""
    return f"{recipe.name}.partial"


def differing_keys(recipe: Recipe, other: Recipe) -> list[str]:
    """Return the keys that a training depends on and in which two recipes differ, dotted and sorted."""
    ours, theirs = (dict(_dotted(trained_parts(each))) for each in (recipe, other))
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _difference(recipe: Recipe, saved: Artifact, context: Context) -> str | None:
    """Say how the recipe of a saved training differs from this one; None where this one can go on from it."""
    if saved.key == train_key(recipe, finished=False):
        return None
    keys = differing_keys(recipe, recipe_of(saved, context))
    return f"a recipe that differs in {', '.join(keys)}" if keys else "a different version of sdpctl"


def _check_resumable(recipe: Recipe, context: Context) -> None:
    """Refuse to go on from what a different recipe left.

    Raises:
        UsageError: naming the keys that differ.
    """
    tag = partial_tag(recipe)
    saved = context.tagged(tag)
    difference = None if saved is None else _difference(recipe, saved, context)
    if difference is not None:
        raise UsageError(
            f"{recipe.name}: {tag} was saved by {difference}; resume it with its own recipe, --set name=NAME trains beside it, "
            "and --force starts afresh in its place"
        )


def make_draw(recipe: Recipe) -> Draw:
    """Return the instance of each training step, as the recipe says."""
    if recipe.sdpoint is None:
        return lambda _: FULL
    if recipe.sdpoint.instances is not None:
        return draw_listed(named(recipe.sdpoint.instances, recipe.model.points), recipe.seed)
    if recipe.sdpoint.draw == "single" and recipe.model.together:
        return draw_listed(grid(recipe), recipe.seed)
    if recipe.sdpoint.draw == "single":
        return draw_single(recipe.points, recipe.ratios, recipe.seed)
    return draw_independent(recipe.points, recipe.ratios, recipe.seed, recipe.sdpoint.p)


def grows(losses: Sequence[float], classes: int) -> bool:
    """Say whether the loss grows: the last epoch's is clearly above the least before, and above that of guessing.

    A loss below that of guessing may rise for good reasons: other instances were drawn, the labels are hard.

    Args:
        losses: mean cross-entropy of each epoch so far.
        classes: of the data; guessing among them has the loss log(classes).
    """
    return len(losses) > 1 and losses[-1] > GROWN * max(min(losses[:-1]), math.log(classes))


def _begin_with(model: "Chain", recipe: Recipe, digest: str, context: Context) -> None:
    """Load the weights of a checkpoint; where its classes are others, the head stays new.

    Raises:
        RecipeError: with a line for each of the first tensors that do not fit the network; or where the shapes fit, but the
            checkpoint's network has a different shortcut.
    """
    from sdpctl.engine.tensors import bytes_to_tensors
    from sdpctl.engine.weights import fill

    checkpoint = context.store.resolve(digest)
    called = f"train.init: the weights of {digest[7:19]}"
    theirs, ours = (section.shape_change for section in (recipe_of(checkpoint, context).model, recipe.model))
    if {theirs, ours} == {"padding", "padding-centred"}:
        raise RecipeError([f"{called} are of a network with model.shortcut={theirs}, not {ours}; set model.shortcut={theirs}"])
    weights = bytes_to_tensors(context.store.read(checkpoint, MODEL), f"{digest}: {MODEL}")
    try:
        whole = fill(model, weights)
    except DataError as error:
        raise RecipeError([f"{called} do not fit this network: {line}" for line in error.lines]) from error
    if not whole:
        context.report.note(f"{called} are of {len(weights[model.head_names[0]])} classes; the head is new")


class _Run:
    """One training of a recipe."""

    def __init__(self, recipe: Recipe, context: Context) -> None:
        import torch

        from sdpctl.engine.device import pick_device
        from sdpctl.engine.threads import choose_threads
        from sdpctl.engine.train import Trainer
        from sdpctl.pipeline.inputs import open_data

        self.recipe, self.context = recipe, context
        self.device = pick_device(recipe.device)
        self.data = open_data(recipe, self.device, context)
        section = recipe.train
        if section.epochs and section.validate.every and not self.data.holdout_indices:
            share = f"data.holdout={100 * recipe.data.holdout:g}%"
            raise DataError(f"{share} of each class is no image: raise it, or set train.validate.every=0")
        with torch.device("meta" if context.dry_run else "cpu"):
            model = initial_model(recipe)
        choose_threads(model, recipe.model.in_channels, recipe.data.image_size, recipe.data.batch_size)
        if not context.dry_run:
            if section.init is not None:
                _begin_with(model, recipe, section.init, context)
            model = model.to(self.device)
        self.trainer = Trainer(model, section, make_draw(recipe), self.data.steps_per_epoch, noise=self.noise(model))
        self.history: list[dict[str, Any]] = []
        self.warned = False
        self.saved: Artifact | None = None
        self.saved_at = time.monotonic()
        self.validated = tuple(map(Instance.parse, section.validate.instances))

    def noise(self, model: "Chain") -> Callable[[int], int] | None:
        """Return the seed of what the network itself draws in a step; None where it draws nothing."""
        seed = self.recipe.seed
        return (lambda step: derive(seed, "masks", step)) if model.draws_in_training else None

    def plan(self) -> str:
        """Say what would be done."""
        recipe, steps = self.recipe, self.data.steps_per_epoch
        images = len(self.data.train_indices)
        params = sum(p.numel() for p in self.trainer.model.parameters())
        return (
            f"{recipe.model.arch} ({params:,} params) on {images:,} images of {recipe.data.dataset}, "
            f"{recipe.train.epochs} epochs of {steps} steps, on {self.device}"
        )

    def finish(self, interruption: Interruption, *, resume: bool) -> Artifact:
        """Train to the end."""
        self.take_up(resume=resume)
        epochs, report = self.recipe.train.epochs, self.context.report
        if self.trainer.epoch < epochs:
            report.note(f"{self.recipe.name}: training {self.plan()}")
        total = epochs * self.data.steps_per_epoch
        with report.progress(f"training {self.recipe.name}", total, self.trainer.step) as bar:
            while len(self.history) < epochs:
                try:
                    self.epoch(interruption, bar.advance)
                except LoaderError as error:
                    saved = short(self.save())
                    text = f"{self.recipe.name}: {error}; {saved} is saved; `run` or `train --resume` goes on from it"
                    raise LoaderError(text) from error
        artifact = self.commit(finished=True)
        report.note(f"{self.recipe.name}: trained, {short(artifact)}")
        if interruption.signum is not None:
            raise RunInterruptedError(interruption.signum, f"{self.recipe.name}: interrupted, but the training was at its end")
        return artifact

    def take_up(self, *, resume: bool) -> None:
        """Go on where the same recipe stopped, if asked to, and say what is done."""
        report, name, tag = self.context.report, self.recipe.name, partial_tag(self.recipe)
        found = self.context.tagged(tag)
        if found is None:
            if resume:
                report.note(f"{name}: starting afresh, nothing is saved")
            return
        if (difference := _difference(self.recipe, found, self.context)) is not None:
            report.note(f"{name}: starting afresh; {tag} was saved by {difference}, and {short(found)} stays without a tag")
            return
        self.saved = found  # what is saved next takes its place
        if not resume:
            report.note(f"{name}: starting afresh; --resume would go on from {tag}")
            return
        from sdpctl.engine.tensors import bytes_to_tensors

        store = self.context.store
        model = self.trainer.model
        model.load_state_dict(bytes_to_tensors(store.read(found, MODEL), f"{tag}: {MODEL}", model.state_dict()))
        state = bytes_to_tensors(store.read(found, TRAINING_STATE), f"{tag}: {TRAINING_STATE}")
        self.history = read_records(store, found, HISTORY)
        steps = self.data.steps_per_epoch
        try:
            self.trainer.load_state(state)
            if not 0 <= self.trainer.step - len(self.history) * steps <= steps:
                raise ValueError(f"it is at step {self.trainer.step}, after {len(self.history)} epochs of {steps}")
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise IntegrityError(
                f"{found.digest}: {TRAINING_STATE} does not fit this recipe ({reason}); start afresh"
            ) from error
        step = self.trainer.step
        report.note(f"{name}: going on after epoch {step // steps}, step {step % steps}")

    def epoch(self, interruption: Interruption, advance: Callable[[str], None]) -> None:
        """Train what is left of the current epoch, validate, save."""
        trainer, steps, section = self.trainer, self.data.steps_per_epoch, self.recipe.train
        number = len(self.history)
        start = trainer.step - number * steps  # all of them where it was stopped in the validation
        began = time.monotonic()
        try:
            for step in trainer.steps(self.data.training(number, start)):
                advance(f"epoch {number + 1}/{section.epochs}")
                if step % steps == 0:
                    continue  # the epoch is to be counted before anything is saved
                if step % FINITE_EVERY == 0:
                    trainer.check_finite()
                if interruption.signum is not None:
                    self.stop(interruption.signum)
                if time.monotonic() - self.saved_at > 60 * section.checkpoint.minutes:
                    self.save()
            seconds = time.monotonic() - began
            trainer.check_finite()
            every = section.validate.every
            validates = every and ((number + 1) % every == 0 or number + 1 == section.epochs)
            validation = {"validation": self.validate(interruption)} if validates else {}
            record: dict[str, Any] = {"epoch": number + 1} | trainer.finish_epoch() | validation
        except DivergedError as error:
            self.context.workspace.log(self.recipe.name, event="diverged", message=str(error))
            tag = partial_tag(self.recipe)
            kept = f"{tag} keeps {short(self.saved)}" if self.saved else "nothing was saved before"
            raise DivergedError(f"{self.recipe.name}: {error}; {kept}; lower train.lr={section.lr:g}") from error
        self.history.append(record)
        rate = (steps - start) * self.recipe.data.batch_size / seconds
        self.tell(record, rate)
        self.context.workspace.log(self.recipe.name, event="epoch", **record, seconds=seconds, images_per_second=rate)
        if number + 1 < section.epochs:
            if interruption.signum is not None:
                self.stop(interruption.signum)
            if (number + 1) % section.checkpoint.epochs == 0:
                self.save()

    def validate(self, interruption: Interruption) -> dict[str, Any]:
        """Score the chosen instances on the holdout, statistics calibrated anew."""
        from sdpctl.engine.calibrate import calibrate
        from sdpctl.engine.evaluate import evaluate

        recipe, model = self.recipe, self.trainer.model
        batches = interruption.between(self.data.calibration(recipe.train.validate.batches), self.stop)
        statistics = calibrate(model, self.validated, batches, recipe.validation)
        holdout = interruption.between(self.data.holdout(recipe.data.batch_size), self.stop)
        scores = evaluate(model, self.validated, holdout, statistics, recipe.validation)
        return {str(instance): {"top1": score.top1, "loss": score.loss} for instance, score in scores.items()}

    def tell(self, record: dict[str, Any], rate: float) -> None:
        """Say how an epoch went."""
        validation = "".join(f"  {name} {score['top1']:.2f} %" for name, score in record.get("validation", {}).items())
        self.context.report.note(
            f"epoch {record['epoch']}/{self.recipe.train.epochs}  loss {record['loss']:.4f}  train {record['accuracy']:.2f} %"
            f"{'  holdout' + validation if validation else ''}  lr {record['lr']:.4g}  {rate:,.0f} images/s"
        )
        losses = [past["loss"] for past in self.history]
        section, classes = self.recipe.train, len(self.data.classes)
        if not self.warned and record["epoch"] > section.warmup_epochs and grows(losses, classes):
            self.warned = True
            self.context.report.note(
                f"{self.recipe.name}: the loss grows, from {min(losses):.4g} to {losses[-1]:.4g}; guessing among {classes} "
                f"classes has {math.log(classes):.4g}. train.lr={section.lr:g} is probably too high; stop, and try again with "
                f"--set train.lr={section.lr / 10:g}"
            )

    def stop(self, signum: int) -> None:
        """Commit what there is and leave."""
        artifact = self.save()
        raise RunInterruptedError(
            signum,
            f"{self.recipe.name}: interrupted; {short(artifact)} is saved; `run` or `train --resume` goes on from it",
        )

    def save(self) -> Artifact:
        """Commit what is needed to go on, in the place of what was saved before."""
        self.trainer.check_finite()
        before, self.saved = self.saved, self.commit(finished=False)
        if before is not None and before.digest != self.saved.digest:
            self.context.store.discard(before)
        self.saved_at = time.monotonic()
        return self.saved

    def commit(self, *, finished: bool) -> Artifact:
        """Commit the checkpoint; a finished one takes the place of what could be resumed."""
        from sdpctl.engine.tensors import tensors_to_bytes

        layers = {
            MODEL: tensors_to_bytes(self.trainer.model.state_dict()),
            HISTORY: lines(self.history),
            RECIPE: recipe_layer(self.recipe),
        }
        layers |= self.context.workspace.left_out(self.recipe)
        if not finished:
            layers[TRAINING_STATE] = tensors_to_bytes(self.trainer.state())
        key = train_key(self.recipe, finished=finished)
        tag = self.recipe.name if finished else partial_tag(self.recipe)
        artifact = self.context.store.commit("checkpoint", layers, key=key, tag=tag)
        if finished and self.saved is not None:
            self.context.store.discard(self.saved)
        return artifact
