"""Attribution beside pytorch-grad-cam and captum: images a second on the same model, layer and target, in one run.

python benchmarks/attribution.py                        # make bench-attribution: about 7 minutes on one core
python benchmarks/attribution.py --models resnet18 --repetitions 5

Random weights, a class logit as target, one thread. Every method and its peer take turns, so that a busy machine slows
both; times are medians over the repetitions, and what one repetition of a method took is also held against that of its
peer next to it. pytorch-grad-cam gives maps scaled and enlarged, and so does heatssl here. "forward" is one pass of the
model without gradients: what no method can do without. Results go to benchmarks/results/attribution/<hardware>.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_grad_cam
import timm
import torch
from captum.attr import IntegratedGradients, Saliency
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from heatssl.attribution import attribute
from heatssl.evaluation.results import commit, hardware, write_record

RESULTS = Path(__file__).parent / "results" / "attribution"
LAYERS = {"vit_tiny_patch16_224": "blocks.11.norm1", "resnet18": "layer4"}
PEERS = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "eigencam": pytorch_grad_cam.EigenCAM,
    "gradcam_plus_plus": pytorch_grad_cam.GradCAMPlusPlus,
}
LABEL = 3
STEPS = 2  # of integrated gradients; its time is proportional to them


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in settings.models for row in measure(name, settings.batch, settings.repetitions)]
    record = {
        "hardware": hardware(torch.device("cpu")),
        "threads": 1,
        "batch": settings.batch,
        "repetitions": settings.repetitions,
        "seed": 0,
        "torch": torch.__version__,
        "commit": commit(),
        "results": rows,
    }
    path = write_record(RESULTS, record)
    print(f"{table(rows)}\n-> {path}")


def measure(name: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """One row for each method of one model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(batch, 3, 224, 224)
    layer = model.get_submodule(LAYERS[name])
    rows = []
    for method, (ours, peer, program) in pairs(model, layer, images).items():
        ours(), peer()  # the first call allocates
        times = [(core_seconds(ours), core_seconds(peer)) for _ in range(repetitions)]
        here, there = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(theirs / own for own, theirs in times)
        rows.append(
            {
                "model": name,
                "method": method,
                "peer": program,
                "images_per_second": round(batch / here, 2),
                "peer_images_per_second": round(batch / there, 2),
                "times_the_peer": round(ratio, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def pairs(model: nn.Module, layer: nn.Module, images: Tensor) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Calls of heatssl and of a peer that do the same, and the name of the peer."""
    targets = [ClassifierOutputTarget(LABEL)] * len(images)
    tokens = {"reshape_transform": lambda x: x[:, 1:].mT.unflatten(2, (14, 14))} if hasattr(model, "blocks") else {}

    def ours(method: str, **options: Any) -> Callable[[], Tensor]:
        return lambda: attribute(model, images, method, LABEL, **options)

    def of_grad_cam(method: str) -> Callable[[], Any]:
        def call() -> Any:
            with PEERS[method](model, [layer], **tokens) as cam:
                return cam(images, targets)

        return call

    def of_captum() -> Tensor:
        integrated = IntegratedGradients(model)
        settings = {"n_steps": STEPS, "method": "riemann_middle", "internal_batch_size": len(images)}
        return integrated.attribute(images, target=LABEL, return_convergence_delta=True, **settings)

    found: dict[str, tuple[Any, ...]] = {
        method: (ours(method, layer=layer), of_grad_cam(method), "pytorch-grad-cam") for method in PEERS
    }
    found["saliency"] = (ours("saliency"), lambda: Saliency(model).attribute(images, target=LABEL), "captum")
    found["integrated_gradients"] = (ours("integrated_gradients", steps=STEPS, chunk=len(images)), of_captum, "captum")
    forward = torch.no_grad()(lambda: model(images))
    found["forward"] = (forward, forward, "itself")
    return found


def core_seconds(call: Callable[[], Any]) -> float:
    """What one call takes of the processor: on a machine with other work the clock would count that too."""
    start = time.process_time()
    call()
    return time.process_time() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | method | heatssl, images/s | peer | images/s | times the peer |", "|---" * 6 + "|"]
    for row in rows:
        cells = [row["model"], row["method"], f"{row['images_per_second']:.1f}", row["peer"]]
        cells += [f"{row['peer_images_per_second']:.1f}", f"{row['times_the_peer']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
