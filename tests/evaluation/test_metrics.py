import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import strategies as st

from fetal_flax.errors import InputError
from fetal_flax.evaluation.metrics import aggregate, segmentation_metrics

EMPTY = np.zeros((4, 6), bool)
FULL = np.ones((4, 6), bool)


def counted_by_hand(prediction, truth):
    both = either = agree = 0
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        both += p and t
        either += p or t
        agree += p == t
    return {
        "dice": 2 * both / (both + either) if either else 1.0,
        "iou": both / either if either else 1.0,
        "pixel_accuracy": agree / prediction.size,
    }


@st.composite
def mask_pairs(draw):
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return draw(arrays.arrays(bool, shape)), draw(arrays.arrays(bool, shape))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(mask_pairs())
def test_metrics_equal_a_count_pixel_by_pixel(masks):
    metrics = segmentation_metrics(*masks)
    assert metrics == pytest.approx(counted_by_hand(*masks), rel=1e-12)
    assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values())
    assert metrics == segmentation_metrics(*reversed(masks))


def test_a_known_case():
    prediction, truth = EMPTY.copy(), EMPTY.copy()
    prediction[:2, :3] = True
    truth[1:3, :3] = True
    assert segmentation_metrics(prediction, truth) == pytest.approx(
        {"dice": 0.5, "iou": 1 / 3, "pixel_accuracy": 0.75}
    )


@pytest.mark.parametrize(
    ("prediction", "truth", "overlap", "accuracy"),
    [(EMPTY, EMPTY, 1, 1), (FULL, FULL, 1, 1), (EMPTY, FULL, 0, 0), (FULL, EMPTY, 0, 0)],
)
def test_empty_and_full_masks(prediction, truth, overlap, accuracy):
    assert segmentation_metrics(prediction, truth) == {
        "dice": overlap,
        "iou": overlap,
        "pixel_accuracy": accuracy,
    }


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (EMPTY, EMPTY.T, r"prediction \(4, 6\), truth \(6, 4\)"),
        (EMPTY[None], EMPTY[None], "height, width"),
        (EMPTY[:0], EMPTY[:0], "height, width"),
        (EMPTY.astype(np.uint8), EMPTY, "must be boolean, not uint8"),
    ],
)
def test_masks_that_do_not_fit_are_refused(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        segmentation_metrics(prediction, truth)


def test_aggregate_gives_mean_and_sample_deviation():
    result = aggregate(
        [{"dice": 0.8, "iou": 0.5}, {"dice": 0.9, "iou": 0.5}, {"dice": 1, "iou": 2}]
    )
    assert result["n"] == 3
    assert result["dice"] == pytest.approx({"mean": 0.9, "std": 0.1})
    assert result["iou"] == pytest.approx({"mean": 1.0, "std": 0.75**0.5})


def test_aggregate_of_one_image_has_no_deviation():
    assert aggregate([{"dice": 0.5}]) == {"n": 1, "dice": {"mean": 0.5, "std": 0.0}}


def test_aggregate_takes_any_metric_and_keeps_the_order():
    per_image = [segmentation_metrics(FULL, FULL) | {"hausdorff_mm": 1.5}] * 2
    assert list(aggregate(per_image)) == ["n", "dice", "iou", "pixel_accuracy", "hausdorff_mm"]


def test_aggregate_refuses_no_images_and_unlike_metrics():
    with pytest.raises(InputError, match="no images"):
        aggregate([])
    with pytest.raises(ValueError, match="same metrics"):
        aggregate([{"dice": 1.0}, {"iou": 1.0}])
