"""The linear probe beside scikit-learn's LogisticRegression on the same features: seconds and accuracy, in one run.

python benchmarks/evaluation.py                                        # make bench-eval: about 5 minutes
python benchmarks/evaluation.py --rows 50000 --width 384 --classes 10 100

Features are generated: a Gaussian for each class, in channels that are correlated and of very different variances, near
enough to each other that a linear classifier gets about half of them right. heatssl trains a grid of 13 L2 strengths on
nine tenths of train, selects one on the last tenth and trains that on all; scikit-learn does the same, one strength
after the other. Beside them both train the selected strength alone. Both stop at the same tolerance. Results go to
benchmarks/results/evaluation/<hardware>.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from heatssl.evaluation import knn_accuracy, linear_probe
from heatssl.evaluation.held_out import stratified_split
from heatssl.evaluation.results import commit, hardware, write_record

RESULTS = Path(__file__).parent / "results" / "evaluation"
GRID = [10 ** (-6 + k * 5 / 12) for k in range(13)]


def main() -> None:
    """Measure every number of classes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    rows = [row for classes in settings.classes for row in measure(settings.rows, settings.width, classes)]
    record = {
        "hardware": hardware(torch.device("cpu")),
        "threads": settings.threads,
        "rows": settings.rows,
        "width": settings.width,
        "torch": torch.__version__,
        "commit": commit(),
        "results": rows,
    }
    path = write_record(RESULTS, record)
    print(f"{table(rows)}\n-> {path}")


def measure(rows: int, width: int, classes: int) -> list[dict[str, Any]]:
    """One row for each program."""
    train_x, train_y, test_x, test_y = features(rows, width, classes)
    measured = []
    start, used = time.perf_counter(), time.process_time()
    found = linear_probe(train_x, train_y, test_x, test_y, grid=GRID)
    measured.append(row("heatssl probe, 13 strengths", classes, found.accuracy, start, used))
    start, used = time.perf_counter(), time.process_time()
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, temperature=0.07)
    measured.append(row("heatssl knn", classes, accuracy, start, used))
    start, used = time.perf_counter(), time.process_time()
    accuracy = scikit_learn(train_x, train_y, test_x, test_y, GRID)
    measured.append(row("scikit-learn, the same 13 strengths", classes, accuracy, start, used))
    start, used = time.perf_counter(), time.process_time()
    alone = linear_probe(train_x, train_y, test_x, test_y, grid=[found.selected])
    measured.append(row("heatssl probe, the selected strength alone", classes, alone.accuracy, start, used))
    start, used = time.perf_counter(), time.process_time()
    accuracy = scikit_learn(train_x, train_y, test_x, test_y, [found.selected])
    measured.append(row("scikit-learn, the selected strength alone", classes, accuracy, start, used))
    return measured


def scikit_learn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, grid: list[float]) -> float:
    """Accuracy of the strength that does best on a tenth of train, trained on the whole of it."""
    scaler = StandardScaler().fit(train_x.numpy())
    x, y = scaler.transform(train_x.numpy()), train_y.numpy()

    def fitted(rows: Any, strength: float) -> LogisticRegression:
        return LogisticRegression(C=1 / (strength * len(y[rows])), max_iter=1000).fit(x[rows], y[rows])

    best = grid[0]
    if len(grid) > 1:
        fit, held = (part.numpy() for part in stratified_split(train_y, 0.1, seed=0))
        best = max(grid, key=lambda strength: fitted(fit, strength).score(x[held], y[held]))
    return float(fitted(slice(None), best).score(scaler.transform(test_x.numpy()), test_y.numpy()))


def row(program: str, classes: int, accuracy: float, start: float, used: float) -> dict[str, Any]:
    """What it took since then."""
    return {
        "program": program,
        "classes": classes,
        "accuracy": round(accuracy, 4),
        "seconds": round(time.perf_counter() - start, 2),
        "core_seconds": round(time.process_time() - used, 2),
    }


def features(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train (rows, width) with labels, and a fifth as many for test."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width)).Q * torch.arange(1, width + 1) ** -0.7
    centres = torch.randn(classes, width) * (0.08 if classes < 50 else 0.13)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % classes
        return (centres[labels] + torch.randn(count, width)) @ basis, labels

    return *draw(rows), *draw(rows // 5)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with times over heatssl's probe."""
    lines = ["| classes | program | accuracy | seconds | core seconds | over heatssl's |", "|---" * 6 + "|"]
    for each in rows:
        reference = next(r for r in rows if r["classes"] == each["classes"])
        cells = [
            each["classes"],
            each["program"],
            f"{100 * each['accuracy']:.1f}",
            each["seconds"],
            each["core_seconds"],
        ]
        ratio = each["core_seconds"] / max(reference["core_seconds"], 1e-9)
        lines.append(f"| {' | '.join(map(str, cells))} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
