"""Heatmaps for a backbone and a target, with and without a classifier."""

from heatssl.attribution.attribute import attribute, explain, method_names
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.commands import run_attribute
from heatssl.attribution.overlay import overlay
from heatssl.attribution.score import score

__all__ = ["Attribution", "attribute", "explain", "method_names", "overlay", "run_attribute", "score"]
