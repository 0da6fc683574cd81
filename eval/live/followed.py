"""A run folder that is being written, followed: each time only what is new in it is read."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.records.frames import read_layers
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder
from periln.runkit.number_format import FP16

KEPT = ("step", "loss", "grad_norm", "loss_scale", "skip_kind", "step_seconds", "tokens_per_second")
TENSORS = ("stream", "residual_add", "branch")
SUBLAYERS = ("embedding", "attn", "mlp")
LATELY = 50  # steps whose median time says how long the others take


class Followed:
    """The records of one run so far.

    `records` has a mapping a step with the fields of `KEPT`; `bits` the least headroom by recorded step and depth
    (attention at the half, MLP at the whole, the embedding at 0), minus infinity for an overflow.
    """

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        self.records: list[dict[str, Any]] = []
        self.bits: dict[int, dict[float, float]] = {}
        self.summary: dict[str, Any] = {}
        self._read: tuple[int, int] = (0, 0)  # the file's inode and how many bytes of it were read
        self._tables: set[str] = set()
        self.behind = True  # whether tables of layers are there that have not been read

    def refresh(self, until: float = math.inf) -> None:
        """Read what was written since the last time. A file that is just being written is read the next time.

        Tables of layers are read until this thread has used `until` seconds of a processor (`time.thread_time`).
        """
        self.read_records()
        self.read_layers(until)

    def read_records(self) -> None:
        """Read summary and metrics."""
        try:
            self.summary = self.folder.summary
        except UserError:
            pass
        self._metrics()

    def _metrics(self) -> None:
        path = self.folder.metrics_path
        if not path.exists():
            return
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if self._read[0] != found.st_ino or found.st_size < self._read[1]:  # a resume has cut it
                self.records, self._read = [], (found.st_ino, 0)
            file.seek(self._read[1])
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self.records.append({key: record.get(key) for key in KEPT})
        self._read = (found.st_ino, self._read[1] + len(whole))

    def read_layers(self, until: float = math.inf) -> None:
        """Read the tables of layers, see `refresh`."""
        folder = self.folder.path / "layers"
        self.behind = False
        for file in sorted(folder.glob("step_*.parquet")) if folder.is_dir() else ():
            if file.name not in self._tables:
                if time.thread_time() > until:
                    self.behind = True
                    return
                try:
                    rows = next(iter(read_layers("", folder, file.name)))
                except UserError:
                    continue
                self._tables.add(file.name)
                self._headroom(rows)

    def _headroom(self, rows: pd.DataFrame) -> None:
        rows = rows[(rows.stat == "max_abs") & rows.tensor.isin(TENSORS) & rows.sublayer.isin(SUBLAYERS)]
        depth = rows.layer.astype(float) - 0.5 * (rows.sublayer == "attn")
        for step, at, value in zip(rows.step, depth, rows.value.astype(float), strict=True):
            cells, bits = self.bits.setdefault(int(step), {}), FP16.headroom(value)
            cells[at] = min(bits, cells.get(at, bits))

    # --- what a table says -------------------------------------------------------------------------------------------
    @property
    def status(self) -> str:
        """That of summary.json; `stopped` where it says `running` but the process is gone from this machine."""
        status = str(self.summary.get("status") or ("running" if self.records else "waiting"))
        pid, host = self.summary.get("pid"), self.summary.get("host")
        if status == "running" and isinstance(pid, int) and host == socket.gethostname() and not _alive(pid):
            return "stopped"
        return status

    @property
    def step(self) -> int:
        return self.records[-1]["step"] + 1 if self.records else 0

    @property
    def seconds_a_step(self) -> float | None:
        times = [r["step_seconds"] for r in self.records[-LATELY:] if isinstance(r["step_seconds"], (int, float))]
        return float(pd.Series(times).median()) if times else None

    @property
    def quiet_seconds(self) -> float | None:
        """How long ago the last record was written."""
        path = self.folder.metrics_path
        return time.time() - path.stat().st_mtime if path.exists() else None

    def least_bits(self) -> float | None:
        return min((bits for cells in self.bits.values() for bits in cells.values()), default=None)

    def skips(self) -> dict[str, int]:
        """How many steps were skipped, by kind."""
        kinds = [record["skip_kind"] for record in self.records if record["skip_kind"]]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
