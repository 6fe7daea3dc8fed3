"""If these fail, a resumed run sees other batches than an unbroken one, or a bad file poisons training."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heatssl.config import DataConfig
from heatssl.data import (
    BadFiles,
    Batch,
    ImageData,
    Subset,
    eval_loader,
    open_split,
    steps_per_epoch,
    train_loader,
)
from heatssl.data.crop import centre_crop, random_resized_crop
from heatssl.errors import UserError

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_split(DataConfig(train_size=50), "train")


def first(loader: Iterable[Batch], count: int) -> list[Batch]:
    return list(islice(loader, count))


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True))


def test_batches_do_not_depend_on_workers_nor_on_where_the_run_was_resumed(shapes: ImageData) -> None:
    alone = first(train_loader(shapes, DataConfig(workers=0), batch_size=8, seed=3), 9)
    resumed = first(train_loader(shapes, DataConfig(workers=2), batch_size=8, seed=3, start_step=5), 4)
    assert all(same(a, b) for a, b in zip(alone[5:], resumed, strict=True))
    assert alone[0].images.shape == (8, 3, 64, 64)
    assert alone[0].images.dtype == torch.uint8
    assert alone[0].labels.tolist() == [shapes.labels[i] for i in alone[0].indices]


def test_loading_leaves_the_global_random_state_alone(shapes: ImageData) -> None:
    loader = train_loader(shapes, DataConfig(workers=0), batch_size=8, seed=3)
    torch.manual_seed(1)
    before = first(loader, 2)
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(before, first(loader, 2), strict=True))


def test_seed_and_epoch_change_order_and_crops(shapes: ImageData) -> None:
    config = DataConfig(workers=0)
    epochs = first(train_loader(shapes, config, batch_size=25, seed=0), 4)
    other = first(train_loader(shapes, config, batch_size=25, seed=1), 1)
    assert not torch.equal(epochs[0].indices, epochs[2].indices)
    assert not torch.equal(epochs[0].indices, other[0].indices)
    crops = {}
    for batch in epochs:
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            crops.setdefault(index, []).append(image)
    assert all(len(views) == 2 and not torch.equal(*views) for views in crops.values())


def test_several_crops_of_an_image_are_decoded_once_and_follow_each_other(
    shapes: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(workers=0, crop_scale=[0.2, 0.5])
    (single,) = first(train_loader(shapes, config, batch_size=8, seed=3), 1)
    loaded: list[int] = []
    load = type(shapes).load
    monkeypatch.setattr(type(shapes), "load", lambda self, i: loaded.append(i) or load(self, i))
    (batch,) = first(train_loader(shapes, config, batch_size=8, seed=3, crops=3), 1)
    assert batch.images.shape == (24, 3, 64, 64)
    assert loaded == batch.indices.tolist() == single.indices.tolist()
    by_image = batch.images.unflatten(0, (8, 3))
    assert torch.equal(by_image[:, 0], single.images), "more crops must not change the first"
    assert not any(torch.equal(crops[1], other) for crops in by_image for other in (crops[0], crops[2]))


def test_processes_share_no_image_within_an_epoch(shapes: ImageData) -> None:
    config = DataConfig(workers=0)
    assert steps_per_epoch(shapes, 8, world=3) == 2
    seen = [
        index
        for rank in range(3)
        for batch in first(train_loader(shapes, config, batch_size=8, seed=0, rank=rank, world=3), 2)
        for index in batch.indices.tolist()
    ]
    assert len(seen) == len(set(seen)) == 48


def test_fewer_images_than_a_batch_still_fill_it() -> None:
    few = open_split(DataConfig(train_size=3), "train")
    (batch,) = first(train_loader(few, DataConfig(workers=0), batch_size=8, seed=0), 1)
    assert sorted(set(batch.indices.tolist())) == [0, 1, 2]
    assert len({image.numpy().tobytes() for image in batch.images}) == 8
    assert steps_per_epoch(few, 8) == 1


def test_evaluation_shows_every_image_once_in_order_and_untouched(shapes: ImageData) -> None:
    loader = eval_loader(shapes, DataConfig(workers=2), batch_size=16)
    assert len(loader) == 4
    for _ in range(2):  # persistent workers must serve a second pass
        batches = list(loader)
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(50))
    assert np.array_equal(batches[0].images[3].permute(1, 2, 0).numpy(), np.asarray(shapes.load(3)))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen so on Linux alone")
def test_there_are_no_more_workers_than_cores(shapes: ImageData) -> None:
    """On one core torch would warn of two, at every command."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = list(eval_loader(shapes, DataConfig(workers=2), batch_size=16))
    finally:
        os.sched_setaffinity(0, cores)
    assert len(batches) == 4


def test_scenes_are_painted_once_and_not_by_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subsets included: painting 8,000 scenes in each worker would stall the first batch."""
    data = Subset(Subset(open_split(DataConfig(train_size=61), "train"), range(40)), range(8))
    loader = eval_loader(data, DataConfig(workers=1), batch_size=8)

    def refuse(*_: object) -> None:
        raise AssertionError("painted again")

    monkeypatch.setattr("heatssl.data.shapes.render", refuse)  # forked workers inherit this
    (batch,) = loader
    assert not batch.bad


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (64, 64), (300, 200)])
def test_any_image_can_be_cropped(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    for crop in (
        random_resized_crop(image, 32, [0.08, 1.0], np.random.default_rng(0)),
        centre_crop(image, 32),
    ):
        assert crop.shape == (3, 32, 32)
        assert torch.equal(crop[:, 5, 5], torch.tensor([10, 20, 30], dtype=torch.uint8))


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(board[..., None], 3, axis=-1))
    for crop in (
        random_resized_crop(image, 32, [1.0, 1.0], np.random.default_rng(0)),
        centre_crop(image, 32),
    ):
        assert crop.float().std() < 8


def test_crops_cover_the_asked_for_area() -> None:
    """A picture whose red and green tell the place: the spread of a crop tells its size."""
    ramp = np.zeros((100, 100, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None], np.arange(100)[:, None]
    image, areas = Image.fromarray(ramp), []
    for seed in range(100):
        crop = random_resized_crop(image, 50, [0.25, 0.5], np.random.default_rng(seed)).float()
        width, height = crop[0].max() - crop[0].min() + 1, crop[1].max() - crop[1].min() + 1
        areas.append(float(width * height) / 1e4)
        assert 0.7 < width / height < 1.4
    assert 0.2 < min(areas) < 0.3
    assert 0.45 < max(areas) < 0.55


@pytest.mark.parametrize("scale", [[1.0, 0.3], [0.0, 1.0], [0.5, 2.0], [0.5]])
def test_a_crop_scale_that_is_no_range_is_refused(shapes: ImageData, scale: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.crop_scale"):
        train_loader(shapes, DataConfig(crop_scale=scale), batch_size=8, seed=0)


@pytest.fixture
def damaged(tmp_path: Path, write_images: Write) -> ImageData:
    write_images(tmp_path, *(f"train/a/{i}.jpg" for i in range(8)))
    (tmp_path / "train/a/2.jpg").write_bytes((tmp_path / "train/a/2.jpg").read_bytes()[:300])
    (tmp_path / "train/a/5.jpg").write_bytes(b"this is no image")
    (tmp_path / "train/a/6.jpg").write_bytes(b"")
    return open_split(DataConfig(name="folder", root=str(tmp_path)), "train")


def test_unreadable_files_are_left_out_and_named(damaged: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    files = BadFiles(0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for batch in eval_loader(damaged, DataConfig(image_size=8, workers=2), batch_size=4):
                files.update(batch)
                assert len(batch.images) == len(batch.labels) == len(batch.indices) == 4 - len(batch.bad)
    files.check()
    assert len(files.names) == 3
    assert sum("2.jpg" in record.message for record in caplog.records) == 1  # once, not once an epoch
    assert "Truncated" in files.names[0]


def test_an_unreadable_file_leaves_none_of_its_crops(damaged: ImageData) -> None:
    loader = train_loader(damaged, DataConfig(image_size=8, workers=0), batch_size=8, seed=0, crops=2)
    (batch,) = first(loader, 1)
    assert batch.images.shape == (10, 3, 8, 8)
    assert len(batch.indices) == len(batch.labels) == 5
    files = BadFiles(0.5)
    files.update(batch)
    assert files.state_dict()["seen"] == 8


def test_a_batch_of_nothing_but_bad_files_is_empty(damaged: ImageData) -> None:
    batches = list(eval_loader(damaged, DataConfig(image_size=8, workers=0), batch_size=1))
    assert [len(batch.images) for batch in batches] == [1, 1, 0, 1, 1, 0, 0, 1]
    assert batches[2].images.shape == (0, 3, 8, 8)


def feed(files: BadFiles, batch: Batch, times: int) -> None:
    for _ in range(times):
        files.update(batch)


def test_too_many_bad_files_stop_the_run(damaged: ImageData) -> None:
    files = BadFiles(0.01)
    (batch,) = eval_loader(damaged, DataConfig(image_size=8, workers=0), batch_size=8)
    files.update(batch)  # 8 images are too few to judge
    with pytest.raises(UserError, match=r"3 of 8 .* data\.bad_fraction"):
        files.check()
    with pytest.raises(UserError, match=r"data\.bad_fraction"):
        feed(files, batch, 20)


def test_one_bad_file_met_in_every_epoch_does_not_stop_the_run() -> None:
    files = BadFiles(0.01)
    good = Batch(torch.zeros(199, 3, 4, 4), torch.zeros(199), torch.zeros(199), ["x.jpg: broken"])
    feed(files, good, 50)
    assert files.names == ["x.jpg: broken"]


def test_counts_go_on_where_they_were_saved(caplog: pytest.LogCaptureFixture) -> None:
    half = Batch(torch.zeros(45, 3, 4, 4), torch.zeros(45), torch.zeros(45), [f"{i}.jpg: broken" for i in range(5)])
    first, second = BadFiles(0.09), BadFiles(0.09)
    first.update(half)  # 50 images are too few to judge
    caplog.clear()
    second.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match=r"10 of 100 .*the first is 0\.jpg"):
        second.update(half)
    assert second.names == half.bad
    assert caplog.records == [], "a file is named once"
