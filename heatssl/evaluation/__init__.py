"""Numbers for frozen backbones: nearest neighbours and a linear probe, each with its protocol."""

from heatssl.evaluation.commands import run_knn, run_probe
from heatssl.evaluation.features import evaluation_mode, extract_features
from heatssl.evaluation.knn import knn_accuracy
from heatssl.evaluation.linear import LinearProbe, load_probe, save_probe
from heatssl.evaluation.probe import ProbeResult, linear_probe
from heatssl.evaluation.results import Result

__all__ = [
    "LinearProbe",
    "ProbeResult",
    "Result",
    "evaluation_mode",
    "extract_features",
    "knn_accuracy",
    "linear_probe",
    "load_probe",
    "run_knn",
    "run_probe",
    "save_probe",
]
