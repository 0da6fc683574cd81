"""A study's folder: what the stage that trains its cells and the stage that judges them share.

    STUDY/plan.yaml      budget, sizes and cells, as chosen; paths relative to STUDY
    STUDY/claims.yaml    the claims: statistic, threshold, group
    STUDY/frozen.json    the SHA-256 of both, written with them: neither may change afterwards
    STUDY/data/          text and tokens (prepare_data)
    STUDY/recipes/, logs/
    STUDY/cells/NAME/    a run folder, and in it cell.json: the cell's result, all that the verdicts read

Exported, the results are lines of `cells.jsonl` next to plan.yaml, claims.yaml and frozen.json.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from periln.runkit.errors import UserError
from periln.runkit.folder import read_json, write_json, write_text
from periln.runkit.recipes import dump_yaml, read_yaml

FROZEN = ("plan.yaml", "claims.yaml")
CELLS = "cells.jsonl"
ENDED = ("completed", "diverged")


def file_hash(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def check_untouched(folder: Path) -> None:
    """Raise UserError where the folder holds a study that has run, or the records of one."""
    ran = next((path.parent.name for path in folder.glob("cells/*/*")), None)
    if ran is not None or (folder / CELLS).exists():
        raise UserError(f"{folder} holds a study that has run ({ran or CELLS}): give another folder with --out")


def freeze(folder: Path, plan: dict[str, Any], claims: str) -> None:
    """Write plan and claims, and their hashes.

    Raises:
        UserError: see `check_untouched`.
    """
    check_untouched(folder)
    write_text(folder / "plan.yaml", dump_yaml(plan))
    write_text(folder / "claims.yaml", claims)
    write_json(folder / "frozen.json", {name: file_hash(folder / name) for name in FROZEN})


@dataclass(frozen=True)
class Study:
    """A frozen study: a folder with a plan, or the records of one.

    Attributes:
        path: the folder.
        records: exported records whose cells count as done; None: none.
    """

    path: Path
    records: Path | None = None

    def check(self) -> None:
        """Raise UserError where plan or claims are missing or have changed, or the records belong to another plan."""
        if not (self.path / "frozen.json").exists():
            raise UserError(f"{self.path} holds no plan: periln study plan --budget 20m --out {self.path}")
        frozen = read_json(self.path / "frozen.json")
        for name in FROZEN:
            if file_hash(self.path / name) != frozen.get(name):
                raise UserError(f"{self.path / name} has changed since it was frozen: a study's {name} stays as it is")
        if self.records is not None and (self.records / "frozen.json").exists():
            other = read_json(self.records / "frozen.json")
            for name in FROZEN:
                if other.get(name) != frozen.get(name):
                    raise UserError(f"{self.records} holds records of another study: its {name} differs")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """plan.yaml, checked against its hash."""
        self.check()
        return read_yaml(self.path / "plan.yaml")

    @cached_property
    def plan_hash(self) -> str:
        return file_hash(self.path / "plan.yaml")

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The plan's cells, the most informative first."""
        return list(self.plan["cells"])

    def run_path(self, name: str) -> Path:
        return self.path / "cells" / name

    def results(self) -> dict[str, dict[str, Any]]:
        """The result of every cell that has one, by name: from the folder, else from the records.

        Raises:
            UserError: a result of another plan, or a damaged file.
        """
        found = read_results(self.path / CELLS) | (read_results(self.records / CELLS) if self.records else {})
        for file in sorted((self.path / "cells").glob("*/cell.json")):
            found[file.parent.name] = read_json(file)
        known = {cell["name"] for cell in self.cells}
        for name, result in found.items():
            if result.get("plan") != self.plan_hash or name not in known:
                raise UserError(f"cell {name}: its result belongs to another plan than {self.path / 'plan.yaml'}")
        return found


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The results in a cells.jsonl, by the cell's name; none where there is no such file.

    Raises:
        UserError: a line that is not a result; names file and line.
    """
    if not file.exists():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            result = json.loads(line)
            found[str(result["cell"])] = result
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}, line {number} is not a cell's result: {error}") from error
    return found


def best_rates(plan: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """For each placement of E2 the rate of lowest held-out loss at the plan's first seed; None while one is missing.

    Chosen at one seed, as in the paper. Where every rate diverged, the lowest rate.
    """
    rates: dict[str, float | None] = {}
    scans: dict[str, list[dict[str, Any]]] = {}
    for cell in plan["cells"]:
        if cell["group"] == "E2" and cell["seed"] == plan["seeds"][0]:
            scans.setdefault(cell["variant"], []).append(cell)
    for variant, cells in scans.items():
        if any(cell["name"] not in results for cell in cells):
            rates[variant] = None
            continue
        losses = {cell["rate"]: results[cell["name"]].get("heldout_loss") for cell in cells}
        alive = {rate: loss for rate, loss in losses.items() if loss is not None}
        rates[variant] = min(alive, key=lambda r: (alive[r], r)) if alive else min(losses)
    return rates
