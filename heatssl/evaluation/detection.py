"""Object detection with a frozen backbone: a detector of its maps is trained, and finds boxes in others."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from heatssl.data import Boxes
from heatssl.errors import UserError
from heatssl.evaluation.checkpoint import Checkpoint, Stateful
from heatssl.evaluation.detector import Detector
from heatssl.evaluation.frozen_maps import FrozenMaps
from heatssl.evaluation.whitening import Whitening
from heatssl.progress_bar import progress_bar
from heatssl.schedule import warmup_cosine

WARMUP = 0.1  # share of all steps
GRADIENT_CLIP = 10.0  # largest norm: far above that of training that goes well
STATISTICS = 1000  # images from which mean and correlations of the channels are taken


def train_detector(
    maps: FrozenMaps,
    boxes: Sequence[Boxes],
    classes: int,
    *,
    width: int,
    scales: Sequence[float],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    shrinkage: float,
    seed: int,
    checkpoint: Callable[[Mapping[str, Stateful]], Checkpoint] | None = None,
) -> Detector:
    """FCOS, AdamW, learning rate up in a tenth of the steps and down a cosine to zero.

    Args:
        maps: of the images to learn from.
        boxes: of each of them, in shares of the image; crowds are left out.
        classes: how many there are.
        width: of the :class:`heatssl.evaluation.detector.Detector`.
        scales: of its pyramid.
        epochs: over all images.
        batch_size: images per step.
        learning_rate: peak.
        weight_decay: of matrices and convolutions.
        shrinkage: of the channels' correlations before they are whitened, see
            :class:`heatssl.evaluation.whitening.Whitening`; 1: channels are standardised.
        seed: of first weights and order; the result depends on nothing else.
        checkpoint: from what changes in training to where its state is written after each epoch, and read from.

    Raises:
        UserError: on a width or scales that cannot work, images that cannot be read, or a loss that is not finite.
    """
    size, device = maps.config.image_size, maps.device
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    sample = torch.cat([part.cpu() for _, part in maps.batches(order[:STATISTICS], batch_size)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(maps.shape[0], Whitening(sample, shrinkage), classes, size, width=width, scales=scales).to(
            device
        )
    optimizer = torch.optim.AdamW(_groups(detector, weight_decay), learning_rate)
    per_epoch = -(-len(maps) // batch_size)
    steps = epochs * per_epoch
    warmup = round(WARMUP * steps)
    state = checkpoint and checkpoint({"detector": detector, "optimizer": optimizer})
    step = state.load() if state else 0
    targets = [_target(each, size, device) for each in boxes]
    with progress_bar(total=steps, initial=step, name="detect", unit="step") as bar:
        for epoch in range(step // per_epoch, epochs):
            order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed + epoch))
            for rows, batch in maps.batches(order, batch_size):
                loss = torch.stack([*detector.losses(batch, [targets[row] for row in rows]).values()]).sum()
                if not torch.isfinite(loss):
                    raise UserError(f"the loss of step {step} is {loss.item()}: lower learning_rate")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), GRADIENT_CLIP)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * warmup_cosine(step, warmup, steps)
                optimizer.step()
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if state:
                state.save(step)
    return detector.eval()


@torch.inference_mode()
def find_boxes(detector: Detector, maps: FrozenMaps, batch_size: int) -> list[dict[str, Tensor]]:
    """What the detector finds in every image, in order, on the CPU: ``boxes`` in pixels, ``scores``, ``labels``."""
    found = []
    batches = maps.batches(torch.arange(len(maps)), batch_size)
    for _, batch in progress_bar(batches, name="boxes", unit="batch"):
        found += [{name: part.cpu() for name, part in each.items()} for each in detector(batch)]
    return found


def true_boxes(boxes: Sequence[Boxes], size: int) -> list[dict[str, Tensor]]:
    """Boxes in pixels of images of this size, as :func:`heatssl.evaluation.average_precision` takes them."""
    return [
        {
            "boxes": size * torch.from_numpy(each.corners),
            "labels": torch.from_numpy(each.labels),
            "iscrowd": torch.from_numpy(each.crowd).long(),
        }
        for each in boxes
    ]


def _target(boxes: Boxes, size: int, device: torch.device) -> dict[str, Tensor]:
    """What to learn: all that is no crowd."""
    single = ~boxes.crowd
    return {
        "boxes": size * torch.from_numpy(boxes.corners[single]).to(device),
        "labels": torch.from_numpy(boxes.labels[single]).to(device),
    }


def _groups(detector: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Norms and biases do not decay."""
    flat = [parameter for parameter in detector.parameters() if parameter.ndim < 2]
    rest = [parameter for parameter in detector.parameters() if parameter.ndim >= 2]
    return [{"params": rest, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
