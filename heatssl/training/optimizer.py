"""The optimiser, made by timm, with weight decay on matrices only."""

from typing import Any, NamedTuple

import timm.optim
import torch
from torch import nn

from heatssl.config import OptimizerConfig
from heatssl.errors import UserError, did_you_mean
from heatssl.objectives import Objective


class Decay(NamedTuple):
    """How many parameters (numbers, not tensors) are pulled towards zero, and how many are not."""

    decayed: int
    free: int


def create_optimizer(objective: Objective, config: OptimizerConfig) -> tuple[torch.optim.Optimizer, Decay]:
    """Build the optimiser of all parameters of an objective that want a gradient.

    Vectors (biases, scales of norms, a diagonal law) are never decayed, nor is what the backbone itself
    exempts, such as position embeddings.

    Raises:
        UserError: on a name that timm does not know.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if config.name not in known:
        raise UserError(f"unknown optimizer.name={config.name!r}{did_you_mean(config.name, known)}")
    exempt = {f"backbone.{name}" for name in getattr(objective.backbone, "no_weight_decay", set)()}

    def groups(model: nn.Module) -> list[dict[str, object]]:
        return timm.optim.param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)

    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if timm.optim.get_optimizer_info(config.name).has_betas:
        settings["betas"] = tuple(config.betas)
    optimizer = timm.optim.create_optimizer_v2(objective, opt=config.name, param_group_fn=groups, **settings)
    decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return optimizer, Decay(
        decayed=sum(size for size, decays in zip(sizes, decayed, strict=True) if decays),
        free=sum(size for size, decays in zip(sizes, decayed, strict=True) if not decays),
    )
