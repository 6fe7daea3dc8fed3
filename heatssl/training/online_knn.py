"""kNN accuracy while training: a number to watch and to choose the best weights by; val stays untouched."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from heatssl.backbones import pooled_features
from heatssl.config import PretrainConfig
from heatssl.data import ImageData, Subset, eval_loader, normalise
from heatssl.errors import UserError
from heatssl.evaluation import knn_accuracy
from heatssl.training.compiling import eager
from heatssl.training.metrics import Metrics
from heatssl.training.spread import spread_over_classes

if TYPE_CHECKING:
    from heatssl.training.module import PretrainModule

CACHE_LIMIT = 1 << 30  # bytes of decoded images kept in memory between two evaluations
NEIGHBOURS = 20
TEMPERATURE = 0.07  # weights exp(similarity / T) of DINO's kNN


class OnlineKnn(L.Callback):
    """Classifies some images of train by their neighbours among other images of train.

    Bank and queries are disjoint and balanced over classes. Both are pretrained on as well, without their
    labels; no image of val is looked at. The first process computes, the others wait for its number.

    Attributes:
        best: highest accuracy after any training, or None.
        improved: whether this very step raised it.
    """

    def __init__(self, data: ImageData, config: PretrainConfig, metrics: Metrics) -> None:
        sizes = config.trainer.knn_train_size, config.trainer.knn_val_size
        self.bank, self.queries = split(data, *sizes, seed=config.seed)
        self.config = config
        self.metrics = metrics
        self.best: float | None = None
        self.improved = False
        self._cache: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def on_train_start(self, trainer: L.Trainer, module: "PretrainModule") -> None:  # type: ignore[override]
        """Where the curve begins: random weights."""
        if trainer.global_step == 0:
            self.metrics.note({"knn/accuracy": self.evaluate(trainer, module)})

    def on_train_batch_end(self, trainer: L.Trainer, module: "PretrainModule", *_: Any) -> None:  # type: ignore[override]
        """Every ``knn_every`` steps and after the last."""
        self.improved = False
        step = trainer.global_step
        if step % self.config.trainer.knn_every and step != trainer.max_steps:
            return
        accuracy = self.evaluate(trainer, module)
        self.metrics.note({"knn/accuracy": accuracy})
        if self.best is None or accuracy > self.best:
            self.best, self.improved = accuracy, True

    def evaluate(self, trainer: L.Trainer, module: "PretrainModule") -> float:
        """Accuracy between 0 and 1, the same on every process."""
        accuracy = 0.0
        if trainer.is_global_zero:
            module.eval()
            with eager():
                bank = self._features("bank", self.bank, module)
                queries = self._features("queries", self.queries, module)
            module.train()
            accuracy = knn_accuracy(*bank, *queries, k=min(NEIGHBOURS, len(self.bank)), temperature=TEMPERATURE)
        return float(trainer.strategy.broadcast(accuracy))

    @torch.no_grad()
    def _features(self, name: str, data: Subset, module: "PretrainModule") -> tuple[Tensor, Tensor]:
        if not len(data):
            raise UserError("online kNN has no images to look at: set trainer.knn_every=0, or give train more of them")
        features, labels = [], []
        for images, some_labels in self._batches(name, data):
            normalised = normalise(images.to(module.device), self.config.data)
            features.append(pooled_features(module.objective.backbone, normalised).float())
            labels.append(some_labels)
        if not features:
            raise UserError(f"none of {len(data)} images can be read, such as {data.name(0)}: check their permissions")
        return torch.cat(features), torch.cat(labels).to(module.device)

    def _batches(self, name: str, data: Subset) -> Iterable[tuple[Tensor, Tensor]]:
        """Decoded images (B, 3, S, S) uint8 and labels (B,); read once and kept, where they fit."""
        if name in self._cache:
            return self._cache[name]
        loader = eval_loader(data, self.config.data, batch_size=self.config.trainer.batch_size)
        batches = ((batch.images, batch.labels) for batch in loader if len(batch.images))
        if len(data) * 3 * self.config.data.image_size**2 > CACHE_LIMIT:
            return batches
        return self._cache.setdefault(name, list(batches))

    def state_dict(self) -> dict[str, Any]:
        """The best accuracy so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing with the best accuracy so far."""
        self.best = state["best"]


def split(data: ImageData, bank_size: int, query_size: int, seed: int) -> tuple[Subset, Subset]:
    """Disjoint bank and queries, balanced over classes; a small data set gives a fifth to the queries.

    The queries come first, so that a larger bank leaves them as they are.
    """
    order = spread_over_classes(data.labels, seed)
    query_size = max(1, min(query_size, len(order) // 5))
    return Subset(data, order[query_size : query_size + bank_size]), Subset(data, order[:query_size])
