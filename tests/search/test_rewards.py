"""Rewards against Python's own arithmetic, and texts that are no rewards."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpctl.engine.cost import Costs
from sdpctl.engine.evaluate import Score
from sdpctl.errors import UsageError
from sdpctl.instance import FULL, Instance
from sdpctl.models import create_model
from sdpctl.search.catalog import REWARDS
from sdpctl.search.rewards import LONGEST, Expression, Facts
from sdpctl.search.scoring import make_reward
from sdpctl.search.space import Space

FACTS = Facts(top1=62.5, top5=93.75, loss=1.25, macs=20_000_000, gmacs=0.02, relative=0.5)
NAMES = FACTS._asdict() | {name: getattr(math, name) for name in ("log", "exp", "sqrt")}
"""What Python's own `eval`, the reference of these tests, may use besides its builtins."""

EXPRESSIONS = [
    "top1 - 2 * gmacs",
    "-(1 - top1/100) * log(macs)",
    " -loss ",
    "top1",
    "top5 + top1 / 2",
    "+top1 - -3",
    "2 ** 3 ** 0.5 * top1",
    "-2 ** 2 + relative",
    "sqrt(abs(-top1)) * exp(-loss)",
    "min(top1, 50, 3e1) - max(macs, 5) ** 0.25",
    "macs * macs * macs * 1e-9",
    "((((top1))))",
    "-" * 190 + "top1",
    "+".join(["top1"] * 40),
]


def space(classes=7):
    costs = Costs(create_model("resnet20", num_classes=classes, in_channels=1), (1, 12, 12))
    return Space(costs, {"layer1.0": (1, 0.5)})


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_is_what_python_computes(text):
    assert text in REWARDS
    assert Expression(text)(FACTS, 3.0) == pytest.approx(eval(text.strip(), {}, NAMES), rel=1e-12)  # our own texts


@given(
    st.recursive(
        st.sampled_from(Facts._fields) | st.floats(0.1, 9).map(str),
        lambda parts: (
            st.tuples(parts, st.sampled_from("+-*/"), parts).map(lambda part: f"({part[0]} {part[1]} {part[2]})")
            | parts.map(lambda part: f"-abs({part})")
            | st.tuples(parts, parts).map(lambda pair: f"max({pair[0]}, {pair[1]})")
        ),
        max_leaves=12,
    )
)
def test_any_expression_is_what_python_computes(text):
    if len(text) > LONGEST or not any(name in text for name in Facts._fields):
        with pytest.raises(UsageError):
            Expression(text)
        return
    try:
        expected = eval(text, {}, NAMES)
    except ZeroDivisionError:
        with pytest.raises(ArithmeticError):
            Expression(text)(FACTS, 1.0)
        return
    assert Expression(text)(FACTS, 1.0) == pytest.approx(expected, rel=1e-12)


ALLOWED = "use numbers, values, functions, parentheses and + - * / **"
VALUES = "top1, top5, loss, macs, gmacs, relative"
FUNCTIONS = "log, exp, sqrt, abs, min, max"

REFUSED = {
    "__import__('os')": f"there is no function '__import__'; the functions are {FUNCTIONS}",
    "open('/etc/passwd')": f"there is no function 'open'; the functions are {FUNCTIONS}",
    "9**9**9**9": f"it depends on none of the values {VALUES}",
    "().__class__": f"'().__class__' is not allowed; {ALLOWED}",
    "top1.__class__": f"'top1.__class__' is not allowed; {ALLOWED}",
    "(top1).real": f"'top1.real' is not allowed; {ALLOWED}",
    "top1[0]": f"'top1[0]' is not allowed; {ALLOWED}",
    "[top1][0]": f"'[top1][0]' is not allowed; {ALLOWED}",
    "'a' * macs": f"\"'a'\" is not allowed; {ALLOWED}",
    "b'a' * macs": f"\"b'a'\" is not allowed; {ALLOWED}",
    "f'{top1}'": f"\"f'{{top1}}'\" is not allowed; {ALLOWED}",
    "5j * top1": f"'5j' is not allowed; {ALLOWED}",
    "True * top1": f"'True' is not allowed; {ALLOWED}",
    "top1 << macs": f"'top1 << macs' is not allowed; {ALLOWED}",
    "top1 // 2": f"'top1 // 2' is not allowed; {ALLOWED}",
    "~top1": f"'~top1' is not allowed; {ALLOWED}",
    "top1 > 50": f"'top1 > 50' is not allowed; {ALLOWED}",
    "1if top1 else 2": f"'1 if top1 else 2' is not allowed; {ALLOWED}",
    "(lambda: top1)()": f"'(lambda: top1)()' is not allowed; {ALLOWED}",
    "(top1 := 5)": f"'(top1 := 5)' is not allowed; {ALLOWED}",
    "[x for x in (top1,)]": f"'[x for x in (top1,)]' is not allowed; {ALLOWED}",
    "log(x=top1)": f"'log(x=top1)' is not allowed; {ALLOWED}",
    "max(top1, *top1)": f"'*top1' is not allowed; {ALLOWED}",
    "log + top1": f"there is no value 'log'; the values are {VALUES}",
    "top1 - gmac": f"there is no value 'gmac' (did you mean 'gmacs'?); the values are {VALUES}",
    "logg(top1)": f"there is no function 'logg' (did you mean 'log'?); the functions are {FUNCTIONS}",
    "log(top1, 2)": "log takes one value, and gets 2",
    "sqrt() + top1": "sqrt takes one value, and gets 0",
    "min(top1)": "min takes two values or more, and gets 1",
    "max() + top1": "max takes two values or more, and gets 0",
    "top1 +": "it cannot be parsed",
    "top1 2": "it cannot be parsed",
    "top1; loss": "it cannot be parsed",
    "top1 = 2": "it cannot be parsed",
    "import os": "it cannot be parsed",
    "top1\0": "it cannot be parsed",
    "(" * 100 + "top1": "it cannot be parsed",
    "": "it cannot be parsed",
    "top1 + " * 1000 + "top1": "it has 7,004 characters, and 200 are allowed",
    "9" * 201: "it has 201 characters, and 200 are allowed",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=[text[:30] for text in REFUSED])
def test_a_text_that_is_no_reward(text, reason):
    assert text not in REWARDS
    (line,) = REWARDS.unknown(text).splitlines()
    assert " is not a reward: " in line
    assert reason in line
    assert line.endswith("; the named rewards are accuracy, amc, branch")
    assert len(line) < 400


def test_a_name_that_is_no_reward():
    assert REWARDS.unknown("acuracy") == (
        "there is no reward 'acuracy' (did you mean 'accuracy'?); choose one of accuracy, amc, branch, or write an expression "
        "such as top1 - 2 * gmacs"
    )


SHRUNK, SCORE = Instance.parse("layer1.0@0.5"), Score(1000, 62.5, 93.75, 1.25)


def test_an_expression_has_the_facts_of_the_network():
    where = space()
    macs = where.costs.of(SHRUNK).macs
    expected = {
        "top1": 62.5,
        "top5": 93.75,
        "loss": 1.25,
        "macs": macs,
        "gmacs": macs / 1e9,
        "relative": macs / where.costs.of(FULL).macs,
    }
    assert expected["relative"] < 1
    assert {name: make_reward(name, 3.0, where)(SHRUNK, SCORE) for name in Facts._fields} == expected


@pytest.mark.parametrize("seen", [62.5, 10.0])
def test_named_rewards_are_the_expressions_that_describe_them(seen):
    where, score = space(), Score(1000, seen, None, 1.0)
    for name, text in {"accuracy": "top1", "amc": "-(1 - top1/100) * log(macs)", "branch": "top1 - 3 * gmacs"}.items():
        for instance in (FULL, SHRUNK):
            assert make_reward(name, 3.0, where)(instance, score) == pytest.approx(
                make_reward(text, 0.0, where)(instance, score), rel=1e-12
            )


@pytest.mark.parametrize(
    ("text", "score", "shown"),
    [
        ("1 / (top1 - 62.5)", SCORE, "where top1 is 62.5 ("),
        ("log(top1 - 100)", SCORE, "where top1 is 62.5 ("),
        ("exp(macs)", SCORE, "where macs is "),
        ("macs ** macs", SCORE, "where macs is "),
        ("(-loss) ** 0.5", SCORE, "where loss is 1.25 ("),
        ("loss * 1e400", SCORE, "where loss is 1.25 (it is inf)"),
        ("loss", Score(9, 50.0, None, math.nan), "where loss is nan (it is nan)"),
        ("9" * 190 + "*loss", Score(9, 50.0, None, 1e200), "where loss is 1e+200 ("),
    ],
)
def test_a_reward_that_is_not_a_finite_number_is_one_line(text, score, shown):
    with pytest.raises(UsageError) as caught:
        make_reward(text, 1.0, space())(SHRUNK, score)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("search.reward=")
    assert f": the reward of {SHRUNK} is not a finite number, {shown}" in line
    assert line.endswith("; choose a different reward")


def test_top5_needs_six_classes():
    assert make_reward("top5 - gmacs", 1.0, space(6))(SHRUNK, SCORE) < 93.75
    for text in ("top5", "min(top1, top5)"):
        with pytest.raises(UsageError) as caught:
            make_reward(text, 1.0, space(5))
        assert str(caught.value) == f"search.reward={text!r}: top5 needs at least 6 classes, and there are 5; use top1"
    assert make_reward("top1 - loss", 1.0, space(5))(SHRUNK, Score(9, 50.0, None, 2.0)) == 48


def test_what_a_reward_depends_on():
    assert [info.weighs_costs for info in REWARDS.values()] == [False, True, True]
    assert REWARDS["top1 - 100 * max(relative, 0.5)"].uses == {"top1", "relative"}
    assert {text: REWARDS[text].weighs_costs for text in ("top1 - loss", "gmacs", "macs", "-relative")} == {
        "top1 - loss": False,
        "gmacs": True,
        "macs": True,
        "-relative": True,
    }
    assert all(info.summary and callable(info.function) for info in REWARDS.values())


def test_a_recipe_with_an_expression_is_read_without_the_evaluator():
    """Help and completion wait for no library that they do not use."""
    code = (
        "import sys; from sdpctl.search.catalog import REWARDS; REWARDS['top1 - gmacs']; "
        "print({'simpleeval', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
