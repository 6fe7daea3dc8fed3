"""From evaluation.json to what a reader wants to know: is it better than random weights, and by how much."""

import math
from dataclasses import dataclass
from typing import Any

from heatssl.report.run_folder import is_number, weights_of

METRIC_NAMES = {"linear": "linear probe", "attentive": "attentive probe", "block": "one-block probe", "knn": "kNN"}
HEADS = ("attentive", "block")  # of heatssl probe, beside the linear one
ORDER = list(METRIC_NAMES)
SAME_PROTOCOL = ("metric", "protocol", "data", "split", "train_size", "val_size", "seed", "backbone", "images")


@dataclass
class Comparison:
    """One protocol: the newest result of some pretrained weights and of random ones; either may be missing."""

    metric: str
    pretrained: dict[str, Any] | None = None
    random_init: dict[str, Any] | None = None

    @property
    def any(self) -> dict[str, Any]:
        """A result to read the protocol from."""
        return self.pretrained or self.random_init or {}

    @property
    def name(self) -> str:
        """What people call the metric, and the weights where they are not the last of the run."""
        name, source = METRIC_NAMES.get(self.metric, self.metric), (self.pretrained or {}).get("source")
        return name if source in (None, "last") else f"{name}, {'best weights' if source == 'best' else source}"

    @property
    def weights(self) -> str:
        """Of the pretrained side, for people; "" where there is none or nothing is known."""
        return weights_of(self.pretrained or {})

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
    """Pair results that share a protocol, the newest of equals; probes first, then kNN, then others.

    The last weights of a run and its best are two. Both stand beside the same random twin, which knows of no step.
    """
    pretrained: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}
    random_init: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}
    for number, result in enumerate(results):
        key = tuple("" if result.get(name) is None else str(result[name]) for name in SAME_PROTOCOL)
        if result.get("weights") == "random_init":
            random_init[key] = number, result
        else:
            pretrained[*key, str(result.get("source"))] = number, result
    found: list[tuple[tuple[int, int], Comparison]] = []
    for (*protocol, _), (number, result) in pretrained.items():
        twin_number, twin = random_init.get(tuple(protocol), (-1, None))
        found.append(((max(number, twin_number), number), Comparison(str(result.get("metric")), result, twin)))
    alone = random_init.keys() - {key[:-1] for key in pretrained}
    for number, twin in (random_init[key] for key in alone):
        found.append(((number, number), Comparison(str(twin.get("metric")), None, twin)))

    def rank(comparison: Comparison) -> int:
        return ORDER.index(comparison.metric) if comparison.metric in ORDER else len(ORDER)

    return [comparison for age, comparison in sorted(found, key=lambda pair: (rank(pair[1]), pair[0]))]


@dataclass
class Verdict:
    """One sentence in two parts, and its tone: good, even, bad or unknown."""

    figure: str
    meaning: str
    tone: str


def verdict(comparisons: list[Comparison]) -> Verdict:
    """The headline: the newest linear probe that has both sides, else another probe or kNN, else what can be said.

    What else was measured, a segmentation say, is the headline only where there is neither a probe nor kNN.
    """
    classified = [comparison for comparison in comparisons if comparison.metric in ORDER]
    complete = [comparison for comparison in classified or comparisons if comparison.gain is not None]
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
    return text if text.startswith("kNN") else text[:1].upper() + text[1:]
