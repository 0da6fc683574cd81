"""The bench's records on disk: two tables a checkpoint, and stability.json, written last.

step_XXXXXXXX.parquet     step, layer, sublayer, tensor, stat, value
angles_XXXXXXXX.parquet   step, layer, other, value (in units of pi)
layers_XXXXXXXX.csv       the same statistics of the stream and the branches, a row a sublayer
certificate_XXXXXXXX.json what FP16 can reach by the weights alone (certificate.json outside of runs)
stability.json            what was measured on, and for every checkpoint losses, fits, FP16 and verdict
"""

from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.stability.fits import fit_growth
from periln.eval.stability.measure import Measured
from periln.eval.stability.verdict import depth_profile, run_verdict
from periln.runkit.errors import UserError
from periln.runkit.folder import json_number, read_json, write_bytes, write_json, write_text

_WIDE = {
    "variance": ("stream", "variance"),
    "max |x|": ("stream", "max_abs"),
    "bits": ("stream", "headroom_bits"),
    "branch max": ("branch", "max_abs"),
    "branch bits": ("branch", "headroom_bits"),
    "share": ("branch_output", "branch_share"),
    "kurtosis": ("stream", "kurtosis"),
    "gradient": ("gradient", "norm"),
    "scale freedom": ("branch_weights", "scale_freedom"),
    "logit max": ("attention_logits", "max"),
    "entropy": ("attention_logits", "entropy"),
    "skip loss": ("stream", "skip_loss"),
}


class BenchFolder:
    """One model's folder of the bench's records."""

    def __init__(self, folder: Path, model: str, single: bool):
        self.folder, self.model, self.single = folder, model, single
        self.path = folder / "stability.json"
        self.old: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        # Records inside a run folder are the run's own, whatever the folder has been called since.
        if single and self.old and self.old.get("model") != model:
            raise UserError(
                f"{folder} holds the measurements of another model ({self.old.get('model')}); give another --out"
            )

    def table(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.parquet"

    def angles(self, step: int) -> Path:
        return self.folder / f"angles_{step:08d}.parquet"

    def certificate(self, step: int) -> Path:
        return self.folder / ("certificate.json" if self.single else f"certificate_{step:08d}.json")

    def entry(self, step: int) -> dict[str, Any] | None:
        """What stability.json holds of a checkpoint."""
        return next((e for e in self.old.get("checkpoints", []) if e["step"] == step), None)

    def has(self, step: int, asked: dict[str, Any], weights: str) -> bool:
        """Whether this measurement exists: of these weights, with these options."""
        entry = self.entry(step)
        whole = self.table(step).exists() and self.angles(step).exists()
        if entry is None or entry.get("stopped") is not None:
            return False
        return whole and entry["asked"] == asked and entry["weights_sha256"] == weights

    def write(self, measured: Measured, entry: dict[str, Any], certificate: dict[str, Any] | None) -> None:
        """The files of one checkpoint, stability.json last."""
        step = entry["step"]
        write_bytes(self.table(step), measured.rows.to_parquet(index=False))
        write_bytes(self.angles(step), measured.angles.to_parquet(index=False))
        write_text(self.folder / f"layers_{step:08d}.csv", wide_table(measured.rows).to_csv(index=False))
        if certificate is not None:
            write_json(self.certificate(step), json_number(certificate))
        kept = [e for e in self.old.get("checkpoints", []) if e["step"] != step]
        entries = sorted([*kept, entry], key=lambda e: e["step"])
        self.old = {"model": self.model, "checkpoints": entries, **self._summary(entries)}
        write_json(self.path, json_number(self.old))

    def _summary(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The verdict: of the last checkpoint, and its history over the steps that were measured alike."""
        last = entries[-1]
        alike = [e for e in entries if e["asked"] == last["asked"]]
        growth = None if len(alike) < 2 else self._growth([e["step"] for e in alike])
        said = [] if growth is None else run_verdict(growth, growth["steps"])
        return {"growth": growth, "verdict": [*said, *last["verdict"]]}

    def _growth(self, steps: list[int]) -> dict[str, Any]:
        """How the stream after the last layer grows over steps."""
        tables = [pd.read_parquet(self.table(step)) for step in steps]
        growth: dict[str, Any] = {"steps": steps}
        for stat in ("variance", "variance_data", "mean_abs", "max_abs"):
            values = [float(depth_profile(table, stat).iloc[-1]) for table in tables]
            growth[stat] = {"values": values, "fit": fit_growth(steps, values)}
        return growth


def wide_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a sublayer, a column a statistic."""
    keys = rows[["layer", "sublayer"]].drop_duplicates()
    order = {"embedding": 0, "attn": 1, "mlp": 2, "layer": 3, "final": 4}
    keys = keys.assign(at=keys.sublayer.map(order)).sort_values(["layer", "at"]).drop(columns="at")
    for name, (tensor, stat) in _WIDE.items():
        chosen = rows[(rows.tensor == tensor) & (rows.stat == stat)]
        keys = keys.merge(chosen[["layer", "sublayer", "value"]].rename(columns={"value": name}), "left")
    return keys
