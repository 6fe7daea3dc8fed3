"""``heatssl finetune``: all weights trained on labels (MAE's recipe, arXiv 2111.06377, A.1).

AdamW with a learning rate that falls by ``layer_decay`` from layer to layer towards the input, mixup and cutmix, label
smoothing, drop path, an average of the weights over steps. Settings are fixed beforehand; val is met once, at the end.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.optim
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from heatssl.backbones import create_backbone, evaluation_mode, pooled_features
from heatssl.config import DataConfig, FinetuneConfig
from heatssl.data import BadFiles, ImageData, eval_loader, normalise
from heatssl.data.crop import check_crop_scale
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.accuracy import right_answers
from heatssl.evaluation.checkpoint import Stateful
from heatssl.evaluation.checks import check_numbers
from heatssl.evaluation.measure import Accuracy, backbones_of, begin, finish, result_of
from heatssl.evaluation.processes import is_first, parallel, rank_and_world, total
from heatssl.evaluation.results import Result
from heatssl.evaluation.source import Source
from heatssl.evaluation.supervised import Plan, train_on_labels
from heatssl.export import BackboneInfo
from heatssl.files import write_atomically
from heatssl.progress_bar import progress_bar


class Classifier(nn.Module):
    """Backbone, mean over positions, linear layer: normalised images (B, 3, S, S) -> logits (B, K)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        width: int = backbone.num_features  # type: ignore[assignment]
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: the first steps move the head alone
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pooled_features(self.backbone, images))


@permission_errors()
def run_finetune(config: FinetuneConfig) -> list[Result]:
    """Train on train, test on val once, print the table, add it to ``evaluation.json``.

    The classifier is kept as ``finetuned.safetensors``, its keys ``backbone.*`` (timm's) and ``head.*``; its backbone
    is a source as any other, ``run=RUN/finetuned.safetensors``. Files of weights that are not the run's last begin with
    their name, see :attr:`heatssl.evaluation.source.Source.mark`. After every epoch the state is written, and the same
    command goes on from there.

    Returns:
        The result of the weights, then, when asked for, that of the same architecture from scratch.

    Raises:
        UserError: on input that cannot work.
    """
    _check_settings(config)
    source = begin(config, several=True)
    # The colours that a run changed belong to its objective: a label may hang on them.
    data = dataclasses.replace(source.data, crop_scale=config.crop_scale, colour_jitter=0.0, grey=0.0)
    train, val = source.splits["train"], source.splits["val"]
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        torch.manual_seed(config.seed)  # of the head's first weights
        model = Classifier(_with_drop_path(backbone, source, config.drop_path), len(train.classes))
        classifier = fit(model, train, data, config, source, weights)
        results.append(_result(weights, accuracy(classifier, val, data, source.device), source, config, train, start))
        if len(results) == 1 and is_first():
            _save(
                source.output / f"{source.mark}finetuned.safetensors",
                classifier,
                train.classes,
                dataclasses.replace(source.info, arguments=source.arguments),
            )
    return finish(source, results)


def _check_settings(config: FinetuneConfig) -> None:
    if config.epochs < 1 or config.batch_size < 2 or config.batch_size % 2:
        raise UserError("epochs must be at least 1, and batch_size even: mixup mixes images in pairs")
    if not 0 < config.layer_decay <= 1 or not 0 <= config.ema < 1 or not 0 <= config.drop_path < 1:
        raise UserError("layer_decay must be in (0, 1], ema and drop_path in [0, 1)")
    if not 0 <= config.smoothing < 1:
        raise UserError("smoothing must be in [0, 1)")
    check_numbers(
        config,
        over_zero=["learning_rate"],
        not_negative=["weight_decay", "warmup_epochs", "mixup", "cutmix", "gradient_clip"],
    )
    check_crop_scale(config.crop_scale, "crop_scale")
    if config.precision not in ("32", "bf16"):
        raise UserError(f"unknown precision {config.precision!r}: use 32 or bf16")


def _with_drop_path(backbone: nn.Module, source: Source, rate: float) -> nn.Module:
    """The same weights in a model that leaves layers out at random, and that is made for the size of the images."""
    arguments = source.arguments
    if rate or "drop_path_rate" in arguments:
        arguments["drop_path_rate"] = rate  # whatever it was pretrained with
    elif not source.resized:
        return backbone
    try:
        model = create_backbone(source.info.name, source.info.image_size, **arguments)
    except UserError as error:
        raise UserError(f"{source.info.name} takes no drop path ({error}): set drop_path=0") from error
    model.load_state_dict(backbone.state_dict())
    return model


def fit(
    model: Classifier, train: ImageData, data: DataConfig, config: FinetuneConfig, source: Source, weights: str
) -> nn.Module:
    """Train on the source's device; the averaged weights, or the last where there is no average."""
    device = source.device
    shared = parallel(model.to(device).train())
    optimizer = timm_optimizer(model, config)
    average = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
    mixes = config.mixup > 0 or config.cutmix > 0
    mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.head.out_features)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        kept = len(images) // 2 * 2  # of unreadable files some batches are odd
        images, labels = images[:kept], labels[:kept]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            if not mixes:
                return F.cross_entropy(shared(images).float(), labels, label_smoothing=config.smoothing)
            images, soft = mix(images, labels)
            return -(soft * F.log_softmax(shared(images).float(), dim=1)).sum(dim=1).mean()

    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    if average is not None:
        parts["average"] = average.module
    train_on_labels(
        loss,
        optimizer,
        train,
        data,
        Plan(config.epochs, config.warmup_epochs, config.batch_size, config.seed, config.gradient_clip),
        source.checkpoint("finetune", weights, source.key("finetune", config), parts),
        device,
        name="finetune",
        after_step=None if average is None else lambda step: average.update(model, step=step),
    )
    trained: nn.Module = model if average is None else average.module
    return trained.eval()


def timm_optimizer(model: Classifier, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW; ``lr_scale`` of a group is the share of the learning rate that its layer gets, 1 for the head."""
    exempt: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    groups = timm.optim.param_groups_layer_decay(
        model.backbone, config.weight_decay, no_weight_decay_list=exempt, layer_decay=config.layer_decay
    )
    groups.append({"params": [model.head.weight], "weight_decay": config.weight_decay})
    groups.append({"params": [model.head.bias], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.999))


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageData, config: DataConfig, device: torch.device) -> tuple[float, int]:
    """Share of images, centre-cropped, that get their label, and how many could be read.

    Of several processes each sees its share of the images.

    Raises:
        UserError: when none can be read, or more than ``config.bad_fraction`` cannot.
    """
    rank, world = rank_and_world()
    loader = eval_loader(data, config, batch_size=256, rank=rank, world=world)
    counts = torch.zeros(2, dtype=torch.long)  # of right answers, and of images
    bad = BadFiles(config.bad_fraction)
    with evaluation_mode(model):
        for batch in progress_bar(loader, name="val", shown=is_first()):
            bad.update(batch)
            if len(batch.images):
                logits = model(normalise(batch.images.to(device), config))
                right = right_answers(logits.argmax(dim=1).cpu(), batch.labels)
                counts += torch.tensor([right, len(batch.labels)])
    bad.check()
    answered, images = total(counts).tolist()
    if not images:
        raise UserError(f"none of the {len(data)} images of val can be read: check data.root={config.root}")
    return answered / images, images


def _save(path: Path, model: nn.Module, classes: list[str], info: BackboneInfo) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {"classes": json.dumps(classes), "backbone": info.to_json()}
    content = safetensors.torch.save(tensors, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))


def _result(
    weights: str,
    found: tuple[float, int],
    source: Source,
    config: FinetuneConfig,
    train: ImageData,
    start: float,
) -> Result:
    share, images = found
    averaged = f"average of weights {config.ema:g}" if config.ema else "last weights"
    settings: dict[str, Any] = {
        "layer decay": config.layer_decay,
        "weight decay": config.weight_decay,
        "mixup": config.mixup,
        "cutmix": config.cutmix,
        "label smoothing": config.smoothing,
        "drop path": config.drop_path,
    }
    smallest, largest = (100 * area for area in config.crop_scale)
    crops = f"random crops of {smallest:g} to {largest:g} %{' and flips' if source.data.flip else ', no flips'}"
    clipped = f", gradients clipped at norm {config.gradient_clip:g}" if config.gradient_clip else ""
    about = (
        f"all weights trained for {config.epochs} epochs on {crops}, AdamW {config.learning_rate:g} in batches "
        f"of {config.batch_size}, {config.warmup_epochs:g} epochs of warm-up, then cosine, "
        f"{', '.join(f'{name} {value:g}' for name, value in settings.items())}{clipped}, {averaged}, "
        f"{'bfloat16' if config.precision == 'bf16' else 'float32'}; mean over positions and a linear layer"
    )
    sizes = (len(train), images)
    return result_of(source, weights, "finetune", Accuracy(share), about, sizes, config, start)
