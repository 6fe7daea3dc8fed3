"""Numbers for frozen backbones: nearest neighbours, a linear probe and probes of whole maps, each with its protocol."""

from heatssl.evaluation.alignment import Alignment
from heatssl.evaluation.average_precision import AveragePrecision, average_precision
from heatssl.evaluation.check_up import run_health
from heatssl.evaluation.commands import run_knn, run_probe
from heatssl.evaluation.detect import run_detect
from heatssl.evaluation.detection import find_boxes, train_detector
from heatssl.evaluation.detector import Detector
from heatssl.evaluation.features import extract_features, extract_maps
from heatssl.evaluation.finetune import run_finetune
from heatssl.evaluation.knn import knn_accuracy
from heatssl.evaluation.linear import LinearProbe, load_probe, save_probe
from heatssl.evaluation.probe import ProbeResult, linear_probe
from heatssl.evaluation.results import Result
from heatssl.evaluation.segment import run_segment
from heatssl.evaluation.segmentation import SegmentationScores, knn_segmentation, linear_segmentation
from heatssl.evaluation.suite import run_suite
from heatssl.evaluation.token_probe import TokenProbe, TokenProbeResult, token_probe

__all__ = [
    "Alignment",
    "AveragePrecision",
    "Detector",
    "LinearProbe",
    "ProbeResult",
    "Result",
    "SegmentationScores",
    "TokenProbe",
    "TokenProbeResult",
    "average_precision",
    "extract_features",
    "extract_maps",
    "find_boxes",
    "knn_accuracy",
    "knn_segmentation",
    "linear_probe",
    "linear_segmentation",
    "load_probe",
    "run_detect",
    "run_finetune",
    "run_health",
    "run_knn",
    "run_probe",
    "run_segment",
    "run_suite",
    "save_probe",
    "token_probe",
    "train_detector",
]
