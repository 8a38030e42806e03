"""What is accepted as the table of an evaluation."""

import pytest

from sdpctl.stages.documents import check_evaluation

ROW = {"instance": "full", "macs": 9, "params": 4, "relative": 1.0, "top1": 50.0, "top5": None, "loss": 1.5}
TABLE = {"classes": ["cat", "dog"], "class_images": [4, 0], "images": 4, "rows": [ROW | {"by_class": [50.0, None]}]}


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        {"images": 4, "rows": [ROW]},  # early versions
        {"images": 4, "rows": [ROW], "classes": ["cat", "dog"], "split": "test"},
    ],
)
def test_tables_of_this_and_of_earlier_versions_are_accepted(table):
    check_evaluation(table, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_images": [4]}, "class_images: expected a value for each of 2 classes, found 1"),
        ({"class_images": [4, -1]}, r"class_images\[1\]: expected a whole number"),
        ({"classes": None}, "class_images: expected a value for each of 0 classes, found 2"),
        ({"rows": [ROW | {"by_class": [50.0]}]}, r"rows\[0\].by_class: expected a value for each of 2 classes, found 1"),
        ({"rows": [ROW | {"by_class": [50.0, 101]}]}, r"rows\[0\].by_class\[1\]: expected a number from 0 to 100, found 101"),
        ({"rows": [ROW | {"by_class": [50.0, "x"]}]}, r"rows\[0\].by_class\[1\]: expected a number from 0 to 100, found 'x'"),
        ({"rows": [ROW | {"by_class": [50.0, 0]}]}, r"rows\[0\].by_class: expected null for each class without images"),
        ({"rows": [ROW | {"by_class": [None, None]}]}, r"rows\[0\].by_class: expected null for each class without images"),
        ({"class_images": None}, r"rows\[0\].by_class: expected null for each class without images"),
        ({"rows": [ROW | {"by_class": 50.0}]}, r"rows\[0\].by_class: expected a list"),
    ],
)
def test_lists_by_class_have_a_value_for_each_class(change, message):
    with pytest.raises(ValueError, match=message):
        check_evaluation(TABLE | change, "")
