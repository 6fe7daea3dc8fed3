"""What a command evaluates: weights, the images they belong to, and where results go."""

import dataclasses
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from heatssl.backbones import create_backbone
from heatssl.config import DataConfig, EvaluationConfig
from heatssl.config_file import load_config
from heatssl.data import ImageData, Split, open_split
from heatssl.errors import UserError
from heatssl.evaluation.features import extract_features, extract_maps
from heatssl.export import BackboneInfo, is_run, load_backbone, run_folder

MAX_CACHED = 8  # splits whose features stay in memory: two weights, train and val, twice


@dataclass(frozen=True)
class Source:
    """Everything that the settings shared by all evaluations stand for."""

    name: str  # as the user wrote it
    backbone: nn.Module
    info: BackboneInfo
    data: DataConfig  # of the size and normalisation that the backbone was trained with
    device: torch.device
    output: Path

    @property
    def kind(self) -> str:
        """Which weights of the run: last or best; or where else they come from."""
        if not is_run(self.name):
            return self.name
        return "last" if run_folder(self.name) == Path(self.name) else "best"

    @property
    def split(self) -> str:
        """What stands in the place of val: val itself, or the held-out share of train."""
        return "held-out" if self.data.held_out else "val"

    def twin(self, seed: int) -> nn.Module:
        """The same architecture with random weights; torch's global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_backbone(self.info.name, self.info.image_size, **self.info.arguments).eval()


def open_source(config: EvaluationConfig, needs_data: bool = True) -> Source:
    """Load the weights and find the images, before anything costs time.

    Args:
        config: which weights and images.
        needs_data: False: the images come from elsewhere. Weights outside a run then need neither data nor output:
            results go to ``runs/NAME``.

    Raises:
        UserError: when the weights cannot be loaded, or a source outside a run leaves data or output open.
    """
    backbone, info = load_backbone(config.run)
    folder = run_folder(config.run) if is_run(config.run) else None
    data = config.data
    if data is None and folder is None and not needs_data:
        data = DataConfig()
    if data is None:
        if folder is None:
            raise UserError(f"{config.run} has no images of its own: choose some with data=folder data.root=PATH")
        data = load_config(folder / "config.yaml").data
    # A backbone takes only what it was trained on; the data's own values belong to other weights.
    data = dataclasses.replace(
        data,
        image_size=info.image_size,
        mean=info.mean or data.mean,
        std=info.std or data.std,
        workers=config.workers,
    )
    output = Path(config.output) if config.output else folder
    if output is None and not needs_data:
        output = Path("runs") / info.name.replace("/", "_").replace(":", "_")
    if output is None:
        raise UserError(f"{config.run} has no folder for results: give one with output=FOLDER")
    return Source(config.run, backbone, info, data, choose_device(config.accelerator), output)


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
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if present[name]))
    if accelerator == "gpu":
        accelerator = "mps" if present["mps"] else "cuda"
    if accelerator not in present:
        raise UserError(f"unknown accelerator {accelerator!r}: use auto, cpu, gpu, cuda or mps")
    if not present[accelerator]:
        raise UserError(
            f"accelerator={accelerator}, but torch finds none: use accelerator=cpu, or install torch for it"
        )
    return torch.device(accelerator)


def fingerprint(backbone: nn.Module) -> str:
    """Hash of all weights and buffers: equal for equal backbones, wherever they come from."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_features: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()


def cached_features(
    backbone: nn.Module, split: Split, source: Source, batch_size: int
) -> tuple[ImageData, Tensor, Tensor]:
    """A split, its features (N, C) and labels (N,), extracted once per process.

    The key holds all that the features depend on: the weights' own hash, the data settings, and the names,
    labels and last change of the files.
    """
    data = open_split(source.data, split)
    root = Path(source.data.root) if source.data.root else None
    settings = dataclasses.replace(source.data, workers=0)
    images = hashlib.sha256("\n".join(f"{data.name(i)} {label}" for i, label in enumerate(data.labels)).encode())
    changed = root.stat().st_mtime_ns if root else 0
    key = (fingerprint(backbone), split, repr(settings), images.hexdigest(), changed)
    if key not in _features:
        _features[key] = extract_features(backbone, data, source.data, batch_size=batch_size, device=source.device)
        while len(_features) > MAX_CACHED:
            _features.popitem(last=False)
    return data, *_features[key]


def split_maps(backbone: nn.Module, split: Split, source: Source, batch_size: int) -> tuple[ImageData, Tensor, Tensor]:
    """A split, its feature maps (N, C, h, w) and labels (N,); not kept: large, and needed once by a command.

    Raises:
        UserError: when they would not fit into memory, see :func:`heatssl.evaluation.features.extract_maps`.
    """
    data = open_split(source.data, split)
    return data, *extract_maps(backbone, data, source.data, batch_size=batch_size, device=source.device)
