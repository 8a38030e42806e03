import re

import pytest
from pydantic import TypeAdapter, ValidationError

from sdpctl.budget import LABEL, Budget, BudgetRange, label
from sdpctl.errors import UsageError
from sdpctl.section import MacsRange
from sdpctl.store.layout import TAG, TAG_MAX

MANY = 10**17 + 3
"""More MACs than a float can count one by one."""


@pytest.mark.parametrize(
    ("given", "full", "macs"),
    [
        ("50%", 1000, 500),
        ("50%", 1001, 500),
        ("50 %", 1000, 500),
        (" 50% ", 1000, 500),
        ("33.3%", 1000, 333),
        ("33.3%", 1001, 333),
        ("33.3%", 1004, 334),
        ("0.1%", 3000, 3),
        ("29%", 100, 29),  # 0.29 * 100 is 28.999999999999996
        ("57%", 100, 57),
        ("100%", MANY, MANY),
        ("10%", MANY, 10**16),
        ("120%", 1000, 1200),
        ("1.2G", 7, 1_200_000_000),
        ("1.1G", 7, 1_100_000_000),
        ("350M", 7, 350_000_000),
        ("12k", 7, 12_000),
        ("1.5 k", 7, 1500),
        (".5G", 7, 500_000_000),
        ("2.G", 7, 2_000_000_000),
        ("0.001k", 7, 1),
        ("1258309", 7, 1_258_309),
        (str(MANY), 7, MANY),
        (1, 7, 1),
        (1_258_309, 7, 1_258_309),
        (MANY, 7, MANY),
        (1e9, 7, 1_000_000_000),
        (1.5e6, 7, 1_500_000),
        (1e22, 7, 10**22),
    ],
)
def test_a_budget_allows_so_many_macs_exactly(given, full, macs):
    assert Budget.parse(given).macs(full) == macs


@pytest.mark.parametrize(
    ("given", "text"), [("50%", "50%"), (" 1.2G ", "1.2G"), (350, "350"), (1e9, "1000000000"), (1e22, str(10**22))]
)
def test_its_text_reads_back_the_same(given, text):
    budget = Budget.parse(given)
    assert budget.text == text
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *[(text, "50pct") for text in ("50%", " 50 % ", "050%", "50.%", "50.00%")],
        *[(text, "37.5pct") for text in ("37.5%", "37.50%", "0037.5 %")],
        *[(text, "1.2G") for text in ("1.2G", "1.20 G", "01.2G")],
        *[(text, "0.5G") for text in (".5G", "0.5G", "00.50G")],
        *[(text, "1258309") for text in ("1258309", 1258309, 1258309.0, "01258309", "1258309.0")],
        ("0.1%", "0.1pct"),
        ("100%", "100pct"),
        ("2.G", "2G"),
        ("350M", "350M"),
        ("1.5 k", "1.5k"),
        (1e9, "1000000000"),
        (1e22, "1" + 22 * "0"),
        ("10.5", "10.5"),
        ("33." + 90 * "3" + "%", "33." + 21 * "3" + "pct"),
        ("0." + 40 * "0" + "1%", "0pct"),
        ("9" * 99 + "G", "9" * 24 + "G"),
        ("5" * 23 + ".7%", "5" * 23 + "pct"),
    ],
)
def test_equal_budgets_have_one_label_and_it_can_end_the_longest_tag(given, expected):
    found = Budget.parse(given).label
    assert found == expected == label(Budget.parse(given).text)
    assert re.fullmatch(LABEL, found)
    tag = f"{'n' * 80}.cascade.{found}"  # a recipe's name has at most 80 characters
    assert TAG.fullmatch(tag)
    assert len(tag) <= TAG_MAX


def test_no_budget_has_a_label_too():
    assert label(None) == "any"
    assert re.fullmatch(LABEL, "any")


@pytest.mark.parametrize(
    "given",
    [
        *[
            "",
            "%",
            "G",
            "half",
            "all",
            "50%%",
            "50%G",
            "1.2.3G",
            "1T",
            "1g",
            "1K",
            "1e9",
            "1,000",
            "0x10",
            "50% of full",
            "1 2",
        ],
        *["0", "0%", "0.0G", "-5", "-50%", "+5", "0.5", "0.9999", "0.0001k", "inf", "nan"],
        *[0, -1, 0.5, 0.0, -2.0, float("inf"), float("nan")],
    ],
)
def test_what_is_no_budget(given):
    with pytest.raises(UsageError) as caught:
        Budget.parse(given)
    assert str(caught.value) == (
        f"{str(given)!r} is not a budget; write a share of `full` as 50%, or MACs as 1.2G, 350M or a number"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("given", ["9" * 5000, "9" * 101 + "G", "\u0665\u0660%", 1e300, "." + "0" * 400 + "1G"])
def test_hostile_text_is_no_budget_and_is_cut(given):
    with pytest.raises(UsageError, match="is not a budget; write a share of `full` as 50%") as caught:
        Budget.parse(given)
    assert len(str(caught.value)) < 250


RANGES = [
    ("30%..90%", 1000, (300, 900), "30%..90%"),
    (" 29% ..  57% ", 100, (29, 57), "29%..57%"),
    ("50%..50%", 1001, (500, 500), "50%..50%"),
    (".5k..1.2G", 7, (500, 1_200_000_000), ".5k..1.2G"),
    ("2...3G", 7, (2, 300_000_000), "2...3G"),
    ("5..120%", 1000, (5, 1200), "5..120%"),
    ("30%..1M", 3_333_333, (999_999, 1_000_000), "30%..1M"),
    (f"1..{MANY}", 7, (1, MANY), f"1..{MANY}"),
]


@pytest.mark.parametrize(("given", "full", "macs", "text"), RANGES)
def test_a_range_has_two_exact_ends_and_reads_back_the_same(given, full, macs, text):
    budgets = BudgetRange.parse(given)
    assert budgets.macs(full) == macs
    assert str(budgets) == text
    assert BudgetRange.parse(text) == budgets
    assert TypeAdapter(MacsRange).validate_python(given) == text


@pytest.mark.parametrize(
    "given",
    ["", "50%", "..", "30%..", "..90%", "30%.90%", "30%-90%", "30%..90%..95%", "0%..50%", "30%..half", "2. ..3G", "2....3G"],
)
def test_what_is_no_range(given):
    with pytest.raises(UsageError) as caught:
        BudgetRange.parse(given)
    assert str(caught.value) == (
        f"{given!r} is not a range of budgets; write two budgets with two dots between them, as 30%..90% or 50M..1.2G"
    )


@pytest.mark.parametrize("given", ["90%..30%", "1.2G..350M", "50.1%..50%"])
def test_the_lower_budget_of_a_range_comes_first(given):
    first, last = given.split("..")
    with pytest.raises(UsageError) as caught:
        BudgetRange.parse(given)
    assert str(caught.value) == (
        f"{given!r} is not a range of budgets: {first} is more than {last}; write the lower budget first"
    )


def test_a_share_and_macs_are_compared_once_the_network_is_known():
    for given, full in (("30%..1M", 5_000_000), ("2M..50%", 3_999_998)):
        with pytest.raises(UsageError):
            BudgetRange.parse(given).macs(full)
    budgets = BudgetRange.parse("30%..1M")
    with pytest.raises(UsageError) as caught:
        budgets.macs(5_000_000)
    assert str(caught.value) == (
        "'30%..1M' is not a range of budgets of this network: 30% is 1,500,000 MACs, more than 1M (1,000,000); lower the first "
        "budget, or write both as shares"
    )


@pytest.mark.parametrize("given", ["9" * 5000, "9" * 5000 + ".." + "9" * 5000, "1.." * 5000, "\u0665%..\u0666%"])
def test_a_hostile_range_is_cut(given):
    with pytest.raises(UsageError, match="is not a range of budgets; write two budgets") as caught:
        BudgetRange.parse(given)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("given", [50, 0.5, True, ["30%", "90%"], None, {"lowest": "30%"}])
def test_a_range_in_a_recipe_is_a_text(given):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(MacsRange).validate_python(given)
    (problem,) = caught.value.errors()
    assert problem["msg"].endswith(f"as 30%..90% or 50M..1.2G; got {given!r}")


def test_a_range_in_a_recipe_is_checked_and_described_as_a_text():
    with pytest.raises(ValidationError, match=r"'90%\.\.30%' is not a range of budgets: 90% is more than 30%"):
        TypeAdapter(MacsRange).validate_python("90%..30%")
    assert TypeAdapter(MacsRange).json_schema() == {"type": "string"}
