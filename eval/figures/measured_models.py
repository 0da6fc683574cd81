"""Models that the stability bench measured outside of any run, as rows next to the runs'.

`python -m eval.stability MODEL --out OUT` writes OUT/NAME/stability.json with its tables. Such a model has no recipe,
no learning rate and no training: figures of hidden states, gradients, angles and headroom show it, the others do not.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.records.frames import Frames, load_all, nothing_recorded
from periln.runkit.errors import UserError
from periln.runkit.folder import read_json

STAGE = "model"
NO_RATE = 0.0  # instead of a learning rate


def _found(root: Path) -> list[Path]:
    """The folders with a stability.json outside any run."""
    files = sorted(root.rglob("stability.json")) if root.is_dir() else []
    return [f.parent for f in files if not (f.parent.parent.parent / "recipe.yaml").exists()]


def load_measured(roots: Sequence[Path]) -> Frames:
    """`load_all` of the run folders under `roots`, and the models that were measured into folders there.

    A copy of a run's own records, as `eval.stability RUN --out OUT` makes it, is left out if the run is included.

    Raises:
        UserError: see `load`; a folder that holds neither; or a damaged stability.json.
    """
    models = list(dict.fromkeys(folder for root in roots for folder in _found(root)))
    trained = [root for root in roots if not _found(root) or any(root.rglob("recipe.yaml"))]
    frames = load_all(trained) if trained else nothing_recorded(", ".join(root.resolve().name for root in roots))
    own = {(path / "eval" / "stability" / "stability.json") for path in frames.folders.values()}
    texts = {file.read_bytes() for file in own if file.exists()}
    rows = [_row(folder) for folder in models if (folder / "stability.json").read_bytes() not in texts]
    if not rows:
        return frames
    names = [row["run"] for row in rows]
    table = pd.DataFrame(rows, columns=frames.runs.columns)
    return replace(
        frames,
        runs=pd.concat([frames.runs, table], ignore_index=True) if len(frames.runs) else table,
        recipes=frames.recipes | {name: {"stage": STAGE, "model": {}} for name in names},
        environments=frames.environments | {name: {} for name in names},
        folders=frames.folders | dict(zip(names, models, strict=False)),
    )


def _row(folder: Path) -> dict[str, Any]:
    report = read_json(folder / "stability.json")
    entries = report.get("checkpoints") if isinstance(report, dict) else None
    if not entries:
        raise UserError(f"{folder / 'stability.json'} holds no measurement")
    last = entries[-1]
    return {
        "run": folder.as_posix(),
        "stage": STAGE,
        "placement": last.get("placement") or folder.name,
        "learning_rate": NO_RATE,
        "status": "completed",
        "reason": "",
        "num_layers": last.get("num_layers"),
        "hidden_size": last.get("hidden_size"),
        "parameters": last.get("parameters"),
    }
