import math

import pytest

from fetal_flax.measurement.gestational_age import (
    TRIMESTER_STARTS_MM,
    gestational_age,
    trimester,
)


@pytest.mark.parametrize(
    ("circumference_mm", "weeks"),
    [(68, 12.7263), (151, 18.1469), (224, 24.4278), (301, 33.3953), (360, 42.3968)],
)
def test_ages_are_those_of_hadlocks_table(circumference_mm, weeks):
    """Rows of the table that scanners print (Hologic, Obstetrical References PM.LAB.175)."""
    age = gestational_age(circumference_mm)
    assert age is not None
    assert age.weeks == pytest.approx(weeks, abs=6e-4)
    assert age.high - age.weeks == pytest.approx(age.weeks - age.low)


@pytest.mark.parametrize(
    ("circumference_mm", "two_sd"),
    [
        *((hc, 1.19) for hc in (68, 144)),
        *((hc, 1.48) for hc in (151, 219)),
        *((hc, 2.06) for hc in (224, 280)),
        *((hc, 2.98) for hc in (284, 325)),
        *((hc, 3.20) for hc in (328, 360)),
    ],
)
def test_the_range_is_that_of_the_tables_group(circumference_mm, two_sd):
    age = gestational_age(circumference_mm)
    assert age is not None
    assert age.high - age.weeks == pytest.approx(two_sd)


@pytest.mark.parametrize("circumference_mm", [0, 67.9, 360.1, math.nan, math.inf])
def test_outside_of_the_table_there_is_no_age(circumference_mm):
    assert gestational_age(circumference_mm) is None


def test_trimesters_begin_at_the_median_head_of_14_and_28_weeks():
    for start, weeks in zip(TRIMESTER_STARTS_MM, (14, 28), strict=True):
        # The chart's curve for the median, in mm.
        median = -28.2849 + 1.69267 * weeks**2 - 0.397485 * weeks**2 * math.log(weeks)
        assert start == pytest.approx(median, abs=0.05)
    assert [trimester(hc) for hc in (0, 97, 98, 260, 261)] == [
        "first",
        "first",
        "second",
        "second",
        "third",
    ]
