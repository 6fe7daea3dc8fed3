"""``heatssl demo``: pretrain, evaluate, explain and report, in one process and with nothing to download."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_demo(overrides: list[str]) -> Path:
    """Run the demo recipe from pixels to report.html, and print the numbers.

    Called again, it goes on where pretraining stopped; once that is done, it makes the numbers, the heatmaps
    and the report anew.

    Args:
        overrides: ``key=value`` on top of ``recipe=demo``, as for ``heatssl pretrain``.

    Returns:
        the report, ``report.html`` in the run folder (runs/demo unless ``output=`` says otherwise).

    Raises:
        UserError: on input that cannot work.
    """
    from heatssl.composition import compose
    from heatssl.report import write_report

    config = compose("demo", overrides)
    seconds: dict[str, float] = {}
    for name, stage in _stages(config):
        start = time.perf_counter()
        stage()
        seconds[name] = time.perf_counter() - start
    report = write_report(Path(config.output)).resolve()
    print(f"\n{summary(Path(config.output), seconds)}\n\nreport  {report}", flush=True)
    return report


def _stages(config: Any) -> list[tuple[str, Callable[[], object]]]:
    """Name and action of each stage, in order; all in one process, so that features are extracted once."""
    from heatssl.config import AttributeConfig, KnnConfig, ProbeConfig
    from heatssl.evaluation import run_knn, run_probe
    from heatssl.report.commands import run_attribute
    from heatssl.training import pretrain

    shared: dict[str, Any] = {
        "run": config.output,
        "seed": config.seed,
        "workers": config.data.workers,
        "accelerator": config.trainer.accelerator,
    }
    return [
        ("pretrain", lambda: pretrain(config)),
        ("linear probe", lambda: run_probe(ProbeConfig(**shared))),
        ("kNN", lambda: run_knn(KnnConfig(**shared))),
        (
            "heatmaps",
            lambda: [run_attribute(AttributeConfig(target=target, **shared)) for target in ("self", "probe")],
        ),
    ]


def summary(run: Path, seconds: dict[str, float]) -> str:
    """The newest accuracies beside those of random weights, their protocols, and the time each stage took."""
    from heatssl.report.numbers import compare, percent, signed
    from heatssl.report.report import duration
    from heatssl.report.run_folder import read_run

    newest = {comparison.name: comparison for comparison in compare(read_run(run).results)}
    rows: list[tuple[str, ...]] = [("", "pretrained", "random init", "gain")]
    for name, comparison in newest.items():
        sides = [percent(side["accuracy"]) if side else "-" for side in (comparison.pretrained, comparison.random_init)]
        rows.append((name, *sides, "-" if comparison.gain is None else f"{signed(comparison.gain)} points"))
    lines = [f"{name:<14}{pretrained:>12}{random:>14}{gain:>15}" for name, pretrained, random, gain in rows]
    lines += ["", *(f"{name}: {comparison.any.get('protocol', '')}" for name, comparison in newest.items())]
    stages = " + ".join(f"{stage} {duration(time)}" for stage, time in seconds.items())
    return "\n".join([*lines, "", f"time    {duration(sum(seconds.values()))} = {stages}"])
