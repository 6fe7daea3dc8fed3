"""Average precision is COCO's, levels lie where they say, and a frozen backbone stays frozen while a head learns."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from heatssl.backbones import create_backbone
from heatssl.cli import main
from heatssl.config import DataConfig, DetectConfig
from heatssl.data import Squares, open_boxed
from heatssl.data.boxes import as_boxes
from heatssl.data.coco import read_instances
from heatssl.errors import UserError
from heatssl.evaluation import Detector, average_precision, find_boxes, run_detect, train_detector
from heatssl.evaluation.checkpoint import Checkpoint
from heatssl.evaluation.detection import true_boxes
from heatssl.evaluation.detector import SimplePyramid, locations
from heatssl.evaluation.frozen_maps import FrozenMaps
from heatssl.evaluation.source import fingerprint
from heatssl.evaluation.whitening import Whitening

CPU = torch.device("cpu")
SMALL = {"width": 32, "scales": [2.0, 1.0], "learning_rate": 3e-3}
QUICK = {**SMALL, "workers": 0, "epochs": 2}
SETTINGS = {**SMALL, "weight_decay": 0.05, "shrinkage": 1.0, "seed": 0}


def tiny_vit(seed: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_backbone("vit_tiny_patch16_224", 32, depth=1, embed_dim=24, num_heads=2, patch_size=8)


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def test_average_precision_in_closed_form() -> None:
    corners = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    (true,) = true_boxes([as_boxes(corners, [0, 0])], 100)
    exact = true["boxes"].tolist()
    assert average_precision([found(exact, [0.9, 0.2], [0, 0])], [true]) == (1, 1, 1)
    # half of the boxes found: precision 1 at the 51 of 101 recalls that are reached
    assert average_precision([found(exact[:1], [0.9], [0])], [true]).ap == pytest.approx(51 / 101)
    # intersection over union 0.62: right at 0.5, 0.55 and 0.6 of the ten
    short = [[0.0, 0.0, 50.0, 31.0], [50.0, 50.0, 100.0, 81.0]]
    assert average_precision([found(short, [0.9, 0.2], [0, 0])], [true]) == pytest.approx((0.3, 1, 0))
    # a wrong one that is surer than both right ones: precision 1/2, then 2/3, of which COCO takes the larger
    assert average_precision([found([[0.0, 90.0, 9.0, 99.0], *exact], [0.99, 0.9, 0.2], [0, 0, 0])], [true]).ap50 == (
        pytest.approx(2 / 3)
    )
    assert average_precision([found(exact, [0.9, 0.2], [1, 1])], [true]).ap == 0


def test_stretched_images_have_the_average_precision_of_cocos_own_tools(tmp_path: Path) -> None:
    """Sizes, category ids and crowds as in a real file; detections in the original pixels for COCO's code."""
    random = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in random.integers(40, 200, (12, 2))]
    images = [{"id": 50 - i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    annotations, predicted, official = [], [], []
    for image in images:
        stretch = np.array([64 / image["width"], 64 / image["height"]] * 2)
        boxes, labels = [], []
        for _ in range(4):
            width, height = random.uniform(0.2, 0.5) * image["width"], random.uniform(0.2, 0.5) * image["height"]
            left, top = random.random() * (image["width"] - width), random.random() * (image["height"] - height)
            box = [left, top, width, height]
            label = int(random.integers(3))
            shared = {"image_id": image["id"], "category_id": [3, 17, 40][label], "bbox": box, "area": width * height}
            annotations.append({**shared, "id": len(annotations) + 1, "iscrowd": int(random.random() < 0.2)})
            moved = np.array([left, top, left + width, top + height]) + random.normal(0, 3, 4)
            boxes.append((moved * stretch).tolist())
            labels.append(label)
        scores = random.random(4).tolist()
        predicted.append(found(boxes, scores, labels))
        for box, score, label in zip(boxes, scores, labels, strict=True):
            left, top, right, bottom = np.array(box) / stretch
            whole = {"image_id": image["id"], "category_id": [3, 17, 40][label], "score": score}
            official.append({**whole, "bbox": [left, top, right - left, bottom - top]})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in (40, 3, 17)],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        judge = COCOeval(truth, truth.loadRes(official), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ours = average_precision(predicted, true_boxes(read_instances(path.read_bytes(), "x").boxes, 64))
    assert 0.2 < judge.stats[0] < 0.9
    assert ours == pytest.approx(judge.stats[:3].tolist(), abs=1e-6)


def test_the_extra_is_named_where_it_is_missing(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torchmetrics.detection.mean_ap._PYCOCOTOOLS_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.detection.mean_ap._FASTER_COCO_EVAL_AVAILABLE", False)
    assert main(["detect", f"run={run}"]) == 2
    assert "pip install 'heatssl[detection]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "size", "side"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}, 32, 4),
        ("gau_small_patch16_224", {"depth": 1, "embed_dim": 32, "patch_size": 8}, 40, 5),
        ("test_resnet", {}, 64, 2),
    ],
)
def test_levels_and_their_places_of_any_backbone(name: str, arguments: dict, size: int, side: int) -> None:
    backbone = create_backbone(name, size, **arguments)
    data = open_boxed(DataConfig(image_size=size, train_size=2), "train").images
    maps = FrozenMaps(backbone, data, DataConfig(image_size=size, workers=0), CPU)
    assert maps.shape[1:] == (side, side)
    (_, batch) = next(maps.batches(torch.arange(2), 2))
    channels = maps.shape[0]
    half = -(-side // 2)
    pyramid = SimplePyramid(channels, 32, (4, 2, 1, 0.5))
    assert [tuple(level.shape) for level in pyramid(batch.float())] == [
        (2, 32, edge, edge) for edge in (4 * side, 2 * side, side, half)
    ]
    detector = Detector(channels, Whitening(batch, 0.1), 3, size, width=32, scales=(4, 2, 1, 0.5))
    outputs, places, counts = detector._read(batch)
    assert counts == [16 * side**2, 4 * side**2, side**2, half**2]
    assert outputs["cls_logits"].shape == (2, sum(counts), 3)
    assert places.shape == (sum(counts), 4)
    whole = places[: counts[0]]
    assert whole[0, :2].tolist() == [0, 0]
    assert whole[-1, 2:].tolist() == [size, size]


def test_places_are_squares_around_what_a_position_sees() -> None:
    places = locations(2, 3, 8.0)
    assert places[:, :2].tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8]]
    assert (places[:, 2:] - places[:, :2] == 8).all()
    mirrored = torch.stack([24 - places[:, 2], places[:, 1], 24 - places[:, 0], places[:, 3]], dim=1)
    assert set(map(tuple, mirrored.tolist())) == set(map(tuple, places.tolist())), "a mirror image has the same places"


@pytest.fixture
def scenes() -> tuple[FrozenMaps, list]:
    """Eight scenes and their boxes."""
    config = DataConfig(image_size=32, train_size=8, workers=0)
    data = open_boxed(config, "train")
    return FrozenMaps(tiny_vit(), Squares(data.images, 32), config, CPU), data.boxes


def test_eight_scenes_are_learned_by_heart_and_the_backbone_stays_as_it_was(scenes) -> None:
    maps, boxes = scenes
    before = fingerprint(maps.backbone)
    detector = train_detector(maps, boxes, 10, epochs=60, batch_size=8, **SETTINGS)
    scores = average_precision(find_boxes(detector, maps, 3), true_boxes(boxes, 32))
    assert scores.ap50 > 0.9
    assert scores.ap > 0.5
    assert fingerprint(maps.backbone) == before
    others = boxes[1:] + boxes[:1]
    assert average_precision(find_boxes(detector, maps, 8), true_boxes(others, 32)).ap50 < 0.3


def test_maps_that_do_not_fit_into_memory_are_the_same(scenes) -> None:
    kept, _ = scenes
    computed = FrozenMaps(kept.backbone, kept.data, kept.config, CPU, most_bytes=0)
    assert computed._kept is None
    order = torch.tensor([5, 0, 7, 2, 1])
    for (rows, maps), (same_rows, same_maps) in zip(kept.batches(order, 2), computed.batches(order, 2), strict=True):
        assert torch.equal(rows, same_rows)
        assert maps.dtype == same_maps.dtype == torch.float16
        assert torch.allclose(maps.float(), same_maps.float(), atol=2e-3)


@pytest.mark.parametrize("most_bytes", [0, 2**30])
def test_an_image_that_cannot_be_read_stops_it(scenes, monkeypatch, most_bytes: int) -> None:
    """Were it left out, every later box would belong to another image."""
    maps, _ = scenes
    real = Squares.load

    def load(self: Squares, i: int):
        if i == 3:
            raise OSError("truncated")
        return real(self, i)

    monkeypatch.setattr(Squares, "load", load)
    maps.config.bad_fraction = 1.0
    with pytest.raises(UserError, match=r"1 images cannot be read|train/00003 disc: OSError: truncated: repair it"):
        list(FrozenMaps(maps.backbone, maps.data, maps.config, CPU, most_bytes).batches(torch.arange(8), 4))


def test_crowds_are_not_learned(scenes) -> None:
    maps, boxes = scenes
    crowded = [as_boxes([*each.corners, [0, 0, 1, 1]], [*each.labels, 3], [*each.crowd, True]) for each in boxes]
    plain, same = (train_detector(maps, each, 10, epochs=1, batch_size=4, **SETTINGS) for each in (boxes, crowded))
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in same.state_dict().items())


def test_a_training_of_ten_steps(scenes) -> None:
    """Eight images in ten epochs, a first try: the warm-up is one step long."""
    maps, boxes = scenes
    first, last = (train_detector(maps, boxes, 10, epochs=epochs, batch_size=8, **SETTINGS) for epochs in (1, 10))
    learned = [torch.equal(first.state_dict()[key], value) for key, value in last.state_dict().items()]
    assert not all(learned)


class InterruptedRunError(Exception):
    """As if the machine had gone down."""


def test_after_an_interruption_it_goes_on_as_if_nothing_had_been(write_run, tmp_path, monkeypatch, capsys) -> None:
    accuracies = []
    real = Checkpoint.save
    for name, interrupt in (("whole", False), ("parts", True)):
        run = write_run(tmp_path / name)
        config = DetectConfig(run=str(run), **QUICK, random_init=False)
        if interrupt:

            def save(self, step):
                real(self, step)
                raise InterruptedRunError

            monkeypatch.setattr(Checkpoint, "save", save)
            with pytest.raises(InterruptedRunError):
                run_detect(config)
            monkeypatch.setattr(Checkpoint, "save", real)
        accuracies.append([result.accuracy for result in run_detect(config)])
        assert not list(run.glob("detect_*.ckpt"))
    assert "going on from step 10 of" in capsys.readouterr().out  # 80 scenes and their mirror images, 16 a step
    assert accuracies[0] == accuracies[1]


def test_the_command_on_scenes_says_what_it_measured(run: Path, capsys) -> None:
    words = [f"{key}={value}" for key, value in QUICK.items()]
    data = ["data=shapes", "data.train_size=24", "data.held_out=0.25"]
    assert main(["detect", f"run={run}", *words, *data]) == 0
    results = json.loads((run / "evaluation.json").read_text())["results"]
    metrics = ["detection AP", "detection AP50", "detection AP75"]
    assert [(each["metric"], each["weights"]) for each in results] == [
        (metric, weights) for weights in ("pretrained", "random_init") for metric in metrics
    ]
    assert {(each["split"], each["train_size"], each["val_size"]) for each in results} == {("held-out", 18, 6)}
    protocol = results[0]["protocol"]
    for part in (
        "10 % of them warm-up, then cosine, gradients clipped at norm 10",
        "average precision",
        "of 10 classes",
        "scales 2, 1,",
        "2 epochs",
        "whole images",
        "seed 0",
    ):
        assert part in protocol
    assert "centre crop" not in protocol
    assert protocol in capsys.readouterr().out


def test_the_command_on_annotated_images(run: Path, tmp_path: Path, capsys) -> None:
    """A folder as a user has it: COCO's file names, images of several sizes, a convolutional model."""
    from PIL import Image

    root = tmp_path / "data"
    for split in ("train", "val"):
        images, annotations = [], []
        for i in range(4):
            width, height = 40 + 8 * i, 64
            picture = np.full((height, width, 3), 60, dtype=np.uint8)
            picture[10:40, 5 : 20 + i] = 220
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / split / f"{i:012d}.jpg")
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": width, "height": height})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [5, 10, 15 + i, 30]})
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    words = [f"{key}={value}" for key, value in {**QUICK, "epochs": 40, "batch_size": 4}.items()]
    data = ["data=folder", f"data.root={root}", "random_init=false"]
    output = tmp_path / "out"
    assert main(["detect", "run=timm:test_resnet?random", f"output={output}", *words, *data]) == 0
    first = json.loads((output / "evaluation.json").read_text())["results"][0]
    assert first["accuracy"] > 0.5, "the same four images"

    content["annotations"][2]["bbox"] = [5, 10, 90, 30]
    (root / "annotations" / "val.json").write_text(json.dumps(content))
    assert main(["detect", f"run={run}", *words, *data]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "annotation 2 of" in told
    assert "reaches outside its image of 56 x 64 pixels" in told

    content["categories"][0]["name"] = "disc"
    content["annotations"][2]["bbox"] = [5, 10, 9, 30]
    (root / "annotations" / "val.json").write_text(json.dumps(content))
    assert main(["detect", f"run={run}", *words, *data]) == 2
    assert "train has boxes of square, val of disc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["width=48"], "width=48 must be a multiple of 32"),
        (["scales=[2,0.3]"], "must be powers of two"),
        (["scales=[1,2]"], "must fall, each once"),
        (["scales=[]"], "must be powers of two"),
        (["epochs=0"], "epochs and batch_size must be at least 1"),
        (["learning_rate=0"], "learning_rate must be over 0"),
        (["learning_rate=nan"], "learning_rate must be over 0 and finite, not nan"),
        (["weight_decay=-1"], "weight_decay must be 0 or more and finite, not -1"),
        (["weight_decay=nan"], "weight_decay must be 0 or more and finite, not nan"),
        (["shrinkage=0"], "shrinkage=0 must be over 0, whitened, and at most 1, standardised"),
        (["learning_rate=1e30", "random_init=false"], "lower learning_rate"),
    ],
)
def test_what_cannot_work_is_named(run: Path, capsys, words: list[str], message: str) -> None:
    quick = [f"{key}={value}" for key, value in QUICK.items() if not words[0].startswith(key)]
    assert main(["detect", f"run={run}", *quick, *words]) == 2
    assert message in capsys.readouterr().err
