import re

import pytest

from sdpctl.budget import LABEL, Budget, label
from sdpctl.errors import UsageError
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
