"""A law as a prior on intermediate layers: any law, any timm backbone, any objective.

The loss of the objective gains weight * (mean over layers of the relative residual). Relative: the law's mean squared
residual over the variance of the field, each channel about its mean over images and positions. So the weight means
the same in every layer, and neither a shrinking field nor a large constant in it makes the residual small.

An objective that shows scattered patches, such as MAE, leaves no field but its values at them. The hidden positions are
then filled in as a body at rest would be (:func:`heatssl.heat.harmonic_weights`), and the law is asked of the whole.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn

from heatssl import heat
from heatssl.backbones import as_field, patches_shown
from heatssl.errors import UserError, did_you_mean
from heatssl.objectives.limits import check_limits
from heatssl.objectives.objective import Objective, Outputs
from heatssl.objectives.targets import from_rows
from heatssl.ops import full_precision


def attach_prior(objective: Objective, settings: dict[str, Any]) -> None:
    """Add the prior that ``settings['name']`` names to an objective, with the other settings as its arguments.

    The objective keeps its names and parameters and gains ``objective.prior``; its loss and logs gain those of the
    prior. ``none`` leaves it as it is.

    Raises:
        UserError: on an unknown law, layer or setting.
    """
    arguments = {key: value for key, value in settings.items() if key != "name"}
    if settings["name"] == "none":
        return
    try:
        check_limits(arguments)
        prior = Prior(objective.backbone, settings["name"], block=objective.block, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"prior {settings['name']}: {error}") from error
    objective.prior = prior
    objective.register_forward_pre_hook(_begin)
    objective.register_forward_hook(_end, always_call=True)


# Hooks find the prior in what they are called with, so that a copy of an objective has the copy of its prior.
def _begin(objective: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    cast("Prior", objective.prior).begin(inputs[0])


def _end(objective: nn.Module, _inputs: tuple[Tensor, ...], outputs: Outputs | None) -> Outputs | None:
    prior = cast("Prior", objective.prior)
    if outputs is None:  # the objective has failed
        prior.stop()
        return None
    return prior.add_to(outputs)


# Heat flow is about two fields, and controls state no equation: all of one field can be made to obey them for nothing.
_NO_PRIOR = (heat.HeatFlow, heat.Copy, heat.FreeLinear, heat.MultilayerPerceptron)
_Shown = tuple[Tensor, tuple[int, int]]  # patches (B, n) and their grid, of heatssl.backbones.patches_shown


class _Watcher:
    """A hook that keeps what a layer returns while there is a list for it.

    Nothing is computed here: gradient checkpointing would compute it once more, when nobody is watching.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, _Shown | None]] | None = None

    @torch.compiler.disable
    def __call__(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.seen is not None:
            self.seen.append((output, patches_shown()))


class Prior(nn.Module):
    """Watches layers of a backbone while the objective runs, and says how far their fields are from obeying a law.

    Args:
        backbone: a timm model; each layer gets a hook, which costs nothing outside :meth:`begin` and :meth:`add_to`.
        law: a law of :mod:`heatssl.heat` in snake case, such as ``correlated_laplace``. Each layer has its own.
        layers: indices of ``backbone.feature_info`` (the blocks of a transformer, the stages of a convolutional
            model; -1: the last), or the module names that stand there, such as ``blocks.3``.
        weight: of the mean relative residual in the loss.
        block: rows and columns of the block of patches that the objective shows; None: whole images.
        **settings: arguments of the law.

    Raises:
        UserError: on an unknown law or layer.
        ValueError: without any layer, with one twice or a negative weight, or on a value that the law does not take.
        TypeError: on a setting that the law does not have.
    """

    def __init__(
        self,
        backbone: Any,
        law: str,
        *,
        layers: Sequence[int | str] = (-1,),
        weight: float = 0.01,
        block: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers is empty: name some, such as layers=[-1]")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight={weight} must be 0 or more")
        self.weight = weight
        self.block = block
        chosen = [_layer(backbone, layer) for layer in layers]
        self.layers = [str(layer["module"]) for layer in chosen]
        for name in self.layers:
            if self.layers.count(name) > 1:
                raise ValueError(f"layers={list(layers)} names {name} more than once: name each layer once")
        self.laws = nn.ModuleList(_law(law, int(layer["num_chs"]), settings) for layer in chosen)
        self._watchers = [_Watcher() for _ in self.layers]
        for name, watcher in zip(self.layers, self._watchers, strict=True):
            backbone.get_submodule(name).register_forward_hook(watcher)
        self._backbone = (backbone,)  # not a part of this module
        self._images: Tensor | None = None

    def begin(self, images: Tensor) -> None:
        """From here on the layers are watched; the objective sees images (B, 3, S, S).

        Raises:
            UserError: under reentrant checkpointing, where what is watched has no gradient.
        """
        if getattr(self._backbone[0], "grad_checkpointing", False) and use_reentrant_ckpt():
            raise UserError(
                "a prior has no gradient under reentrant checkpointing: timm.layers.set_reentrant_ckpt(False)"
            )
        self._images = images
        for watcher in self._watchers:
            watcher.seen = []

    def stop(self) -> None:
        """Stop watching, and forget what was seen."""
        self._images = None
        for watcher in self._watchers:
            watcher.seen = None

    def add_to(self, outputs: Outputs) -> Outputs:
        """Stop watching; add the weighted mean to the loss and ``prior/<layer>`` to the logs.

        Raises:
            UserError: when a layer was not run, or its field is too small for the law.
        """
        seen, images = [watcher.seen for watcher in self._watchers], self._images
        self.stop()
        assert images is not None
        residuals = {}
        # Differences of neighbours cancel: too fine for half precision.
        with full_precision(outputs.loss):
            for name, law, calls in zip(self.layers, self.laws, seen, strict=True):
                if not calls:
                    raise UserError(f"prior.layers: {name} takes no part in this objective: choose another layer")
                fields = [self._field(output, images, shown).float() for output, shown in calls]
                try:
                    values = [heat.relative_residual(cast("heat.Law", law), field) for field in fields]
                except ValueError as error:
                    raise UserError(f"prior on {name}: {error}") from error
                residuals[name] = torch.stack(values).mean()
        logs = {f"prior/{name}": value.detach() for name, value in residuals.items()}
        loss = outputs.loss + self.weight * torch.stack(list(residuals.values())).mean()
        return outputs._replace(loss=loss, logs=outputs.logs | logs)

    def extra_repr(self) -> str:
        return f"layers={self.layers}, weight={self.weight}, block={self.block}"

    def _field(self, output: Tensor, images: Tensor, encoded: _Shown | None) -> Tensor:
        """What a layer returned as a field: tokens are of whole images, of the objective's block, or scattered."""
        (backbone,) = self._backbone
        shown = [images]
        if self.block is not None and output.ndim == 3:
            rows, columns = (
                side * patch for side, patch in zip(self.block, backbone.patch_embed.patch_size, strict=True)
            )
            shown.append(images[..., :rows, :columns])
        for part in shown:
            with contextlib.suppress(UserError):
                return as_field(backbone, output, part)
        if encoded is None:
            raise UserError(
                f"a layer returns {tuple(output.shape)}, tokens without a grid: a prior needs an objective whose "
                "backbone sees whole images, one block of them, or patches through encode_visible; use prior=none here"
            )
        return fill_in(output[:, int(getattr(backbone, "num_prefix_tokens", 0)) :], *encoded)


def fill_in(tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, n, C) at visible patches (B, n), Laplace's equation everywhere else: a field (B, C, *grid).

    Raises:
        UserError: for a single patch, around which the field is the same everywhere and obeys any law.
    """
    if visible.shape[1] < 2:
        raise UserError("a prior needs two visible patches or more in each set: show more of them, or larger images")
    everywhere = torch.arange(grid[0] * grid[1], device=tokens.device).expand(len(tokens), -1)
    with full_precision(tokens):
        weights = heat.harmonic_weights(visible, everywhere, grid, torch.ones(1, device=tokens.device))[:, 0]
        return from_rows(weights @ tokens.float(), grid)


def _layer(backbone: Any, layer: int | str) -> dict[str, Any]:
    """The entry of timm's feature_info for an index or a module name."""
    known = [dict(entry) for entry in getattr(backbone, "feature_info", [])]
    for index, entry in enumerate(known):
        if layer in (entry["module"], index, index - len(known)):
            return entry
    names = [str(entry["module"]) for entry in known]
    hint = did_you_mean(str(layer), names) or f": choose one of {', '.join(names)}"
    raise UserError(f"prior.layers: {type(backbone).__name__} has no layer {layer!r}{hint}")


def _law(name: str, channels: int, settings: dict[str, Any]) -> heat.Law:
    """The law ``heatssl.heat`` exports under this name in camel case; Laplace's alone does not ask for channels."""
    public = {name: getattr(heat, name) for name in heat.__all__ if name not in ("Law", "Propagator")}
    laws = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): kind
        for name, kind in public.items()
        if isinstance(kind, type) and issubclass(kind, heat.Law) and kind not in _NO_PRIOR
    }
    if name not in laws:
        raise UserError(f"unknown law {name!r}{did_you_mean(name, laws)}")
    return laws[name](**settings) if name == "laplace" else laws[name](channels, **settings)
