"""Training on labels: the loop that fine-tuning and MAE's linear probe share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from heatssl.config import DataConfig
from heatssl.data import BadFiles, ImageData, augment, normalise, steps_per_epoch, train_loader
from heatssl.errors import UserError
from heatssl.evaluation.checkpoint import Checkpoint
from heatssl.evaluation.processes import is_first, rank_and_world
from heatssl.progress_bar import progress_bar
from heatssl.schedule import warmup_cosine


@dataclass(frozen=True)
class Plan:
    """How long, in what steps."""

    epochs: int
    warmup_epochs: float
    batch_size: int  # of all processes together
    seed: int  # of order, crops, and all that is drawn in a step
    gradient_clip: float = 0.0  # largest gradient norm; 0: none


def train_on_labels(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: ImageData,
    data: DataConfig,
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    name: str,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """Minimise ``loss`` of augmented, normalised images (B, 3, S, S) and labels (B,).

    Of several processes each meets its share of every batch; ``loss`` sees to it that their gradients become one.

    The learning rate of each group (times its ``lr_scale``, where it has one) is its peak, after a linear warm-up; half
    a cosine takes it to zero. After every epoch the state is written; after the last one too, and then
    nothing is trained again.

    Raises:
        UserError: when the loss is not finite, too many files cannot be read, or processes cannot share a batch.
    """
    rank, world = rank_and_world()
    if plan.batch_size % (2 * world) and world > 1:
        raise UserError(f"{world} processes cannot share {plan.batch_size} images in pairs: choose another batch_size")
    per_epoch = steps_per_epoch(images, plan.batch_size)
    steps = per_epoch * plan.epochs
    warmup = min(round(plan.warmup_epochs * per_epoch), steps - 1)
    peaks = [group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = checkpoint.load()
    if first >= steps:  # what came after the training was interrupted
        return
    share = plan.batch_size // world
    loader = train_loader(images, data, batch_size=share, seed=plan.seed, start_step=first, rank=rank, world=world)
    bad = BadFiles(data.bad_fraction)
    with progress_bar(total=steps, initial=first, name=name, unit="step", shown=is_first()) as bar:
        for step, batch in zip(range(first, steps), loader, strict=False):
            bad.update(batch)
            if len(batch.images) < 2:
                raise UserError(f"hardly an image of step {step} can be read ({batch.bad[0]}): replace it")
            torch.manual_seed(plan.seed + step)
            torch.rand(rank * share)  # flips of the images before: each image is shown as one process would show it
            np.random.seed((plan.seed + step) % 2**32)  # noqa: NPY002 (timm's mixup draws from it)
            height = warmup_cosine(step, warmup, steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * height
            shown = normalise(augment(batch.images.to(device), data), data)
            found = loss(shown, batch.labels.to(device))
            if not torch.isfinite(found):
                raise UserError(f"the loss of step {step} is {found.item()}: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            nn.utils.clip_grad_norm_(parameters, plan.gradient_clip or math.inf)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            bar.update()
            bar.set_postfix(loss=f"{found.item():.3f}", refresh=False)
            if (step + 1) % per_epoch == 0:
                bad.check()  # first: who finds the state trusts it
                checkpoint.save(step + 1)
