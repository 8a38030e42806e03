"""The plan, with stages that only count how often they are done."""

import dataclasses

import pytest

from sdpctl.errors import DataError, ResourceError
from sdpctl.kinds import Kind
from sdpctl.plan import Plan, Step
from sdpctl.stages.context import Context
from sdpctl.stages.stage import Job, Made, Stage, key_of

WORD = Kind(name="word", command="word", suffixes=("w",))


class Word(Stage):
    """Keeps a word after those it is made from."""

    kind = WORD

    def __init__(self, tag, *needs, word="a", complete=True, serves=None, together=None, also=(), fails=None):
        self.name, self.needs, self.word, self.complete = tag, needs, word, complete
        self.serves, self.together, self.fails, self.done = serves, together or {}, fails, 0
        self.further = also

    @property
    def tag(self):
        return self.name

    @property
    def also(self):
        return self.further

    def steps(self, context):
        made_from = []
        for need in self.needs:
            made_from.append((yield need))
        if self.serves is not None:
            return self.serves
        key = key_of(self.kind, word=self.word, made_from=[artifact.digest for artifact in made_from])
        subject = made_from[0] if made_from else None
        return Job(key=key, make=self.make, subject=subject, complete=self.complete, together=self.together)

    def task(self, context):
        return f"write {self.word}"

    def make(self):
        self.done += 1
        if self.fails:
            raise self.fails
        return Made({"word.txt": self.word.encode()}, f"{self.word} is written")


class Listener:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def detail(self, text):
        pass


@pytest.fixture
def context(tmp_path):
    return Context(path=tmp_path / "store", report=Listener())


def tags(context):
    return {artifact.tag: artifact.digest for artifact in context.store.artifacts() if artifact.tag}


def test_what_is_needed_is_done_first_and_once(context):
    first = Word("first")
    second, third = Word("second", first, word="b"), Word("third", first, word="c")
    last = Word("last", second, third, word="d")
    plan = Plan(context)
    artifact = plan.run(last)
    assert [step.tag for step in plan.steps] == ["first", "second", "third", "last"]
    assert (first.done, second.done, third.done, last.done) == (1, 1, 1, 1)
    assert context.store.read(artifact, "word.txt") == b"d"
    assert context.store.at(artifact.subject).digest == plan.run(second).digest


def test_what_the_store_has_is_not_done_again(context):
    before = Plan(context).run(Word("a"))
    again = Word("a")
    assert Plan(context).run(again).digest == before.digest
    assert again.done == 0
    assert context.report.notes[-1] == f"a: in the store already, {before.short}"


def test_force_does_again_what_the_command_names_and_nothing_else(context):
    Plan(context).run(Word("a", Word("n")))
    need = Word("n")
    named = Word("a", need)
    Plan(context, force=True).run(named)
    assert (need.done, named.done) == (0, 1)


def test_a_named_stage_moves_its_tag_and_one_on_the_way_does_not(context):
    before = Plan(context).run(Word("n"))
    Plan(context).run(Word("a", Word("n", word="new")))
    assert tags(context)["n"] == before.digest
    after = Plan(context).run(Word("n", word="new"))
    assert tags(context)["n"] == after.digest != before.digest


@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_on_the_way_takes_a_free_tag_if_its_result_is_complete(context, complete):
    Plan(context).run(Word("a", Word("n", complete=complete)))
    assert ("n" in tags(context)) == complete
    Plan(context).run(Word("n", complete=complete))
    assert "n" in tags(context)


def test_further_tags_move_with_a_named_stage_and_back_when_the_store_answers(context):
    b = Plan(context).run(Word("n", word="b", also=("n.b", "n.x")))
    c = Plan(context).run(Word("n", word="c", also=("n.c", "n.x")))
    assert (b.tag, c.tag) == ("n", "n")
    assert tags(context) == {"n": c.digest, "n.b": b.digest, "n.c": c.digest, "n.x": c.digest}
    again = Plan(context).run(Word("n", word="b", also=("n.b", "n.x")))
    assert (again.digest, again.tag) == (b.digest, "n")
    assert tags(context) == {"n": b.digest, "n.b": b.digest, "n.c": c.digest, "n.x": b.digest}
    before = (context.path / "index.json").read_bytes()
    dry = Plan(dataclasses.replace(context, dry_run=True)).run(Word("n", word="c", also=("n.c", "n.x")))
    assert (dry.digest, dry.tag) == (c.digest, "n.c")
    assert (context.path / "index.json").read_bytes() == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_on_the_way_takes_each_tag_that_is_free(context, complete):
    root = Word("root", word="r")
    before = Plan(context).run(Word("n", root, word="b", also=("n.b",)))
    need = Word("n", root, word="c", complete=complete, also=("n.b", "n.c"))
    Plan(context).run(Word("a", need, word="d"))
    assert need.done == 1
    assert tags(context)["n"] == tags(context)["n.b"] == before.digest
    assert ("n.c" in tags(context)) == complete
    if complete:
        assert context.store.read(context.store.resolve("n.c"), "word.txt") == b"c"


def test_tags_that_belong_together_move_with_the_named_stage_alone(context):
    old, new = Plan(context).run(Word("s", word="old")), Plan(context).run(Word("other", word="new"))
    Plan(context).run(Word("up", Word("t", together={"s": new})))
    assert tags(context)["s"] == old.digest
    Plan(context).run(Word("t", together={"s": new}))
    assert tags(context)["s"] == new.digest


def test_an_artifact_that_serves_as_well_is_taken(context):
    other = Plan(context).run(Word("other"))
    stage = Word("n", word="b", serves=other)
    assert Plan(context).run(stage).digest == other.digest
    assert stage.done == 0


def test_a_dry_run_lists_every_stage_and_does_none(context):
    there = Plan(context).run(Word("there"))
    dry = dataclasses.replace(context, dry_run=True)
    missing = Word("missing", Word("there"), word="b")
    last = Word("last", missing, word="c")
    plan = Plan(dry)
    assert plan.run(last) is None
    key = key_of(WORD, word="b", made_from=[there.digest])
    assert plan.steps == [
        Step("there", "word", there.digest),
        Step("missing", "word", None, "write b", f"the store has no artifact of its key {key[:12]}"),
        Step("last", "word", None, "write c", "missing is made first"),
    ]
    assert missing.done == last.done == 0
    assert set(tags(context)) == {"there"}


def test_a_forced_dry_run_says_so(context):
    Plan(context).run(Word("a"))
    plan = Plan(dataclasses.replace(context, dry_run=True), force=True)
    assert plan.run(Word("a")) is None
    assert plan.steps == [Step("a", "word", None, "write a", "--force")]


def test_a_stage_that_fails_leaves_tags_and_artifacts_as_they_were(context):
    Plan(context).run(Word("a"))
    before = tags(context)
    with pytest.raises(DataError):
        Plan(context).run(Word("a", word="b", fails=DataError("the data is gone")))
    assert tags(context) == before


def test_a_store_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    stage = Word("a")
    with pytest.raises(ResourceError):
        Plan(Context(path=tmp_path / "file" / "store", report=Listener())).run(stage)
    assert stage.done == 0


def test_a_dry_run_says_that_a_result_is_kept_with_a_different_recipe(context):
    class Adapted(Word):
        def steps(self, context):
            job = yield from super().steps(context)
            return dataclasses.replace(job, adapt=lambda _: Made({"word.txt": b"z"}, "the same word in other letters"))

    Plan(context).run(Word("a"))
    plan = Plan(dataclasses.replace(context, dry_run=True))
    assert plan.run(Word("b", Adapted("a"), word="b")) is None
    assert [step.task for step in plan.steps] == ["keep the same word in other letters", "write b"]
    kept = Plan(context).run(Adapted("a"))
    assert context.store.read(kept, "word.txt") == b"z"
    assert context.report.notes[-1] == f"a: the same word in other letters, {kept.short}"
