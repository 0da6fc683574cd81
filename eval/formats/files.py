"""The records on disk: a file for every row as soon as it is measured, and what is derived from them.

formats.json   the samples, the reference, the table's rows, the sentences about them
cells/*.json   one row of one variant: nats of every sample, KL, top-1, slots
formats.csv, formats.md, formats.png, slots.csv
"""

import re
from pathlib import Path
from typing import Any

from periln.eval.arguments.formats import check_records
from periln.runkit.errors import UserError
from periln.runkit.folder import json_number, read_json, write_json


class FormatsFolder:
    """One model's folder of measurements in number formats. `asked` is what decides a row: weights and samples.

    Raises:
        UserError: the folder holds rows of something else; what differs is named.
    """

    def __init__(self, folder: Path, asked: dict[str, Any]):
        check_records(folder)
        self.folder, self.path = folder, folder / "formats.json"
        self.head: dict[str, Any] = read_json(self.path) if self.path.exists() else {"asked": asked}
        found = self.head.get("asked", {})
        if other := [f"{k} {found.get(k)!r}, not {v!r}" for k, v in asked.items() if found.get(k) != v]:
            raise UserError(f"{folder} holds other measurements ({'; '.join(other)}): give another --out")

    def _file(self, variant: str, key: str) -> Path:
        name = re.sub(r"[^a-z0-9]+", "_", f"{variant} {key}".lower()).strip("_")
        return self.folder / "cells" / f"{name}.json"

    def cell(self, variant: str, key: str) -> dict[str, Any] | None:
        """A row that exists already."""
        file = self._file(variant, key)
        return read_json(file) if file.exists() else None

    def write_cell(self, variant: str, record: dict[str, Any]) -> None:
        """Keep a row."""
        write_json(self._file(variant, record["key"]), json_number(record))

    def write_head(self, **more: Any) -> None:
        """Write formats.json with what is known so far."""
        self.head |= more
        write_json(self.path, json_number(self.head))
