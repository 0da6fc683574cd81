"""Recipes: YAML files read into dataclasses, with every mistake found before any work starts."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from periln.runkit.errors import UsageError, UserError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `2e-3` is a number (YAML 1.1 requires a dot) and no key appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"field {twice!r} appears twice", node.start_mark)
        return mapping


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, merged over the file that its field `base` names, if it has one.

    `base` is a path relative to the file that names it, and may have a base itself. See `merge` for what wins.

    Raises:
        UserError: no such file, or not readable.
        UsageError: no YAML, no mapping, or a base that is not a path or leads back to itself.
    """
    return _read_chain(Path(path), [])


def _read_chain(path: Path, above: list[Path]) -> dict[str, Any]:
    """`read_yaml` for the base of the last file of `above`, or for a file that is not a base."""
    if path.resolve() in [p.resolve() for p in above]:
        raise UsageError(f"base: the recipes lead in a circle: {' -> '.join(map(str, [*above, path]))}")
    try:
        mapping = _read_one(path)
    except UserError as error:
        if above:
            raise type(error)(f"{above[-1]}: base: {error}") from error
        raise
    if "base" not in mapping:
        return mapping
    base = mapping.pop("base")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{path}: base must be the path of another recipe, not {base!r}")
    return merge(_read_chain(path.parent / base, [*above, path]), mapping)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it: sections are merged field by field, all else (lists too) is replaced.

    `null` is a value like any other. For a section it means that nothing of the base is kept: its fields have
    their defaults again.
    """
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def at_path(dotted: str, value: Any) -> dict[str, Any]:
    """`a.b.c` and a value as nested sections."""
    *sections, last = dotted.split(".")
    nested = {last: value}
    for name in reversed(sections):
        nested = {name: nested}
    return nested


def apply_overrides(mapping: dict[str, Any], assignments: list[str], schema: type | None = None) -> dict[str, Any]:
    """A recipe's mapping with assignments such as `optimizer.learning_rate=1e-3` over it; values are YAML.

    Raises:
        UsageError: no `field=value`, a field twice, a field of something that is not a section, or one that the
            dataclass `schema` does not have (with the nearest that it has).
    """
    seen: set[str] = set()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not all(name.split(".")):
            raise UsageError(f"{assignment!r} is not an assignment: write field=value or section.field=value")
        if not text.strip():
            raise UsageError(f"{assignment!r} has no value: write {name}=null for none")
        if name in seen:
            raise UsageError(f"{name} is assigned twice")
        seen.add(name)
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"{name}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from error
        check_field(mapping, name, schema)
        mapping = merge(mapping, at_path(name, value))
    return mapping


def check_field(mapping: dict[str, Any], dotted: str, schema: type | None) -> None:
    """Raise UsageError where `dotted` names no field of `schema`, or goes through a value."""
    words, here = dotted.split("."), mapping
    for i, word in enumerate(words):
        where = "".join(f"{w}." for w in words[:i])
        schema = section_of(schema) or schema
        if dataclasses.is_dataclass(schema):
            hints = typing.get_type_hints(schema)
            if word not in hints:
                raise UsageError(f"unknown field {where}{word}{did_you_mean(word, list(hints))}")
            schema = hints[word]
        last = i == len(words) - 1
        sectionless = here.get(word) is not None and not isinstance(here[word], dict)
        if not last and (sectionless or not _may_be_section(schema)):
            raise UsageError(f"{dotted}: {where}{word} is a value, not a section")
        here = here[word] if isinstance(here.get(word), dict) else {}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union without null, or the one type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint,)


def section_of(hint: Any) -> type | None:
    """The dataclass of a field that is a section, also of one that may be null; None for any other field."""
    return next((kind for kind in _kinds(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _may_be_section(hint: Any) -> bool:
    if hint in (None, Any) or section_of(hint):
        return True
    return any((typing.get_origin(kind) or kind) is dict for kind in _kinds(hint))


def _read_one(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
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


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def from_mapping(cls: type[T], mapping: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from a mapping. Sections are dataclasses; one that is `null` has its defaults.

    A section declared as `Section | None` may be left out: there `null` means no section.

    Raises:
        UsageError: unknown field (with the nearest known one), missing field, wrong type; the message names
            the field with its sections and the value.
    """
    if not isinstance(mapping, dict):
        raise UsageError(f"{where.rstrip('.') or 'the recipe'} must be a section with fields, not {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields: Any = cls  # a dataclass, which no type variable can express
    known = {f.name: f for f in dataclasses.fields(fields)}
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in known:
            raise UsageError(f"unknown field {where}{name}{did_you_mean(name, list(known))}")
        hint = hints[name]
        if section := section_of(hint):
            if value is None and section is not hint:
                values[name] = None  # a section that may be left out
                continue
            if value is None and _has_default(known[name]):
                continue
            value = from_mapping(section, value, f"{where}{name}.")
        elif not _fits(value, hint):
            raise UsageError(f"{where}{name} must be {_spell(hint)}, not {value!r}")
        elif hint is float:
            value = float(value)
        values[name] = value
    for name, field in known.items():
        if name not in values and not _has_default(field):
            raise UsageError(f"the field {where}{name} is missing")
    return cls(**values)


def to_mapping(recipe: Any) -> dict[str, Any]:
    """A dataclass as plain, ordered data for YAML; a mapping as it is."""
    return recipe if isinstance(recipe, dict) else dataclasses.asdict(recipe)


def dump_yaml(mapping: dict[str, Any]) -> str:
    """YAML text with the fields in their order."""
    text: str = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=100)
    return text


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
