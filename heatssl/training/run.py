"""``heatssl pretrain``: check, build, fit, write."""

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import lightning as L
import safetensors.torch
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import rank_zero_only

from heatssl import objectives
from heatssl.config import PretrainConfig
from heatssl.data import ImageData, open_split, train_loader
from heatssl.errors import UserError, permission_errors
from heatssl.expected import Expected, expected_of
from heatssl.export import save_backbone
from heatssl.files import write_atomically
from heatssl.training.checkpoint import (
    AtomicCheckpointIO,
    Checkpoints,
    ResumePoint,
    backbone_info,
    find_resume_point,
    known_images,
    remove_half_written,
)
from heatssl.training.checks import (
    check_batch,
    check_folder,
    check_objective,
    check_settings,
    check_space,
    claim_folder,
)
from heatssl.training.compiling import compile_parts, eager
from heatssl.training.health import Health
from heatssl.training.metrics import Clock, Metrics, read
from heatssl.training.module import PretrainModule, freeze_unused
from heatssl.training.online_knn import OnlineKnn
from heatssl.training.pictures import write_pictures
from heatssl.training.progress import Progress, duration
from heatssl.training.stop import StopRequest
from heatssl.training.stopwatch import TimedLoader

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"32": "32-true", "bf16": "bf16-mixed"}
FINAL_FILES = ("objective.safetensors", "pictures.npz")


@permission_errors()
def pretrain(config: PretrainConfig) -> Path:
    """Pretrain a backbone, or go on where the output folder's run stopped.

    The run folder then holds config.yaml, metrics.jsonl, metrics.csv, checkpoints/, backbone.safetensors,
    best_backbone.safetensors (when online kNN is on), objective.safetensors and pictures.npz. A finished run
    is left as it is.

    Returns:
        the run folder, ``config.output``.

    Raises:
        UserError: on input that cannot work, wherever possible before the first step.
        SystemExit: with 128 + signal, when stopped by Ctrl-C or SIGTERM after writing a checkpoint.
    """
    config = with_launched_devices(config)
    folder = Path(config.output)
    check_settings(config)
    train, val = open_split(config.data, "train"), open_split(config.data, "val")
    module = build_module(config)
    module.images = known_images(train)
    check_batch(config, module.objective)
    check_objective(config, module.objective)
    is_first = is_first_process()
    if is_first:
        check_folder(config)
    resume = find_resume_point(folder, config, module)
    if resume is not None and resume.step >= config.trainer.steps:
        if all((folder / name).exists() for name in FINAL_FILES):
            _say(is_first, f"{folder} is finished: {config.trainer.steps} steps of this very run are done")
            return folder
        checkpoint = torch.load(resume.path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
        module.bad_files.check()
        if is_first:
            claim_folder(config)
    else:
        if is_first:
            trainer = config.trainer
            # Weights alone are a third of a checkpoint.
            kept = (trainer.steps // trainer.keep_every + 1) / 3 if trainer.keep_every else 0
            files = (3 if resume is None else 1) + kept
            check_space(folder, sum(p.numel() for p in module.parameters()), files)
        fit(config, train, module, resume)
    if is_first:
        finish(config, module, val)
        print(_closing(folder), flush=True)
    return folder


def with_launched_devices(config: PretrainConfig) -> PretrainConfig:
    """The same settings with the number of processes that torchrun has started, where it has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return config
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    return replace(config, trainer=replace(config.trainer, devices=devices, nodes=nodes))


def is_first_process() -> bool:
    """Read from the environment: there may be no process group yet."""
    return getattr(rank_zero_only, "rank", 0) == 0


def build_module(config: PretrainConfig) -> PretrainModule:
    """Backbone, objective and optimiser, with weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return PretrainModule(objectives.build(config), config)


def fit(config: PretrainConfig, train: ImageData, module: PretrainModule, resume: ResumePoint | None) -> None:
    """Run the steps that are left. The folder is written to only when all that may refuse the run is behind.

    Raises:
        UserError: when Lightning cannot have the devices that were asked for, or the folder cannot be written.
        SystemExit: when stopped by a signal.
    """
    settings = config.trainer
    start_step = resume.step if resume else 0
    # Only made once Lightning iterates over it: by then every process knows its rank.
    loader = TimedLoader(
        lambda: train_loader(
            train,
            config.data,
            batch_size=settings.batch_size,
            seed=config.seed,
            crops=module.objective.crops,
            start_step=start_step,
            rank=module.global_rank,
            world=module.trainer.world_size,
        )
    )
    metrics = Metrics(
        Path(config.output),
        loader,
        batch_size=settings.batch_size,
        train_size=len(train),
        every=settings.log_every,
        tensorboard=settings.tensorboard,
    )
    knn = OnlineKnn(train, config, metrics) if settings.knn_every and len(train.classes) > 1 else None
    stop = StopRequest()
    saving = Checkpoints(config, metrics, knn, stop)
    expected = expected_of(config)
    # In this order they note, write, show and save.
    callbacks = [Clock(loader), Health(metrics), knn, metrics, Progress(metrics, expected), saving]
    with quiet_lightning():
        trainer = create_trainer(config, [callback for callback in callbacks if callback is not None])
        if trainer.world_size > 1:
            freeze_unused(module.objective, config.data.image_size)
        if settings.compile:  # after that pass, which runs elsewhere and in another shape
            compile_parts(module.objective.backbone)
        if is_first_process():
            claim_folder(config)
            remove_half_written(Path(config.output))
            print(_opening(config, train, module, resume), flush=True)
            if config.expected is not None:
                print(_expectation(config, expected), flush=True)
        trainer.fit(module, loader, ckpt_path=str(resume.path) if resume else None)
    if trainer.global_step < settings.steps:
        number = stop.signal or signal.SIGTERM
        text = f"stopped at step {trainer.global_step}, which is saved: run the same command again to go on"
        _say(trainer.is_global_zero, text)
        raise SystemExit(128 + number)


def create_trainer(config: PretrainConfig, callbacks: list[L.Callback]) -> L.Trainer:
    """A Trainer that only trains: no logger, no validation loop, no files of its own."""
    settings = config.trainer
    try:
        return L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy="ddp" if settings.devices * settings.nodes > 1 else "auto",
            precision=PRECISIONS[settings.precision],
            max_steps=settings.steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=config.output,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
        )
    except MisconfigurationException as error:
        reason = str(error).strip().split("\n", 1)[0]
        wanted = f"trainer.accelerator={settings.accelerator} trainer.devices={settings.devices}"
        raise UserError(
            f"{wanted} is not to be had here ({reason}): try trainer.accelerator=auto trainer.devices=1"
        ) from error


def finish(config: PretrainConfig, module: PretrainModule, val: ImageData) -> None:
    """Write what stands in a run folder only when the run is done."""
    folder = Path(config.output)
    objective = module.objective.cpu()
    save_backbone(folder, objective.backbone, backbone_info(config, config.trainer.steps))
    weights = safetensors.torch.save({key: value.contiguous() for key, value in objective.state_dict().items()})
    write_atomically(folder / "objective.safetensors", lambda file: file.write(weights))
    with eager():
        write_pictures(folder / "pictures.npz", objective, val, config.data)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the banners, tips and warnings that mean nothing to someone who never sees Lightning."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _expectation(config: PretrainConfig, expected: Expected | None) -> str:
    if expected is None:
        return f"these settings are not those of the recorded runs of {config.expected}: no bands to compare with"
    return f"in brackets: what {expected.runs} recorded runs of {config.expected} lead one to expect at that step"


def _opening(config: PretrainConfig, train: ImageData, module: PretrainModule, resume: ResumePoint | None) -> str:
    settings, decay = config.trainer, module.decay
    start = f"goes on at step {resume.step}" if resume else "starts"
    classes = f"of {len(train.classes)} classes" if len(train.classes) > 1 else "of one class (no online kNN)"
    return (
        f"{config.output} {start}: {config.objective.get('name')} on {config.backbone}, "
        f"{len(train)} images {classes} at {config.data.image_size} px, "
        f"{settings.steps} steps of {settings.batch_size * settings.devices * settings.nodes}\n"
        f"{(decay.decayed + decay.free) / 1e6:.2f} M parameters: "
        f"weight decay {config.optimizer.weight_decay:g} on {decay.decayed}, none on {decay.free}"
    )


def _closing(folder: Path) -> str:
    records = read(folder / "metrics.jsonl")
    if not records:
        return f"{folder} is finished; its metrics.jsonl is gone"
    last = records[-1]
    accuracies = [line["knn/accuracy"] for line in records if "knn/accuracy" in line and line["step"] > 0]
    best = f", best kNN {max(accuracies):.1%}" if accuracies else ""
    return f"{folder}: {last['step']} steps in {duration(last['seconds'])}, loss {last['train/loss']:.4f}{best}"


def _say(aloud: bool, text: str) -> None:
    if aloud:
        print(text, flush=True)
