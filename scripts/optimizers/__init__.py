"""The optimizers that a recipe can name, a file each; to add one, add a file with a `ROW` like the others'.

What a row says decides everything that the trainer, its checkpoints and the plans need to know. States are stored under
their parameters' names, whatever their keys are, so that a new optimizer resumes exactly without more code.
"""

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from periln.runkit.errors import UsageError, did_you_mean
from periln.runkit.recipes import from_mapping
from periln.scripts.optimizers import rows
from periln.scripts.optimizers.rows import Row as Row

ROWS: dict[str, Row] = {
    module.name: import_module(f"{__name__}.{module.name}").ROW
    for module in iter_modules(__path__)
    if module.name != rows.__name__.rpartition(".")[2]
}


def find_row(name: str) -> Row:
    """The row of an optimizer.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in ROWS:
        raise UsageError(f"optimizer.name {name!r} is none of {', '.join(ROWS)}{did_you_mean(name, list(ROWS))}")
    return ROWS[name]


def read_options(name: str, options: dict[str, Any]) -> Any:
    """A recipe's `optimizer.options` as the row's own dataclass.

    Raises:
        UsageError: an unknown field, or a value that it cannot have; the message names it.
    """
    row = find_row(name)
    schema: Any = row.options
    if options and not fields(schema):
        raise UsageError(f"optimizer.options.{next(iter(options))}: {name} has no options")
    found: Any = from_mapping(schema, options, "optimizer.options.")
    row.check(found)
    return found
