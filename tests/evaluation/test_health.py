"""Figures of health have known values for features that are known."""

import json
import weakref

import pytest
import torch
from PIL import Image
from torch import nn

from heatssl.backbones import create_backbone, pooled_features
from heatssl.cli import main
from heatssl.config import DataConfig, HealthConfig
from heatssl.data import eval_loader, normalise, open_split
from heatssl.evaluation import check_up, extract_features, run_health
from heatssl.evaluation.health import (
    alignment,
    area_holding,
    effective_rank,
    lidar,
    linear_cka,
    receptive_field,
    uniformity,
)
from heatssl.evaluation.source import open_source
from heatssl.export import BackboneInfo, load_backbone, save_backbone
from heatssl.objectives.views import view_settings

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def test_effective_rank_counts_equal_eigenvalues():
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])).item() == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])).item() == pytest.approx(1)


def test_lidar_counts_the_directions_that_tell_images_apart():
    torch.manual_seed(0)
    informative = torch.zeros(400, 1, 12)
    informative[..., :4] = 10 * torch.randn(400, 1, 4)
    views = informative + torch.randn(400, 8, 12)
    assert 3.9 < lidar(views).item() < 4.6
    # What varies as much within an image as between images is not counted, however large.
    noisy = views.clone()
    noisy[..., 5] = 100 * torch.randn(400, 8)
    assert lidar(noisy).item() < 4.7
    torch.testing.assert_close(lidar(7 * views), lidar(views))
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    torch.testing.assert_close(lidar(views @ rotation), lidar(views), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="two views of each"):
        lidar(views[:, :1])


def test_alignment_and_uniformity_at_their_ends():
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    assert alignment(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert alignment(x, -x).item() == pytest.approx(4)
    assert alignment(x, torch.randn(300, 64)).item() == pytest.approx(2, abs=0.1)
    assert uniformity(x[:1].expand(20, -1)).item() == pytest.approx(0, abs=1e-6)
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(two).item() == pytest.approx(-8)
    assert uniformity(x).item() < uniformity(x + 5).item()


def test_cka_knows_rotations_and_strangers():
    torch.manual_seed(0)
    x = torch.randn(500, 8) * torch.arange(1, 9)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert linear_cka(x, 3 * x @ rotation + 2).item() == pytest.approx(1)
    assert linear_cka(x, torch.randn(500, 5)).item() < 0.05
    y = x + 8 * torch.randn(500, 8)
    gram = lambda z: (z - z.mean(0)) @ (z - z.mean(0)).T  # noqa: E731
    expected = (gram(x) * gram(y)).sum() / (gram(x).norm() * gram(y).norm())
    assert linear_cka(x, y).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_receptive_field_is_where_the_middle_looks():
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 64, depth=1, embed_dim=24, num_heads=2, patch_size=8)
    images = torch.randn(2, 3, 64, 64)
    whole = receptive_field(backbone, images)
    assert whole.shape == (64, 64)
    assert whole.sum().item() == pytest.approx(1)
    for block in backbone.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    alone = receptive_field(backbone, images)
    own = torch.zeros(64, 64)
    own[32:40, 32:40] = 1
    assert (alone * own).sum().item() == pytest.approx(1)
    assert (whole * own).sum().item() < 0.999
    assert area_holding(0.5, alone) < 0.5 / 64 * 1.2
    assert area_holding(0.5, torch.full((8, 8), 1 / 64)) == pytest.approx(0.5)
    assert area_holding(0.999, whole) > 2 * area_holding(0.999, alone)


def test_the_command_prints_and_keeps_its_figures(run, capsys):
    figures = run_health(HealthConfig(run=str(run), workers=0, images=24, views=3, other=str(run)))
    mine, twin = figures["pretrained"], figures["random_init"]
    assert mine["cka"] == pytest.approx(1)
    assert "cka" not in twin
    assert 1 <= mine["lidar"] <= 24
    assert 0 <= mine["alignment"] <= 4
    assert mine.keys() - {"cka"} == twin.keys()
    kept = json.loads((run / "health.json").read_text())
    assert kept["pretrained"] == mine
    assert (kept["source"], kept["step"]) == ("last", 7), "which weights the figures are of"
    shown = capsys.readouterr().out
    assert "LiDAR" in shown
    assert "24 images of val" in shown
    assert main(["health", f"run={run}", "images=1", "workers=0"]) == 2
    assert "images must be at least 2" in capsys.readouterr().err


def test_other_weights_see_the_same_images_as_they_were_trained_to(run, tmp_path):
    """A model of 224 pixels that is shown 64 is another model, and CKA would be about that one."""
    torch.manual_seed(5)
    backbone = create_backbone("vit_tiny_patch16_224", 64, **ARGUMENTS)
    other = tmp_path / "other"
    other.mkdir()
    mean, std = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
    save_backbone(other, backbone, BackboneInfo("vit_tiny_patch16_224", 64, ARGUMENTS, mean, std, step=1))
    config = HealthConfig(run=str(run), workers=0, images=24, views=2, random_init=False, other=str(other))
    figures = run_health(config)["pretrained"]
    own = DataConfig(image_size=32, val_size=24, workers=0)
    others = DataConfig(image_size=64, mean=mean, std=std, val_size=24, workers=0)
    features = [
        extract_features(model, open_split(data, "val"), data)[0]
        for model, data in ((load_backbone(run)[0], own), (backbone, others))
    ]
    assert figures["cka"] == pytest.approx(linear_cka(*features).item(), rel=1e-4)
    assert f"CKA to {other} at 64 px" in json.loads((run / "health.json").read_text())["protocol"]


def test_images_that_cannot_be_read_are_told_of(run, tmp_path, capsys):
    """Half of the images would give other figures, as if of all."""
    for split in ("train", "val"):
        for i in range(6):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * i, 20, 90)).save(path)
    broken = sorted((tmp_path / "images" / "val").rglob("*.png"))
    words = [f"run={run}", "data=folder", f"data.root={tmp_path / 'images'}", "workers=0", "views=2"]
    broken[0].write_bytes(b"")
    assert main(["health", *words]) == 2
    assert "1 of 6 images could not be read, over data.bad_fraction=0.01" in capsys.readouterr().err
    for path in broken[1:5]:
        path.write_bytes(b"")
    assert main(["health", *words, "data.bad_fraction=0.9"]) == 2
    assert "1 image can be read, and figures compare two at least" in capsys.readouterr().err
    assert not (run / "health.json").exists()


def test_held_out_images_are_not_called_val(run, capsys):
    data = DataConfig(image_size=32, train_size=80, held_out=0.2, workers=0)
    run_health(HealthConfig(run=str(run), data=data, workers=0, images=12, views=2, random_init=False))
    said = "12 images of the held-out share of train"
    assert said in capsys.readouterr().out
    assert said in json.loads((run / "health.json").read_text())["protocol"]


def test_a_view_is_gone_when_it_was_seen_and_the_figures_are_those_of_all(run, monkeypatch):
    """All views of 1,000 images at 224 px are 4.8 GB."""
    alive, most = weakref.WeakSet(), []
    real = check_up.random_view

    def view(*arguments):
        found = real(*arguments)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(check_up, "random_view", view)
    config = HealthConfig(run=str(run), workers=0, images=24, views=3, batch_size=8, seed=5)
    figures = run_health(config)
    assert len(most) == 3 * 3
    assert max(most) <= 2

    data = DataConfig(image_size=32, val_size=24, workers=0)
    settings = view_settings(32, (0.3, 1.0), 0.4, 0.2, 0.0)
    torch.manual_seed(5)
    batches = [normalise(batch.images, data) for batch in eval_loader(open_split(data, "val"), data, batch_size=8)]
    views = torch.cat(
        [torch.stack([real(shown, settings, data.mean, data.std) for _ in range(3)], 1) for shown in batches]
    )
    source = open_source(config)
    for weights, backbone in (("pretrained", source.backbone), ("random_init", source.twin(5))):
        with torch.no_grad():
            features = pooled_features(backbone, views.flatten(0, 1)).unflatten(0, (24, 3))
            field = receptive_field(backbone, torch.cat(batches))
        assert figures[weights]["lidar"] == pytest.approx(lidar(features).item(), rel=1e-4)
        assert figures[weights]["alignment"] == pytest.approx(
            alignment(features[:, 0], features[:, 1]).item(), rel=1e-4
        )
        assert figures[weights]["receptive_area"] == area_holding(0.95, field)
