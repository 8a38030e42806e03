"""The plan: find which stages a command needs, take the results that the store already has, and run the other stages in order.

Every stage is handled in the same order: first the stages that it needs are resolved; then its key is looked up in the store;
then, if the store has no artifact with this key, the stage runs and its result is committed. A dry run runs no stage; the plan
lists the stages that would run.

One rule decides which stage moves its tags. A stage that the user's command names always moves its tags. A stage that is only
needed by a named stage takes a tag only if its result is complete and no artifact of the same checkpoint has the tag yet;
otherwise its result is found by its key.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sdpctl.stages.context import Context
from sdpctl.stages.stage import Job, Made, Stage, Stored
from sdpctl.stages.tracking import track
from sdpctl.store import Artifact
from sdpctl.tracking.catalog import check_installed

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One line of a plan.

    Args:
        tag: tag of the stage.
        kind: kind of its artifact.
        digest: digest of the artifact in the store; None if the stage has to run.
        task: what the stage would do; empty if the store has the artifact.
        reason: why the stage has to run; empty if the store has the artifact.
    """

    tag: str
    kind: str
    digest: str | None
    task: str = ""
    reason: str = ""


class Plan:
    """Resolves stages, and runs those whose results are missing.

    Args:
        context: the store and the reporter that the stages work with.
        force: run the stages that the command names again, even if the store has their results.
    """

    def __init__(self, context: Context, *, force: bool = False) -> None:
        self.context = context
        self.force = force
        self.steps: list[Step] = []
        """The stages resolved so far, in the order in which they run."""
        self._known: dict[Stage, Artifact | None] = {}
        self._missing: set[str] = set()

    def run(self, stage: Stage) -> Artifact | None:
        """Return the artifact of a stage that the command names; run this stage and the stages it needs if results are missing.

        Returns:
            The artifact; None in a dry run if the artifact is missing.
        """
        return self._resolved(stage, named=True)

    def need(self, stage: Stage) -> Artifact | None:
        """Return the artifact of a stage that the command needs but does not name; see `run`."""
        return self._resolved(stage, named=False)

    def follow(self, steps: Generator[Stage, Artifact, T]) -> T | None:
        """Send a generator the artifact of each stage that it yields; run the stages whose results are missing.

        Returns:
            The return value of the generator; None in a dry run if one of the artifacts is missing.
        """
        outcome, missing = self._followed(steps)
        return None if missing else outcome

    def _followed(self, steps: Generator[Stage, Artifact, T]) -> tuple[T | None, Stage | None]:
        """Return the return value of a generator, or, in a dry run, the first yielded stage whose result is missing."""
        try:
            needed = next(steps)
            while (artifact := self._resolved(needed, named=False)) is not None:
                needed = steps.send(artifact)
        except StopIteration as end:
            return end.value, None
        steps.close()
        return None, needed

    def _resolved(self, stage: Stage, *, named: bool) -> Artifact | None:
        if stage not in self._known:
            self._known[stage] = self._looked_up_or_done(stage, named=named)
        return self._known[stage]

    def _looked_up_or_done(self, stage: Stage, *, named: bool) -> Artifact | None:
        outcome, missing = self._followed(stage.steps(self.context))
        if missing is not None:
            self._to_be_done(stage, f"{missing.tag} is made first")
            return None
        if outcome is None:
            self._to_be_done(stage, "which results it needs is known only when it runs")
            return None
        if isinstance(outcome, Artifact):
            if not isinstance(stage, Stored):
                self._listed(stage, outcome)
            return outcome
        forced = self.force and named
        found = None if forced else self.context.by_key(outcome.key)
        if found is not None:
            return self._adopted(stage, outcome, found, named=named)
        self.context.require_writable()
        check_installed(stage.tracked.by)
        if self.context.dry_run:
            self._to_be_done(stage, "--force" if forced else f"the store has no artifact of its key {outcome.key[:12]}")
            return None
        if not forced:
            self.context.report.detail(f"{stage.tag}: the store has no artifact of the key {outcome.key[:12]}")
        with outcome.guard:
            return self._committed(stage, outcome, outcome.make(), named=named)

    def _adopted(self, stage: Stage, job: Job, found: Artifact, *, named: bool) -> Artifact | None:
        """Return the artifact that the store has, and move the stage's tags to it if the rule for tags says so."""
        made = job.adapt(found)
        if made is not None:
            check_installed(stage.tracked.by)
            if self.context.dry_run:
                self._to_be_done(stage, "the recipe differs from the stored one elsewhere", task=f"keep {made.summary}")
                return None
            return self._committed(stage, job, made, named=named)
        if self._listed(stage, found):
            self.context.report.note(f"{stage.tag}: in the store already, {found.short}")
        if not self.context.dry_run:
            self._move_tags(stage, job, found, named=named)
        tagged = self.context.tagged(stage.tag)
        return tagged if tagged is not None and tagged.digest == found.digest else found

    def _committed(self, stage: Stage, job: Job, made: Made, *, named: bool) -> Artifact:
        store = self.context.store
        tag = next(self._moving_tags(stage, job, named=named), None)
        artifact = store.commit(stage.kind.name, made.layers, subject=job.subject, key=job.key, tag=tag)
        if made.replaces is not None:
            store.discard(made.replaces)
        self._move_tags(stage, job, artifact, named=named)
        self._listed(stage, artifact)
        self.context.report.note(f"{stage.tag}: {made.summary}, {artifact.short}")
        track(artifact, made.layers, stage.tracked, self.context)
        return artifact

    def _moving_tags(self, stage: Stage, job: Job, *, named: bool) -> Iterator[str]:
        """Yield the tags of a stage that the rule for tags moves to its result."""
        for tag in (stage.tag, *stage.also):
            if named or (job.complete and self._is_free(tag, job.subject)):
                yield tag

    def _is_free(self, tag: str, subject: Artifact | None) -> bool:
        """Return whether no artifact has a tag, or only one of a different checkpoint, which a newer training has replaced."""
        tagged = self.context.tagged(tag)
        if tagged is None or subject is None:
            return tagged is None
        theirs, ours = (self.context.lineage(artifact)[-1].digest for artifact in (tagged, subject))
        return theirs != ours

    def _move_tags(self, stage: Stage, job: Job, result: Artifact, *, named: bool) -> None:
        """Move the tags of a stage to its result, and the tags of the inputs that move together with them."""
        moved = dict.fromkeys(self._moving_tags(stage, job, named=named), result)
        for tag, artifact in (moved | dict(job.together) if named else moved).items():
            there = self.context.tagged(tag)
            if there is None or there.digest != artifact.digest:
                self.context.store.tag(artifact, tag)

    def _listed(self, stage: Stage, artifact: Artifact) -> bool:
        """Add a stage whose artifact exists to the plan, and return whether it was not in the plan before."""
        step = Step(stage.tag, stage.kind.name, artifact.digest)
        if step in self.steps:
            return False
        self.steps.append(step)
        return True

    def _to_be_done(self, stage: Stage, reason: str, *, task: str | None = None) -> None:
        if stage.tag not in self._missing:
            self._missing.add(stage.tag)
            self.steps.append(Step(stage.tag, stage.kind.name, None, task or stage.task(self.context), reason))
