"""What is counted when a file is compared with its network."""

import dataclasses

import cv2
import numpy as np
import pytest

from fetal_flax.export.comparison import Comparison, Limits, compare
from fetal_flax.inference.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
LIMITS = Limits(logit_difference=1e-3, dice=0.99, circumference_change=0.01)
SAME = Comparison(
    images=2,
    largest_logit=20.0,
    logit_difference=0.01,
    pixels=100,
    differing_pixels=0,
    dice=(1.0, 1.0),
    circumference_change=(0.0, 0.0),
    heads_of_one=0,
)


def head(width: int) -> np.ndarray:
    image = np.full((64, 96), 20, np.uint8)
    return cv2.ellipse(image, ((48.0, 32.0), (width, 40.0), 0), 230, -1)


@pytest.fixture
def run(threshold_network):
    def run(images: np.ndarray) -> np.ndarray:
        return np.stack([*Segmenter(threshold_network).logits([*images])])

    return run


def test_the_network_itself_differs_in_nothing(threshold_network, run):
    found = compare(threshold_network, run, [head(50), head(60)], SIZE)
    assert (found.images, found.pixels) == (2, 2 * 64 * 96)
    assert found.logit_difference == found.differing_pixels == found.heads_of_one == 0
    assert found.dice == (1, 1) and found.circumference_change == (0, 0)
    assert found.largest_logit == pytest.approx(20 - 40 * 20 / 255, abs=1e-3)  # The background.


def test_batches_are_one_image_and_then_more(threshold_network, run):
    sizes = []

    def counted(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return run(images)

    compare(threshold_network, counted, [head(50)] * 7, SIZE)
    assert sizes == [1, 4, 2]


def test_what_differs_is_counted(threshold_network, run):
    def other(images: np.ndarray) -> np.ndarray:
        logits = run(images)
        logits[:, :32] = -20  # The upper half.
        return logits

    image = head(50)
    found = compare(threshold_network, other, [image], SIZE)
    assert found.differing_pixels == np.count_nonzero(image[:32] > 200)
    assert found.logit_difference > 30
    assert found.dice[0] == found.dice[1] == pytest.approx(2 / 3, abs=0.03)
    assert found.circumference_change[0] > 0.1


def test_a_head_that_only_one_sees_is_counted(threshold_network):
    found = compare(
        threshold_network, lambda images: np.full((1, *SIZE), -20, np.float32), [head(50)], SIZE
    )
    assert found.heads_of_one == 1
    assert np.isnan(found.circumference_change[0])


def test_what_is_not_finite_is_beyond_its_limit(threshold_network):
    found = compare(
        threshold_network,
        lambda images: np.full((len(images), *SIZE), np.nan, np.float32),
        [head(50), head(60)],
        SIZE,
    )
    assert np.isnan(found.logit_difference)
    assert any("logits differ" in problem for problem in LIMITS.problems(found))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"logit_difference": 0.03}, "logits differ by 0.0015 of the largest (limit 0.001)"),
        ({"dice": (0.98, 0.97)}, "the masks' mean Dice is 0.9800 (limit 0.99)"),
        (
            {"circumference_change": (0.02, 0.1)},
            "circumferences change by 2.00 % in the mean (limit 1 %)",
        ),
        ({"circumference_change": (np.nan, np.nan)}, None),
    ],
)
def test_limits_name_what_is_beyond_them(changed, problem):
    problems = LIMITS.problems(dataclasses.replace(SAME, **changed))
    assert problems == ([problem] if problem else [])
