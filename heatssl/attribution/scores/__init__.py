"""How good heatmaps are: pure functions of tensors, one number per image."""

from heatssl.attribution.scores.confidence import bootstrap_interval
from heatssl.attribution.scores.localisation import (
    average_precision,
    best_iou,
    energy_inside,
    otsu_iou,
    otsu_threshold,
    pointing_game,
)
from heatssl.attribution.scores.perturbation import deletion, infidelity, insertion, perturbation_curve, random_squares
from heatssl.attribution.scores.randomisation import randomisation
from heatssl.attribution.scores.ranking import rank_correlation
from heatssl.attribution.scores.sensitivity import max_sensitivity

__all__ = [
    "average_precision",
    "best_iou",
    "bootstrap_interval",
    "deletion",
    "energy_inside",
    "infidelity",
    "insertion",
    "max_sensitivity",
    "otsu_iou",
    "otsu_threshold",
    "perturbation_curve",
    "pointing_game",
    "random_squares",
    "randomisation",
    "rank_correlation",
]
