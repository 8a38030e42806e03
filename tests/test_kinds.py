import pytest

from sdpctl.kinds import without_suffix


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("digits", "digits"),
        ("digits.bn", "digits"),
        ("digits.eval", "digits"),
        ("digits.search", "digits"),
        ("digits.search.50pct", "digits"),
        ("digits.search.37.5pct", "digits"),
        ("digits.search.1.2G", "digits"),
        ("digits.search.1258309", "digits"),
        ("digits.search.any", "digits"),
        ("digits.cascade", "digits"),
        ("digits.cascade.350M", "digits"),
        ("digits.export.onnx.0123456789ab", "digits"),
        ("search", "search"),
        ("digits.search.anything", "digits.search.anything"),
        ("digits.search.50", "digits"),
        ("digits.50pct", "digits.50pct"),
        ("digits.bn.50pct", "digits.bn.50pct"),
        ("digits.research", "digits.research"),
        ("digits.partial", "digits.partial"),
    ],
)
def test_the_suffix_of_a_kind_is_not_part_of_the_name(tag, name):
    assert without_suffix(tag) == name
