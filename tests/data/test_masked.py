"""Images find their masks, wherever both lie, and a missing one is named before anything is computed."""

import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from heatssl.config import DataConfig
from heatssl.data import eval_loader, open_masked
from heatssl.data.crop import centre_crop, centre_crop_mask
from heatssl.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images a split, of breeds that differ between the splits; the mask is 2 where the image is white."""
    base = tmp_path / "pets"
    random = np.random.default_rng(0)
    for split, breeds in (("train", ("cat", "dog")), ("val", ("fox", "cat"))):
        for breed in breeds:
            for i in range(2):
                white = random.random((12, 10 + i)) > 0.5
                for place, picture in (
                    (base / split / breed / f"{i}.jpg.png", np.where(white, 255, 0).astype(np.uint8)),
                    (base / "masks" / split / breed / f"{i}.jpg.png", np.where(white, 2, 1).astype(np.uint8)),
                ):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(place)
    return base


@pytest.fixture(params=["folder", "tar"])
def config(root: Path, request: pytest.FixtureRequest) -> DataConfig:
    """The same data, stored in two ways."""
    path = root
    if request.param == "tar":
        path = root.with_suffix(".tar")
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")
    return DataConfig(name=request.param, root=str(path), image_size=8, workers=0)


def test_masks_belong_to_their_images(config: DataConfig) -> None:
    for split in ("train", "val"):
        data = pickle.loads(pickle.dumps(open_masked(config, split)))
        assert len(data) == 4
        assert data.labels == [0] * 4
        for i in range(4):
            white = np.asarray(data.load(i))[..., 0] > 127
            assert np.array_equal(data.mask(i), np.where(white, 2, 1))
    batch = next(iter(eval_loader(data, config, batch_size=4)))
    assert batch.images.shape == (4, 3, 8, 8)


def test_scenes_have_theirs() -> None:
    data = open_masked(DataConfig(image_size=32, train_size=6), "train")
    mask = data.mask(3)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
    grey = np.asarray(data.load(3)).mean(-1)
    assert grey[mask == 1].mean() > grey[mask == 0].mean(), "objects are brighter"


def test_mask_and_image_are_cropped_alike() -> None:
    side = np.zeros((30, 50), dtype=np.uint8)
    side[:, 20:25] = 200
    image = centre_crop(Image.fromarray(side).convert("RGB"), 60)[0]
    mask = centre_crop_mask(side, 60)
    assert set(mask.unique().tolist()) == {0, 200}
    assert ((image > 100) == (mask > 100)).float().mean() > 0.96
    assert torch.equal(centre_crop_mask(side[:, :30], 30), torch.from_numpy(side[:, :30].copy()))


def test_what_is_missing_is_named(root: Path) -> None:
    (root / "masks" / "train" / "dog" / "1.jpg.png").unlink()
    config = DataConfig(name="folder", root=str(root))
    with pytest.raises(UserError, match=r"1 of 4 images .* have no mask, dog/1\.jpg\.png first: add .*masks/train/dog"):
        open_masked(config, "train")
    assert len(open_masked(config, "val")) == 4
    (root / "masks" / "val").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"masks/val holds no images: lay the data out as"):
        open_masked(config, "val")


def test_masks_of_another_kind_or_size_are_refused(root: Path) -> None:
    place = root / "masks" / "val" / "cat" / "0.jpg.png"
    data = open_masked(DataConfig(name="folder", root=str(root)), "val")
    Image.new("RGB", (10, 12)).save(place)
    with pytest.raises(ValueError, match="not one channel of classes"):
        data.mask(0)
    Image.new("L", (9, 12)).save(place)
    with pytest.raises(ValueError, match="another size"):
        data.mask(0)


def test_the_settings_leave_the_same_images_with_their_masks(config: DataConfig) -> None:
    """Else a number "on the held-out share" is one on images that were trained on."""
    held_out = replace(config, held_out=0.25)
    train, held = open_masked(held_out, "train"), open_masked(held_out, "val")
    assert (len(train), len(held)) == (3, 1)
    whole = open_masked(config, "train")
    names = [whole.name(i) for i in range(4)]
    assert sorted(data.name(i) for data in (train, held) for i in range(len(data))) == names
    for data in (train, held, open_masked(replace(config, train_size=2, held_out=0.5), "train")):
        for i in range(len(data)):
            assert np.array_equal(data.mask(i), whole.mask(names.index(data.name(i))))
    assert len(open_masked(replace(config, val_size=1), "val")) == 1
    with pytest.raises(UserError, match=r"data\.train_size=0"):
        open_masked(replace(config, train_size=0), "train")


def test_an_image_is_not_decoded_for_its_size_and_may_lie_on_its_side(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask is drawn over the image as a viewer shows it."""
    image, mask = (root / place / "val" / "cat" / "0.jpg.png" for place in ("", "masks"))
    image.unlink()
    sideways = Image.new("RGB", (10, 12))
    sideways.getexif()[0x0112] = 6
    sideways.save(image.with_suffix(".jpg"), exif=sideways.getexif())
    Image.new("L", (12, 10)).save(mask.with_name("0.jpg.png"))
    data = open_masked(DataConfig(name="folder", root=str(root)), "val")
    assert data.load(0).size == (12, 10)
    real = ImageFile.ImageFile.load

    def load(picture: ImageFile.ImageFile) -> object:
        assert picture.mode == "L", "an image was decoded"
        return real(picture)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert data.mask(0).shape == (10, 12)
