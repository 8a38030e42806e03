"""The study: what it claims, scores and writes down, with owners that live, die and wait, and with real processes."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from sdpctl.engine.evaluate import Score
from sdpctl.errors import ResourceError, UsageError
from sdpctl.instance import Instance
from sdpctl.search import study as module
from sdpctl.search.problem import Problem
from sdpctl.search.run import run_strategy
from sdpctl.search.study import Study, open_storage

pytestmark = pytest.mark.usefixtures("quick_sqlite")

TENTHS = [tenth / 10 for tenth in range(10, 0, -1)]
SPACE = SimpleNamespace(cost=lambda instance: round(1000 * instance.ratio("stem") * instance.ratio("layer1.0")))
NETWORKS = [Instance((("stem", a), ("layer1.0", b))) for a in TENTHS for b in TENTHS]
"""A hundred networks; the cheaper, the better."""

IDENTITY = {"checkpoint": "abc", "budget": 500, "seed": 7}


def score_of(instance, images=100):
    return Score(images, 100 - SPACE.cost(instance) / 10, None, 1.5)


class Killed(BaseException):
    """The process dies here: nothing after it happens, and nothing is cleared up."""


class Owner:
    """A process of which others know that it is dead, or that it lives, or nothing, as on another machine."""

    graves = cradles = frozenset()

    def __init__(self, name):
        self.id = name

    def gone(self, other):
        return True if other in self.graves else False if other in self.cradles else None


class Measure:
    """Remembers the networks of each pass; `before` may die, or wait."""

    def __init__(self, before=lambda: None):
        self.passes, self.before = [], before

    def __call__(self, instances):
        self.before()
        self.passes.append(list(instances))
        return {instance: score_of(instance) for instance in instances}


def die():
    raise Killed


@pytest.fixture
def owners(monkeypatch):
    """Say which owners are known to be dead, and which to live."""

    def owners(*dead, alive=()):
        monkeypatch.setattr(Owner, "graves", frozenset(dead))
        monkeypatch.setattr(Owner, "cradles", frozenset(alive))

    return owners


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with its tables and nothing in them: making those takes most of a second."""
    path = tmp_path_factory.mktemp("empty") / "studies.sqlite"
    open_storage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def opened(empty, tmp_path, monkeypatch):
    """Open the one study of a file as another process would, with a connection of its own."""
    monkeypatch.setattr(module, "POLL", 0.01)
    shutil.copy(empty, tmp_path)
    storages = []

    def opened(owner="one", before=lambda: None, identity=IDENTITY):
        storages.append(open_storage(f"sqlite:///{tmp_path / 'studies.sqlite'}"))
        return Study(
            storages[-1],
            "s",
            identity,
            space=SPACE,
            choices={"stem": TENTHS, "layer1.0": TENTHS},
            owner=Owner(owner),
            reward=lambda instance, score: score.top1,
            measure=Measure(before),
        )

    yield opened
    for storage in storages:
        storage.engine.dispose()


@pytest.fixture
def clock(monkeypatch):
    """Let time pass only where the study sleeps, or where a test says so."""
    clock = SimpleNamespace(now=1e9)
    clock.time = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(module, "time", clock)
    return clock


def trials(study, state=None):
    found = study.storage.get_all_trials(study.id)
    return [Instance.parse(trial.user_attrs["network"]) for trial in found if state in (None, trial.state)]


def scored(*instances):
    return {instance: score_of(instance) for instance in instances}


# One process


def test_a_network_is_measured_once(opened):
    study, (a, b, c) = opened(), NETWORKS[:3]
    assert study.answer([a, b], 10) == scored(a, b)
    assert study.answer([b, c], 10) == scored(b, c)
    assert study.answer([c, a], 10) == scored(a, c)
    assert study.measure.passes == [[a, b], [c]]
    assert list(study.scores()) == [a, b, c] == trials(study, TrialState.COMPLETE) == trials(study)


def test_the_limit_holds(opened):
    study = opened()
    assert study.answer(NETWORKS[:2], 3) == scored(*NETWORKS[:2])
    assert study.answer(NETWORKS[1:5], 3) == scored(*NETWORKS[1:3])
    assert study.answer(NETWORKS[5:9], 3) == {}
    assert study.measure.passes == [NETWORKS[:2], NETWORKS[2:3]]
    assert trials(study) == NETWORKS[:3]


def test_a_trial_says_what_was_scored_and_how(opened):
    study, network = opened(), NETWORKS[57]
    study.answer([network], 10)
    (trial,) = study.storage.get_all_trials(study.id)
    assert trial.params == {"stem": 0.5, "layer1.0": 0.3}
    assert trial.value == score_of(network).top1
    assert trial.user_attrs["macs"] == 150
    assert trial.user_attrs["owner"] == "one"


# One after the other


def test_a_resumed_study_has_the_scores_without_measuring(opened, owners):
    opened("one").answer(NETWORKS[:5], 10)
    owners("one")
    study = opened("two")
    assert study.answer(NETWORKS[:5], 10) == scored(*NETWORKS[:5])
    assert study.scores() == scored(*NETWORKS[:5])
    assert study.measure.passes == []


def test_what_the_dead_found_is_told_only_when_it_is_asked_for(opened, owners):
    """A strategy that is run again from its seed must see what it saw the first time, no more."""
    opened("one").answer(NETWORKS[:5], 10)
    owners("one")
    study = opened("two")
    assert study.answer(NETWORKS[3:6], 10) == scored(*NETWORKS[3:6])
    assert study.measure.passes == [NETWORKS[5:6]]


def test_what_the_living_found_is_told_at_once(opened):
    one, two = opened("one"), opened("two")
    one.answer(NETWORKS[:2], 10)
    assert two.answer(NETWORKS[2:3], 10) == scored(*NETWORKS[:3])


def test_claims_of_the_dead_are_withdrawn_and_scored_anew(opened, owners):
    with pytest.raises(Killed):
        opened("one", die).answer(NETWORKS[:3], 3)
    owners("one")
    study = opened("two")
    assert study.answer(NETWORKS[:3], 3) == scored(*NETWORKS[:3])
    assert study.measure.passes == [NETWORKS[:3]]
    assert trials(study, TrialState.FAIL) == trials(study, TrialState.COMPLETE) == NETWORKS[:3]
    assert trials(study, TrialState.RUNNING) == []
    assert list(study.scores()) == NETWORKS[:3]


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_pass_that_was_written_down_is_not_measured_again(opened, owners, monkeypatch, closed):
    one, left = opened("one"), [closed]
    close = one.storage.set_trial_state_values

    def close_some(*arguments):
        left[0] -= 1
        return close(*arguments) if left[0] >= 0 else die()

    monkeypatch.setattr(one.storage, "set_trial_state_values", close_some)
    with pytest.raises(Killed):
        one.answer(NETWORKS[:3], 10)
    owners("one")
    two = opened("two")
    assert trials(two, TrialState.COMPLETE) == NETWORKS[:closed]
    assert two.answer(NETWORKS[:3], 10) == scored(*NETWORKS[:3])
    assert two.measure.passes == []
    assert trials(two) == trials(two, TrialState.COMPLETE) == NETWORKS[:3]
    assert [trial.value for trial in two.storage.get_all_trials(two.id)] == [score_of(i).top1 for i in NETWORKS[:3]]


def test_a_pass_that_was_not_written_down_is_measured_again_as_a_whole(opened, owners, monkeypatch):
    one = opened("one")
    monkeypatch.setattr(one.storage, "set_trial_user_attr", lambda *_: die())
    with pytest.raises(Killed):
        one.answer(NETWORKS[:3], 10)
    owners("one")
    two = opened("two")
    two.answer(NETWORKS[:3], 10)
    assert two.measure.passes == [NETWORKS[:3]]


def test_a_claim_without_its_scores_does_not_end_a_search(opened, owners):
    """Two processes died; the one that goes on draws as the first did, and finds part of the evaluations used up."""
    opened("one").answer(NETWORKS[:4], 12)
    opened("two").answer(NETWORKS[20:24], 12)
    owners("one", "two")
    study = opened("three")

    def propose(problem, score):
        for i in range(0, 100, 4):
            rewards = score(NETWORKS[i : i + 4])
            assert rewards == [score_of(instance).top1 for instance in NETWORKS[i : i + 4]]

    outcome = found(study, propose, 12)
    assert set(outcome.scores) == {*NETWORKS[:4], *NETWORKS[20:24], *NETWORKS[4:8]}
    assert outcome.winner == NETWORKS[7]


def found(study, propose, evaluations, more=None):
    """Run a strategy to its winner."""
    return run_strategy(
        Problem(SPACE, None, evaluations, 0), propose, study, best=2, measure_more=more or Measure(), watch=lambda _: None
    )


def listed(*networks):
    return lambda problem, score: score(networks)


# Side by side


def test_a_living_process_is_waited_for_and_nothing_is_measured_twice(opened):
    begun, go = threading.Event(), threading.Event()

    def wait():
        begun.set()
        assert go.wait(30)

    one, two = opened("one", wait), opened("two")
    a, b, c = NETWORKS[:3]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(one.answer, [a, b], 10)
        assert begun.wait(30)
        second = threads.submit(two.answer, [b, c], 10)
        while c not in two.scores():
            assert not second.done(), second.result()
        with pytest.raises(TimeoutError):
            second.result(0.2)
        go.set()
        assert first.result(30).items() >= scored(a, b).items()
        assert second.result(30).items() >= scored(b, c).items()
    assert one.measure.passes == [[a, b]]
    assert two.measure.passes == [[c]]
    assert trials(one) == trials(one, TrialState.COMPLETE) == [a, b, c]


def claim_before(study, monkeypatch, what):
    """Let something happen after a study saw what is missing, and before it claims that."""
    create, again = study.storage.create_new_trial, []

    def late(*arguments, **options):
        if not again:
            again.append(True)
            what()
        return create(*arguments, **options)

    monkeypatch.setattr(study.storage, "create_new_trial", late)


def test_the_older_claim_counts_and_the_younger_is_withdrawn(opened, monkeypatch):
    one, two = opened("one"), opened("two")
    claim_before(two, monkeypatch, lambda: one.answer(NETWORKS[:2], 10))
    assert two.answer(NETWORKS[1:3], 10) == scored(*NETWORKS[:3])
    assert one.measure.passes == [NETWORKS[:2]]
    assert two.measure.passes == [NETWORKS[2:3]]
    assert trials(two, TrialState.COMPLETE) == NETWORKS[:3]
    assert trials(two, TrialState.FAIL) == NETWORKS[1:2]


def test_the_limit_holds_for_all_processes_together(opened, monkeypatch):
    one, two = opened("one"), opened("two")
    claim_before(two, monkeypatch, lambda: one.answer(NETWORKS[:2], 3))
    assert two.answer(NETWORKS[2:4], 3) == scored(*NETWORKS[:3])
    assert two.measure.passes == [NETWORKS[2:3]]
    assert trials(two, TrialState.COMPLETE) == NETWORKS[:3]
    assert trials(two, TrialState.RUNNING) == []
    assert list(two.scores()) == NETWORKS[:3]


def test_one_held_for_dead_who_comes_back_overwrites_nothing(opened, owners):
    """Its claims were given to another meanwhile: it takes the scores that count, and leaves no claim behind."""
    one, two = opened("one"), opened("two")

    def overtaken():
        owners("one")
        two.answer(NETWORKS[:3], 10)

    one.measure.before = overtaken
    assert one.answer(NETWORKS[:3], 10).items() >= scored(*NETWORKS[:3]).items()
    assert trials(one, TrialState.COMPLETE) == trials(one, TrialState.FAIL) == NETWORKS[:3]
    assert trials(one, TrialState.RUNNING) == []
    assert {trial.user_attrs["owner"] for trial in one.storage.get_all_trials(one.id) if trial.value is not None} == {"two"}


def test_settling_waits_for_the_living_and_not_for_the_dead(opened, owners):
    with pytest.raises(Killed):
        opened("one", die).answer(NETWORKS[:2], 10)
    two = opened("two")
    with ThreadPoolExecutor(1) as threads:
        settled = threads.submit(two.settle)
        try:
            with pytest.raises(TimeoutError):
                settled.result(0.2)
        finally:
            owners("one")
        settled.result(30)
    assert trials(two, TrialState.FAIL) == NETWORKS[:2]


def test_a_rank_counts_the_living_that_came_before(opened, owners, clock):
    one = opened("one")
    clock.now += 1
    two = opened("two")
    clock.now += 1
    three = opened("three")
    assert [study.rank for study in (one, two, three)] == [0, 1, 2]
    owners("one")
    assert [study.rank for study in (two, three)] == [0, 1]


# Other machines, where no lock tells who is dead


def test_who_is_not_heard_of_counts_as_dead_when_the_lease_ends(opened, clock, monkeypatch):
    monkeypatch.setattr(module, "POLL", 7.0)
    began = clock.now
    with pytest.raises(Killed):
        opened("far away", die).answer(NETWORKS[:2], 10)
    study = opened("here")
    study.measure.before = lambda: setattr(study, "began", clock.now)
    assert study.answer(NETWORKS[:2], 10) == scored(*NETWORKS[:2])
    assert module.LEASE < study.began - began <= module.LEASE + 7
    assert trials(study, TrialState.FAIL) == NETWORKS[:2]


def test_a_heartbeat_extends_the_lease(opened, clock):
    one = opened("one")
    clock.now += 1
    two = opened("two")
    clock.now += module.LEASE - 100
    one.heartbeat()
    clock.now += module.LEASE - 1
    assert two.rank == 1
    clock.now += 2
    assert two.rank == 0


def test_a_claim_is_made_by_one_who_was_just_heard_of(opened, clock):
    """However long it waited or thought before: else the claim would be withdrawn at once."""
    one = opened("one")
    clock.now += 1
    two, ranks = opened("two"), []
    clock.now += 2 * module.LEASE
    one.measure.before = lambda: ranks.append(two.rank)
    one.answer(NETWORKS[:2], 10)
    assert ranks == [1]


def test_who_is_known_to_live_may_be_silent(opened, owners, clock):
    opened("one")
    clock.now += 1
    two = opened("two")
    clock.now += 10 * module.LEASE
    owners(alive=["one"])
    assert two.rank == 1
    owners()
    assert two.rank == 0


def test_a_heartbeat_is_written_now_and_then_only(opened, clock, monkeypatch):
    study, written = opened(), []
    monkeypatch.setattr(study.storage, "set_study_user_attr", lambda *arguments: written.append(arguments))
    for _ in range(600):
        clock.now += 0.5
        study.heartbeat()
    assert 5 <= len(written) <= 10


# The best few, on more images


def test_the_best_are_scored_again_once_and_the_others_wait(opened):
    one, two, best = opened("one"), opened("two"), NETWORKS[:2]
    begun, go = threading.Event(), threading.Event()

    def wait():
        begun.set()
        assert go.wait(30)

    first, second = Measure(wait), Measure()
    with ThreadPoolExecutor(2) as threads:
        a = threads.submit(one.rescored, best, first)
        assert begun.wait(30)
        b = threads.submit(two.rescored, best, second)
        with pytest.raises(TimeoutError):
            b.result(0.2)
        go.set()
        assert a.result(30) == b.result(30) == scored(*best)
    assert (first.passes, second.passes) == ([best], [])
    assert opened("three").rescored(best, second) == scored(*best)
    assert second.passes == []


def test_who_died_scoring_the_best_again_is_succeeded(opened, owners):
    best = NETWORKS[:2]
    with pytest.raises(Killed):
        opened("one").rescored(best, Measure(die))
    owners("one")
    measure = Measure()
    assert opened("two").rescored(best, measure) == scored(*best)
    assert measure.passes == [best]


def test_a_process_that_ends_early_does_not_choose_for_the_others(opened):
    """Its strategy found nothing new; that of another went on, and found better ones."""
    one, two = opened("one"), opened("two")
    assert found(one, listed(*NETWORKS[:4]), 8).winner == NETWORKS[3]
    outcome = found(two, listed(*NETWORKS[90:94]), 8)
    assert outcome.winner == NETWORKS[93]
    assert set(outcome.more) == set(NETWORKS[92:94])
    assert outcome.best[NETWORKS[93]].images == 200


# Identity


@pytest.mark.parametrize(("key", "value"), [("checkpoint", "abd"), ("budget", 501), ("budget", None), ("seed", 8)])
def test_another_identity_is_refused_by_what_differs(opened, key, value):
    opened()
    with pytest.raises(UsageError) as caught:
        opened(identity=IDENTITY | {key: value})
    assert str(caught.value).startswith(f"study s: its {key} is {IDENTITY[key]}, here it is {value}; ")
    assert "search.study" in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_first_difference_is_named(opened):
    opened()
    with pytest.raises(UsageError, match=r"^study s: its budget is 500, here it is 1;"):
        opened(identity=IDENTITY | {"seed": 0, "budget": 1})


# Databases


UNUSABLE = {
    "a folder that is not there": ("sqlite:////no/such/folder/studies.sqlite", "unable to open database file"),
    "a dialect that does not exist": ("oracel://user:geheim@host/studies", "oracel"),
    "a driver that is not installed": ("postgresql+psycopg2://user:geheim@host/studies", "psycopg2"),
    "a driver of its own": ("mysql://user:geheim@host/studies", "MySQLdb"),
    "a server that does not answer": ("postgresql://user:geheim@127.0.0.1:1/studies", "127.0.0.1"),
    "no address at all": ("studies", "URL"),
    "an address with a slip": ("postgresql//user:geheim@host/studies", "URL"),
    "a port that is no number": ("postgresql://user:geheim@host:port/studies", "port"),
    "nothing": ("", "URL"),
    "a password where options stand": ("postgresql://user@127.0.0.1:1/studies?password=geheim", "127.0.0.1"),
    "a password with a slash": ("postgresql://user:ge/heim@127.0.0.1:1/studies", "127.0.0.1"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_database_that_cannot_be_used_is_one_line_without_its_password(name):
    url, word = UNUSABLE[name]
    if word == "psycopg2":
        assert_not_installed(word)
    with pytest.raises(ResourceError) as caught:
        open_storage(url)
    text = str(caught.value)
    assert caught.value.exit_code == 7
    assert len(text.splitlines()) == 1
    assert word in text
    assert "search.storage" in text
    assert "heim" not in text


def assert_not_installed(name):
    try:
        __import__(name)
    except ImportError:
        return
    pytest.skip(f"{name} is installed here")


def test_what_is_no_database_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("nothing that SQLite reads\n" * 99)
    with pytest.raises(ResourceError, match=r"notes\.txt: .*file is not a database"):
        open_storage(f"sqlite:///{path}")


RACES = [
    "table studies already exists",
    "UNIQUE constraint failed: alembic_version.version_num",
    'duplicate key value violates unique constraint "pg_type_typname_nsp_index"',
]
"""What SQLite and PostgreSQL say to the second of two processes that make the tables at one moment."""


@pytest.mark.parametrize("reason", RACES)
def test_tables_that_another_process_makes_meanwhile_are_waited_for(tmp_path, monkeypatch, clock, reason):
    real, attempts = module.RDBStorage, []

    def late(*arguments, **options):
        attempts.append(arguments)
        if len(attempts) == 1:
            raise IntegrityError("CREATE", {}, sqlite3.Error(reason)) from sqlite3.Error(reason)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "RDBStorage", late)
    open_storage(f"sqlite:///{tmp_path / 'studies.sqlite'}").engine.dispose()
    assert len(attempts) == 2


def test_the_password_of_a_storage_that_can_be_used_is_never_shown():
    url = "postgresql+psycopg://user:geheim@host:5432/studies"
    assert make_url(url).password == "geheim"
    assert module.without_password(url) == "postgresql+psycopg://user:***@host:5432/studies"


# Real processes

WORKERS = """
import os, random, sys, time
from pathlib import Path
from types import SimpleNamespace
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sdpctl.engine.evaluate import Score
from sdpctl.instance import Instance
from sdpctl.search import study as module
from sdpctl.search.study import Study, open_storage
from sdpctl.stages.liveness import LivingProcess

folder = Path(sys.argv[1])
module.POLL = 0.02
event.listen(Engine, "connect", lambda connection, _: connection.execute("pragma synchronous = off"))
tenths = [tenth / 10 for tenth in range(10, 0, -1)]
networks = [Instance((("stem", a), ("layer1.0", b))) for a in tenths for b in tenths][:60]

def work(seed, log):
    def measure(instances):
        time.sleep(0.05)
        print("measured", *instances, file=log, flush=True)
        return {i: Score(100, 10 * len(str(i)) / 7, None, 0.5) for i in instances}

    process = LivingProcess(folder / "processes")
    with process.living():
        study = Study(
            open_storage(f"sqlite:///{folder / 'studies.sqlite'}"), "shared", {"seed": 1},
            space=SimpleNamespace(cost=lambda instance: len(str(instance))), choices={"stem": tenths, "layer1.0": tenths},
            owner=process, reward=lambda instance, score: score.top1, measure=measure,
        )
        random.Random(seed).shuffle(networks)
        for i in range(0, 60, 4):
            study.answer(networks[i : i + 4], 60)
        study.settle()
        assert len(study.scores()) == 60
        best = sorted(study.scores(), key=str)[:3]
        print("best", *study.rescored(best, measure), file=log, flush=True)

pids = []
for name in ("one", "two"):
    pids.append(os.fork())
    if not pids[-1]:
        try:
            work(name, (folder / name).open("w"))
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
print(*pids, flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@contextmanager
def two_at_work(folder):
    """Let two processes begin at one moment on one study that is not there yet; yield theirs and their parent."""
    command = [sys.executable, "-c", WORKERS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        yield [int(pid) for pid in parent.stdout.readline().split()], parent


def measured(lines):
    return [instance for line in lines if line.startswith("measured ") for instance in line.split()[1:]]


def in_the_file(path):
    """Read a study by SQL alone: the networks of each state."""
    rows = "select t.state, a.value_json from trials t join trial_user_attributes a using (trial_id) where a.key = 'network'"
    found = {}
    with closing(sqlite3.connect(path)) as connection:
        for state, network in connection.execute(rows):
            found.setdefault(state, []).append(network.strip('"'))
    return found


def test_two_processes_lose_nothing_and_double_nothing(tmp_path):
    with two_at_work(tmp_path) as (_, parent):
        assert parent.communicate(timeout=60)[0] == "0 0\n"
    states = in_the_file(tmp_path / "studies.sqlite")
    assert sorted(states["COMPLETE"]) == sorted(map(str, NETWORKS[:60]))
    assert set(states) <= {"COMPLETE", "FAIL"}
    logs = [(tmp_path / name).read_text().splitlines() for name in ("one", "two")]
    (best,) = {line for lines in logs for line in lines if line.startswith("best ")}
    once = [measured(line for line in lines if line != best.replace("best", "measured")) for lines in logs]
    assert min(map(len, once)) > 0
    assert sorted(once[0] + once[1]) == sorted(states["COMPLETE"])
    assert list((tmp_path / "processes").iterdir()) == []


def test_when_one_of_two_is_killed_the_other_completes(tmp_path):
    with two_at_work(tmp_path) as ((killed, _), parent):
        while not (tmp_path / "one").exists() or len(measured((tmp_path / "one").read_text().splitlines())) < 8:
            assert parent.poll() is None
            time.sleep(0.01)
        os.kill(killed, signal.SIGKILL)
        assert parent.communicate(timeout=60)[0] == "-9 0\n"
    states = in_the_file(tmp_path / "studies.sqlite")
    assert sorted(states["COMPLETE"]) == sorted(map(str, NETWORKS[:60]))
    assert set(states) <= {"COMPLETE", "FAIL"}
    before = measured((tmp_path / "one").read_text().splitlines())
    lines = (tmp_path / "two").read_text().splitlines()
    assert len(before) < 40
    assert set(before) & set(measured(lines[:-2])) <= set(before[-4:])
    assert lines[-1].startswith("best ")
