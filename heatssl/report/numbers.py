"""From evaluation.json to what a reader wants to know: is it better than random weights, and by how much."""

import math
from dataclasses import dataclass
from typing import Any

from heatssl.report.run_folder import is_number

METRIC_NAMES = {"linear": "linear probe", "attentive": "attentive probe", "block": "one-block probe", "knn": "kNN"}
HEADS = ("attentive", "block")  # of heatssl probe, beside the linear one
ORDER = list(METRIC_NAMES)
SAME_PROTOCOL = ("metric", "protocol", "data", "split", "train_size", "val_size", "seed")


@dataclass
class Comparison:
    """One protocol: the newest result of the pretrained weights and of random ones; either may be missing."""

    metric: str
    pretrained: dict[str, Any] | None = None
    random_init: dict[str, Any] | None = None

    @property
    def any(self) -> dict[str, Any]:
        """A result to read the protocol from."""
        return self.pretrained or self.random_init or {}

    @property
    def name(self) -> str:
        """What people call the metric."""
        return METRIC_NAMES.get(self.metric, self.metric)

    @property
    def accuracies(self) -> tuple[float, float] | None:
        """Of pretrained and of random weights, when both are there."""
        if self.pretrained is None or self.random_init is None:
            return None
        return self.pretrained["accuracy"], self.random_init["accuracy"]

    @property
    def gain(self) -> float | None:
        """Accuracy above random weights, in points."""
        return None if self.accuracies is None else 100 * (self.accuracies[0] - self.accuracies[1])

    @property
    def gain_error(self) -> float:
        """Two standard errors of the gain in points, from the number of test images; 0 when that is unknown.

        Both weights see the same images, so errors are correlated and this bound is on the wide side. A share of images
        that are right has such an error; overlaps and average precisions have none that is known from their size.
        """
        size = self.any.get("val_size")
        is_share = "segmentation" not in self.metric and not self.metric.startswith("detection")
        if self.accuracies is None or not is_number(size) or size <= 0 or not is_share:
            return 0.0
        return 200 * math.sqrt(sum(max(share * (1 - share), 0.0) for share in self.accuracies) / size)


def compare(results: list[dict[str, Any]]) -> list[Comparison]:
    """Pair results that share a protocol, the newest of equals; probes first, then kNN, then others."""
    groups: dict[tuple[str, ...], Comparison] = {}
    for result in results:
        key = tuple(str(result.get(name)) for name in SAME_PROTOCOL)
        comparison = groups.pop(key, Comparison(str(result.get("metric"))))
        if result.get("weights") == "random_init":
            comparison.random_init = result
        else:
            comparison.pretrained = result
        groups[key] = comparison  # put last again: the order is that of the newest result

    def rank(comparison: Comparison) -> int:
        return ORDER.index(comparison.metric) if comparison.metric in ORDER else len(ORDER)

    return sorted(groups.values(), key=rank)


@dataclass
class Verdict:
    """One sentence in two parts, and its tone: good, even, bad or unknown."""

    figure: str
    meaning: str
    tone: str


def verdict(comparisons: list[Comparison]) -> Verdict:
    """The headline: the newest linear probe that has both sides, else another probe or kNN, else what can be said."""
    complete = [comparison for comparison in comparisons if comparison.gain is not None]
    if not complete:
        return _incomplete(comparisons)
    headline = [comparison for comparison in complete if comparison.metric == complete[0].metric][-1]
    gain, error = headline.gain or 0.0, headline.gain_error
    figure = f"{capital(headline.name)} {percent(headline.any['accuracy'])}"
    if abs(gain) <= error or gain == 0:
        margin = f", within the chance of {headline.any['val_size']:,} test images" if error else ""
        return Verdict(figure, f"no better than random weights ({signed(gain)} points{margin})", "even")
    if gain < 0:
        return Verdict(figure, f"{-gain:.1f} points below random weights", "bad")
    return Verdict(figure, f"{gain:.1f} points above random weights", "good")


def _incomplete(comparisons: list[Comparison]) -> Verdict:
    for comparison in comparisons:
        if comparison.pretrained:
            figure = f"{capital(comparison.name)} {percent(comparison.pretrained['accuracy'])}"
            return Verdict(figure, "random weights were not evaluated", "unknown")
    return Verdict("Not evaluated yet", "run heatssl probe and heatssl knn for numbers", "unknown")


def percent(share: float) -> str:
    """0.521 -> 52.1 %, with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"


def signed(points: float) -> str:
    """20.34 -> +20.3; negative points get a true minus sign."""
    return f"{points:+.1f}".replace("-", "\u2212")


def capital(text: str) -> str:
    """First letter large; ``kNN`` keeps its own."""
    return text if text == "kNN" else text[:1].upper() + text[1:]
