import dataclasses

import numpy as np
import pytest
from scipy.special import logit

from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.head import Head, measure_head
from fetal_flax.measurement.quality import expected_dice, judge, size_spread

ELLIPSE = Ellipse(center_x=48.0, center_y=32.0, semi_major=30.0, semi_minor=20.0, angle=0.2)
SHAPE = (64, 96)


def logits_of(mask: np.ndarray, probability: float = 0.9999) -> np.ndarray:
    return np.where(mask, logit(probability), -logit(probability)).astype(np.float32)


def flags(mask: np.ndarray, probability: float = 0.9999) -> tuple[str, ...]:
    head = measure_head(mask, outline_px=0.0)
    return judge(logits_of(mask, probability), head).flags


def drawn(ellipse: Ellipse = ELLIPSE) -> np.ndarray:
    return ellipse.filled(*SHAPE) > 0


def test_a_clear_ellipse_has_no_flag():
    assert flags(drawn()) == ()


def test_each_sign_has_its_flag():
    two = drawn()
    two[2:6, 2:6] = True
    dented = drawn() & ~(dataclasses.replace(ELLIPSE, center_y=58.0).filled(*SHAPE) > 0)
    assert flags(np.zeros(SHAPE, bool)) == ("no_head",)
    assert flags(drawn(dataclasses.replace(ELLIPSE, center_y=15.0))) == ("touches_border",)
    assert flags(two) == ("several_components",)
    assert flags(dented) == ("low_ellipse_agreement",)
    assert flags(drawn(), probability=0.9) == ("low_confidence",)


def test_a_mask_without_an_edge_is_not_called_no_head():
    assert flags(np.ones(SHAPE, bool)) == ("covers_image",)


@pytest.mark.parametrize(
    ("hc_mm", "expected"),
    [
        (29.9, ("implausible_size",)),
        (30.1, ()),
        (449.9, ()),
        (450.1, ("implausible_size",)),
        (163_458, ("implausible_size",)),
    ],
)
def test_a_circumference_that_no_fetus_has_is_flagged(hc_mm, expected):
    head = measure_head(drawn(), outline_px=0.0)
    assert head is not None
    size = hc_mm / head.ellipse.circumference
    assert judge(logits_of(drawn()), head, pixel_size_mm=size).flags == expected


def test_the_spread_is_that_of_the_circumferences_at_two_probabilities():
    """Of an edge whose probability falls from 1 to 0 over some pixels."""
    y, x = np.mgrid[:200, :200] - 100.0
    distance = np.hypot(x, y)
    logits = ((60 - distance) / 2).astype(np.float32)  # 0.9 and 0.1 are 4.4 pixels off the edge.
    off = 2 * logit(0.9)
    assert size_spread(logits) == pytest.approx(2 * off / 60, rel=0.01)
    assert size_spread(logits_of(drawn())) == size_spread(np.full((4, 4), -9.0)) == 0
    head = measure_head(logits > 0, outline_px=0.0)
    assert head is not None
    for spread_mm, expected in ((11.5, ()), (12.5, ("uncertain_size",))):
        size = spread_mm / (2 * np.pi * 2 * off)
        assert judge(logits, head, pixel_size_mm=size).flags == expected


def test_an_image_may_have_several():
    cut = drawn(dataclasses.replace(ELLIPSE, center_y=15.0))
    cut[-4:, :4] = True
    assert flags(cut, 0.8) == ("touches_border", "several_components", "low_confidence")


def test_the_agreement_is_the_dice_with_the_ellipse():
    dented = drawn()
    dented[:, 60:] = False
    head = measure_head(dented, outline_px=3.0)
    without = measure_head(dented, outline_px=0.0)
    assert isinstance(head, Head) and isinstance(without, Head)
    # The outline that is taken off is no disagreement.
    assert head.ellipse_agreement == without.ellipse_agreement
    filled = drawn(without.ellipse)
    dice = 2 * (filled & dented).sum() / (filled.sum() + dented.sum())
    assert without.ellipse_agreement == pytest.approx(dice)
    assert dice < 0.99


def test_confidence_is_the_dice_with_the_probabilities():
    probabilities = np.array([[0.9, 0.6], [0.4, 0.1]])
    expected = 2 * (0.9 + 0.6) / (0.9 + 0.6 + 0.4 + 0.1 + 2)
    assert expected_dice(logit(probabilities)) == pytest.approx(expected)
    assert expected_dice(np.full((4, 4), -3.0)) == 0
    assert expected_dice(np.array([[200.0, -200.0]], np.float32)) == 1
