"""The study: the networks a strategy asked for and their scores, in an Optuna storage that processes share and that persists.

A process *claims* a network by a running trial before it scores the network, so that no other process scores it. Of two claims
of one network the older counts, and the other is withdrawn (a failed trial). A claim holds as long as its owner lives. The
scores of a pass are written together before its trials are closed one by one, so a pass is stored as a whole or not at all.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
"""Seconds without a heartbeat after which an owner on a different machine counts as dead."""

POLL = 0.5
"""Seconds between two checks of the work of other processes."""

PASS_SCORES, OWNER, NETWORK, SCORE, WITHDRAWN = "pass", "owner", "network", "score", "withdrawn"
IDENTITY, RESCORED, RESCORER = "identity", "rescored", "rescorer"

Measure = Callable[[Sequence[Instance]], Mapping[Instance, Score]]
"""Returns the scores of networks, computed in one pass."""


class Owner(Protocol):
    """This process, one of those that work on the study."""

    id: str

    def gone(self, other: str) -> bool | None:
        """Return whether a different process is dead; None if this is unknown, for example on a different machine."""


def without_password(url: str) -> str:
    """Return the address of a storage without its password."""
    try:
        return re.sub("(password=)[^&]*", r"\1***", make_url(url).render_as_string(hide_password=True))
    except (SQLAlchemyError, ValueError):
        return "the storage"


def open_storage(url: str) -> BaseStorage:
    """Open a database, and create its tables if they are missing.

    Raises:
        ResourceError: if the database cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(5):
        try:
            return RDBStorage(url, engine_kwargs=waiting)
        except (SQLAlchemyError, StorageInternalError, ImportError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            # A different process may be creating the tables at the same moment.
            if not re.search("already exists|duplicate key|UNIQUE constraint", reason) or attempt == 4:
                raise ResourceError(
                    f"{without_password(url)}: cannot open this database ({reason}); correct search.storage, or install the "
                    "database's driver"
                ) from error
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


@contextmanager
def opened_storage(url: str) -> Iterator[BaseStorage]:
    """Open a database as `open_storage` does, and close its connections afterwards."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        if isinstance(storage, RDBStorage):
            storage.engine.dispose()


def idle_studies(storage: BaseStorage, owner: Owner) -> dict[str, Mapping[str, Any]]:
    """Return the identity of each study that no living process works on, by the name of the study.

    Args:
        storage: the storage of the studies.
        owner: this process.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for study in storage.get_all_studies():
        owners = _owners_of(study.user_attrs)
        begun = IDENTITY in study.user_attrs and owners  # a process that makes a study writes both one after the other
        if begun and all(_is_gone(owner, other, heard) for other, (_, heard) in owners.items()):
            found[study.study_name] = study.user_attrs[IDENTITY]
    return found


def _owners_of(attrs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return when each owner of a study started, and when it was last heard of."""
    return {key.removeprefix(f"{OWNER}:"): value for key, value in attrs.items() if key.startswith(f"{OWNER}:")}


def _is_gone(owner: Owner, other: str, heard: float) -> bool:
    """Return whether a different process is dead: by its lock, or on a different machine by the time of its last heartbeat."""
    gone = owner.gone(other)
    return time.time() - heard > LEASE if gone is None else gone


def forget(storage: BaseStorage, name: str) -> None:
    """Remove a study, so that it starts again from nothing."""
    with suppress(KeyError):
        storage.delete_study(storage.get_study_id_from_name(name))


class Study:
    """The trials of one strategy.

    Args:
        storage: the storage of the trials.
        name: name of the study; it is created if it does not exist.
        identity: everything that the scores of the study depend on.
        space: the space of networks.
        choices: the ratios that a trial may have at each point.
        owner: this process.
        reward: returns the reward of a network and its score.
        measure: scores networks that no process has scored.

    Raises:
        UsageError: if a study of that name has a different identity.
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
                f"study {name}: its {other} is {before.get(other)}, here it is {identity[other]}; choose a different "
                "search.study"
            )
        self._started = time.time()
        self._heard = 0.0
        self.heartbeat()
        self._past = {name for name in self._owners() if self._gone(name)}

    # Owners

    def heartbeat(self) -> None:
        """Record that this process is alive, if the last record is old."""
        if time.time() - self._heard > LEASE / 10:
            self._heard = time.time()
            self.storage.set_study_user_attr(self.id, f"{OWNER}:{self.owner.id}", [self._started, self._heard])

    def _wait(self) -> None:
        self.heartbeat()
        time.sleep(POLL)

    def _owners(self) -> dict[str, list[float]]:
        return _owners_of(self.storage.get_study_user_attrs(self.id))

    def _gone(self, owner: str) -> bool:
        if owner == self.owner.id:
            return False
        _, heard = self._owners().get(owner, [0.0, 0.0])
        return _is_gone(self.owner, owner, heard)

    @property
    def rank(self) -> int:
        """Number of living processes that started before this one."""
        return sum(
            (start, name) < (self._started, self.owner.id) and not self._gone(name)
            for name, (start, _) in self._owners().items()
        )

    # Networks

    def answer(self, instances: Sequence[Instance], limit: int) -> dict[Instance, Score]:
        """Score networks that no process has scored, and wait for those that other processes are scoring.

        Args:
            instances: canonical instances.
            limit: maximum number of networks in the study.

        Returns:
            The scores of the networks within the limit, and of networks that other processes scored meanwhile.
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
        """Return all scores, in the order of the trials."""
        complete = [(i, trial) for i, trial in self._entries().items() if trial.state is TrialState.COMPLETE]
        return {i: Score(**trial.user_attrs[SCORE]) for i, trial in sorted(complete, key=lambda entry: entry[1].number)}

    def settle(self) -> None:
        """Wait until no living process is scoring a network."""
        while any(trial.state is TrialState.RUNNING for trial in self._entries().values()):
            self._wait()

    def _entries(self) -> dict[Instance, FrozenTrial]:
        """Settle the claims of dead processes, and return the trial that counts for each network."""
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
        """Open a trial for each network, and withdraw the claims that came too late."""
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
            return  # this process was taken for dead: the scores of other processes count
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
            pass  # a different process has already closed it

    def rescored(self, instances: Sequence[Instance], measure: Measure) -> dict[Instance, Score]:
        """Return the scores of the best networks on more images; one living process scores them while the others wait."""
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
