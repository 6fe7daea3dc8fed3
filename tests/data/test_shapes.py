"""If these fail, the embedded data set is not what the demo's numbers claim."""

import numpy as np
import pytest

from heatssl.config import DataConfig
from heatssl.data import open_split, shapes_render
from heatssl.data.shapes import Shapes
from heatssl.data.shapes_geometry import CLASSES, signed_distance
from heatssl.data.shapes_render import render


@pytest.fixture(scope="module")
def scenes() -> Shapes:
    return Shapes("train", size=1000)


def images_of(data: Shapes) -> np.ndarray:
    return np.stack([np.asarray(data.load(i)) for i in range(len(data))])


def masks_of(data: Shapes) -> np.ndarray:
    return np.stack([data.mask(i) for i in range(len(data))])


def test_every_class_has_its_share(scenes: Shapes) -> None:
    assert np.bincount(scenes.labels).tolist() == [100] * 10


def test_an_image_does_not_depend_on_how_many_are_asked_for() -> None:
    few, many = Shapes("val", size=7), Shapes("val", size=170)
    assert np.array_equal(images_of(few), images_of(many)[:7])
    assert np.array_equal(masks_of(few), masks_of(many)[:7])


def test_train_and_val_share_no_image() -> None:
    train, val = images_of(Shapes("train", size=200)), images_of(Shapes("val", size=200))
    assert len({image.tobytes() for image in np.concatenate([train, val])}) == 400


def test_the_mask_is_where_the_object_was_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a white object on black, a pixel shows how much of it is object: from half on it is masked."""
    original, before = shapes_render._paint, render(1, np.arange(20), 64)

    def paint_white_on_black(canvas: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
        canvas[:] = 0
        original(canvas, cover, np.float32(1))

    monkeypatch.setattr(shapes_render, "_paint", paint_white_on_black)
    share = render(1, np.arange(20), 64).images[..., 0]
    assert np.array_equal(share >= 128, before.masks)
    assert ((share == 0) | (share == 255)).mean() > 0.9


def test_every_object_lies_inside_and_stands_out(scenes: Shapes) -> None:
    images, masks = images_of(scenes).astype(float).mean(axis=-1), masks_of(scenes)
    border = np.ones((64, 64), dtype=bool)
    border[1:-1, 1:-1] = False
    assert not masks[:, border].any()
    share = masks.mean(axis=(1, 2))
    assert share.min() > 0.06
    assert share.max() < 0.22
    inside = (images * masks).sum(axis=(1, 2)) / masks.sum(axis=(1, 2))
    around = (images * ~masks).sum(axis=(1, 2)) / (~masks).sum(axis=(1, 2))
    contrast = np.abs(inside - around)
    assert contrast.min() > 20  # grey levels
    assert (inside > around).all()


def test_colour_place_and_area_tell_no_class(scenes: Shapes) -> None:
    """Nearest class mean on these few numbers stays near chance (10 %) on the other half of the images."""
    images, masks, labels = images_of(scenes), masks_of(scenes), np.array(scenes.labels)
    rows, columns = np.mgrid[:64, :64]
    area = masks.sum(axis=(1, 2))
    hints = {
        "mean colour": images.mean(axis=(1, 2)),
        "object colour": (images * masks[..., None]).sum(axis=(1, 2)) / area[:, None],
        "place": np.stack([(masks * rows).sum(axis=(1, 2)) / area, (masks * columns).sum(axis=(1, 2)) / area], 1),
        "area": area[:, None],
    }
    for hint, values in hints.items():
        means = np.stack([values[:500][labels[:500] == label].mean(axis=0) for label in range(10)])
        nearest = ((values[500:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
        accuracy = (nearest == labels[500:]).mean()
        assert accuracy < 0.17, f"{hint} tells the class in {accuracy:.0%} of the images"


@pytest.mark.parametrize("shape", CLASSES)
def test_silhouettes_are_distances_of_area_one(shape: str) -> None:
    axis = np.linspace(-1.2, 1.2, 800, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = signed_distance(shape, x, y)
    step = axis[1] - axis[0]
    assert distance.dtype == np.float32
    assert (distance < 0).sum() * step**2 == pytest.approx(1, abs=0.01)
    assert np.sqrt(x**2 + y**2)[distance < 0].max() < 0.95  # what keeps objects inside the image
    slope = np.hypot(*np.gradient(distance, step))
    near = np.abs(distance) < 0.02
    assert np.median(slope[near]) == pytest.approx(1, abs=0.02)  # else the antialiased edge is too soft or hard


def test_another_image_size_shows_the_same_scene() -> None:
    small, large = render(3, np.arange(10), 32), render(3, np.arange(10), 64)
    shrunk = large.masks.reshape(10, 32, 2, 32, 2).mean(axis=(2, 4)) > 0.5
    assert (shrunk != small.masks).mean() < 0.02


def test_size_is_a_setting() -> None:
    assert len(open_split(DataConfig(), "train")) == 8000
    assert len(open_split(DataConfig(), "val")) == 2000
    assert len(open_split(DataConfig(val_size=30), "val")) == 30
