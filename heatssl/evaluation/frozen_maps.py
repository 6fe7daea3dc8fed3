"""Frozen feature maps by the batch: in memory where they fit, else computed whenever they are asked for."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from heatssl.backbones import evaluation_mode, feature_map
from heatssl.config import DataConfig
from heatssl.data import ImageData, Subset, eval_loader, normalise
from heatssl.errors import UserError
from heatssl.evaluation.features import MOST_BYTES, extract_all_maps


class FrozenMaps:
    """Maps of all images of a split; the same numbers, in float16, whether they are kept or not.

    Args:
        backbone: never changed.
        data: the images.
        config: their size and normalisation.
        device: where the backbone runs.
        most_bytes: of memory, beyond which they are not kept.

    Attributes:
        shape: (C, h, w) of each.

    Raises:
        UserError: when an image cannot be read.
    """

    def __init__(
        self,
        backbone: nn.Module,
        data: ImageData,
        config: DataConfig,
        device: torch.device,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.backbone = backbone.to(device)
        self.data, self.config, self.device = data, config, device
        side = config.image_size
        with evaluation_mode(backbone), torch.inference_mode():
            self.shape = feature_map(backbone, torch.zeros(1, 3, side, side, device=device)).shape[1:]
        self._kept: Tensor | None = None
        if 2 * len(data) * self.shape.numel() <= most_bytes:
            self._kept = extract_all_maps(backbone, data, config, device=device)

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """These images in this order: positions (B,), maps (B, C, h, w) float16 on the device.

        Raises:
            UserError: when an image cannot be read.
        """
        if self._kept is not None:
            for part in rows.split(batch_size):
                yield part, self._kept[part].to(self.device)
            return
        for batch in eval_loader(Subset(self.data, rows.numpy()), self.config, batch_size=batch_size):
            if batch.bad:
                raise UserError(f"{batch.bad[0]}: repair it, or take it and what belongs to it out")
            with evaluation_mode(self.backbone), torch.no_grad():
                maps = feature_map(self.backbone, normalise(batch.images.to(self.device), self.config))
            yield rows[batch.indices], maps.half()
