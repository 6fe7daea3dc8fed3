"""``heatssl report``, ``heatssl evaluate`` and ``heatssl attribute``: the commands that end in a page."""

from pathlib import Path

from heatssl.config import AttributeConfig, EvaluateConfig, ReportConfig


def run_report(config: ReportConfig) -> None:
    """Write the report of a run and print where it is."""
    from heatssl.report.report import write_report

    print(write_report(Path(config.run)))


def run_evaluate(config: EvaluateConfig) -> None:
    """Measure every source, write tables and page, print where they are; an interrupt leaves what was measured."""
    from heatssl.evaluation import run_suite
    from heatssl.evaluation.processes import is_first
    from heatssl.report.results_page import write_results_page

    folder = run_suite(config, after_table=write_results_page)
    if is_first():
        print(f"-> {folder / 'results.html'}")


def run_attribute(config: AttributeConfig) -> Path:
    """Explain some images, write maps, overlays and the gallery of them all, print and return where it is."""
    from heatssl import attribution
    from heatssl.report.gallery import write_gallery

    gallery = write_gallery(attribution.run_attribute(config))
    print(f"-> {gallery}")
    return gallery
