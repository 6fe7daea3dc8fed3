"""Trained on quarters, evaluated on whole images: what the jump in length costs, for each normaliser.

python benchmarks/quarters.py runs/gau_softmax runs/vit      # pretrained: benchmarks/objectives.py --keep runs

The features of an image are the mean over its map: of the whole image encoded at once, or of its four quarters, each
encoded alone at its place, as heat_jepa encodes them (and then all of a quarter's patches). A linear probe and kNN of
each, train and test alike. With softmax also the factor log n / log N at test, where N is what training had; N of
softmax_plus is the whole grid's, whichever it was trained on. Accuracies are those of the tenth of train that a run
held out, so that val stays unread. Rows go to benchmarks/results/quarters.jsonl.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heatssl.backbones import encode_block, set_normaliser
from heatssl.config_file import load_config
from heatssl.data import open_split
from heatssl.evaluation import extract_features, knn_accuracy, linear_probe
from heatssl.evaluation.results import commit, hardware
from heatssl.export import load_backbone

RESULTS = Path(__file__).parent / "results" / "quarters.jsonl"
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
COLUMNS = ("model", "seed", "normaliser at test", "encoded", "linear", "knn")


class QuartersAlone(nn.Module):
    """A backbone whose map is put together from the maps of four quarters that do not see each other.

    Args:
        backbone: a token model.
        side: rows, and columns, of a quarter in patches.
    """

    def __init__(self, backbone: nn.Module, side: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.side = side

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> field (B, C, 2 side, 2 side)."""
        corners = torch.tensor(CORNERS).repeat_interleave(len(images), dim=0) * self.side
        rows, columns = corners.unbind(dim=1)
        blocks = encode_block(self.backbone, images.repeat(4, 1, 1, 1), rows, columns, self.side, self.side)
        top_left, top_right, bottom_left, bottom_right = blocks.chunk(4)
        top, bottom = torch.cat([top_left, top_right], dim=3), torch.cat([bottom_left, bottom_right], dim=3)
        return torch.cat([top, bottom], dim=2)


def main() -> None:
    """Measure every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders that held out a tenth of train")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        for run in arguments.runs:
            for row in measure(run):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(line, rows)]))


def measure(run: Path) -> Iterator[dict[str, Any]]:
    """Rows of one run."""
    config = load_config(run / "config.yaml")
    if not config.data.held_out:
        raise SystemExit(f"{run} has seen all of train: pretrain with data.held_out=0.1, to keep val unread")
    backbone: Any
    backbone, info = load_backbone(str(run))
    about = {"model": info.name, "arguments": info.arguments, "trained": config.objective["name"], "seed": config.seed}
    for way in ways(backbone):
        if way == "softmax, log n":
            # N: the patches of a quarter that training saw, which is what its softmax knows.
            seen = config.objective.get("visible_ratio", 1.0) * backbone.patch_embed.num_patches / 4
            settings = dataclasses.replace(backbone.normaliser.settings, length=round(seen), log_n_at_test=True)
            set_normaliser(backbone, settings)
        side = backbone.patch_embed.grid_size[0] // 2
        for encoded, model in (("whole", backbone), ("quarters", QuartersAlone(backbone, side))):
            row = about | {"normaliser at test": way, "encoded": encoded} | accuracies(model, config.data)
            yield row | {"hardware": hardware(torch.device("cpu")), "commit": commit()}


def ways(backbone: Any) -> list[str]:
    """The normaliser as trained, and with the factor log n at test where it can have it."""
    if not hasattr(backbone, "normaliser"):
        return ["softmax"]
    kind = backbone.normaliser.settings.kind
    return [kind, "softmax, log n"] if kind == "softmax" else [kind]


def accuracies(model: nn.Module, data: Any) -> dict[str, Any]:
    """Linear probe and kNN on the held-out tenth."""
    train, held_out = open_split(data, "train"), open_split(data, "val")
    features = (*extract_features(model, train, data), *extract_features(model, held_out, data))
    train_x, train_y, test_x, test_y = features
    centre, spread = train_x.mean(dim=0), train_x.std(dim=0) + 1e-6
    knn = knn_accuracy((train_x - centre) / spread, train_y, (test_x - centre) / spread, test_y)
    return {"linear": linear_probe(*features).accuracy, "knn": knn, "images": len(test_y), "split": "held-out"}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    shown = [row[column] for column in COLUMNS[:4]] + [f"{100 * row[column]:.1f}" for column in COLUMNS[4:]]
    return "| " + " | ".join(map(str, shown)) + " |"


if __name__ == "__main__":
    main()
