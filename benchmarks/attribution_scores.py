"""Every attribution method by every score, against the masks of Oxford-IIIT Pet, or those of the generated scenes.

python benchmarks/attribution_scores.py runs/a timm:vit_small_patch16_224.dino --data pets-trimap.tar --split train
python benchmarks/attribution_scores.py runs/demo --images 300                   # pretrained on the scenes: those
python benchmarks/attribution_scores.py runs/a --twin 0 --data pets-trimap.tar   # the same model with random weights

``--split train`` to choose settings of methods, ``--split val`` once for what is reported. The object is the animal
(1), the border (3) counts nowhere; in a scene it is what the class is of. A method that a backbone refuses is named
and left out. Rows go to benchmarks/results/attribution_scores.jsonl; of equal ones the last counts in the table.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from heatssl.attribution import method_names
from heatssl.attribution.fitness import refusals
from heatssl.attribution.of_source import options_of_source
from heatssl.attribution.pictures import pictures_of_split
from heatssl.attribution.score_table import Row, markdown
from heatssl.attribution.scoring import measure_scores
from heatssl.attribution.target_setting import read_target, with_classifier
from heatssl.config import AttributeConfig, DataConfig
from heatssl.evaluation.source import open_source
from heatssl.export import is_run

RESULTS = Path(__file__).parent / "results" / "attribution_scores.jsonl"


def main() -> None:
    """Measure every source, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders, timm:NAME, ...")
    parser.add_argument("--data", type=Path, help="pets-trimap.tar; without, the images of the run itself")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--methods", nargs="+", default=None, help="all without")
    parser.add_argument("--scores", nargs="+", default=["all"])
    parser.add_argument("--target", default="self")
    parser.add_argument("--images", type=int, default=None, help="of the split; all without")
    parser.add_argument("--image-size", type=int, help="pixels of a side; without: as in training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", type=int, help="random weights of this seed in the place of the run's")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        for run in arguments.runs:
            config = AttributeConfig(
                run=run,
                methods=arguments.methods or method_names(),
                data=DataConfig("tar", str(arguments.data)) if arguments.data else None,
                ignore=[3] if arguments.data else [],
                scores=arguments.scores,
                target=arguments.target,
                split=arguments.split,
                score_count=arguments.images,
                batch_size=arguments.batch_size,
                image_size=arguments.image_size,
                seed=arguments.seed,
                workers=0,
                output=None if is_run(run) else "runs/attribution_scores",
            )
            name = Path(run).name if is_run(run) else run
            if arguments.image_size:
                name += f", {arguments.image_size} px"
            if arguments.twin is not None:
                name += f", random weights {arguments.twin}"
            with RESULTS.open("a") as file:
                for row in measure(config, arguments.twin):
                    file.write(json.dumps({"run": name, **asdict(replace(row, root=Path(row.root).name))}) + "\n")
    print(table(RESULTS.read_text().splitlines() if RESULTS.exists() else []))


def measure(config: AttributeConfig, twin: int | None = None) -> Iterator[Row]:
    """Rows of one source, or of its twin with random weights of a seed; methods down and scores across."""
    source = with_classifier(config, open_source(config))
    if twin is not None:
        source = replace(source, backbone=source.twin(twin))
    source.backbone.to(source.device).eval()
    wish = read_target(config, source)
    of_source = options_of_source(config, source, None)
    refused = refusals(wish, pictures_of_split(replace(config, count=1), source), source, config, of_source)
    for method, error in refused.items():
        print(f"{config.run}: {method} is left out: {error}", flush=True)
    able = [method for method in config.methods if method not in refused]
    rows, _ = measure_scores(wish, None, source, replace(config, methods=able), of_source)
    yield from rows


def table(lines: list[str]) -> str:
    """Markdown: a table for each run, target and split."""
    newest: dict[tuple[str, ...], tuple[str, Row]] = {}
    for line in lines:
        entry = json.loads(line)
        run = entry.pop("run")
        row = Row(**entry)
        newest[run, row.data, row.digest, row.title, row.score, row.target, row.split, str(row.seed)] = run, row
    runs = dict.fromkeys(run for run, _ in newest.values())
    return "\n\n".join(f"## {run}\n\n{markdown([row for of, row in newest.values() if of == run])}" for run in runs)


if __name__ == "__main__":
    main()
