import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from scipy.special import expit

from fetal_flax._util import pipeline
from fetal_flax.checkpoints import Checkpoint, Description, save_checkpoint
from fetal_flax.config import ModelConfig
from fetal_flax.data.images import resize_image
from fetal_flax.errors import InputError
from fetal_flax.inference import segmenter as segmenters
from fetal_flax.inference.assessment import Measurement, mean_logits, native_mask
from fetal_flax.inference.segmenter import Segmenter, load
from fetal_flax.measurement.gestational_age import gestational_age
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = ModelConfig(name="unet", base_width=4)
NO_VARIABLES = Variables({}, {})
ONE_DEVICE = jax.devices()[:1]


def checkpoint(
    variables: Variables, image_size: tuple[int, int], model: ModelConfig = MODEL
) -> Checkpoint:
    return Checkpoint(variables, Description("network", model, image_size))


@pytest.fixture
def nothing_traced() -> Iterator[None]:
    """Programs are shared within a process, and one of another test has that test's network."""
    segmenters._shared_program.cache_clear()
    yield
    segmenters._shared_program.cache_clear()


@pytest.fixture
def calls(nothing_traced, monkeypatch) -> list[tuple[int, ...]]:
    """Replaces the network by `pixel − 0.5`; collects the shapes it is traced with."""
    shapes = []

    def infer(config, arrays, images):
        del config, arrays
        shapes.append(images.shape)
        return images[..., :1] - 0.5

    monkeypatch.setattr(functional, "fold", lambda config, variables: {})
    monkeypatch.setattr(functional, "infer", infer)
    return shapes


def random_images(count: int, shape: tuple[int, int] = (40, 56)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


def test_logits_on_a_grid_give_the_mask_of_the_native_grid():
    """A plane is what bilinear interpolation reproduces, so the mask is exact off the border."""
    height, width = 108, 160
    plane = lambda x, y: 0.7 * (x - 61.3) - 1.1 * (y - 40.8)  # noqa: E731
    x = (np.arange(64) + 0.5) * width / 64 - 0.5
    y = (np.arange(32) + 0.5) * height / 32 - 0.5
    logits = plane(x[None, :], y[:, None]).astype(np.float32)
    expected = plane(np.arange(width)[None, :], np.arange(height)[:, None]) > 0
    mask = native_mask(logits, (height, width))
    assert mask.shape == (height, width) and mask.dtype == np.bool_
    inside = np.s_[2:-2, 2:-2]
    np.testing.assert_array_equal(mask[inside], expected[inside])


def test_logits_are_resized_before_the_threshold():
    # Between −1 and 3 the zero lies at a quarter of the way, not halfway.
    mask = native_mask(np.array([[-1, 3]], np.float32), (1, 80))
    assert mask[0].argmax() == pytest.approx(20 + 40 / 4, abs=1)


def test_probability_one_half_is_background():
    assert not native_mask(np.zeros((4, 4), np.float32), (8, 8)).any()


def test_masks_lie_where_the_network_saw_them_in_images_of_any_size(calls):
    sizes = [(108, 160), (160, 108), (64, 32)]
    images = []
    for height, width in sizes:
        ramp = np.linspace(0, 200, height)[:, None] + np.linspace(0, 100, width)[None, :]
        images.append(np.clip(ramp, 0, 255).astype(np.uint8))
    masks = Segmenter(checkpoint(NO_VARIABLES, (32, 64))).masks(images)
    for image, mask in zip(images, masks, strict=True):
        brighter, darker = image > 127 + 4, image < 127 - 4
        assert mask.shape == image.shape
        assert mask[brighter].all() and not mask[darker].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_sees_resized_images_in_0_to_1(calls, channels):
    model = ModelConfig(name="unet", base_width=4, in_channels=channels)
    images, saved = random_images(2), checkpoint(NO_VARIABLES, (32, 64), model)
    logits = list(Segmenter(saved, devices=ONE_DEVICE).logits(images))
    assert calls == [(2, 32, 64, channels)]
    for image, own in zip(images, logits, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own + 0.5, resize_image(image, (32, 64)) / 255, atol=1e-6)


def test_a_last_small_batch_is_padded_and_the_network_compiled_once(calls):
    images = random_images(7)
    saved = checkpoint(NO_VARIABLES, (32, 32))
    segmenter = Segmenter(saved, batch_size=3, devices=ONE_DEVICE)
    logits = list(segmenter.logits(images))
    assert len(logits) == 7 and calls == [(3, 32, 32, 1)]
    np.testing.assert_allclose(logits[6] + 0.5, resize_image(images[6], (32, 32)) / 255, atol=1e-6)


def test_few_images_are_not_padded_to_a_whole_batch(calls):
    segmenter = Segmenter(checkpoint(NO_VARIABLES, (32, 32)), devices=ONE_DEVICE)
    assert len(list(segmenter.logits(random_images(2)))) == 2
    assert calls == [(2, 32, 32, 1)]


def test_batching_does_not_change_the_logits():
    variables = functional.init(MODEL, 0)
    images = random_images(4)
    segmenter = Segmenter(checkpoint(variables, (32, 32)), batch_size=3, devices=ONE_DEVICE)
    together = list(segmenter.logits(images))
    for image, logits in zip(images, together, strict=True):
        (alone,) = segmenter.logits([image])
        np.testing.assert_allclose(alone, logits, atol=1e-5)
    assert np.ptp(np.stack(together), axis=0).max() > 1e-3


@pytest.mark.usefixtures("nothing_traced")
def test_networks_that_differ_in_their_weights_alone_are_traced_once(monkeypatch):
    infer, traced = functional.infer, []

    def counted(config, arrays, images):
        traced.append(images.shape)
        return infer(config, arrays, images)

    monkeypatch.setattr(functional, "infer", counted)
    images = random_images(1)
    first, second, again = (
        next(Segmenter(checkpoint(functional.init(MODEL, seed), (32, 32))).logits(images))
        for seed in (0, 1, 0)
    )
    assert traced == [(1, 32, 32, 1)]
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("devices", "images", "tta"),
    [
        (8, 19, "flip"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in ((3, 7, "none"), (8, 5, "none"), (2, 1, "flip"))
        ),
    ],
)
def test_devices_that_share_images_see_what_one_sees(devices, images, tta):
    saved = checkpoint(functional.init(MODEL, 0), (32, 32))
    seen = random_images(images)
    alone, together = (
        list(Segmenter(saved, batch_size=2, tta=tta, devices=jax.devices()[:count]).views(seen))
        for count in (1, devices)
    )
    np.testing.assert_array_equal(together, alone)
    assert len(together) == images and len({views.tobytes() for views in together}) == images


def test_every_device_works_on_its_share(calls):
    segmenter = Segmenter(checkpoint(NO_VARIABLES, (32, 32)), batch_size=2)
    images = random_images(19)
    logits = list(segmenter.logits(images))
    # Eight devices: sixteen images, then three, padded to as many.
    assert len(logits) == 19 and calls == [(2, 32, 32, 1)]
    for image, own in zip(images, logits, strict=True):
        np.testing.assert_allclose(own + 0.5, resize_image(image, (32, 32)) / 255, atol=1e-6)


def test_images_are_taken_a_batch_ahead(calls, monkeypatch):
    monkeypatch.setattr(pipeline, "available_cpus", lambda: 2)
    taken = 0

    def endless() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal taken
        (image,) = random_images(1)
        for number in itertools.count():
            taken += 1
            yield number, image

    saved = checkpoint(NO_VARIABLES, (32, 32))
    segmenter = Segmenter(saved, batch_size=4, devices=ONE_DEVICE)
    pairs = segmenter.segment(endless(), lambda item: item[1])
    for number in range(10):
        (own, _), _ = next(pairs)
        assert own == number
        assert taken == 4 * (number // 4 + 2) + 2


def test_measurements_before_an_image_that_is_none_are_yielded(calls):
    def images() -> Iterator[np.ndarray]:
        yield from [bright_ellipse()] * 6
        yield np.zeros((4, 4), np.uint8)

    measured = Segmenter(checkpoint(NO_VARIABLES, (32, 32)), batch_size=4).measure_all(images())
    assert len(list(itertools.islice(measured, 6))) == 6
    with pytest.raises(InputError, match="4×4 pixels, too few"):
        next(measured)


def test_items_keep_their_own_logits(calls):
    items = [(str(value), np.full((20, 30), value, np.uint8)) for value in (0, 255, 51)]
    segmenter = Segmenter(checkpoint(NO_VARIABLES, (32, 32)), batch_size=2)
    means = {
        name: float(views.mean()) + 0.5
        for (name, _), views in segmenter.segment(items, lambda item: item[1])
    }
    assert means == pytest.approx({"0": 0, "255": 1, "51": 0.2})


def test_a_mirror_image_is_mirrored_back():
    variables = functional.init(MODEL, 0)
    (image,) = random_images(1, (32, 64))
    segmenter = Segmenter(checkpoint(variables, (32, 64)), tta="flip")
    (views,) = segmenter.views([image])
    direct, mirrored = (
        next(Segmenter(checkpoint(variables, (32, 64))).logits([seen]))
        for seen in (image, np.ascontiguousarray(image[:, ::-1]))
    )
    assert views.shape == (2, 32, 64)
    np.testing.assert_allclose(views[0], direct, atol=1e-5)
    np.testing.assert_allclose(views[1], mirrored[:, ::-1], atol=1e-5)
    assert np.abs(views[0] - views[1]).max() > 1e-3
    (averaged,) = segmenter.logits([image])
    mean = (expit(views[0]) + expit(views[1])) / 2
    np.testing.assert_allclose(expit(averaged), mean, atol=1e-6)


def test_single_views_are_assessed_where_they_are_wanted():
    segmenter = Segmenter(checkpoint(functional.init(MODEL, 0), (32, 64)), tta="flip")

    def measure(**options) -> Measurement:
        items = segmenter.measure_each(
            random_images(1, (32, 64)), lambda image: image, lambda _: 0.5, **options
        )
        return next(items)[1]

    both, neither = measure(), measure(assess_views=False)
    assert len(both.views) == 2 and neither.views == ()
    np.testing.assert_array_equal(neither.logits, both.logits)
    assert (neither.head, neither.quality) == (both.head, both.quality)


def test_mean_logits_are_exact_where_probabilities_round():
    views = np.array([[[50, -50, 3, 200]], [[60, -60, -3, -200]]], np.float32)
    mean = mean_logits(views)
    # The less sure of two decides, and half of its odds are lost.
    np.testing.assert_allclose(mean, [[50 + np.log(2), -50 - np.log(2), 0, 0]], atol=1e-4)
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean_logits(views[:1]), views[0])


def test_no_images_give_no_masks(calls):
    assert Segmenter(checkpoint(NO_VARIABLES, (32, 32))).masks([]) == []


def test_a_checkpoint_predicts_as_its_variables_do(tmp_path: Path):
    variables = functional.init(MODEL, 5)
    save_checkpoint(tmp_path, checkpoint(variables, (32, 64)))
    (image,) = random_images(1)
    (loaded,) = load(tmp_path).logits([image])
    (direct,) = Segmenter(checkpoint(variables, (32, 64))).logits([image])
    assert loaded.shape == (32, 64)
    np.testing.assert_array_equal(loaded, direct)


def test_a_folder_without_a_checkpoint_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        load(tmp_path)


def bright_ellipse() -> np.ndarray:
    """What the network in `calls` takes for a head."""
    image = np.zeros((180, 240), np.uint8)
    return cv2.ellipse(image, ((120.0, 90.0), (130.0, 100.0), 0.0), 255, -1)


def test_a_head_is_measured_in_pixels_and_where_their_size_is_known_in_millimetres(calls):
    segmenter = Segmenter(checkpoint(NO_VARIABLES, (96, 128)))
    in_mm = segmenter.measure(bright_ellipse(), 0.5)
    assert in_mm.head and in_mm.hc_mm and in_mm.bpd_mm and in_mm.ofd_mm
    # The outline of 1.4 pixels on either side is taken off.
    assert in_mm.ofd_mm == pytest.approx(0.5 * (130 - 2.8), abs=0.5)
    assert in_mm.bpd_mm == pytest.approx(0.5 * (100 - 2.8), abs=0.5)
    assert in_mm.hc_mm == in_mm.head.in_mm(0.5).circumference
    age = gestational_age(in_mm.hc_mm)
    assert age and in_mm.ga_weeks == age.weeks and in_mm.gestational_age == age
    in_pixels = segmenter.measure(bright_ellipse())
    assert in_pixels.head == in_mm.head
    assert in_pixels.hc_mm is in_pixels.bpd_mm is in_pixels.ofd_mm is in_pixels.ga_weeks is None
    missed = segmenter.measure(np.zeros((180, 240), np.uint8), 0.5)
    assert missed.head is missed.hc_mm is missed.ga_weeks is None
    assert missed.flags == ("no_head",) and not missed.mask.any()


def test_measure_all_takes_files_and_images_and_sizes_for_all_or_each(calls, tmp_path):
    segmenter = Segmenter(checkpoint(NO_VARIABLES, (96, 128)), batch_size=2)
    cv2.imwrite(str(tmp_path / "a.png"), bright_ellipse())
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), bright_ellipse()]
    sizes = [[m.pixel_size_mm for m in segmenter.measure_all(images)]]
    for given in (0.5, np.float64(0.5), [0.5, None, 0.25]):
        measured = list(segmenter.measure_all(images, pixel_sizes_mm=given))
        sizes.append([m.pixel_size_mm for m in measured])
        assert all(np.array_equal(m.mask, measured[0].mask) for m in measured)
    assert sizes == [[None] * 3, [0.5] * 3, [0.5] * 3, [0.5, None, 0.25]]
    for given in ([0.5], [0.5] * 4):
        with pytest.raises(InputError, match="not as many pixel_sizes_mm as images"):
            list(segmenter.measure_all(images, pixel_sizes_mm=given))
    with pytest.raises(InputError, match="no such image file"):
        list(segmenter.measure_all([tmp_path / "b.png"]))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((40, 56, 3), np.uint8), r"uint8 with shape \(40, 56, 3\): give grey uint8"),
        (np.zeros((40, 56)), "float64 with shape"),
        (np.zeros((40, 8), np.uint8), "8×40 pixels, too few"),
        ([[0]], "list"),
    ],
)
def test_what_is_no_grey_image_is_named(calls, shapes_unchecked, image, named):
    with pytest.raises(InputError, match=named):
        Segmenter(checkpoint(NO_VARIABLES, (32, 32))).measure(image)


@pytest.mark.parametrize("size", [0, -1.0, float("nan"), 1000])
def test_what_is_no_pixel_size_is_named(calls, size):
    with pytest.raises(InputError, match="is not a positive number of mm below 1000"):
        Segmenter(checkpoint(NO_VARIABLES, (32, 32))).measure(bright_ellipse(), size)
