"""Gestational age and trimester from the head circumference; for research.

Neither paper was at hand: the coefficients are those that several independent programs agree on,
and the tests hold them to published tables (docs/measurement.md names the sources).
"""

import bisect
from typing import NamedTuple

HADLOCK_RANGE_MM = (68.0, 360.0)
"""Head circumferences that Hadlock's table covers; outside of it no age is given."""
# Upper end in mm of each group of the table, and twice the standard deviation in it, in weeks.
_HADLOCK_GROUPS_MM = (147.5, 221.5, 282.0, 326.5)
_HADLOCK_TWO_SD_WEEKS = (1.19, 1.48, 2.06, 2.98, 3.20)

TRIMESTERS = ("first", "second", "third")
TRIMESTER_STARTS_MM = (97.9, 260.4)
"""Head circumference that is the median at 14 and at 28 weeks, where the second and the third
trimester begin (INTERGROWTH-21st: Papageorghiou et al. 2014, Lancet 384:869-879)."""


class GestationalAge(NamedTuple):
    """Gestational age in weeks, and the range of two standard deviations around it."""

    weeks: float
    low: float
    high: float


def gestational_age(circumference_mm: float) -> GestationalAge | None:
    """Returns the gestational age of a head circumference, or None outside of the table.

    8.96 + 0.540·HC + 0.0003·HC³ weeks with HC in cm (Hadlock, Deter, Harrist & Park 1984,
    Radiology 152:497-501), from 361 fetuses of 14 to 42 weeks.
    """
    if not HADLOCK_RANGE_MM[0] <= circumference_mm <= HADLOCK_RANGE_MM[1]:
        return None
    cm = circumference_mm / 10
    weeks = 8.96 + 0.540 * cm + 0.0003 * cm**3
    two_sd = _HADLOCK_TWO_SD_WEEKS[bisect.bisect(_HADLOCK_GROUPS_MM, circumference_mm)]
    return GestationalAge(weeks, weeks - two_sd, weeks + two_sd)


def trimester(circumference_mm: float) -> str:
    """Returns which of `TRIMESTERS` a head circumference is typical of."""
    return TRIMESTERS[bisect.bisect(TRIMESTER_STARTS_MM, circumference_mm)]
