"""A run folder as training, evaluation and attribution leave it, with made-up numbers."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

CONFIG = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_arguments": {"patch_size": 8, "depth": 6},
    "data": {"name": "shapes", "root": None, "image_size": 64, "crop_scale": [0.35, 1.0], "flip": True},
    "objective": {"name": "qb_heat", "law": "commuting", "channels": None, "target": "normalised"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.95]},
    "trainer": {"steps": 1000, "batch_size": 128, "precision": "32"},
    "seed": 0,
    "output": "runs/demo",
    "resume": "auto",
}
CLASSES = ["star", "ring", "heart", "crescent", "cross", "drop", "square", "arrow"]


def result(metric: str, weights: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    """One entry of evaluation.json."""
    protocols = {
        "linear": "logistic regression on frozen features, learning rate selected on 10 % of train",
        "knn": "k=20, cosine, weights exp(s/0.07), frozen mean-pooled features",
    }
    return {
        "metric": metric,
        "weights": weights,
        "accuracy": accuracy,
        "protocol": protocols.get(metric, metric),
        "data": "shapes",
        "split": "val",
        "train_size": 8000,
        "val_size": 2000,
        "seed": 0,
        "seconds": 3.1,
        "hardware": "2 cores of an Intel Xeon",
        "commit": "1f2e3d4c5b6a79881f2e3d4c5b6a79881f2e3d4c+changes",
    } | changes


def scene(random: np.random.Generator, size: int) -> np.ndarray:
    """A lit disc over stripes: (size, size, 3) uint8."""
    y, x = np.mgrid[:size, :size] / size
    stripes = 0.5 + 0.3 * np.sin(random.uniform(10, 30) * (x * random.normal() + y * random.normal()))
    image = stripes[..., None] * random.uniform(0.3, 1, 3)
    centre, radius = random.uniform(0.35, 0.65, 2), random.uniform(0.15, 0.3)
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    image[disc] = random.uniform(0.2, 1, 3) * (0.6 + 0.4 * x[disc, None])
    return (255 * np.clip(image + random.normal(0, 0.03, image.shape), 0, 1)).astype(np.uint8)


def write_run(folder: Path, images: int = 2, steps: int = 1000, size: int = 64) -> Path:
    """Write every file that the report reads."""
    random = np.random.default_rng(0)
    (folder / "attribution").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "backbone.json").write_text(json.dumps({"name": "vit_tiny_patch16_224", "image_size": size}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, steps + 1, 10):
            share = step / steps
            row = {"step": step, "epoch": step / 62, "seconds": step * 0.17}
            row["train/loss"] = 0.55 + 0.45 * math.exp(-5 * share) + random.normal(0, 0.012)
            row["train/loss/visible"] = row["train/loss"] * 0.8
            row["train/lr"] = 1e-3 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * share))
            row |= {"train/images_per_second": 750 + random.normal(0, 20), "train/data_wait": 0.04}
            if step % 50 == 0:
                row["health/rankme"] = 12 + 50 * (1 - math.exp(-4 * share))
                row["health/law_residual"] = 0.2 * math.exp(-3 * share) + 0.02
                row["health/channel_std"] = 0.9 + 0.1 * share
                row |= {"health/commutator": 1e-7, "health/spectral_radius": 0.98 + 0.01 * share}
            if step % 250 == 0:
                row["knn/accuracy"] = 0.18 + 0.24 * share
            file.write(json.dumps(row) + "\n")
    results = [
        result("linear", "pretrained", 0.521),
        result("linear", "random_init", 0.318),
        result("knn", "pretrained", 0.417),
        result("knn", "random_init", 0.203),
    ]
    (folder / "evaluation.json").write_text(json.dumps({"results": results}))
    originals = np.stack([scene(random, size) for _ in range(images)])
    visible = np.full_like(originals, 124)
    visible[:, : size // 2, : size // 2] = originals[:, : size // 2, : size // 2]
    blocks = originals.reshape(images, size // 8, 8, size // 8, 8, 3).mean((2, 4), keepdims=True)
    smooth = np.broadcast_to(blocks, (images, size // 8, 8, size // 8, 8, 3)).reshape(originals.shape)
    labels = [CLASSES[i % len(CLASSES)] for i in range(images)]
    np.savez(
        folder / "pictures.npz",
        image=originals,
        visible=visible,
        reconstruction=smooth.astype(np.uint8),
        law_residual=random.gamma(2, 0.01, (images, 8, 8)).astype(np.float32),
        label=np.array(labels),
    )
    maps = []
    for i in range(images):
        for method in ("gradcam", "integrated_gradients"):
            for target in ("self: cosine to the image's own embedding", f"probe: logit of {labels[i]}"):
                file_name = f"attribution/{i:03d}_{method}_{target[:5].strip(':')}.png"
                Image.fromarray(originals[i]).resize((296, 256)).save(folder / file_name)
                maps.append(
                    {
                        "image": f"val/{i:05d}",
                        "label": labels[i],
                        "method": method,
                        "target": target,
                        "file": file_name,
                        "completeness_error": 0.0132 if method == "integrated_gradients" else None,
                    }
                )
    (folder / "attribution" / "attribution.json").write_text(json.dumps({"maps": maps}))
    return folder


NAMES = ["val/ring 1.jpg", "val/<b>\"quoted\" & 'so'" + "_and_long" * 9 + ".jpg", "val/star 3.jpg"]


def write_maps(run: Path, photos: bool = True) -> Path:
    """What ``heatssl attribute checkpoints=true`` leaves behind for three images of 32 pixels, two methods, a law."""
    random = np.random.default_rng(0)
    folder = run / "attribution"
    folder.mkdir(parents=True)
    listed: dict[str, list[dict[str, Any]]] = {"maps": [], "checkpoints": []}
    for i, image in enumerate(NAMES):
        Image.fromarray(scene(random, 32)).save(folder / f"photo_{i}.png")
        for method, side, step in (("gradcam", 4, 90), ("integrated_gradients", 32, 90), ("gradcam", 4, 0)):
            stem = f"{i:03d}_{method}_{step}"
            values = random.normal(size=(side, side)).astype(np.float32)
            np.save(folder / f"{stem}.npy", np.abs(values) if method == "gradcam" else values)
            Image.fromarray(scene(random, 32)).save(folder / f"{stem}.png")
            entry = {
                "image": image,
                "label": "" if i == 1 else CLASSES[i],
                "photo": f"attribution/photo_{i}.png" if photos else None,
                "method": method,
                "target": "self: cosine to the image's own embedding",
                "step": step,
                "file": f"attribution/{stem}.png",
                "completeness_error": [0.02, 0.3, 0.001][i] if side == 32 else None,
            }
            if method == "gradcam" and i < 2:
                entry["scores"] = {"deletion_auc": 0.5 - 0.1 * i}
            listed["maps" if step else "checkpoints"].append(entry)
    (folder / "attribution.json").write_text(json.dumps(listed))
    small = random.integers(-127, 128, (3, 4, 4, 6)).astype(np.int8)
    colours = random.normal(size=(3, 4, 4, 3)).astype(np.float32)
    shares = {"colour_share": np.array([0.4, 0.2, 0.1]), "code_share": np.array(0.875)}
    np.savez(folder / "features.npz", image=np.array(NAMES), colours=colours, codes=small, **shares)
    visible = np.zeros((3, 4, 4), dtype=bool)
    visible[0, :2, :2] = visible[1, :2, 2:] = visible[2, 2:, :2] = True
    errors = {name: random.random((3, 4, 4)).astype(np.float32) for name in ("error", "error_of_mean")}
    fields = {"seen": colours, "filled": -colours}
    np.savez(folder / "extrapolation.npz", image=np.array(NAMES), visible=visible, **fields, **errors)
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where Chromium is; a test that needs it is skipped where it is not."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("Chromium is not installed")
    return found


@pytest.fixture(name="write_maps", scope="session")
def write_maps_fixture() -> Callable[..., Path]:
    """Makes a folder of maps: ``write_maps(run, photos=True)``."""
    return write_maps


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    """A complete run folder."""
    return write_run(tmp_path / "demo")


@pytest.fixture(name="config")
def config_fixture() -> dict[str, Any]:
    """What the run's config.yaml holds."""
    return copy.deepcopy(CONFIG)


@pytest.fixture(name="result", scope="session")
def result_fixture() -> Callable[..., dict[str, Any]]:
    """Makes one entry of evaluation.json: ``result(metric, weights, accuracy, **changes)``."""
    return result


@pytest.fixture(name="write_run", scope="session")
def write_run_fixture() -> Callable[..., Path]:
    """Makes a run folder: ``write_run(folder, images=2)``."""
    return write_run
