"""Checkpoints that are whole or absent: the last one to go on from, and the best one by online kNN."""

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from heatssl.backbones.create import without_starting_weights
from heatssl.config import PretrainConfig
from heatssl.data import ImageData
from heatssl.errors import UserError
from heatssl.export import BackboneInfo, first_mismatch, keep_backbone, save_backbone
from heatssl.files import is_half_written, write_atomically
from heatssl.training.metrics import Metrics
from heatssl.training.online_knn import OnlineKnn
from heatssl.training.stop import StopRequest

if TYPE_CHECKING:
    from heatssl.training.module import PretrainModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside the old one and moved over it."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ARG002
    ) -> None:
        """Write one checkpoint.

        Raises:
            UserError: when the disk is full; the older file is intact then.
        """
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class Checkpoints(L.Callback):
    """Last of all callbacks, so that what the others noted is saved.

    Writes ``last`` every so many steps, at the end and when asked to stop; ``best`` by online kNN; and, where they are
    to stay, the backbones of the start and of every so many steps, see :func:`heatssl.export.kept_backbones`.
    """

    def __init__(self, config: PretrainConfig, metrics: Metrics, knn: OnlineKnn | None, stop: StopRequest) -> None:
        self.folder = Path(config.output)
        self.config = config
        self.metrics = metrics
        self.knn = knn
        self.stop = stop

    def on_train_start(self, trainer: L.Trainer, module: "PretrainModule") -> None:  # type: ignore[override]
        """Listen to signals only now: Lightning sets handlers of its own when it starts."""
        self.stop.listen()
        if trainer.global_step == 0:
            self._keep(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: "PretrainModule", *_: Any) -> None:  # type: ignore[override]
        """Save what is due after this step."""
        step = trainer.global_step
        stopping = self.stop.agreed(trainer)
        self._keep(trainer, module)
        # ``last`` comes last: it knows the best accuracy, and a run that goes on from it never meets this step again.
        if self.knn is not None and self.knn.improved:
            self._save(trainer, module, "best")
        if stopping or step % self.config.trainer.checkpoint_every == 0 or step == trainer.max_steps:
            self._save(trainer, module, "last")
        if stopping:
            trainer.should_stop = True

    def on_train_end(self, *_: Any) -> None:
        """Signals mean what they meant before."""
        self.stop.restore()

    def on_exception(self, *_: Any) -> None:
        """Signals mean what they meant before."""
        self.stop.restore()

    def _keep(self, trainer: L.Trainer, module: "PretrainModule") -> None:
        """The backbone alone, where one is due: no objective and no optimiser, which going on would take."""
        every, step = self.config.trainer.keep_every, trainer.global_step
        if every and step % every == 0 and trainer.is_global_zero:
            keep_backbone(self.folder, module.objective.backbone, backbone_info(self.config, step))

    def _save(self, trainer: L.Trainer, module: "PretrainModule", name: str) -> None:
        """The checkpoint after all that belongs to it: a kill in between only makes this step be trained again."""
        if trainer.is_global_zero:
            info = backbone_info(self.config, trainer.global_step)
            save_backbone(self.folder, module.objective.backbone, info, prefix="best_" if name == "best" else "")
            self.metrics.write_csv()
        trainer.save_checkpoint(checkpoint_path(self.folder, name))


class ResumePoint(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    step: int


def checkpoint_path(folder: Path, name: str = "last") -> Path:
    """Where a run keeps a checkpoint."""
    return folder / "checkpoints" / f"{name}.ckpt"


def backbone_info(config: PretrainConfig, step: int) -> BackboneInfo:
    """What backbone.json says of a run's weights."""
    data = config.data
    arguments = without_starting_weights(config.backbone_arguments)
    return BackboneInfo(config.backbone, data.image_size, arguments, list(data.mean), list(data.std), step)


def known_images(data: ImageData) -> str:
    """How many images there are, and a hash of their labels: another text when some were added or taken out.

    :func:`heatssl.data.digest` would ask for the state of every file.
    """
    labels = np.asarray(data.labels, dtype=np.int64)
    return f"{len(labels)} images ({hashlib.sha256(labels.tobytes()).hexdigest()[:8]})"


def find_resume_point(folder: Path, config: PretrainConfig, module: "PretrainModule") -> ResumePoint | None:
    """The last checkpoint of a run folder, or None.

    Raises:
        UserError: when the file is damaged, or was written by another architecture or, unless it is of the last step,
            for other images (both are named).
    """
    path = checkpoint_path(folder)
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        made_by, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        point = ResumePoint(path, checkpoint["global_step"])
    except PermissionError:
        raise  # whole, for all we know: it must not be deleted
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged: delete it to train from the start") from error
    mismatch = first_mismatch(weights, module.state_dict())
    if mismatch:
        size, arguments = made_by["data"]["image_size"], made_by["backbone_arguments"]
        there = BackboneInfo(made_by["backbone"], size, arguments).describe()
        here = backbone_info(config, 0).describe()
        raise UserError(
            f"{path} was made by {there} with objective {made_by['objective'].get('name')}, "
            f"this run asks for {here} with objective {config.objective.get('name')} ({mismatch}): "
            "choose another output=FOLDER"
        )
    images = checkpoint.get("images")  # absent from older checkpoints
    if point.step < config.trainer.steps and images and module.images and images != module.images:
        raise UserError(
            f"{path} was made of {images}, and there are {module.images}: it cannot go on with the same losses; "
            "put them back, or choose another output=FOLDER"
        )
    return point


def remove_half_written(folder: Path) -> None:
    """Clear away what a kill in the middle of a write has left."""
    for path in [*folder.glob("*.tmp"), *folder.glob("checkpoints/*.tmp")]:
        if is_half_written(path):
            path.unlink(missing_ok=True)
