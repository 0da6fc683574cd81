"""Redraw docs/images/demo-fp16-headroom.png from the records next to it: `python docs/results/redraw_demo.py`.

`python docs/results/redraw_demo.py --keep runs/demo` first stores what the picture shows of a demo in records/demo/:
peaks.csv, the largest |x| of every layer over the recorded steps, and runs.json, the recipes' fields and the outcomes.
"""

import json
import sys
import tempfile
from pathlib import Path

import pandas as pd

from periln.eval.figures import pieces
from periln.eval.figures.headroom import TENSORS, peaks_by_layer
from periln.eval.figures.selection import view_of
from periln.eval.records.frames import load
from periln.runkit.folder import read_json, write_bytes, write_json, write_text
from periln.runkit.recipes import dump_yaml, read_yaml

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "demo"
PICTURE = HERE.parent / "images" / "demo-fp16-headroom.png"
FIELDS = ("name", "stage", "seed", "steps", "batch_size", "sequence_length", "model", "optimizer", "precision")
KEYS = ["run", "layer", "sublayer", "tensor"]


def keep(runs: Path) -> None:
    """Store the records of the pretraining runs of a demo."""
    kept, peaks = {}, []
    for file in sorted(runs.glob("*_lr*_seed*/summary.json")):
        run, recipe, summary = file.parent, read_yaml(file.parent / "recipe.yaml"), read_json(file)
        kept[run.name] = {
            "recipe": {name: recipe[name] for name in FIELDS if name in recipe},
            "summary": {name: summary.get(name) for name in ("status", "step", "reason", "parameters")},
        }
        for table in [*run.glob("layers/*.parquet"), *run.glob("eval/stability/step_*.parquet")]:
            rows = pd.read_parquet(table).query("stat == 'max_abs'").assign(run=run.name)
            peaks.append(rows[rows.tensor.isin(TENSORS)])
        seen = read_json(run / "environment.json")
    about = {name: seen.get(name) for name in ("commit", "uncommitted_changes", "processor", "versions")}
    largest = pd.concat(peaks).groupby(KEYS, sort=True).value.agg(lambda v: v.max(skipna=False)).reset_index()
    write_text(RECORDS / "peaks.csv", largest.to_csv(index=False, float_format="%.6g", na_rep="nan"))
    write_json(RECORDS / "runs.json", about | {"runs": kept})


def draw() -> bytes:
    """The picture, from the records alone."""
    peaks = pd.read_csv(RECORDS / "peaks.csv")
    with tempfile.TemporaryDirectory() as folder:
        for name, kept in read_json(RECORDS / "runs.json")["runs"].items():
            run, step = Path(folder) / name, kept["summary"]["step"]
            write_text(run / "recipe.yaml", dump_yaml(kept["recipe"]))
            write_text(run / "summary.json", json.dumps(kept["summary"]))
            write_text(run / "environment.json", "{}")
            (run / "layers").mkdir()
            rows = peaks[peaks.run == name].drop(columns="run").assign(step=step, stat="max_abs")
            rows.to_parquet(run / "layers" / f"step_{step:08d}.parquet")
        with pieces.settings():
            return pieces.image_bytes(peaks_by_layer(view_of(load(Path(folder)))).figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--keep"]:
        keep(Path(sys.argv[2]))
    write_bytes(PICTURE, draw())
    print(PICTURE)
