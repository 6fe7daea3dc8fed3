"""What a command evaluates: weights, the images they belong to, and where results go."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heatssl.backbones import arguments_as_trained, create_backbone, set_input_size
from heatssl.config import DataConfig, EvaluationConfig, FinetuneConfig, SegmentConfig
from heatssl.config_file import load_config
from heatssl.data import ImageData, MaskedData, Split, digest, open_masked, open_split
from heatssl.errors import UserError, check_choice
from heatssl.evaluation import processes
from heatssl.evaluation.checkpoint import Checkpoint, Stateful
from heatssl.evaluation.checks import check_classes
from heatssl.export import BackboneInfo, is_run, load_backbone, run_folder

LONGEST_MARK = 80  # letters of a source outside a run that go into the name of a file
# Settings that leave a number as it is, or that a key names in a better way.
KEEPS_NUMBER = frozenset({"run", "data", "image_size", "workers", "accelerator", "output", "cache", "random_init"})
# Settings that came later: as they are by default, a number has the key that it had before.
LATER: tuple[tuple[str, Any], ...] = (("layers", []), ("pooling", ["mean"]), ("pooling", "mean"))


@dataclass(frozen=True)
class Source:
    """Everything that the settings shared by all evaluations stand for."""

    name: str  # as the user wrote it
    backbone: nn.Module
    info: BackboneInfo
    data: DataConfig  # of the normalisation that the backbone was trained with, and of the size unless told otherwise
    device: torch.device
    output: Path
    cache: bool = True  # whether features are kept on disk
    checkpoints: list[Checkpoint] = field(default_factory=list)  # of what was trained for results yet to be kept
    resized: bool = False  # whether images are of another size than in training

    @cached_property
    def splits(self) -> dict[Split, ImageData]:
        """Train and val, or the held-out share in its place, opened once; both have images of the same classes."""
        if self.data.name == "images":
            raise UserError("data=images has no classes to measure by: name labelled ones, data=folder data.root=PATH")
        found: dict[Split, ImageData] = {split: open_split(self.data, split) for split in ("train", "val")}
        check_classes(found["train"], found["val"], self.split)
        return found

    @cached_property
    def digests(self) -> dict[Split, str]:
        """What changes when an image of a split does, see :func:`heatssl.data.digest`."""
        return {split: digest(data) for split, data in self.splits.items()}

    def digest_now(self, split: Split) -> str:
        """The same, looked at again."""
        return digest(open_split(self.data, split))

    @cached_property
    def masked_splits(self) -> dict[Split, MaskedData]:
        """Images with masks, opened once."""
        return {split: open_masked(self.data, split) for split in ("train", "val")}

    @cached_property
    def masked_digests(self) -> dict[Split, str]:
        """What changes when an image of a split does, or its mask."""
        return {split: digest(data) for split, data in self.masked_splits.items()}

    def digests_for(self, config: EvaluationConfig) -> dict[Split, str]:
        """Of the images that a command looks at: those with masks for segmentation, else those with classes."""
        return self.masked_digests if isinstance(config, SegmentConfig) else self.digests

    def key(
        self, metric: str, config: EvaluationConfig, images: Mapping[Split, str] | None = None, weights: str = ""
    ) -> str:
        """Digest of all that a number depends on but code and hardware: weights, images, protocol and seed.

        Args:
            metric: its name.
            config: settings of the protocol.
            images: a digest of each split; None: :meth:`digests_for` the settings.
            weights: ``random_init`` for the random twin, which architecture and seed determine; else the weights.
        """
        given = {name: value for name, value in asdict(config).items() if name not in KEEPS_NUMBER}
        settings = {name: value for name, value in given.items() if (name, value) not in LATER}
        shown = [self.data.image_size, self.data.mean, self.data.std]
        if isinstance(config, FinetuneConfig):  # the only one that flips images as the data have it
            shown.append(self.data.flip)
        is_twin = bool(weights) and weights != self.weights
        measured = digest_of(weights, self.info.describe()) if is_twin else self._weights_digest
        return digest_of(metric, settings, measured, images or self.digests_for(config), shown)

    @cached_property
    def _weights_digest(self) -> str:
        return digest_of(fingerprint(self.backbone), self.info.describe())

    @property
    def weights(self) -> str:
        """What results call them: ``pretrained``, or ``random_init`` where nothing was loaded."""
        return "random_init" if self.name.endswith("?random") else "pretrained"

    @property
    def kind(self) -> str:
        """Which weights of the run: last or best; or where else they come from."""
        if not is_run(self.name):
            return self.name
        return "last" if run_folder(self.name) == Path(self.name) else "best"

    @property
    def origin(self) -> str:
        """The same for results: the whole name where they do not lie in the run's own folder, but among others."""
        return self.kind if is_run(self.name) and run_folder(self.name) == self.output else self.name

    @property
    def place(self) -> torch.device:
        """Where features are classified: MPS has no float64, which the sums of probes need; the processor has."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    @property
    def root(self) -> str | None:
        """Whole path of the images; None where they are generated."""
        return str(Path(self.data.root).expanduser().resolve()) if self.data.root else None

    @property
    def split(self) -> str:
        """What stands in the place of val: val itself, or the held-out share of train."""
        return "held-out" if self.data.held_out else "val"

    @property
    def size(self) -> str:
        """Of the images, ``128 px``, where it is another than in training; else ""."""
        return f"{self.info.image_size} px" if self.resized else ""

    @property
    def mark(self) -> str:
        """Start of the names of files that belong to these weights alone.

        "" for the last of the run whose folder they lie in, ``best_`` for its best; made of the name for all others.
        Then the size of the images, ``128px_``, where that is another than in training.
        """
        size = self.size.replace(" ", "") + "_" if self.size else ""
        if self.origin == "last":
            return size
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.origin)[-LONGEST_MARK:].strip("_.") + "_" + size

    @property
    def probe_file(self) -> Path:
        """Where the linear probe of these weights is kept."""
        return self.output / f"{self.mark}probe.safetensors"

    def checkpoint(self, name: str, weights: str, key: str, parts: Mapping[str, Stateful]) -> Checkpoint:
        """Where a training keeps its state, until :func:`heatssl.evaluation.measure.finish` has kept the results.

        Not until it is over alone: results are kept together, and the twin may train for as long again.

        Args:
            name: of the training.
            weights: ``pretrained`` or ``random_init``.
            key: see :meth:`key`.
            parts: what changes in training.
        """
        made = Checkpoint(self.output / f"{self.mark}{name}_{weights}.ckpt", key, parts)
        self.checkpoints.append(made)
        return made

    def twin(self, seed: int) -> nn.Module:
        """The same architecture with random weights; torch's global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classes = getattr(self.backbone, "num_classes", 0)  # those of a classifier that is explained
            return create_backbone(self.info.name, self.info.image_size, classes=classes, **self.arguments).eval()

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a backbone that is made for the size of the images and computes what this one does."""
        return self.info.arguments | (arguments_as_trained(self.backbone) if self.resized else {})


def open_source(
    config: EvaluationConfig, *, cache: bool = False, several: bool = False, needs_data: bool = True
) -> Source:
    """Load the weights and find the images, before anything costs time.

    Args:
        config: settings.
        cache: whether features are kept on disk.
        several: whether the command can share its work among the processes that torchrun has started.
        needs_data: False: the images come from elsewhere. Weights outside a run then need neither data nor output:
            results go to ``runs/NAME``.

    Raises:
        UserError: on settings out of their range, when the weights cannot be loaded, a source outside a run leaves data
            or output open, or there are several processes for a command of one.
    """
    for name, least in {"seed": 0, "batch_size": 1, "workers": 0}.items():
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)} is too small: give {least} or more")
    if processes.launched() > 1 and not several:
        raise UserError(
            "this runs in one process: start it without torchrun, which knn, probe, finetune and evaluate can share"
        )
    processes.join()
    # By the seed: each process of torchrun builds its own, and the next command looks for the features of this one.
    backbone, info = load_backbone(config.run, seed=config.seed)
    trained_size = info.image_size
    info = fit_images(backbone, info, config.image_size)
    folder = run_folder(config.run) if is_run(config.run) else None
    data = config.data
    if data is None and folder is None and not needs_data:
        data = DataConfig()
    if data is None:
        if folder is None:
            raise UserError(f"{config.run} has no images of its own: choose some with data=folder data.root=PATH")
        data = load_config(folder / "config.yaml").data
    data = dataclasses.replace(shown_to(info, data), workers=config.workers)
    output = Path(config.output) if config.output else folder
    if output is None and not needs_data:
        output = Path("runs") / info.name.replace("/", "_").replace(":", "_")
    if output is None:
        raise UserError(f"{config.run} has no folder for results: give one with output=FOLDER")
    device, resized = choose_device(config.accelerator), info.image_size != trained_size
    return Source(config.run, backbone, info, data, device, output, cache, resized=resized)


def fit_images(backbone: nn.Module, info: BackboneInfo, image_size: int | None) -> BackboneInfo:
    """Let a backbone see images of a size, None: of its own; what is known of it then.

    Raises:
        UserError: as of :func:`heatssl.backbones.set_input_size`.
    """
    if image_size in (None, info.image_size):
        return info
    set_input_size(backbone, image_size)
    return dataclasses.replace(info, image_size=image_size)


def shown_to(info: BackboneInfo, data: DataConfig) -> DataConfig:
    """The same images as a backbone takes them: as in its training; the data's own values belong to other weights."""
    return dataclasses.replace(data, image_size=info.image_size, mean=info.mean or data.mean, std=info.std or data.std)


def choose_device(accelerator: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        UserError: on an unknown accelerator, or one that this machine lacks.
    """
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if accelerator == "auto":
        accelerator = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if accelerator == "gpu":
        accelerator = "mps" if present["mps"] else "cuda"
    check_choice("accelerator", accelerator, ("auto", "gpu", *present), UserError)
    if not present[accelerator]:
        raise UserError(
            f"accelerator={accelerator}, but torch finds none: use accelerator=cpu, or install torch for it"
        )
    if accelerator == "cuda" and processes.launched() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator)


def fingerprint(backbone: nn.Module) -> str:
    """Hash of all weights and buffers: equal for equal backbones, wherever they come from."""
    found = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def short_digest(images: Mapping[Split, str]) -> str:
    """One name for the images of all splits: results that share it were measured on the same ones."""
    return digest_of(sorted(images.items()))[:12]


def digest_of(*parts: object) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
