"""Is the run healthy? Averages of what the objective logs, its collapse figures, and a guard against NaN."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from heatssl.errors import UserError
from heatssl.files import write_atomically
from heatssl.training.metrics import Metrics
from heatssl.training.schedule import learning_rate

if TYPE_CHECKING:
    from heatssl.training.module import PretrainModule


class Health(L.Callback):
    """Averages loss and logs over the steps between two lines of metrics, and over processes.

    The running sums travel in the checkpoint: a resumed run writes the lines that an uninterrupted one would.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: "PretrainModule", *_: Any) -> None:  # type: ignore[override]
        """Add one step; at a line of metrics, note the averages and ask the objective how it feels."""
        outputs = module.outputs
        logs = {"train/loss": outputs.loss, "train/gradient_norm": module.gradient_norm, **outputs.logs}
        for key, value in logs.items():
            before = self.sums.get(key, torch.zeros(()))
            self.sums[key] = before.to(value.device) + value.detach().float()
        self.count += 1
        if not self.metrics.is_due(trainer):
            return
        # One collective for all of them: every process must take part.
        means = trainer.strategy.reduce(torch.stack(list(self.sums.values())) / self.count, reduce_op="mean")
        self.metrics.note(dict(zip(self.sums, means.tolist(), strict=True)))
        self.sums, self.count = {}, 0
        config = module.config
        rate = learning_rate(trainer.global_step - 1, config.trainer.steps, config.optimizer)
        self.metrics.note({"train/lr": rate})
        if trainer.is_global_zero:
            self.metrics.note(module.objective.health(outputs))

    def on_save_checkpoint(self, _: L.Trainer, module: "PretrainModule", checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """The running sums, those of each process."""
        state = {"sums": {key: value.item() for key, value in self.sums.items()}, "count": self.count}
        checkpoint["health"] = module.of_every_process(state)

    def on_load_checkpoint(self, _: L.Trainer, module: "PretrainModule", checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Continue the running sums."""
        if "health" in checkpoint:  # absent from older checkpoints
            state = checkpoint["health"][module.global_rank]
            self.sums = {key: torch.tensor(value) for key, value in state["sums"].items()}
            self.count = state["count"]


def check_finite(module: "PretrainModule") -> None:
    """Stop before a non-finite number reaches the weights, and keep all that made it.

    Raises:
        UserError: when loss or gradient norm is not finite. ``nan_dump/step_N.pt`` of the run folder then
            holds the batch, the logs and the weights (a plain dict for ``torch.load``).
    """
    loss, norm = torch.stack([module.outputs.loss.detach().float(), module.gradient_norm.float()]).tolist()
    if abs(loss) < float("inf") and abs(norm) < float("inf"):
        return
    step = module.global_step
    rank = f"_rank{module.global_rank}" if module.global_rank else ""
    path = Path(module.config.output) / "nan_dump" / f"step_{step}{rank}.pt"
    dump = {
        "step": step,
        "images": module.batch.images.cpu(),
        "labels": module.batch.labels.cpu(),
        "indices": module.batch.indices.cpu(),
        "loss": loss,
        "gradient_norm": norm,
        "logs": {key: value.item() for key, value in module.outputs.logs.items()},
        "objective": {key: value.cpu() for key, value in module.objective.state_dict().items()},
        "config": asdict(module.config),
    }
    write_atomically(path, lambda file: torch.save(dump, file))
    what = f"the loss became {loss}" if not abs(loss) < float("inf") else f"the gradient became {norm}"
    raise UserError(
        f"{what} at step {step}: batch, logs and weights are in {path}; "
        f"try optimizer.learning_rate={module.config.optimizer.learning_rate / 3:.1e}"
        + ("" if module.config.trainer.precision == "32" else " or trainer.precision=32")
        + " with another output=FOLDER"
    )
