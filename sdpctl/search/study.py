"""The study: which networks a strategy has asked for and how they scored, in an Optuna storage that survives and is shared.

A network is *claimed* by a running trial before it is scored, so that nobody else scores it; of two claims of one network the
older counts, the other is withdrawn (a failed trial). A claim holds as long as its owner lives. The scores of a pass are
written down at once before its trials are closed one by one, so that a pass is there as a whole or not at all.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from sdpctl.engine.evaluate import Score
from sdpctl.errors import ResourceError, UsageError
from sdpctl.instance import Instance
from sdpctl.search.space import Space

LEASE = 300.0
"""Seconds after which an owner on another machine that has not been heard of counts as dead."""

POLL = 0.5
"""Seconds between two looks at what other processes do."""

PASS_SCORES, OWNER, NETWORK, SCORE, WITHDRAWN = "pass", "owner", "network", "score", "withdrawn"
IDENTITY, RESCORED, RESCORER = "identity", "rescored", "rescorer"

Measure = Callable[[Sequence[Instance]], Mapping[Instance, Score]]
"""Scores networks in one pass."""


class Owner(Protocol):
    """This process, among those that work on the study."""

    id: str

    def gone(self, other: str) -> bool | None:
        """Say whether another process is dead; None where that cannot be known, as of another machine's."""


def without_password(url: str) -> str:
    """Return the address of a storage without its password."""
    try:
        return re.sub("(password=)[^&]*", r"\1***", make_url(url).render_as_string(hide_password=True))
    except (SQLAlchemyError, ValueError):
        return "the storage"


def open_storage(url: str) -> BaseStorage:
    """Open a database, and make its tables where there are none.

    Raises:
        ResourceError: where it cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(5):
        try:
            return RDBStorage(url, engine_kwargs=waiting)
        except (SQLAlchemyError, StorageInternalError, ImportError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            # Another process may be making the tables this very moment.
            if not re.search("already exists|duplicate key|UNIQUE constraint", reason) or attempt == 4:
                raise ResourceError(
                    f"{without_password(url)}: cannot open this database ({reason}); correct search.storage, or install the "
                    "database's driver"
                ) from error
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def forget(storage: BaseStorage, name: str) -> None:
    """Remove a study, so that it begins anew."""
    with suppress(KeyError):
        storage.delete_study(storage.get_study_id_from_name(name))


class Study:
    """The trials of one strategy.

    Args:
        storage: where they are kept.
        name: of the study; made where there is none.
        identity: what its scores depend on.
        space: the networks.
        choices: the ratios that a trial may show at each point.
        owner: this process.
        reward: of a score.
        measure: scores networks that nobody has scored.

    Raises:
        UsageError: where a study of that name has another identity.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        identity: Mapping[str, Any],
        *,
        space: Space,
        choices: Mapping[str, Sequence[float]],
        owner: Owner,
        reward: Callable[[Instance, Score], float],
        measure: Measure,
    ) -> None:
        self.storage, self.name, self.space, self.owner = storage, name, space, owner
        self.distributions = {point: CategoricalDistribution(tuple(ratios)) for point, ratios in choices.items()}
        self.reward, self.measure = reward, measure
        try:
            self.id = storage.create_new_study([StudyDirection.MAXIMIZE], name)
        except DuplicatedStudyError:
            self.id = storage.get_study_id_from_name(name)
        before = storage.get_study_user_attrs(self.id).get(IDENTITY)
        if before is None:
            storage.set_study_user_attr(self.id, IDENTITY, dict(identity))
        elif before != dict(identity):
            other = next(key for key in identity if before.get(key) != identity[key])
            raise UsageError(
                f"study {name}: its {other} is {before.get(other)}, here it is {identity[other]}; choose another search.study"
            )
        self._started = time.time()
        self._heard = 0.0
        self.heartbeat()
        self._past = {name for name in self._owners() if self._gone(name)}

    # Who works on it

    def heartbeat(self) -> None:
        """Say that this process lives, now and then."""
        if time.time() - self._heard > LEASE / 10:
            self._heard = time.time()
            self.storage.set_study_user_attr(self.id, f"{OWNER}:{self.owner.id}", [self._started, self._heard])

    def _wait(self) -> None:
        self.heartbeat()
        time.sleep(POLL)

    def _owners(self) -> dict[str, list[float]]:
        attrs = self.storage.get_study_user_attrs(self.id)
        return {key.removeprefix(f"{OWNER}:"): value for key, value in attrs.items() if key.startswith(f"{OWNER}:")}

    def _gone(self, owner: str) -> bool:
        if owner == self.owner.id:
            return False
        gone = self.owner.gone(owner)
        if gone is not None:
            return gone
        _, heard = self._owners().get(owner, [0.0, 0.0])
        return time.time() - heard > LEASE

    @property
    def rank(self) -> int:
        """How many living processes came before this one."""
        return sum(
            (start, name) < (self._started, self.owner.id) and not self._gone(name)
            for name, (start, _) in self._owners().items()
        )

    # Networks

    def answer(self, instances: Sequence[Instance], limit: int) -> dict[Instance, Score]:
        """Score networks that nobody has scored, and wait for those that others are at.

        Args:
            instances: canonical.
            limit: how many networks the study may hold.

        Returns:
            The scores of those that are within the limit, and of what other processes found meanwhile.
        """
        while True:
            entries = self._entries()
            missing = [i for i in instances if i not in entries][: max(0, limit - len(entries))]
            if missing:
                self._score(self._claim(missing, limit))
                continue
            if not any(entries[i].state is TrialState.RUNNING for i in instances if i in entries):
                break
            self._wait()
        asked = set(instances)
        return {
            instance: Score(**trial.user_attrs[SCORE])
            for instance, trial in entries.items()
            if trial.state is TrialState.COMPLETE
            and (instance in asked or trial.user_attrs[OWNER] not in self._past | {self.owner.id})
        }

    def scores(self) -> dict[Instance, Score]:
        """Return every score there is, in the order of the trials."""
        complete = [(i, trial) for i, trial in self._entries().items() if trial.state is TrialState.COMPLETE]
        return {i: Score(**trial.user_attrs[SCORE]) for i, trial in sorted(complete, key=lambda entry: entry[1].number)}

    def settle(self) -> None:
        """Wait until no living process is at a network."""
        while any(trial.state is TrialState.RUNNING for trial in self._entries().values()):
            self._wait()

    def _entries(self) -> dict[Instance, FrozenTrial]:
        """Return for each network the trial that counts, the dead's claims settled."""
        trials = self.storage.get_all_trials(self.id, deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        gone = {owner for owner in {trial.user_attrs[OWNER] for trial in running} if self._gone(owner)}
        abandoned = [trial for trial in running if trial.user_attrs[OWNER] in gone]
        if abandoned:
            written: dict[str, Any] = {}
            for trial in trials:
                written |= trial.user_attrs.get(PASS_SCORES, {})
            for trial in abandoned:
                score = written.get(trial.user_attrs[NETWORK])
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.id, trial.number)
                self._close(trial_id, Instance.parse(trial.user_attrs[NETWORK]), score and Score(**score))
            trials = self.storage.get_all_trials(self.id, deepcopy=False)
        entries: dict[Instance, FrozenTrial] = {}
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.state in (TrialState.RUNNING, TrialState.COMPLETE):
                entries.setdefault(Instance.parse(trial.user_attrs[NETWORK]), trial)
        return entries

    def _claim(self, instances: Sequence[Instance], limit: int) -> dict[Instance, int]:
        """Open a trial for each network, and withdraw those that came too late."""
        self.heartbeat()
        claims = {instance: self.storage.create_new_trial(self.id, self._template(instance)) for instance in instances}
        counting = sorted(self._entries().values(), key=lambda trial: trial.number)[:limit]
        numbers = {trial.user_attrs[NETWORK]: trial.number for trial in counting}
        kept = {}
        for instance, trial_id in claims.items():
            if numbers.get(str(instance)) == self.storage.get_trial_number_from_id(trial_id):
                kept[instance] = trial_id
            else:
                self._close(trial_id, instance, None)
        return kept

    def _template(self, instance: Instance) -> FrozenTrial:
        return create_trial(
            state=TrialState.RUNNING,
            params={point: instance.ratio(point) for point in self.distributions},
            distributions=dict(self.distributions),
            user_attrs={NETWORK: str(instance), OWNER: self.owner.id, "macs": self.space.cost(instance)},
        )

    def _score(self, claims: Mapping[Instance, int]) -> None:
        if not claims:
            return
        scores = self.measure(list(claims))
        first = next(iter(claims.values()))
        try:
            self.storage.set_trial_user_attr(first, PASS_SCORES, {str(i): asdict(score) for i, score in scores.items()})
        except UpdateFinishedTrialError:
            return  # held for dead: what others make of these networks counts
        for instance, trial_id in claims.items():
            self._close(trial_id, instance, scores[instance])

    def _close(self, trial_id: int, instance: Instance, score: Score | None) -> None:
        try:
            if score is None:
                self.storage.set_trial_user_attr(trial_id, WITHDRAWN, True)
                self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
            else:
                self.storage.set_trial_user_attr(trial_id, SCORE, asdict(score))
                self.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [self.reward(instance, score)])
        except UpdateFinishedTrialError:
            pass  # another process was quicker

    def rescored(self, instances: Sequence[Instance], measure: Measure) -> dict[Instance, Score]:
        """Return the scores of the best networks on more images; one living process scores them, the others wait."""
        while True:
            attrs = self.storage.get_study_user_attrs(self.id)
            known, scorer = attrs.get(RESCORED, {}), attrs.get(RESCORER)
            missing = [instance for instance in instances if str(instance) not in known]
            if not missing:
                return {instance: Score(**known[str(instance)]) for instance in instances}
            if scorer == self.owner.id:
                fresh = {str(instance): asdict(score) for instance, score in measure(missing).items()}
                self.storage.set_study_user_attr(self.id, RESCORED, known | fresh)
                self.storage.set_study_user_attr(self.id, RESCORER, None)
            elif scorer is None or self._gone(scorer):
                self.storage.set_study_user_attr(self.id, RESCORER, self.owner.id)
            else:
                self._wait()
