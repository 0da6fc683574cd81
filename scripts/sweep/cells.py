"""A sweep as data: one YAML, a recipe and a grid, and the cells that follow from it.

A sweep file is a recipe (with a `base`, as a rule) that has one more field, `grid`: for each field, with its section,
the values that it takes. Every combination is a cell, with its own recipe file and run folder:

    runs/<sweep>/recipes/<cell>.yaml     the cell's recipe, resolved
    runs/<sweep>/logs/<cell>.log         what its trainer said, over all attempts
    runs/<sweep>/<cell>/                 its run folder
    runs/<sweep>/table.csv, .md, .png    see sweep_table.py

A value may be a section: `model: [{norm_placement: output, qk_norm: full}]` changes two fields at once.
"""

import fcntl
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.recipes import (
    at_path,
    check_field,
    dump_yaml,
    flatten,
    from_mapping,
    merge,
    read_yaml,
    to_mapping,
)
from periln.runkit.resume import resumption
from periln.scripts.origin import adopt_origin, find_origin
from periln.scripts.pretrain import open_data
from periln.scripts.recipe import Recipe, check_run_name

PLACEMENT, RATE, SEED = "model.norm_placement", "optimizer.learning_rate", "seed"
_SHORT = {PLACEMENT: "", "model": "", RATE: "lr", "optimizer.warmup": "warmup", SEED: "seed"}


def label(value: Any) -> str:
    """A grid value in words: numbers as briefly as they can be read back, sections as their values."""
    if isinstance(value, dict):
        return "-".join(label(v) for v in flatten(value).values())
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its recipe, the grid's values in it, and its folder."""

    recipe: Recipe
    values: dict[str, Any]
    run: RunFolder

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def placement(self) -> str:
        """The placement's name, or for the user's own placement the grid's name for it."""
        placement = self.recipe.model.get("norm_placement", "peri")
        return placement if isinstance(placement, str) else label(placement)

    @property
    def state(self) -> str:
        """The run's status; `waiting` before it began, `stopped` where it says `running` but its lock is free."""
        status = self.run.status or "waiting"
        return "stopped" if status == "running" and not _held(self.run.path) else status


def _held(path: Path) -> bool:
    """Whether a live process holds the run folder, without disturbing it."""
    try:
        with open(path / ".periln.lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep, in the order of its grid: the last field changes fastest."""

    name: str
    grid: dict[str, list[Any]]
    cells: list[Cell]
    path: Path

    def recipe_file(self, cell: Cell) -> Path:
        return self.path / "recipes" / f"{cell.name}.yaml"

    def log_file(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.name}.log"

    def write_recipes(self, tell: Callable[[str], None] = print) -> None:
        """Write every cell's recipe file. A sweep may grow; what a cell is may not change, once a cell has begun.

        What does not decide a cell's result (see `runkit.resume`) may change, and is told.

        Raises:
            UserError: a cell of this name has another recipe; the differing fields are named, nothing is written.
        """
        settled, told = [], []
        begun = any(RunFolder(self.path / file.stem).began for file in (self.path / "recipes").glob("*.yaml"))
        for cell in self.cells:
            file, recipe = self.recipe_file(cell), cell.recipe
            if file.exists() and begun:
                found = resumption(read_yaml(file), recipe)
                if found.different:
                    raise UserError(
                        f"{self.path} belongs to another sweep ({cell.name}: {'; '.join(found.different)}): give "
                        "another name, or another --runs"
                    )
                recipe = found.recipe
                told += [line for line in (*map(str, found.changes), *found.kept) if line not in told]
            settled.append((file, dump_yaml(to_mapping(recipe))))
        for line in told:
            tell(f"{self.path}: {line}")
        for file, text in settled:
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)

    def check_data(self) -> None:
        """Find out, before any cell is run, whether every cell has its data, and still the data that it began with.

        Raises:
            UsageError, UserError: names the cell, and the path or the fingerprints.
        """
        for cell in self.cells:
            recipe = replace(cell.recipe)
            try:
                fresh = recipe.init_from is not None and not cell.run.checkpoints()
                open_data(recipe, self.recipe_file(cell), find_origin(str(recipe.init_from)) if fresh else None)
            except UserError as error:
                raise type(error)(f"cell {cell.name}: {error}") from error
            began = cell.run.recipe.get("data_fingerprint") if (cell.run.path / "recipe.yaml").exists() else None
            if cell.run.began and began not in (None, recipe.data_fingerprint):
                raise UserError(
                    f"cell {cell.name}: {recipe.data} holds other data (fingerprint {recipe.data_fingerprint[:8]}) "
                    f"than the cell began with ({began[:8]})"
                )


def _cell_name(values: dict[str, Any]) -> str:
    order = sorted(values, key=lambda f: (f not in (PLACEMENT, "model"), f == SEED))
    parts = [_SHORT.get(field, field.split(".")[-1]) + label(values[field]) for field in order]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def _check_grid(mapping: dict[str, Any], grid: Any, path: Path) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise UsageError(f"{path}: a sweep needs a grid, a section of fields with lists of values")
    grid = flatten(grid)
    for field, values in grid.items():
        check_field(mapping, field, Recipe)
        if field in ("name", "stage", "data_fingerprint", "init_sha256"):
            raise UsageError(f"grid.{field} cannot be varied")
        if not isinstance(values, list) or not values:
            raise UsageError(f"grid.{field} must be a list of values, not {values!r}")
        labels = [label(v) for v in values]
        twice = [name for name in labels if labels.count(name) > 1]
        if twice:
            raise UsageError(f"grid.{field} has the value {twice[0]} twice")
    return grid


def load_sweep(path: Path, runs: Path = Path("runs")) -> Sweep:
    """Read a sweep and check every cell's recipe, before any work starts.

    Raises:
        UsageError, UserError: names the field, and the cell.
    """
    mapping = read_yaml(path)
    grid = _check_grid(mapping, mapping.pop("grid", None), path)
    name = mapping.get("name")
    try:
        check_run_name(name)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    cells = []
    for combination in product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        changed = mapping
        for field, value in values.items():
            changed = merge(changed, at_path(field, value))
        cell_name = _cell_name(values)
        try:
            recipe, run = from_mapping(Recipe, changed | {"name": cell_name}), RunFolder(runs / name / cell_name)
            adopt_origin(recipe, run)
            recipe.check()
        except UserError as error:
            raise type(error)(f"{path}, cell {cell_name}: {error}") from error
        cells.append(Cell(recipe, values, run))
    names = [cell.name for cell in cells]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise UsageError(f"{path}: two cells would be called {twice[0]}")
    return Sweep(name, grid, cells, runs / name)
