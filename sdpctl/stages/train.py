"""Training: start or resume it, stop it on a signal, and save it in the store."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdpctl.errors import (
    DataError,
    DivergedError,
    IntegrityError,
    LoaderError,
    RecipeError,
    RunInterruptedError,
    UsageError,
)
from sdpctl.instance import Instance
from sdpctl.kinds import CHECKPOINT, HISTORY, MODEL, RECIPE, TRAINING_STATE
from sdpctl.models import empty_model
from sdpctl.recipe.resolved import Resolved
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.beginning import begin_from, teacher_of
from sdpctl.stages.context import Context
from sdpctl.stages.draws import training_macs
from sdpctl.stages.interruption import Interruption
from sdpctl.stages.layers import initial_model, lines, read_model, read_records, renew_head
from sdpctl.stages.network import recipe_layer, recipe_of
from sdpctl.stages.opening import open_data
from sdpctl.stages.shared import SharedNetwork, make_trainer
from sdpctl.stages.stage import Job, Made, Stage, Steps, Tracked, key_of
from sdpctl.stages.tracking import Tracking, epoch_figures
from sdpctl.store import Artifact

if TYPE_CHECKING:
    from sdpctl.data.loader import Batch
    from sdpctl.models.chain import Chain

GROWN = 1.1
"""The loss counts as growing if it exceeds both its earlier minimum and the loss of guessing by this factor."""

FINITE_EVERY = 50
"""Number of steps between two checks that the loss is finite; each check waits for the device."""


class Train(Stage):
    """Train a network with one or several instances per step.

    Args:
        recipe: the network, its data and its training.
        resume: continue the training saved as `NAME.partial`; by default if there is one.

    Raises:
        DataError: if the data is missing, or does not match its fingerprint.
        DivergedError: if the loss is no longer finite; the last saved checkpoint is kept.
        LoaderError: if processes that load data died; the training so far is committed.
        NotFoundError: if the checkpoint that `train.init` names does not exist.
        RunInterruptedError: after a signal; the training so far is committed.
        UsageError: if `NAME.partial` was saved by a different recipe; the message names the keys that differ.
    """

    kind = CHECKPOINT

    def __init__(self, recipe: Recipe, *, resume: bool | None = None) -> None:
        self.recipe = recipe
        self.resume = resume

    @property
    def tag(self) -> str:
        """`NAME`."""
        return self.recipe.name

    @property
    def tracked(self) -> Tracked:
        """The trackers of the recipe."""
        return tracked_by(self.recipe)

    def steps(self, context: Context) -> Steps:
        """Return the job; a training needs no other stage."""
        yield from ()
        context.make_store()
        resolved = resolve(self.recipe, context)
        interruption = Interruption()
        return Job(
            key=train_key(resolved),
            make=lambda: self._train(resolved, context, interruption),
            guard=interruption,
            adapt=lambda found: _with_recipe(found, resolved, context),
        )

    def task(self, context: Context) -> str:
        """Return the network, the images and the number of steps."""
        resolved = resolve(self.recipe, context)
        if self._resumes(context):
            _check_resumable(resolved, context)
        return f"train {_Training(resolved, context).description()}"

    def _resumes(self, context: Context) -> bool:
        return context.tagged(partial_tag(self.recipe)) is not None if self.resume is None else self.resume

    def _train(self, resolved: Resolved, context: Context, interruption: Interruption) -> Made:
        resume = self._resumes(context)
        if resume:
            _check_resumable(resolved, context)
        return _Training(resolved, context).finish(interruption, resume=resume)


def tracked_by(recipe: Recipe) -> Tracked:
    """Return the trackers of a recipe's training."""
    return Tracked(recipe.train.track, recipe.name)


def resolve(recipe: Recipe, context: Context) -> Resolved:
    """Return a recipe with the fingerprint of its data and the digests of the checkpoints that its training needs.

    If `train.init` names weights of a library, they are fetched unless the store has them, and the recipe has their
    preprocessing.

    Raises:
        DataError: if the data is missing or does not match the recipe's fingerprint, or weights cannot be fetched.
        NotFoundError: if a checkpoint that `train.init` or `train.distill.teacher` names does not exist.
        RecipeError: if a library does not have the weights that `train.init` names, or the teacher does not fit.
    """
    resolved = context.workspace.resolve(recipe)
    recipe, checkpoint = begin_from(resolved.recipe, context)
    teacher = teacher_of(replace(resolved, recipe=recipe), context)
    digests = {name: each.digest for name, each in (("init", checkpoint), ("teacher", teacher)) if each is not None}
    return replace(resolved, recipe=recipe, **digests)


def _with_recipe(found: Artifact, resolved: Resolved, context: Context) -> Made | None:
    """Adapt a checkpoint of the same training to a recipe that differs only in keys that do not affect training.

    Returns:
        A checkpoint with the same weights and this recipe, with the same digest as after a new training; None if the stored
        recipe is the same.
    """
    layer = recipe_layer(resolved)
    if context.store.read(found, RECIPE) == layer:
        return None
    layers = {title: context.store.read(found, title) for title in (MODEL, HISTORY)} | {RECIPE: layer}
    return Made(layers | context.workspace.left_out(resolved.recipe), "the same weights with this recipe")


TRAINED_BY = ("seed", "model", "data", "sdpoint", "train")
"""The keys and sections that determine the result of a training; the name and the other sections do not."""


def train_key(resolved: Resolved, *, finished: bool = True) -> str:
    """Return the key of a finished or unfinished training."""
    return key_of(CHECKPOINT, recipe=resolved.parts(*TRAINED_BY), finished=finished)


def partial_tag(recipe: Recipe) -> str:
    """Return the tag of a recipe's unfinished training, which can be resumed."""
    return f"{recipe.name}.partial"


def differing_keys(resolved: Resolved, other: Resolved) -> list[str]:
    """Return the dotted keys that affect training and differ between two recipes, sorted."""
    ours, theirs = (dict(_dotted(each.parts(*TRAINED_BY))) for each in (resolved, other))
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _difference(resolved: Resolved, saved: Artifact, context: Context) -> str | None:
    """Return how the recipe of a saved training differs from this recipe; None if this recipe can continue the training."""
    if saved.key == train_key(resolved, finished=False):
        return None
    keys = differing_keys(resolved, Resolved(recipe_of(saved, context)))
    return f"a recipe that differs in {', '.join(keys)}" if keys else "a different version of sdpctl"


def _check_resumable(resolved: Resolved, context: Context) -> None:
    """Refuse to continue a training that a different recipe saved.

    Raises:
        UsageError: if the recipes differ; the message names the keys.
    """
    name, tag = resolved.recipe.name, partial_tag(resolved.recipe)
    saved = context.tagged(tag)
    difference = None if saved is None else _difference(resolved, saved, context)
    if difference is not None:
        raise UsageError(
            f"{name}: {tag} was saved by {difference}; resume it with its own recipe, train under a different name with "
            "--set name=NAME, or start afresh in its place with --force"
        )


def grows(losses: Sequence[float], classes: int) -> bool:
    """Return whether the last epoch's loss is clearly above both the earlier minimum and the loss of guessing.

    A loss below the loss of guessing may rise without anything being wrong: different instances were drawn, or the labels are
    hard.

    Args:
        losses: mean cross-entropy of each epoch so far.
        classes: number of classes; guessing among them has the loss log(classes).
    """
    return len(losses) > 1 and losses[-1] > GROWN * max(min(losses[:-1]), math.log(classes))


def _begin_with(model: "Chain", recipe: Recipe, digest: str, context: Context) -> None:
    """Load the weights of a checkpoint into a network; if the numbers of classes differ, the network has a new head.

    Raises:
        RecipeError: if tensors do not fit the network, with a line for each of the first; or if the shapes fit, but the
            checkpoint's network has a different shortcut.
    """
    from sdpctl.engine.tensors import bytes_to_tensors
    from sdpctl.engine.weights import fill

    checkpoint = context.store.resolve(digest)
    called = f"train.init: the weights of {digest[7:19]}"
    theirs, ours = (section.shape_change for section in (recipe_of(checkpoint, context).model, recipe.model))
    if {theirs, ours} == {"padding", "padding-centred"}:
        raise RecipeError(
            [f"{called} belong to a network with model.shortcut={theirs}, not {ours}; set model.shortcut={theirs}"]
        )
    weights = bytes_to_tensors(context.store.read(checkpoint, MODEL), f"{digest}: {MODEL}")
    try:
        whole = fill(model, weights)
    except DataError as error:
        problems = [f"{called} do not fit this network: {line}" for line in error.lines]
        if (arch := recipe_of(checkpoint, context).model.arch) != recipe.model.arch:
            problems.append(f"{called} belong to {arch}; this network is {recipe.model.arch}")
        raise RecipeError(problems) from error
    if not whole:
        renew_head(model, recipe.seed)
        context.report.note(f"{called} have {len(weights[model.head_names[0]])} classes; the head is new")


class _Training:
    """One training of a recipe."""

    def __init__(self, resolved: Resolved, context: Context) -> None:
        from sdpctl.engine.device import pick_device
        from sdpctl.engine.threads import choose_threads

        self.resolved, self.context = resolved, context
        self.recipe = recipe = resolved.recipe
        self.device = pick_device(recipe.device)
        size = recipe.data.image_size  # the key of a training does not depend on `evaluate`
        self.ranks = ranks = context.ranks
        self.interruption: Interruption | None = None
        self.data = open_data(recipe, self.device, context, scored_size=size, stoppable=self.stoppable, ranks=ranks)
        section = recipe.train
        if section.epochs and section.validate.every and not self.data.holdout_indices:
            share = f"data.holdout={100 * recipe.data.holdout:g}%"
            raise DataError(f"{share} of each class leaves no image to validate on: raise it, or set train.validate.every=0")
        if recipe.data.batch_size < 2 * ranks.size:
            raise DataError(
                f"data.batch_size={recipe.data.batch_size} leaves one of {ranks.size} processes fewer than two images, which "
                "BatchNorm needs: raise data.batch_size, or start fewer processes"
            )
        model = empty_model(recipe.model) if context.dry_run else initial_model(recipe)
        choose_threads(model, recipe.model.in_channels, recipe.data.image_size, recipe.data.batch_size)
        if not context.dry_run:
            if resolved.init is not None:
                _begin_with(model, recipe, resolved.init, context)
            model = model.to(self.device)
        self.trainer = make_trainer(model, recipe, self.data, ranks)
        checkpoint = None if resolved.teacher is None else context.store.resolve(resolved.teacher)
        self.teacher = None if checkpoint is None else (recipe_of(checkpoint, context).model, checkpoint)
        self.history: list[dict[str, Any]] = []
        self.warned = False
        self.saved: Artifact | None = None
        self.saved_at = time.monotonic()
        self.validated = tuple(map(Instance.parse, section.validate.instances))

    def description(self) -> str:
        """Describe the network, the images and the number of steps in words."""
        recipe, steps = self.recipe, self.data.steps_per_epoch
        images = len(self.data.train_indices)
        params = sum(p.numel() for p in self.trainer.model.parameters())
        teacher = None if self.teacher is None else self.teacher[0]
        macs = training_macs(recipe, recipe.train.epochs * steps, teacher) * recipe.data.batch_size
        return (
            f"{recipe.model.arch} ({params:,} params) on {images:,} images of {recipe.data.dataset}, "
            f"{recipe.train.epochs} epochs of {steps} steps, {macs:.3g} MACs, on {self.device}"
        )

    def finish(self, interruption: Interruption, *, resume: bool) -> Made:
        """Train until the last epoch, and return the checkpoint."""
        self.interruption = interruption
        self.take_up(resume=resume)
        epochs, report = self.recipe.train.epochs, self.context.report
        if self.trainer.epoch < epochs:
            report.note(f"{self.recipe.name}: training {self.description()}")
            if self.trainer.compiled is not None:
                report.note(f"{self.recipe.name}: the network is compiled in the first steps, which may take minutes")
        if len(self.history) < epochs:
            self.share()
        total = epochs * self.data.steps_per_epoch
        tracked = tracked_by(self.recipe)
        with (
            Tracking(tracked, train_key(self.resolved), self.context, len(self.history) + 1) as tracking,
            report.progress(f"training {self.recipe.name}", total, self.trainer.step) as bar,
        ):
            tracking.settings(dict(_dotted(self.resolved.parts(*TRAINED_BY))))
            while len(self.history) < epochs:
                try:
                    self.epoch(interruption, bar.advance, tracking)
                except LoaderError as error:
                    saved = self.save().short
                    text = f"{self.recipe.name}: {error}; {saved} is saved; `run` or `train --resume` continues from it"
                    raise LoaderError(text) from error
        return Made(self.layers(), "trained", replaces=self.saved)

    def share(self) -> None:
        """Let the followers begin the training at this step."""
        found = self.context.workspace.seen(self.recipe).located
        self.shared = SharedNetwork(self.trainer.evaluated, self.data, self.recipe, found, self.ranks)
        if self.teacher is None:
            self.shared.send_training(self.trainer)
            return
        settings, checkpoint = self.teacher
        self.shared.send_training(
            self.trainer, settings.plain, read_model(self.context.store, checkpoint, settings).to(self.device)
        )

    def take_up(self, *, resume: bool) -> None:
        """Load the training that the same recipe saved, if `resume` is set, and tell the user how the training starts."""
        report, name, tag = self.context.report, self.recipe.name, partial_tag(self.recipe)
        found = self.context.tagged(tag)
        if found is None:
            if resume:
                report.note(f"{name}: starting afresh, nothing is saved")
            return
        if (difference := _difference(self.resolved, found, self.context)) is not None:
            report.note(f"{name}: starting afresh; {tag} was saved by {difference}, and {found.short} stays without a tag")
            return
        self.saved = found  # the next save replaces it
        if not resume:
            report.note(f"{name}: starting afresh; --resume would continue from {tag}")
            return
        from sdpctl.engine.tensors import bytes_to_tensors

        store = self.context.store
        model = self.trainer.evaluated
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
        report.note(f"{name}: continuing after epoch {step // steps}, step {step % steps}")

    def epoch(self, interruption: Interruption, advance: Callable[[str], None], tracking: Tracking) -> None:
        """Train the rest of the current epoch, validate, and save."""
        trainer, steps, section = self.trainer, self.data.steps_per_epoch, self.recipe.train
        number = len(self.history)
        start = trainer.step - number * steps  # equal to `steps` if the training was stopped during validation
        began, compiling = time.monotonic(), (trainer.compile_seconds, trainer.compile_steps)
        self.shared.send_epoch(number, start)
        try:
            for step in trainer.steps(self.data.training(number, start)):
                advance(f"epoch {number + 1}/{section.epochs}")
                if step % steps == 0:
                    continue  # the epoch is counted before anything is saved
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
            if self.ranks.several:
                record["ranks"] = self.ranks.size
        except DivergedError as error:
            self.context.workspace.log(self.recipe.name, event="diverged", message=str(error))
            tag = partial_tag(self.recipe)
            kept = f"{tag} is still {self.saved.short}" if self.saved else "nothing was saved before"
            raise DivergedError(f"{self.recipe.name}: {error}; {kept}; lower train.lr={section.lr:g}") from error
        self.history.append(record)
        compiled, others = trainer.compile_seconds - compiling[0], steps - start - (trainer.compile_steps - compiling[1])
        timed = (others, seconds - compiled) if others else (steps - start, seconds)
        rate = timed[0] * self.recipe.data.batch_size / timed[1]
        self.tell(record, rate, compiled)
        times = {"seconds": seconds, "compile_seconds": compiled, "images_per_second": rate}
        self.context.workspace.log(self.recipe.name, event="epoch", **record, **times)
        tracking.scalars(epoch_figures(record | times), record["epoch"])
        if number + 1 < section.epochs:
            if interruption.signum is not None:
                self.stop(interruption.signum)
            if (number + 1) % section.checkpoint.epochs == 0:
                self.save()

    def validate(self, interruption: Interruption) -> dict[str, Any]:
        """Score the instances of `train.validate` on the holdout with freshly calibrated statistics."""
        recipe, shared, settings = self.recipe, self.shared, self.recipe.validation
        self.trainer.evaluated.eval()
        shared.send_weights(images=recipe.data.batch_size)

        def watch(batches: "Iterable[Batch]") -> "Iterable[Batch]":
            return interruption.between(batches, self.stop)

        statistics = shared.calibrate(self.validated, recipe.train.validate.batches, recipe.data.preparation, settings, watch)
        images = ("holdout", recipe.data.batch_size)
        scores = shared.evaluate(self.validated, images, statistics, settings, watch=watch)
        return {str(instance): {"top1": score.top1, "loss": score.loss} for instance, score in scores.items()}

    def tell(self, record: dict[str, Any], rate: float, compiled: float) -> None:
        """Show the user the numbers of an epoch, and warn once if the loss grows.

        Args:
            record: the numbers of the epoch.
            rate: images per second of the steps in which nothing was compiled.
            compiled: seconds of the steps in which segments were compiled.
        """
        validation = "".join(f"  {name} {score['top1']:.2f} %" for name, score in record.get("validation", {}).items())
        self.context.report.note(
            f"epoch {record['epoch']}/{self.recipe.train.epochs}  loss {record['loss']:.4f}  train {record['accuracy']:.2f} %"
            f"{'  holdout' + validation if validation else ''}  lr {record['lr']:.4g}  {rate:,.0f} images/s"
            f"{f' beside {compiled:.0f} s of compiling' if compiled else ''}"
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

    def stoppable(self, items: Iterable[Any]) -> Iterable[Any]:
        """Yield items; once a signal has come, save the training before the next item, and raise the interruption."""
        return items if self.interruption is None else self.interruption.between(items, self.stop)

    def stop(self, signum: int) -> None:
        """Commit the training so far, and raise the interruption."""
        artifact = self.save()
        raise RunInterruptedError(
            signum,
            f"{self.recipe.name}: interrupted; {artifact.short} is saved; `run` or `train --resume` continues from it",
        )

    def save(self) -> Artifact:
        """Commit everything that is needed to continue, in place of the previous save."""
        from sdpctl.engine.tensors import tensors_to_bytes

        self.trainer.check_finite()
        layers = self.layers() | {TRAINING_STATE: tensors_to_bytes(self.trainer.state())}
        key, tag = train_key(self.resolved, finished=False), partial_tag(self.recipe)
        before, self.saved = self.saved, self.context.store.commit(CHECKPOINT.name, layers, key=key, tag=tag)
        if before is not None and before.digest != self.saved.digest:
            self.context.store.discard(before)
        self.saved_at = time.monotonic()
        return self.saved

    def layers(self) -> dict[str, bytes]:
        """Return the layers of the checkpoint."""
        from sdpctl.engine.tensors import tensors_to_bytes

        layers = {
            MODEL: tensors_to_bytes(self.trainer.evaluated.state_dict()),
            HISTORY: lines(self.history),
            RECIPE: recipe_layer(self.resolved),
        }
        return layers | self.context.workspace.left_out(self.recipe)
