"""Recipes: YAML files read into dataclasses, with every mistake found before any work starts."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UsageError, UserError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `2e-3` is a number (YAML 1.1 wants a dot) and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"field {twice!r} stands twice", node.start_mark)
        return mapping


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: no such file, or not readable.
        UsageError: no YAML, or no mapping.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping of fields, not {type(value).__name__}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args and type(value) in {type(a) for a in args}
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(v, args[0]) for v in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return (
        str(getattr(hint, "__name__", hint) if not typing.get_args(hint) else hint)
        .replace("NoneType", "null")
        .replace("None", "null")
    )


def from_mapping(cls: type[T], mapping: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` (sections may be dataclasses) from a mapping.

    Raises:
        UsageError: unknown field (with the nearest known one), missing field, wrong type; the message names
            the field with its sections and the value.
    """
    if not isinstance(mapping, dict):
        raise UsageError(f"{where.rstrip('.') or 'the recipe'} must be a section with fields, not {mapping!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in mapping.items():
        if name not in known:
            raise UsageError(f"unknown field {where}{name}{did_you_mean(name, list(known))}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_mapping(hint, value, f"{where}{name}.")
        elif not _fits(value, hint):
            raise UsageError(f"{where}{name} must be {_spell(hint)}, not {value!r}")
        elif hint is float:
            value = float(value)
        values[name] = value
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"the field {where}{name} is missing")
    return cls(**values)


def to_mapping(recipe: Any) -> dict[str, Any]:
    """A dataclass as plain, ordered data for YAML."""
    return dataclasses.asdict(recipe)


def dump_yaml(mapping: dict[str, Any]) -> str:
    """YAML text with the fields in their order."""
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=100)


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.field` keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`field: old -> new` for every field in which two recipes differ."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
