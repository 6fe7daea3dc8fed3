"""A run folder as one self-contained HTML page, from the folder's files only: no torch, no network."""

from heatssl.report.report import write_report

__all__ = ["write_report"]
