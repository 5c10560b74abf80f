import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from fetal_flax.errors import InputError
from fetal_flax.measurement.overlap import aggregate, segmentation_metrics

EMPTY = np.zeros((4, 6), bool)
FULL = np.ones((4, 6), bool)


def counted_by_hand(prediction, truth):
    both = either = agree = predicted = annotated = 0
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        both += p and t
        either += p or t
        agree += p == t
        predicted += p
        annotated += t
    return {
        "dice": 2 * both / (both + either) if either else 1.0,
        "iou": both / either if either else 1.0,
        "pixel_accuracy": agree / prediction.size,
        "precision": both / predicted if predicted else float(not either),
        "recall": both / annotated if annotated else float(not either),
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
    swapped = {"precision": metrics["recall"], "recall": metrics["precision"]}
    assert segmentation_metrics(*reversed(masks)) == metrics | swapped


def test_a_known_case():
    prediction, truth = EMPTY.copy(), EMPTY.copy()
    prediction[:2, :3] = True
    truth[1:3, :2] = True
    assert segmentation_metrics(prediction, truth) == pytest.approx(
        {"dice": 0.4, "iou": 1 / 4, "pixel_accuracy": 0.75, "precision": 1 / 3, "recall": 0.5}
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
        "precision": overlap,
        "recall": overlap,
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
@pytest.mark.usefixtures("shapes_unchecked")
def test_masks_that_do_not_fit_are_refused(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        segmentation_metrics(prediction, truth)


def test_aggregate_gives_mean_sample_deviation_and_median():
    result = aggregate(
        [{"dice": 0.8, "iou": 0.5}, {"dice": 0.9, "iou": 0.5}, {"dice": 1, "iou": 2}]
    )
    assert result["n"] == 3
    for name, mean, std, median in (("dice", 0.9, 0.1, 0.9), ("iou", 1.0, 0.75**0.5, 0.5)):
        assert result[name]["mean"] == pytest.approx(mean)
        assert result[name]["std"] == pytest.approx(std)
        assert result[name]["median"] == pytest.approx(median)


def test_aggregate_of_one_image_has_no_deviation():
    distribution = {"mean": 0.5, "std": 0.0, "median": 0.5, "ci95": [0.5, 0.5]}
    assert aggregate([{"dice": 0.5}]) == {"n": 1, "dice": distribution}


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).gamma(2, size=200)
    low, high = aggregate([{"adf": value} for value in values])["adf"]["ci95"]
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=2
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), rel=0.02)
    assert low < values.mean() < high


def test_aggregate_takes_any_metric_and_keeps_the_order():
    metrics = segmentation_metrics(FULL, FULL)
    assert list(metrics) == ["dice", "iou", "pixel_accuracy", "precision", "recall"]
    assert list(aggregate([metrics | {"hausdorff_mm": 1.5}] * 2)) == ["n", *metrics, "hausdorff_mm"]


def test_aggregate_refuses_no_images_and_unlike_metrics():
    with pytest.raises(InputError, match="no images"):
        aggregate([])
    with pytest.raises(ValueError, match="same metrics"):
        aggregate([{"dice": 1.0}, {"iou": 1.0}])
