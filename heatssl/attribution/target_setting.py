"""What the setting ``target`` of ``heatssl attribute`` stands for."""

import difflib
import math
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from heatssl.attribution.pictures import Pictures, read_picture
from heatssl.attribution.targets import TargetLike, channel, embed, entropy, margin, neighbours, region
from heatssl.attribution.targets.correspondence import Box
from heatssl.attribution.targets.logits import logits_of
from heatssl.config import AttributeConfig
from heatssl.data.decode import decode
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe, load_probe
from heatssl.evaluation.source import Source, fingerprint, open_source
from heatssl.evaluation.split_features import split_features
from heatssl.export import Head, is_run, load_backbone, load_head

WORDS = "self, logit, logit:N, probe, margin, entropy, neighbours, channel:N, region:FILE@x,y,w,h, a class, or a file"
CHUNK = 64  # images of a forward pass
LOGIT = re.compile(r"logit(:\d+)?")  # of the model's own classifier


@dataclass(frozen=True)
class Wish:
    """A target, of whatever images."""

    kind: str  # part of the file names: self, probe, class3, image, margin, entropy, neighbours, channel17, logit285
    description: str
    of: Callable[[Pictures], TargetLike]
    probe: LinearProbe | None = None


def with_classifier(config: AttributeConfig, source: Source) -> Source:
    """The source with the classifier that its weights came with, where the target asks for that one.

    ``margin`` and ``entropy`` take the probe of these weights where there is one.

    Raises:
        UserError: when ``target=logit``, and there is no classifier.
    """
    if load_head(source.name) is not None:  # no part of the model, see _of_head
        return source
    if LOGIT.fullmatch(config.target):
        return replace(source, backbone=load_backbone(source.name, classifier=True, seed=config.seed)[0])
    if config.target in ("margin", "entropy") and not any(file.exists() for file in _probe_files(source)):
        with suppress(UserError):  # without any classifier it is a probe that is missing
            return replace(source, backbone=load_backbone(source.name, classifier=True, seed=config.seed)[0])
    return source


def read_target(config: AttributeConfig, source: Source) -> Wish:
    """The target that the settings name, of a source that :func:`with_classifier` returned.

    Raises:
        UserError: on a word that is none, a probe that is missing or belongs to other weights, or a file that cannot
            be read.
    """
    word = config.target
    if word == "self":
        return Wish("self", "self: cosine to the image's own embedding", lambda _: "self")
    if word == "neighbours":
        return _neighbours(config, source)
    if re.fullmatch(r"channel:\d+", word):
        index = int(word.removeprefix("channel:"))
        return Wish(f"channel{index}", f"channel: feature {index}, mean over positions", lambda _: channel(index))
    if word.startswith("region:"):
        return _region(word, source)
    if word not in ("probe", "margin", "entropy") and Path(word).expanduser().is_file():
        with torch.no_grad():
            reference = embed(source.backbone, read_picture(word, source)[None])[0]
        return Wish("image", f"image: cosine to the embedding of {Path(word).name}", lambda _: reference)
    return _of_classifier(config, source)


def _of_classifier(config: AttributeConfig, source: Source) -> Wish:
    """Of the one that the weights came with, or of a probe."""
    word = config.target
    head = load_head(source.name)
    if head is not None and word != "probe":
        return _of_head(word, head, source)
    own = bool(LOGIT.fullmatch(word) or getattr(source.backbone, "num_classes", 0))
    return _of_own_classifier(word, source) if own else _of_classes(config, source)


def _neighbours(config: AttributeConfig, source: Source) -> Wish:
    """Among the images that the run was trained on, whatever is explained; of other weights, train of the data."""
    if config.data is None and not is_run(config.run):
        raise UserError(f"target=neighbours needs images of train, and {config.run} has none: give data=... data.root=")
    own = open_source(replace(config, data=None)) if is_run(config.run) else source
    features, labels = split_features(source.backbone, "train", own, config.batch_size)
    k = min(20, len(labels))
    maker = neighbours(features, labels, k=k)
    what = f"neighbours: cosine to the class that {k} of {len(labels)} images of train ({own.data.name}) vote for"
    return Wish("neighbours", what, lambda _: maker)


def _of_own_classifier(word: str, source: Source) -> Wish:
    """Targets of the classifier that the weights came with; a class is a number, as such files hold no names."""
    whose, model = "the model's own classifier", source.backbone
    if word == "entropy":
        return Wish("entropy", f"entropy: of the classes of {whose}, in nats", lambda _: entropy())
    if word == "margin":
        what = f"margin: logit of the class that {whose} gives the image, minus the largest other"
        return Wish("margin", what, lambda _: margin())
    if word == "logit":

        def predicted(pictures: Pictures) -> Tensor:
            with torch.no_grad():
                return torch.cat([logits_of(model, part, None).argmax(dim=1) for part in pictures.images.split(CHUNK)])

        return Wish("logit", f"logit: of the class that {whose} gives the image", predicted)
    label, classes = int(word.removeprefix("logit:")), int(getattr(model, "num_classes", 0))
    if label >= classes:
        raise UserError(f"target={word}, but {whose} has {classes} classes: choose one from 0 to {classes - 1}")
    return Wish(f"logit{label}", f"logit: of class {label} of {whose}", lambda _: label)


def _of_head(word: str, head: Head, source: Source) -> Wish:
    """Targets of the classifier of ``heatssl finetune``: a linear layer on the pooled embedding, as a probe is."""
    whose, width = f"the classifier of {Path(source.name).name}", head.weight.shape[1]
    probe = LinearProbe(head.weight, head.bias, torch.zeros(width), torch.ones(width)).to(source.device)
    if word == "entropy":
        return Wish("entropy", f"entropy: of the classes of {whose}, in nats", lambda _: entropy(), probe)
    if word in ("logit", "margin"):

        def labels_of(pictures: Pictures) -> Tensor:
            return _labels(pictures, head.classes, probe, source)

        if word == "logit":
            return Wish("logit", f"logit: of the image's class, by {whose}", labels_of, probe)
        what = f"margin: logit of the image's class minus the largest other, by {whose}"
        return Wish("margin", what, lambda pictures: margin(labels_of(pictures)), probe)
    label = int(word.removeprefix("logit:")) if LOGIT.fullmatch(word) else _class_of(word, head.classes)
    if label >= len(head.classes):
        raise UserError(
            f"target={word}, but {whose} has {len(head.classes)} classes: choose one from 0 to {len(head.classes) - 1}"
        )
    return Wish(f"logit{label}", f"logit: of {head.classes[label]}, by {whose}", lambda _: label, probe)


def _class_of(word: str, classes: list[str]) -> int:
    if word not in classes:
        nearest = difflib.get_close_matches(word, classes, n=1, cutoff=0.0)[0]
        raise UserError(f"target={word} is neither a file nor a class: did you mean {nearest!r}? There are {WORDS}")
    return classes.index(word)


def _of_classes(config: AttributeConfig, source: Source) -> Wish:
    """Targets of the probe of these weights."""
    word = config.target
    if source.weights == "random_init":
        raise UserError(f"target={word} needs a probe, and random weights are others each time: use target=self")
    if word not in ("probe", "margin", "entropy") and not any(file.exists() for file in _probe_files(source)):
        raise UserError(
            f"target={word} is no file, and classes need a probe: "
            f"run `{_probe_command(config, source)}` first, or use target=self"
        )
    probe, classes = _probe_of(config, source)
    probe = probe.to(source.device)
    if word == "entropy":
        return Wish("entropy", "entropy: of the probe's classes, in nats", lambda _: entropy(), probe)
    if word in ("probe", "margin"):

        def labels_of(pictures: Pictures) -> Tensor:
            return _labels(pictures, classes, probe, source)

        if word == "probe":
            return Wish("probe", "probe: logit of the image's class", labels_of, probe)
        what = "margin: logit of the image's class minus the largest other"
        return Wish("margin", what, lambda pictures: margin(labels_of(pictures)), probe)
    label = _class_of(word, classes)
    return Wish(f"class{label}", f"probe: logit of {word}", lambda _: label, probe)


def _probe_of(config: AttributeConfig, source: Source) -> tuple[LinearProbe, list[str]]:
    weights, (own, older) = fingerprint(source.backbone), _probe_files(source)
    if not own.exists():
        with suppress(UserError):
            return load_probe(older, weights)
    return load_probe(own, weights, _probe_command(config, source))


def _probe_files(source: Source) -> tuple[Path, Path]:
    """That of these weights, and where an older heatssl kept those of all weights alike."""
    return source.probe_file, source.output / "probe.safetensors"


def _probe_command(config: AttributeConfig, source: Source) -> str:
    """The command line that trains the probe which is missing."""
    words = [f"run={source.name}"]
    if config.data is not None:
        words += [f"data={config.data.name}", *([f"data.root={config.data.root}"] if config.data.root else [])]
    elif not is_run(source.name):
        words += ["data=folder", "data.root=PATH"]
    if config.output or not is_run(source.name):
        words.append(f"output={source.output}")
    return shlex.join(["heatssl", "probe", *words])


def _labels(pictures: Pictures, classes: list[str], probe: LinearProbe, source: Source) -> Tensor:
    """The known class of each image, else the one that the probe predicts: (B,)."""
    with torch.no_grad():
        predicted = probe.logits(embed(source.backbone, pictures.images)).argmax(dim=1).tolist()
    known = [classes.index(label) if label in classes else None for label in pictures.labels]
    chosen = [guess if index is None else index for index, guess in zip(known, predicted, strict=True)]
    return torch.tensor(chosen, device=source.device)


def _region(word: str, source: Source) -> Wish:
    """``region:FILE@x,y`` or ``region:FILE@x,y,w,h``: a point, or a rectangle by its top left corner."""
    path, _, numbers = word.removeprefix("region:").rpartition("@")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if not path or len(values) not in (2, 4) or not all(map(math.isfinite, values)):
        raise UserError(
            f"target={word} is no region: write region:FILE@x,y or region:FILE@x,y,w,h, in pixels, or in fractions "
            "with a point as in 0.5"
        )
    if min(values[2:], default=0) < 0:
        raise UserError(f"target={word} has a negative size: write x,y of its top left corner, then width and height")
    picture = read_picture(path, source)
    width, height = decode(Path(path).expanduser().read_bytes()).size
    x, y, w, h = [*values, 0.0, 0.0][:4]
    if "." in numbers:
        x, y, w, h = x * width, y * height, w * width, h * height
    maker = region(picture, _in_centre(word, (x, y, x + w, y + h), width, height))
    return Wish("region", f"region: cosine to {numbers} of {Path(path).name}, mean over positions", lambda _: maker)


def _in_centre(word: str, box: Box, width: int, height: int) -> Box:
    """A box in pixels of the file, as fractions of the square in its middle, which is what the backbone sees."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    inside = ((box[0] - left) / side, (box[1] - top) / side, (box[2] - left) / side, (box[3] - top) / side)
    cut = tuple(min(1.0, max(0.0, place)) for place in inside)
    if inside[2] < 0 or inside[3] < 0 or inside[0] > 1 or inside[1] > 1:
        raise UserError(
            f"target={word} lies outside the middle square, pixels {left} to {left + side} across and {top} to "
            f"{top + side} down of {width} x {height}: it is all that the backbone sees"
        )
    return cut[0], cut[1], cut[2], cut[3]
