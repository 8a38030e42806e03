import pytest

from sdpctl.kinds import without_suffix


@pytest.mark.parametrize(
    ("tag", "kind", "name"),
    [
        ("digits", "checkpoint", "digits"),
        ("digits.bn", "bn-statistics", "digits"),
        ("digits.eval", "evaluation", "digits"),
        ("digits.holdout", "evaluation", "digits"),
        ("digits.search", "search", "digits"),
        ("digits.search.50pct", "search", "digits"),
        ("digits.search.37.5pct", "search", "digits"),
        ("digits.search.1.2G", "search", "digits"),
        ("digits.search.1258309", "search", "digits"),
        ("digits.search.any", "search", "digits"),
        ("digits.cascade", "cascade", "digits"),
        ("digits.cascade.350M", "cascade", "digits"),
        ("digits.export.onnx.0123456789ab", "export", "digits"),
        # tags that a user gave
        ("best", "search", "best"),
        ("search", "search", "search"),
        ("digits.search.anything", "search", "digits.search.anything"),
        ("digits.50pct", "search", "digits.50pct"),
        ("digits.research", "search", "digits.research"),
        ("digits.search", "checkpoint", "digits.search"),
        ("digits.search.2", "checkpoint", "digits.search.2"),
        ("digits.search.search", "search", "digits.search"),
        ("digits.partial", "checkpoint", "digits.partial"),
        ("digits.bn", "a kind of a different tool", "digits.bn"),
    ],
)
def test_the_suffix_of_its_kind_is_not_part_of_the_name(tag, kind, name):
    assert without_suffix(tag, kind) == name
