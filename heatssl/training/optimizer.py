"""The optimiser, made by timm, with weight decay on matrices only."""

from typing import Any, NamedTuple

import timm.optim
import torch
from torch import nn

from heatssl.config import OptimizerConfig
from heatssl.errors import UserError, did_you_mean
from heatssl.objectives import Objective
from heatssl.training.muon import StackedMuon

# Muon's step is a matrix of equal singular values (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which means
# something for the weights of linear layers only; everything else gets AdamW's. timm makes it as long as AdamW's is on
# the whole (Moonlight, arXiv 2502.16982); in our trials matrices liked four times that (docs/recipe.md), so
# optimizer.learning_rate is four times AdamW's, and what AdamW moves gets a quarter of it.
HYBRID: dict[str, dict[str, Any]] = {
    name: {"momentum": 0.95, "nesterov": True, "fallback_lr_scale": 0.25} for name in ("muon", "adamuon")
}


class Decay(NamedTuple):
    """How many parameters (numbers, not tensors) are pulled towards zero, and how many are not."""

    decayed: int
    free: int


def create_optimizer(objective: Objective, config: OptimizerConfig) -> tuple[torch.optim.Optimizer, Decay]:
    """Build the optimiser of all parameters of an objective that want a gradient.

    Vectors (biases, scales of norms) are never decayed, nor is what a module itself exempts by timm's
    ``no_weight_decay``: a backbone its position embeddings, a law its turns. ``muon`` and ``adamuon`` act on the
    weights of linear layers; position tables, tokens, convolutions, vectors and the matrices of laws are AdamW's.

    Raises:
        UserError: on a name that timm does not know, another number of betas than it takes, or settings or a machine
            that it cannot be made with.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if config.name not in known:
        raise UserError(f"unknown optimizer.name={config.name!r}{did_you_mean(config.name, known)}")
    exempt = {
        f"{path}.{name}" if path else name  # of the objective itself
        for path, module in objective.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }

    def groups(model: nn.Module) -> list[dict[str, object]]:
        by_decay = timm.optim.param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
        return split_off_fallback(by_decay, model) if config.name in HYBRID else by_decay

    info = timm.optim.get_optimizer_info(config.name)
    if info.second_order:
        raise UserError(f"optimizer.name={config.name} needs second derivatives, which no step computes: try adamw")
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    settings |= HYBRID.get(config.name, {})
    if info.has_betas:
        if len(config.betas) != info.num_betas:
            raise UserError(f"optimizer.betas={config.betas}: {config.name} takes {info.num_betas} of them")
        settings["betas"] = tuple(config.betas)
    optimizer: torch.optim.Optimizer
    try:
        if config.name == "muon":
            optimizer = StackedMuon(groups(objective), **settings)
        else:
            optimizer = timm.optim.create_optimizer_v2(objective, opt=config.name, param_group_fn=groups, **settings)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"optimizer.name={config.name} cannot be made here ({reason}): try adamw or muon") from error
    decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return optimizer, Decay(
        decayed=sum(size for size, decays in zip(sizes, decayed, strict=True) if decays),
        free=sum(size for size, decays in zip(sizes, decayed, strict=True) if not decays),
    )


def split_off_fallback(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The same groups, those parameters apart that are no weight of a linear layer: ``use_fallback``, timm's mark."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parts = [
        {**group, "params": [p for p in group["params"] if (id(p) in linear) != fallback], "use_fallback": fallback}
        for group in groups
        for fallback in (False, True)
    ]
    return [part for part in parts if part["params"]]
