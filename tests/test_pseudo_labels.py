"""Labels that an earlier AuT has written make a later one better where neither has been."""

from pathlib import Path

import pytest

from antiphon.train.run import read_course
from benchmarks.pseudo_labels import compared, print_table, trained

COURSE = Path(__file__).parents[1] / "recipes/tiny/labels.yaml"


@pytest.mark.scale
def test_an_aut_with_labels_of_an_earlier_one_hears_more_than_the_same_without_them(tmp_path):
    course, cuts, runs = read_course(COURSE), tmp_path / "cuts", tmp_path / "runs"
    trained(course, cuts, runs)
    found = compared(course, cuts, runs, "test.jsonl.gz")
    print_table(found)
    margin = found["margin"]
    assert margin.low is not None
    assert margin.low > 0
