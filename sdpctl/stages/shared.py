"""A network and its images on every rank: rank 0 sends each piece of work, and every rank does its share of it.

The stages run on rank 0 only. They use `SharedNetwork` instead of the engine's functions; with a single process it adds nothing
to them. A follower runs the loop of `Followed`, whose table `WORKS` lists all work that rank 0 can send.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sdpctl.cascade import Cascade
from sdpctl.data.reader import Located
from sdpctl.data.settings import Preparation
from sdpctl.engine import distributed
from sdpctl.engine.distributed import Group, Ranks
from sdpctl.engine.settings import FinetuneSettings, Precision, WalkSettings
from sdpctl.errors import DivergedError
from sdpctl.instance import Instance
from sdpctl.models import empty_model
from sdpctl.models.settings import ModelSettings
from sdpctl.recipe.load import parse_recipe
from sdpctl.recipe.schema import Recipe
from sdpctl.stages.draws import make_draw
from sdpctl.stages.layers import initial_model

if TYPE_CHECKING:
    from torch import Tensor

    from sdpctl.data.loader import Batch, ImageData
    from sdpctl.engine.calibrate import Statistics
    from sdpctl.engine.evaluate import CascadeTally, ClassTally, Score
    from sdpctl.engine.finetune import Tuned
    from sdpctl.engine.teacher import Teacher
    from sdpctl.engine.train import Trainer
    from sdpctl.models.chain import Chain
    from sdpctl.search.scoring import Scorer


def make_trainer(model: "Chain", recipe: Recipe, data: "ImageData", ranks: Ranks) -> "Trainer":
    """Return the training of a network, as a recipe specifies; the network is on its device, and is changed in place.

    Raises:
        ModelError: if the network must be compiled and cannot be.
        ResourceError: if the network must be compiled, and this machine has no compiler.
    """
    from sdpctl.engine.compile import Compiled, compiles
    from sdpctl.engine.threads import count_macs
    from sdpctl.engine.train import Trainer

    section, device = recipe.train, next(model.parameters()).device
    images = section.epochs * data.steps_per_epoch * recipe.data.batch_size
    macs = images * count_macs(model, recipe.model.in_channels, recipe.data.image_size)
    many_sizes = recipe.sdpoint is not None and recipe.sdpoint.many_points
    compiled = compiles(section.compile, model, device, macs, synchronises=section.sync_bn and ranks.several)
    return Trainer(
        model,
        recipe.train,
        make_draw(recipe),
        data.steps_per_epoch,
        seed=recipe.seed,
        class_weights_K=data.class_weights,
        compiled=Compiled(model, dynamic=many_sizes) if compiled else None,
        ranks=ranks,
        batch_size=recipe.data.batch_size,
    )


def make_teacher(model: "Chain", data: "ImageData", ranks: Ranks) -> "Teacher":
    """Return the teacher of a training, calibrated on the training's own batches."""
    from sdpctl.engine.teacher import BATCHES, Teacher

    return Teacher(model, data.calibration(BATCHES), ranks)


Images = tuple[str, *tuple[int | None, ...]]
"""Images to score: the name of a method of `ImageData`, and its arguments."""

SCORED = ("test", "holdout", "holdout_part")
"""The methods of `ImageData` that yield images to score."""

Watch = Callable[["Iterable[Batch]"], "Iterable[Batch]"]


def _unwatched(batches: "Iterable[Batch]") -> "Iterable[Batch]":
    return batches


def _plain(located: Located) -> dict[str, Any]:
    return asdict(located) | {"files": {name: str(path) for name, path in located.files.items()}}


def _located(plain: Mapping[str, Any]) -> Located:
    train, test = (tuple((name, label) for name, label in plain[split]) for split in ("train", "test"))
    files = {name: Path(path) for name, path in plain["files"].items()}
    return Located(tuple(plain["classes"]), files, train, test, plain["fingerprint"])


def _scored(data: "ImageData", images: Images) -> "Iterable[Batch]":
    name, *arguments = images
    assert name in SCORED
    batches: Iterable[Batch] = getattr(data, name)(*arguments)
    return batches


class Scored(NamedTuple):
    """The images by which a search scores networks.

    Args:
        calibration: number of batches that a network is calibrated with.
        first: number of held-out images that score every network.
        more: number of further held-out images that score the best networks.
        batch_size: number of held-out images of a batch.
        preparation: how training images become the batches of a calibration.
    """

    calibration: int
    first: int
    more: int
    batch_size: int
    preparation: Preparation

    def scorer(self, model: "Chain", data: "ImageData", settings: WalkSettings, **options: Any) -> "Scorer":
        """Return a scorer of networks on these images; `options` are those of `Scorer`."""
        from sdpctl.search.scoring import Scorer

        return Scorer(
            model,
            data.calibration(self.calibration, self.preparation),
            data.holdout_part(0, self.first, self.batch_size),
            lambda: data.holdout_part(self.first, self.first + self.more, self.batch_size),
            settings,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """A fine-tuning of instances.

    Args:
        instances: texts of the instances to fine-tune.
        settings: number of steps and learning rate.
        preparation: how training images become batches.
        precision: `fp32`, or `bf16` under autocast.
    """

    instances: tuple[str, ...]
    settings: FinetuneSettings
    preparation: Preparation
    precision: Precision

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Finetuning":
        """Return a fine-tuning that was sent as plain data."""
        settings, preparation = FinetuneSettings(**plain["settings"]), Preparation(**plain["preparation"])
        return cls(
            instances=tuple(plain["instances"]), settings=settings, preparation=preparation, precision=plain["precision"]
        )

    def run(self, model: "Chain", data: "ImageData", known: Sequence[Instance], ranks: Ranks, watch: Watch) -> "Tuned":
        """Fine-tune the instances.

        Args:
            model: the chain, in evaluation mode.
            data: the images.
            known: the instances that may share tree nodes with them.
            ranks: the processes that share the instances.
            watch: wraps the batches of an instance.
        """
        from sdpctl.engine.finetune import finetune
        from sdpctl.engine.tree import Tree

        return finetune(
            Tree(model, known),
            lambda instance: watch(data.finetuning(str(instance), self.settings.steps, self.preparation)),
            self.settings,
            list(map(Instance.parse, self.instances)),
            precision=self.precision,
            class_weights_K=data.class_weights,
            ranks=ranks,
        )


class SharedNetwork:
    """A network and its images, as rank 0 uses them; the followers open the same images.

    Args:
        model: the network, on its device.
        data: this rank's share of the images.
        recipe: names the network, the data and the device.
        located: the files of the data set.
        ranks: all ranks.
    """

    def __init__(self, model: "Chain", data: "ImageData", recipe: Recipe, located: Located, ranks: Ranks) -> None:
        self.model, self.data, self.ranks = model, data, ranks
        if ranks.several:
            plain = recipe.changed(search=None).complete()  # the address of a search's storage may be a secret
            cache = None if data.cache is None else data.cache.plain
            ranks.send("open", recipe=plain, located=_plain(located), scored_size=data.scored_size, cache=cache)

    def send_weights(self, *, images: int) -> None:
        """Send the network's weights to the followers.

        Args:
            images: number of images per batch; the number of threads depends on it.
        """
        if self.ranks.several:
            self.ranks.send("weights", self.model.state_dict(), images=images)

    def send_training(
        self, trainer: "Trainer", taught_by: dict[str, Any] | None = None, teacher: "Chain | None" = None
    ) -> None:
        """Let all ranks begin a training at the trainer's step; calibrate the teacher, if there is one, for the trainer.

        Args:
            trainer: the training.
            taught_by: the settings of the teacher's network, as plain data.
            teacher: the teacher's network, on the device.
        """
        if self.ranks.several:
            if teacher is not None:
                self.data.fill_cache("training")
            weights = {f"weights.{name}": t for name, t in trainer.model.state_dict().items()}
            state = {f"state.{name}": t for name, t in trainer.state().items() if not name.startswith("weights.")}
            taught = {} if teacher is None else {f"teacher.{name}": t for name, t in teacher.state_dict().items()}
            self.ranks.send("train", weights | state | taught, taught_by=taught_by)
        if teacher is not None:
            trainer.teacher = make_teacher(teacher, self.data, self.ranks)

    def send_epoch(self, number: int, start: int) -> None:
        """Let the followers train the batches of an epoch from batch `start` on."""
        if self.ranks.several:
            self.data.fill_cache("training")
            self.ranks.send("epoch", number=number, start=start)

    def calibrate(
        self,
        instances: Sequence[Instance],
        batches: int,
        preparation: Preparation,
        settings: WalkSettings,
        watch: Watch = _unwatched,
        tuned: "Tuned | None" = None,
    ) -> "Statistics":
        """Gather the statistics of instances; see `sdpctl.engine.calibrate.calibrate`.

        Args:
            instances: the instances.
            batches: number of batches of all ranks.
            preparation: how the images become batches.
            settings: how the instances are run.
            watch: wraps this rank's batches.
            tuned: the result of the last `finetune`, which the followers have as well; nothing by default.
        """
        from sdpctl.engine.calibrate import calibrate

        if self.ranks.several:
            self.data.fill_cache("calibration", preparation)
            self.ranks.send(
                "calibrate",
                instances=_texts(instances),
                batches=batches,
                preparation=asdict(preparation),
                settings=asdict(settings),
                finetuned=tuned is not None,
            )
        batches_of_rank = watch(self.data.calibration(batches, preparation))
        return calibrate(self.model, instances, batches_of_rank, settings, self.ranks, tuned or {})

    def finetune(self, instances: Sequence[Instance], finetuning: Finetuning, watch: Watch = _unwatched) -> "Tuned":
        """Fine-tune instances; see `sdpctl.engine.finetune.finetune`.

        Args:
            instances: the instances that may share tree nodes.
            finetuning: which of them to fine-tune, and how.
            watch: wraps the batches of each instance that this rank trains.
        """
        if self.ranks.several:
            self.data.fill_cache("calibration", finetuning.preparation)
            self.ranks.send("finetune", instances=_texts(instances), plain=asdict(finetuning))
        return finetuning.run(self.model, self.data, instances, self.ranks, watch)

    def evaluate(
        self,
        instances: Sequence[Instance],
        images: Images,
        statistics: "Statistics",
        settings: WalkSettings,
        tally: "ClassTally | None" = None,
        watch: Watch = _unwatched,
        cascades: "CascadeTally | None" = None,
    ) -> "dict[Instance, Score]":
        """Score instances; see `sdpctl.engine.evaluate.evaluate`.

        Args:
            instances: the instances.
            images: the images of all ranks.
            statistics: statistics that cover the instances.
            settings: how the instances are run.
            tally: receives the hits by class.
            watch: wraps this rank's batches.
            cascades: scores cascades of these instances.
        """
        from sdpctl.engine.evaluate import evaluate

        if self.ranks.several:
            self.data.fill_cache(images[0])
            tensors, described = _packed(statistics)
            self.ranks.send(
                "evaluate",
                tensors,
                instances=_texts(instances),
                images=images,
                described=described,
                settings=asdict(settings),
                tallies=tally is not None,
                keeps=tally is not None and tally.keeps,
                cascades=[] if cascades is None else [str(cascade) for cascade in cascades.cascades],
            )
        batches = watch(_scored(self.data, images))
        return evaluate(self.model, instances, batches, statistics, settings, tally, self.ranks, cascades)

    def logits(
        self,
        instances: Sequence[Instance],
        images: Images,
        statistics: "Statistics",
        settings: WalkSettings,
        watch: Watch = _unwatched,
    ) -> "tuple[Tensor, Tensor]":
        """Return the logits of instances, and the labels; see `sdpctl.engine.evaluate.gather_logits`.

        Args:
            instances: the instances.
            images: the images of all ranks.
            statistics: statistics that cover the instances.
            settings: how the instances are run.
            watch: wraps this rank's batches.
        """
        from sdpctl.engine.evaluate import gather_logits

        if self.ranks.several:
            self.data.fill_cache(images[0])
            tensors, described = _packed(statistics)
            work = {"instances": _texts(instances), "images": images, "described": described, "settings": asdict(settings)}
            self.ranks.send("logits", tensors, **work)
        batches = watch(_scored(self.data, images))
        return gather_logits(self.model, instances, batches, statistics, settings, self.ranks)

    def scorer(self, scored: Scored, settings: WalkSettings, tick: Callable[[], None]) -> "Scorer":
        """Return a search's scorer, whose passes run on all ranks.

        Args:
            scored: the images of all ranks.
            settings: how networks are run.
            tick: called after each batch of this rank.
        """
        if self.ranks.several:
            self.data.fill_cache("calibration", scored.preparation)
            self.data.fill_cache("holdout")
            plain = [*scored[:-1], asdict(scored.preparation)]
            self.ranks.send("scorer", scored=plain, settings=asdict(settings))

        def announce(instances: Sequence[Instance], more: bool) -> None:
            if self.ranks.several:
                self.ranks.send("score", instances=_texts(instances), more=more)

        return scored.scorer(self.model, self.data, settings, tick=tick, ranks=self.ranks, announce=announce)


def _texts(instances: Iterable[Instance]) -> list[str]:
    return [str(instance) for instance in instances]


def _packed(statistics: "Statistics") -> "tuple[dict[str, Tensor], dict[str, Any]]":
    import torch

    from sdpctl.engine.tensors import statistics_to_bytes

    content, described = statistics_to_bytes(statistics)
    return {"statistics": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, described


class Followed:
    """What a follower does.

    Args:
        ranks: all ranks.
    """

    recipe: Recipe
    data: "ImageData"
    model: "Chain"
    trainer: "Trainer"
    scorer: "Scorer"
    tuned: "Tuned"

    def __init__(self, ranks: Group) -> None:
        self.ranks = ranks

    def work(self) -> None:
        """Receive work and do it, for as long as this process lives."""
        while True:
            name, arguments, tensors = self.ranks.receive()
            WORKS[name](self, tensors, **arguments)

    def open(
        self,
        _: "dict[str, Tensor]",
        *,
        recipe: dict[str, Any],
        located: dict[str, Any],
        scored_size: int,
        cache: dict[str, Any] | None,
    ) -> None:
        """Open this rank's share of the images of a recipe."""
        from sdpctl.data.cache import Cache
        from sdpctl.data.loader import ImageData
        from sdpctl.engine.device import pick_device

        self.recipe = parse_recipe(json.dumps(recipe), "the recipe of rank 0")
        self.device = pick_device(self.recipe.device)
        self.data = ImageData(
            self.recipe.data,
            _located(located),
            self.device,
            in_channels=self.recipe.model.in_channels,
            seed=self.recipe.seed,
            scored_size=scored_size,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
            cache=None if cache is None else Cache.of(cache),
        )

    def weights(self, tensors: "dict[str, Tensor]", *, images: int) -> None:
        """Build the network with given weights."""
        from sdpctl.engine.threads import choose_threads

        recipe, model = self.recipe, empty_model(self.recipe.model)
        model.load_state_dict(tensors, assign=True)
        choose_threads(model, recipe.model.in_channels, self.data.scored_size, images)
        self.model = model.to(self.device).channels_last().eval()

    def train(self, tensors: "dict[str, Tensor]", *, taught_by: dict[str, Any] | None) -> None:
        """Begin a training; the average of the weights is kept by rank 0 only."""
        from sdpctl.engine.threads import choose_threads

        recipe = self.recipe.changed(train={"ema": None})
        weights, state, taught = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("weights.", "state.", "teacher.")
        )
        model = initial_model(recipe)
        model.load_state_dict(weights)
        choose_threads(model, recipe.model.in_channels, recipe.data.image_size, recipe.data.batch_size)
        self.trainer = make_trainer(model.to(self.device), recipe, self.data, self.ranks)
        self.trainer.load_state(state)
        if taught_by is not None:
            settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in taught_by.items()}
            model = empty_model(ModelSettings(**settings))
            model.load_state_dict(taught, assign=True)
            self.trainer.teacher = make_teacher(model.to(self.device), self.data, self.ranks)

    def epoch(self, _: "dict[str, Tensor]", *, number: int, start: int) -> None:
        """Train on this rank's part of each batch of an epoch."""
        try:
            for _step in self.trainer.steps(self.data.training(number, start)):
                pass
            self.trainer.finish_epoch()
        except DivergedError:  # rank 0 has the same sums, and tells the user
            return

    def calibrate(
        self,
        _: "dict[str, Tensor]",
        *,
        instances: list[str],
        batches: int,
        preparation: dict[str, Any],
        settings: dict[str, Any],
        finetuned: bool,
    ) -> None:
        """Gather statistics on this rank's batches."""
        from sdpctl.engine.calibrate import calibrate

        chosen = list(map(Instance.parse, instances))
        images = self.data.calibration(batches, Preparation(**preparation))
        tuned = self.tuned if finetuned else {}
        calibrate(self.model, chosen, images, WalkSettings(**settings), self.ranks, tuned)

    def finetune(self, _: "dict[str, Tensor]", *, instances: list[str], plain: dict[str, Any]) -> None:
        """Fine-tune this rank's share of the instances, and keep the parameters of all."""
        known = list(map(Instance.parse, instances))
        with suppress(DivergedError):  # rank 0 has the same parameters, and tells the user
            self.tuned = Finetuning.of(plain).run(self.model, self.data, known, self.ranks, _unwatched)

    def evaluate(
        self,
        tensors: "dict[str, Tensor]",
        *,
        instances: list[str],
        images: Images,
        described: dict[str, Any],
        settings: dict[str, Any],
        tallies: bool,
        keeps: bool,
        cascades: list[str],
    ) -> None:
        """Score instances and cascades on this rank's images."""
        from sdpctl.engine.evaluate import CascadeTally, ClassTally, evaluate

        statistics = self._unpacked(tensors, described)
        chosen, tally = list(map(Instance.parse, instances)), ClassTally(keeps=keeps) if tallies else None
        several = CascadeTally(map(Cascade.parse, cascades)) if cascades else None
        batches = _scored(self.data, images)
        try:
            evaluate(self.model, chosen, batches, statistics, WalkSettings(**settings), tally, self.ranks, several)
        except DivergedError:  # rank 0 has the same sums, and tells the user
            return

    def logits(
        self,
        tensors: "dict[str, Tensor]",
        *,
        instances: list[str],
        images: Images,
        described: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        """Run instances on this rank's images."""
        from sdpctl.engine.evaluate import gather_logits

        statistics, chosen = self._unpacked(tensors, described), list(map(Instance.parse, instances))
        batches = _scored(self.data, images)
        gather_logits(self.model, chosen, batches, statistics, WalkSettings(**settings), self.ranks)

    def _unpacked(self, tensors: "dict[str, Tensor]", described: dict[str, Any]) -> "Statistics":
        from sdpctl.engine.tensors import statistics_from_bytes, wanted_statistics

        wanted = wanted_statistics(described, self.model, "statistics")
        return statistics_from_bytes(tensors["statistics"].numpy().tobytes(), described, wanted, "statistics")

    def begin_scoring(self, _: "dict[str, Tensor]", *, scored: list[Any], settings: dict[str, Any]) -> None:
        """Read this rank's share of the images of a search."""
        calibration, first, more, batch_size, preparation = scored
        images = Scored(calibration, first, more, batch_size, Preparation(**preparation))
        self.scorer = images.scorer(self.model, self.data, WalkSettings(**settings), tick=lambda: None, ranks=self.ranks)

    def score(self, _: "dict[str, Tensor]", *, instances: list[str], more: bool) -> None:
        """Score networks of a search on this rank's images."""
        chosen = list(map(Instance.parse, instances))
        try:
            (self.scorer.score_more if more else self.scorer.score)(chosen)
        except DivergedError:  # rank 0 has the same sums, and tells the user
            return


WORKS: Mapping[str, Callable[..., None]] = {
    "open": Followed.open,
    "weights": Followed.weights,
    "train": Followed.train,
    "epoch": Followed.epoch,
    "calibrate": Followed.calibrate,
    "finetune": Followed.finetune,
    "evaluate": Followed.evaluate,
    "logits": Followed.logits,
    "scorer": Followed.begin_scoring,
    "score": Followed.score,
}
"""All work that rank 0 can send to the followers, by name; each receives tensors by name, and plain data as keywords."""


def follow(explained: Callable[[Exception], tuple[Sequence[str], int]]) -> NoReturn:
    """Follow rank 0 until it ends.

    Args:
        explained: returns the lines that a user sees of an error, and the exit code.
    """
    distributed.follow(lambda ranks: Followed(ranks).work(), explained)
