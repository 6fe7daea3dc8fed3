"""What can be known to be wrong before the first step."""

import contextlib
import math
import shutil
from pathlib import Path

import torch

from heatssl.config import PretrainConfig
from heatssl.config_file import differences, load_config, save_config
from heatssl.data.crop import check_crop_scale
from heatssl.errors import UserError, check_choice, did_you_mean
from heatssl.expected import recorded_recipes
from heatssl.files import disk_errors
from heatssl.objectives import Objective
from heatssl.ops.compiled import compiler
from heatssl.training.checkpoint import checkpoint_path

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SHOWN_DIFFERENCES = 3
SEEDS = 2**63  # what torch and numpy both take


def check_settings(config: PretrainConfig) -> None:
    """Refuse values that no run can have.

    Raises:
        UserError: on the first such value.
    """
    trainer, optimizer = config.trainer, config.optimizer
    for name, value, least in (
        ("trainer.steps", trainer.steps, 1),
        ("trainer.batch_size", trainer.batch_size, 1),
        ("trainer.devices", trainer.devices, 1),
        ("trainer.nodes", trainer.nodes, 1),
        ("trainer.log_every", trainer.log_every, 1),
        ("trainer.checkpoint_every", trainer.checkpoint_every, 1),
        ("trainer.keep_every", trainer.keep_every, 0),
        ("trainer.knn_every", trainer.knn_every, 0),
        ("trainer.knn_train_size", trainer.knn_train_size, 1),
        ("trainer.knn_val_size", trainer.knn_val_size, 1),
        ("trainer.gradient_clip", trainer.gradient_clip, 0),
        ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ("optimizer.fade_in_steps", optimizer.fade_in_steps, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("optimizer.final_learning_rate", optimizer.final_learning_rate, 0),
        ("data.workers", config.data.workers, 0),
    ):
        if not least <= value < math.inf:  # a comparison with nan is false
            raise UserError(f"{name}={value} must be {least} or more")
    if not 0 < optimizer.learning_rate < math.inf:
        raise UserError(f"optimizer.learning_rate={optimizer.learning_rate} must be above 0")
    if optimizer.final_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate} is above the peak, "
            f"optimizer.learning_rate={optimizer.learning_rate}: choose a lower one"
        )
    for name, share in (
        ("data.colour_jitter", config.data.colour_jitter),
        ("data.grey", config.data.grey),
        ("data.bad_fraction", config.data.bad_fraction),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share} must be between 0 and 1")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas={optimizer.betas} must each be 0 or more and below 1, such as [0.9,0.95]")
    if not 0 <= config.seed < SEEDS:
        raise UserError(f"seed={config.seed} must be 0 or more and below 2^63: choose a small number")
    for name, choice, choices in (
        ("trainer.precision", trainer.precision, ("32", "bf16")),
        ("trainer.accelerator", trainer.accelerator, ACCELERATORS),
        ("resume", config.resume, ("auto", "never")),
    ):
        check_choice(name, choice, choices, UserError)
    known = recorded_recipes()
    if config.expected is not None and config.expected not in known:
        hint = did_you_mean(config.expected, known) or f": choose one of {', '.join(known)}, or null"
        raise UserError(f"no recorded runs of expected={config.expected}{hint}")
    check_crop_scale(config.data.crop_scale)


def check_batch(config: PretrainConfig, objective: Objective) -> None:
    """Refuse steps of so few images that an objective has nothing to learn from them.

    Raises:
        UserError: when there are fewer than ``objective.least_images`` on all devices together.
    """
    trainer = config.trainer
    images = trainer.batch_size * trainer.devices * trainer.nodes
    if images < objective.least_images:
        raise UserError(
            f"trainer.batch_size={trainer.batch_size} leaves {config.objective.get('name')} nothing to tell an image "
            f"from: set trainer.batch_size={objective.least_images} or more"
        )


def check_objective(config: PretrainConfig, objective: Objective) -> None:
    """One forward pass of random images: a backbone that cannot do what is asked of it is refused before anything.

    Random numbers and statistics of norms stay as they were.

    Raises:
        UserError: with what the backbone said, and where it is to be compiled without a compiler.
    """
    if config.trainer.compile and compiler() is None:
        raise UserError("trainer.compile=true needs a C++ compiler: install g++ or clang++, or set it to false")
    size = config.data.image_size
    was_training = objective.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            objective.eval()(torch.randn(2 * objective.crops, 3, size, size))
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"objective={config.objective.get('name')} cannot run {config.backbone} at {size} px ({reason}): "
                "choose another backbone, or another data.image_size"
            ) from error
        finally:
            objective.train(was_training)


def check_folder(config: PretrainConfig) -> None:
    """Refuse an output folder that cannot take this run.

    Raises:
        UserError: when it holds another run (the first differences are named), when it holds any run and
            ``resume=never``, and when it is a file.
    """
    if not config.output:
        raise UserError("output= is empty, and would be this very folder: give output=FOLDER")
    folder = Path(config.output)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output={folder}: {there} is a file: choose another output=FOLDER")
    path = folder / "config.yaml"
    began = checkpoint_path(folder).exists() or (path.exists() and any(each != path for each in folder.iterdir()))
    if config.resume == "never" and began:
        raise UserError(f"{folder} holds a run: choose another output=FOLDER, or resume=auto to go on with it")
    if not path.exists() or not began:
        return  # what stopped before its first step holds nothing that could be lost
    changed = differences(load_config(path), config)
    if changed:
        more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
        raise UserError(
            f"{folder} holds a different run ({', '.join(changed[:SHOWN_DIFFERENCES])}{more}): "
            "choose another output=FOLDER"
        )


def claim_folder(config: PretrainConfig) -> None:
    """Create the output folder with its config.yaml, once nothing else can refuse the run.

    Raises:
        UserError: when it cannot be written; what was created on the way is gone then.
    """
    folder = Path(config.output)
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    with disk_errors(folder):
        try:
            save_config(config, folder / "config.yaml")
        except OSError:
            for path in created:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise


def check_space(folder: Path, parameters: int, files: float) -> None:
    """Refuse a disk on which ``files`` checkpoints of so many parameters do not fit.

    Raises:
        UserError: with the space that is needed and that there is.
    """
    needed = files * parameters * 3 * 4  # weights and two moments, four bytes each
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, the checkpoints need {needed / 2**20:.0f} MiB: "
            "free space or choose another output=FOLDER"
        )
