"""What an attribution explains: one number per image, made from the model's output, with or without a classifier."""

from heatssl.attribution.targets.channel import Channel, channel
from heatssl.attribution.targets.correspondence import Correspondence, region
from heatssl.attribution.targets.logits import ClassLogit, Entropy, Margin, entropy, margin
from heatssl.attribution.targets.make import TargetLike, make_target
from heatssl.attribution.targets.neighbours import neighbours
from heatssl.attribution.targets.similarity import Similarity
from heatssl.attribution.targets.target import Target, TargetMaker, embed

__all__ = [
    "Channel",
    "ClassLogit",
    "Correspondence",
    "Entropy",
    "Margin",
    "Similarity",
    "Target",
    "TargetLike",
    "TargetMaker",
    "channel",
    "embed",
    "entropy",
    "make_target",
    "margin",
    "neighbours",
    "region",
]
