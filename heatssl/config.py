"""Typed schemas of every command's settings: plain dataclasses, importable without torch or Hydra.

Fields stand in three groups, by consequence: what changes the result, what changes only the speed,
and bookkeeping. The YAML files under ``configs/`` give values to these fields and may name no other.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args


@dataclass
class DataConfig:
    """Where images come from and how they become a batch.

    ``name``: ``shapes`` (generated, needs no root), ``folder`` (``root/train/<class>/*.jpg`` and
    ``root/val/<class>/*.jpg``), ``tar`` (one plain tar file of that layout, read in place) or ``images`` (any folder
    of images, without classes).
    """

    # changes the result
    name: str = "shapes"
    root: str | None = None
    image_size: int = 64  # pixels, square
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])  # area fractions of random-resized-crop
    flip: bool = True
    colour_jitter: float = 0.0  # strength of brightness, contrast and saturation jitter; hue: a quarter of it
    grey: float = 0.0  # probability of turning an image grey
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    train_size: int | None = None  # shapes: images to generate; others: a deterministic class-balanced subset
    val_size: int | None = None
    held_out: float = 0.0  # share of train that takes the place of val, which stays unread: to choose settings on
    expected_classes: int | None = None  # checked before the first step, in train and in val
    # changes only the speed
    workers: int = 2  # processes that read images, at most one for each core
    # bookkeeping
    bad_fraction: float = 0.01  # stop when more than this share of the files cannot be read


@dataclass
class OptimizerConfig:
    """AdamW, or another of timm's, with linear warm-up and cosine decay, counted in steps."""

    # changes the result
    name: str = "adamw"  # any name of timm.optim; muon: Muon on linear layers, AdamW on the rest
    learning_rate: float = 1.0e-3  # peak, for the batch size in use: never rescaled behind your back
    final_learning_rate: float = 1.0e-5
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_steps: int = 100
    fade_in_steps: int = 0  # post-norm backbones: the share of each layer grows from 0 to 1 (RoFormerV2); 0: it is 1


@dataclass
class TrainerConfig:
    """How long, how precise, on what."""

    # changes the result
    steps: int = 1000
    batch_size: int = 128  # images per step and device
    precision: str = "32"  # "32" or "bf16"
    gradient_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    devices: int = 1  # per node; a step sees batch_size * devices * nodes images
    nodes: int = 1
    # changes only the speed
    accelerator: str = "auto"  # auto, cpu, gpu, cuda or mps
    compile: bool = False  # torch.compile on the backbone
    # bookkeeping
    log_every: int = 20  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 200  # steps between two checkpoints
    keep_every: int = 0  # steps between two backbones that stay, to see how features form, see attribute; 0: none stays
    knn_every: int = 500  # steps between two online kNN evaluations; 0 turns them off
    knn_train_size: int = 2000  # images of train in the bank of the online kNN
    knn_val_size: int = 500  # other images of train, classified by the online kNN: val stays untouched
    tensorboard: bool = False


@dataclass
class PretrainConfig:
    """``heatssl pretrain``."""

    # changes the result
    backbone: str = "vit_tiny_patch16_224"  # any timm name
    backbone_arguments: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model
    data: DataConfig = field(default_factory=DataConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "heat_completion"})
    prior: dict[str, Any] = field(default_factory=lambda: {"name": "none"})  # a law on intermediate layers
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    # bookkeeping
    expected: str | None = None  # recorded runs to hold this one against: a file of configs/recorded_runs
    output: str = "runs/pretrain"
    resume: str = "auto"  # auto: go on where output stopped; never: refuse an output that holds a run


@dataclass
class EvaluationConfig:
    """What all commands that look at weights share: the weights and the images."""

    run: str = "runs/pretrain"  # run folder, RUN/best, timm:NAME, hf-hub:USER/NAME, FILE.safetensors or FILE?NAME
    data: DataConfig | None = None  # null: the data the run was trained on
    image_size: int | None = None  # pixels of a side; null: as in training
    seed: int = 0
    batch_size: int = 256
    workers: int = 2  # processes that read images, at most one for each core
    accelerator: str = "auto"
    output: str | None = None  # null: the run folder


@dataclass
class KnnConfig(EvaluationConfig):
    """``heatssl knn``."""

    k: Any = 20  # neighbours; a list such as [10,20,50,100,200] gives one row each, found in one pass
    temperature: float | None = 0.07  # null: plain majority vote
    shrinkage: float | None = None  # null: features as they are; 1 standardises them, towards 0 whitens them
    pooling: str = "mean"  # of the final layer: mean or max over positions, class (the class token), class_mean (both)
    random_init: bool = True  # the same protocol on the same architecture with random weights, beside it
    cache: bool = True  # keep features in ~/.cache/heatssl/features ($XDG_CACHE_HOME/heatssl/features), at most 20 GiB


@dataclass
class ProbeConfig(EvaluationConfig):
    """``heatssl probe``: a classifier on frozen features."""

    protocol: str = "features"  # extracted once; mae: a linear classifier trained by LARS on random crops, for long
    head: str = "linear"  # on mean-pooled features, kept in a file; attentive or block: on feature maps, not kept
    depth: int = 1  # of block: transformer blocks
    solver: str = "logistic_regression"  # of linear: a grid of L2 strengths; or sgd, a grid of learning rates
    grid: list[float] = field(default_factory=list)  # empty: the default of solver or head; of mae: rates for batch 256
    layers: list[int] = field(default_factory=list)  # of linear: blocks, or stages; -1 the last. Empty: the final layer
    pooling: list[str] = field(default_factory=lambda: ["mean"])  # of linear: as of knn; several are selected among
    iterations: int = 100  # of logistic_regression, at most
    epochs: int | None = None  # of sgd, mae, attentive and block; null: their default
    held_out: float = 0.1  # share of train that selects the point of the grid, where that has several
    shots: int | None = None  # few labels: so many images of each class train the linear probe
    share: float | None = None  # or this share of train
    draws: int = 5  # of the few, each with other images: the mean of their accuracies, and their deviation
    random_init: bool = True
    cache: bool = True  # keep features on disk, as knn does


@dataclass
class SegmentConfig(EvaluationConfig):
    """``heatssl segment``: masks/train/x/1.png beside train/x/1.jpg, and so for val; or the generated scenes."""

    method: str = "linear"  # a linear layer on every position; or knn, the most similar positions of train
    ignore: list[int] = field(default_factory=list)  # values of masks that count nowhere
    k: int = 30  # knn
    temperature: float = 0.07  # knn: votes weigh exp(cosine / temperature)
    epochs: int | None = None  # linear; null: its default
    held_out: float = 0.1  # linear: share of train that selects the learning rate
    random_init: bool = True


@dataclass
class DetectConfig(EvaluationConfig):
    """``heatssl detect``: boxes of annotations/train.json and val.json in COCO's format, of masks, or of the scenes."""

    mask_value: int = 1  # where masks stand for boxes: the box around these pixels is the object
    width: int = 128  # channels of the pyramid and the head, a multiple of 32
    scales: list[float] = field(default_factory=lambda: [2.0, 1.0, 0.5])  # levels of the pyramid, in map sizes
    epochs: int = 20
    batch_size: int = 16  # images per step
    learning_rate: float = 1.0e-3  # peak, for this batch size: not rescaled
    weight_decay: float = 0.05
    shrinkage: float = 1.0  # of the channels' correlations: 1 standardises the maps, towards 0 whitens them
    flip: bool = True  # learn from mirror images as well
    random_init: bool = True


@dataclass
class FinetuneConfig(EvaluationConfig):
    """``heatssl finetune``: all weights, trained on labels."""

    epochs: int = 50
    batch_size: int = 64  # images per step, even
    learning_rate: float = 1.0e-3  # peak, of the head; for this batch size: not rescaled
    layer_decay: float = 0.75  # each layer's share of the learning rate of the one after it
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    mixup: float = 0.8  # alpha; 0: none
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1
    ema: float = 0.999  # average of the weights over steps, which is what is tested; 0: the last weights
    gradient_clip: float = 1.0  # largest gradient norm; 0: none
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    precision: str = "32"  # or bf16
    random_init: bool = False  # the same from scratch, beside it: as long again


@dataclass
class HealthConfig(EvaluationConfig):
    """``heatssl health``: figures that need no labels."""

    images: int = 1000  # of val, or of the held-out share of train
    views: int = 8  # random crops of each, in other colours
    other: str | None = None  # weights that CKA compares with, such as RUN/best
    random_init: bool = True


@dataclass
class EvaluateConfig:
    """``heatssl evaluate``: several backbones in one table."""

    sources: list[str] = field(default_factory=list)  # as run= of knn: run folders, timm:NAME, FILE?NAME, ...
    suite: str = "quick"  # knn and the linear probe; full: few labels, heads and, where there are masks, segmentation
    data: DataConfig | None = None  # null: of each run its own
    image_size: int | None = None  # pixels of a side; null: of each as in its training
    seeds: list[int] = field(default_factory=lambda: [0])  # of the probes; several show their spread
    ignore: list[int] = field(default_factory=list)  # full: values of masks that count nowhere, as segment does
    fresh: bool = False  # measure again what stands in evaluation.json of the run or of the output already
    batch_size: int = 256
    workers: int = 2  # processes that read images, at most one for each core
    accelerator: str = "auto"
    cache: bool = True  # keep features on disk, as knn does
    output: str = "runs/evaluation"  # results.json, .csv, .md and .html; evaluation.json of all that was measured


@dataclass
class AttributeConfig(EvaluationConfig):
    """``heatssl attribute``: heatmaps, as PNG overlays and as a page, and their scores."""

    methods: list[str] = field(default_factory=lambda: ["gradcam", "integrated_gradients", "heat_flow"])
    target: str = "self"  # logit, logit:N, probe, margin, entropy, neighbours, channel:N, region:FILE@x,y, class, image
    images: list[str] = field(default_factory=list)  # files and folders; empty: `count` of `split`, spread over classes
    split: str = "val"  # or train, to choose settings on
    count: int = 8
    steps: int = 32  # integrated gradients, of the image or a layer: points on the path
    samples: int | None = None  # of smoothgrad, rise and expected_gradients; null: as many as each has by itself
    layer: str | None = None  # gradcam and its kin, law_residual, ...: blocks.3 or another module; null: the final map
    border: float | None = None  # heat_flow: how well heat leaves at the border; 0: not at all; null: 0.1
    law: str | None = None  # law_residual: run or laplace; null: that of the run where it has one, else laplace
    checkpoints: bool = False  # also by the weights that the run has kept on its way, see trainer.keep_every
    size: int = 256  # pixels of the written overlays
    over_image: bool = True  # false: the heat alone, for images that must not be passed on
    score: bool = False  # also score the methods, over all images of `split`, or over `images`
    scores: list[str] = field(default_factory=list)  # which; empty: the quick ones; all: see docs/attribution_scores.md
    score_count: int | None = None  # images of `split` that are scored, those shown among them; null: all
    objects: list[int] = field(default_factory=lambda: [1])  # values of masks that are the object
    ignore: list[int] = field(default_factory=list)  # values of masks that count nowhere


@dataclass
class ReportConfig:
    """``heatssl report``."""

    run: str = "runs/pretrain"  # run folder; report.html is written into it


ExportFormat = Literal["timm", "onnx"]


@dataclass
class ExportConfig:
    """``heatssl export``: weights as other programs take them."""

    run: str = "runs/pretrain"  # run folder, RUN/best, RUN/finetuned.safetensors with its classifier, or as of knn
    formats: list[str] = field(default_factory=lambda: ["timm"])  # timm: as timm and the Hugging Face hub; onnx
    image_size: int | None = None  # pixels of a side; null: as in training
    output: str | None = None  # folder; null: export in the run folder


@dataclass
class ModelsConfig:
    """``heatssl models``."""

    names: str = "gau_*,flash_*,roformer_v2_*"  # patterns, with commas between; any of timm's: vit_small_*


SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "knn": KnnConfig,
    "finetune": FinetuneConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
    "health": HealthConfig,
    "evaluate": EvaluateConfig,
    "attribute": AttributeConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "models": ModelsConfig,
}

# Keys of PretrainConfig in which a run may differ from the one it continues.
KEEPS_RESULT = frozenset(
    {
        "expected",
        "output",
        "resume",
        "data.workers",
        "data.bad_fraction",
        "trainer.accelerator",
        "trainer.compile",
        "trainer.log_every",
        "trainer.checkpoint_every",
        "trainer.keep_every",
        "trainer.knn_every",
        "trainer.knn_train_size",
        "trainer.knn_val_size",
        "trainer.tensorboard",
    }
)


def setting_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type for every setting of a schema; a nested schema stands before its settings."""
    types: dict[str, Any] = {}
    for setting in fields(schema):
        key = f"{prefix}{setting.name}"
        types[key] = setting.type
        nested = next((kind for kind in (setting.type, *get_args(setting.type)) if is_dataclass(kind)), None)
        if isinstance(nested, type):
            types |= setting_types(nested, f"{key}.")
    return types
