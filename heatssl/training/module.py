"""The training step: augment -> normalise -> objective -> loss."""

import hashlib
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from heatssl.backbones import fade_in
from heatssl.config import PretrainConfig
from heatssl.data import BadFiles, Batch, augment, normalise
from heatssl.errors import UserError
from heatssl.objectives import Objective, Outputs
from heatssl.training.health import check_finite
from heatssl.training.optimizer import create_optimizer
from heatssl.training.schedule import factor


class PretrainModule(L.LightningModule):
    """Any objective as a LightningModule.

    Every step draws its random numbers anew from (seed, step, rank), so that a run which was killed and
    resumed meets the very same numbers as one that was not.

    Attributes:
        batch, outputs: those of the latest step, for callbacks.
        images: what the run is trained on, as checkpoints know it, see :func:`known_images`.
        gradient_norm: of the latest step, before clipping.
    """

    batch: Batch
    outputs: Outputs
    gradient_norm: Tensor

    def __init__(self, objective: Objective, config: PretrainConfig) -> None:
        super().__init__()
        self.objective = objective
        self.config = config
        self.bad_files = BadFiles(config.data.bad_fraction)
        self.images = ""
        # Made here and not when Lightning asks, so that a wrong name stops before anything is written.
        self.optimizer, self.decay = create_optimizer(objective, config.optimizer)
        if config.optimizer.fade_in_steps:
            fade_in(objective.backbone, 1.0)  # is there anything to fade in?

    def training_step(self, batch: Batch, *_: Any) -> Tensor:
        """One loss. Images of the batch: uint8 (B K, 3, S, S), K the objective's crops of each image."""
        self.bad_files.update(batch)
        if len(batch.images) == 0:
            raise UserError(f"no image of step {self.global_step} could be read ({batch.bad[0]}): replace it")
        torch.manual_seed(step_seed(self.config.seed, self.global_step, self.global_rank))
        if self.config.optimizer.fade_in_steps:
            fade_in(self.objective, min(1.0, (self.global_step + 1) / self.config.optimizer.fade_in_steps))
        with torch.autocast(self.device.type, enabled=False):  # kornia is not safe in half precision
            images = normalise(augment(batch.images, self.config.data), self.config.data)
        self.batch, self.outputs = batch, self.objective(images)
        return self.outputs.loss

    def on_train_end(self) -> None:
        """A short run may have seen too few images for a check on the way."""
        self.bad_files.check()

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip, and look at the norm that clipping computes anyway, just before the weights would change."""
        limit = self.config.trainer.gradient_clip or float("inf")
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        check_finite(self)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser and its schedule, which moves with every step."""
        scheduler = LambdaLR(self.optimizer, factor(self.config.trainer.steps, self.config.optimizer))
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain types only: torch refuses to unpickle anything else from a checkpoint."""
        checkpoint["hyper_parameters"] = asdict(self.config)
        checkpoint["images"] = self.images
        checkpoint["bad_files"] = self.of_every_process(self.bad_files.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting unreadable files."""
        if "bad_files" in checkpoint:  # absent from older checkpoints
            self.bad_files.load_state_dict(checkpoint["bad_files"][self.global_rank])

    def of_every_process(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process keeps for itself, in the order of their ranks: the first one writes for all."""
        states = [state] * self.trainer.world_size
        if len(states) > 1:
            torch.distributed.all_gather_object(states, state)
        return states


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for one step of one process; neighbouring steps share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def freeze_unused(objective: Objective, image_size: int) -> None:
    """Freeze what the loss does not depend on: with several processes, a missing gradient is an error."""
    device = next(objective.parameters()).device
    objective.eval()  # statistics of norms must not see these images
    objective(torch.randn(4 * objective.crops, 3, image_size, image_size, device=device)).loss.backward()
    objective.train()
    for parameter in objective.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None
