"""Opening artifacts whose stored recipe somebody else may have written."""

import json

import pytest

from sdpctl.errors import IntegrityError, RecipeError
from sdpctl.kinds import HISTORY, MODEL, RECIPE
from sdpctl.recipe.resolved import Resolved
from sdpctl.stages.network import open_network, recipe_layer, recipe_of
from sdpctl.stages.workspace import LOCAL


@pytest.fixture
def kept(context):
    """Keep a checkpoint with some recipe in the store."""

    def keep(recipe):
        context.require_writable()
        layers = {MODEL: b"weights", HISTORY: b"", RECIPE: recipe}
        return context.store.commit("checkpoint", layers, key="0" * 64, tag="foreign")

    return keep


HOSTILE = {
    "bytes": (b"\xff\xfe\0", "this file is UTF-16 or UTF-32, not UTF-8"),
    "a large recipe": (b"#" * (2**20 + 1), "and a recipe has at most 1,048,576"),
    "text": (b"nonsense", "a recipe is a mapping of keys"),
    "no YAML": (b"[", "this is not YAML"),
    "an alias in itself": (b"a: &a [*a]", "this value contains an alias that refers to the value itself"),
    "an unknown architecture": (
        b"name: a\nmodel: {arch: b}\ndata: {dataset: digits}\n",
        ":2:15: model.arch: there is no architecture 'b'",
    ),
    "many problems": (b"name: [\x41]\nmodel: 1\ndata: 2\nb: 3\n", ":1:7: name: this should be a valid string"),
}


@pytest.mark.parametrize(("recipe", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_recipe_in_the_store_is_said_of_its_artifact(kept, context, recipe, problem):
    artifact = kept(recipe)
    for look in (lambda: recipe_of(artifact, context), lambda: open_network("foreign", context, ["data.workers=0"])):
        with pytest.raises(IntegrityError) as caught:
            look()
        assert caught.value.exit_code == 5
        (line,) = str(caught.value).splitlines()
        assert artifact.digest[7:19] in line
        assert problem in line
        assert line.endswith("the artifact is damaged, or a newer sdpctl made it: restore it from a copy, or make it again")


def test_an_override_that_does_not_hold_is_a_problem_of_the_recipe(kept, context, tiny):
    kept(recipe_layer(Resolved(tiny())))
    with pytest.raises(RecipeError) as caught:
        open_network("foreign", context, ["data.batch_size=1"])
    assert caught.value.exit_code == 3
    assert caught.value.problems == [
        "--set data.batch_size=1: data.batch_size: this should be greater than or equal to 2, got 1"
    ]


@pytest.mark.parametrize(
    "values", [{"data.workers": "many"}, {"device": 7}, {"data.root": ["a"]}, {"train.checkpoint": {"epochs": 0}}]
)
def test_damaged_local_values_are_said_of_their_file(kept, context, tiny, values):
    kept(recipe_layer(Resolved(tiny("data.fingerprint=abc"))))
    (context.path / LOCAL).write_text(json.dumps({"abc": values}))
    with pytest.raises(IntegrityError, match=r"local\.json: this file is damaged \(.*\); remove it and name the data"):
        open_network("foreign", context)


@pytest.mark.parametrize("values", [{"data.root.x": 1}, {"name": "b"}, {"x-y": 1}, {"model.arch.b.c": {}}])
def test_other_local_values_are_not_taken(kept, context, tiny, values):
    kept(recipe_layer(Resolved(tiny("data.fingerprint=abc"))))
    (context.path / LOCAL).write_text(json.dumps({"abc": values | {"data.root": "there"}}))
    opened = open_network("foreign", context)
    assert (opened.recipe.name, opened.recipe.model.arch, opened.recipe.data.root) == ("tiny", "resnet20", "there")
