"""Training as a stage: what it needs to start, to go on, to stop, and to be kept."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdpctl.errors import DataError, DivergedError, NotFoundError, RecipeError, RunInterruptedError
from sdpctl.instance import FULL, Draw, Instance, draw_independent, draw_listed, draw_single
from sdpctl.pipeline.artifacts import (
    HISTORY,
    MODEL,
    RECIPE,
    TRAINING_STATE,
    initial_model,
    lines,
    read_lines,
)
from sdpctl.pipeline.context import Context, grid, named, recipe_layer, recipe_of, short, stage_key
from sdpctl.pipeline.interruption import Interruption
from sdpctl.randomness import derive
from sdpctl.recipe.schema import Recipe
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from sdpctl.models.chain import Chain

FINITE_EVERY = 50
"""Steps between two looks at whether the loss is finite: each waits for the device."""


def train(recipe: Recipe, context: Context, *, resume: bool = False) -> Artifact | None:
    """Train a network, one instance a step, and commit its checkpoint as `<name>`.

    Args:
        recipe: what to train, and on what.
        context: where, and who is told.
        resume: go on from `<name>.partial`, where the same recipe left one.

    Returns:
        The checkpoint; None on a dry run that would have trained.

    Raises:
        DataError: where the data is not there, or not what was promised.
        DivergedError: where the loss is no longer finite; the last good checkpoint stays.
        RunInterruptedError: after a signal; what was learnt is committed.
    """
    context.prepare()
    recipe = resolved(context.workspace.fingerprint(recipe), context)
    key = train_key(recipe)
    if (found := context.known(key, recipe.name)) is not None:
        layer = recipe_layer(recipe)
        if context.dry_run or context.store.read(found, RECIPE) == layer:
            return found
        # Trained for a recipe that differed elsewhere: the checkpoint that this one would have led to, digest and all.
        layers = {title: context.store.read(found, title) for title in (MODEL, HISTORY)} | {RECIPE: layer}
        kept = context.store.commit("checkpoint", layers, key=key, tag=recipe.name)
        context.report.note(f"{recipe.name}: the same weights with this recipe, {short(kept)}")
        return kept
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
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"init": artifact.digest})})


def train_key(recipe: Recipe, *, finished: bool = True) -> str:
    """Return the key of a training; name, calibration and evaluation do not matter to it."""
    identity = recipe.identity()
    parts = {part: identity[part] for part in ("seed", "model", "data", "sdpoint", "train")}
    return stage_key("checkpoint", recipe=parts, finished=finished)


def partial_tag(recipe: Recipe) -> str:
    """Return the tag of what can be resumed."""
    return f"{recipe.name}.partial"


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
    weights = bytes_to_tensors(context.store.read(checkpoint, MODEL))
    try:
        whole = fill(model, weights)
    except DataError as error:
        raise RecipeError([f"{called} do not fit this network: {line}" for line in str(error).splitlines()]) from error
    if not whole:
        context.report.note(f"{called} are of {len(weights['fc.bias'])} classes; the head is new")


class _Run:
    """One training of a recipe."""

    def __init__(self, recipe: Recipe, context: Context) -> None:
        import torch

        from sdpctl.engine.device import pick_device
        from sdpctl.engine.train import Trainer, TrainSettings
        from sdpctl.pipeline.inputs import open_data

        self.recipe, self.context = recipe, context
        self.device = pick_device(recipe.device)
        self.data = open_data(recipe, self.device)
        section = recipe.train
        if section.epochs and section.validation.every and not self.data.holdout_indices:
            share = f"data.holdout={100 * recipe.data.holdout:g}%"
            raise DataError(f"{share} of each class is no image: raise it, or set train.validate.every=0")
        settings = TrainSettings(**section.model_dump(exclude={"init", "validation", "checkpoint"}))
        with torch.device("meta" if context.dry_run else "cpu"):
            model = initial_model(recipe)
        if not context.dry_run:
            if section.init is not None:
                _begin_with(model, recipe, section.init, context)
            model = model.to(self.device)
        self.trainer = Trainer(model, settings, make_draw(recipe), self.data.steps_per_epoch, noise=self.noise())
        self.history: list[dict[str, Any]] = []
        self.saved: Artifact | None = None
        self.saved_at = time.monotonic()
        self.validated = tuple(map(Instance.parse, section.validation.instances))

    def noise(self) -> Callable[[int], int] | None:
        """Return the seed of what the network itself draws in a step, where it does."""
        seed = self.recipe.seed
        return (lambda step: derive(seed, "masks", step)) if self.recipe.model.masks == "random" else None

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
            while self.trainer.epoch < epochs:
                self.epoch(interruption, bar.advance)
        artifact = self.commit(finished=True)
        report.note(f"{self.recipe.name}: trained, {short(artifact)}")
        if interruption.signum is not None:
            raise RunInterruptedError(interruption.signum, f"{self.recipe.name}: interrupted, but the training was at its end")
        return artifact

    def take_up(self, *, resume: bool) -> None:
        """Go on where the same recipe stopped, if asked to, and say what is done."""
        report, name, tag = self.context.report, self.recipe.name, partial_tag(self.recipe)
        found = self.context.tagged(tag)
        ours = found is not None and found.key == train_key(self.recipe, finished=False)
        if ours:
            self.saved = found  # what is saved next takes its place
        if not resume:
            if ours:
                report.note(f"{name}: starting afresh; --resume would go on from {tag}")
            return
        if found is None or not ours:
            why = "nothing is saved" if found is None else f"{tag} is of another recipe"
            report.note(f"{name}: starting afresh, {why}")
            return
        from sdpctl.engine.tensors import bytes_to_tensors

        store = self.context.store
        self.trainer.model.load_state_dict(bytes_to_tensors(store.read(found, MODEL)))
        self.trainer.load_state(bytes_to_tensors(store.read(found, TRAINING_STATE)))
        self.history = read_lines(store.read(found, HISTORY))
        step, steps = self.trainer.step, self.data.steps_per_epoch
        report.note(f"{name}: going on after epoch {step // steps}, step {step % steps}")

    def epoch(self, interruption: Interruption, advance: Callable[[str], None]) -> None:
        """Train what is left of the current epoch, validate, save."""
        trainer, steps, section = self.trainer, self.data.steps_per_epoch, self.recipe.train
        number, start = trainer.epoch, trainer.step % steps
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
            record: dict[str, Any] = {"epoch": number + 1} | trainer.finish_epoch()
            every = section.validation.every
            if every and ((number + 1) % every == 0 or number + 1 == section.epochs):
                record["validation"] = self.validate()
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

    def validate(self) -> dict[str, Any]:
        """Score the chosen instances on the holdout, statistics calibrated anew."""
        from sdpctl.engine.calibrate import calibrate
        from sdpctl.engine.evaluate import evaluate

        recipe, model = self.recipe, self.trainer.model
        precision = recipe.train.precision
        batches = self.data.calibration(recipe.train.validation.batches)
        statistics = calibrate(model, self.validated, batches, precision=precision, memory=self.recipe.memory)
        holdout = self.data.holdout(recipe.data.batch_size)
        scores = evaluate(model, self.validated, holdout, statistics, precision=precision, memory=self.recipe.memory)
        return {str(instance): {"top1": score.top1, "loss": score.loss} for instance, score in scores.items()}

    def tell(self, record: dict[str, Any], rate: float) -> None:
        """Say how an epoch went."""
        validation = "".join(f"  {name} {score['top1']:.2f} %" for name, score in record.get("validation", {}).items())
        self.context.report.note(
            f"epoch {record['epoch']}/{self.recipe.train.epochs}  loss {record['loss']:.4f}  train {record['accuracy']:.2f} %"
            f"{'  holdout' + validation if validation else ''}  lr {record['lr']:.4g}  {rate:,.0f} images/s"
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
        if not finished:
            layers[TRAINING_STATE] = tensors_to_bytes(self.trainer.state())
        key = train_key(self.recipe, finished=finished)
        tag = self.recipe.name if finished else partial_tag(self.recipe)
        artifact = self.context.store.commit("checkpoint", layers, key=key, tag=tag)
        if finished and self.saved is not None:
            self.context.store.discard(self.saved)
        return artifact
