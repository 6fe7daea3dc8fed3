"""Pretraining on Lightning: one function, :func:`pretrain`, from settings to a run folder."""

from heatssl.training.run import pretrain

__all__ = ["pretrain"]
