"""What may change between two starts of one run. Each field of a recipe declares it.

A run is identified by the fields of its recipe that decide its result, and by the content of its data (a fingerprint),
never by where they are. Everything else may change on a resume: how often checkpoints are written, which trackers
listen, where folders are.
"""

import dataclasses
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from periln.runkit.recipes import differing_fields, from_mapping, merge, section_of, to_mapping

RESULT = "result"  # may not change
BITS = "bits"  # may change: the same computation, rounded in another way
NOTHING = "nothing"  # may change
PLACE = "place"  # may change: a path, since a fingerprint says what is there

T = TypeVar("T")


def setting(default: Any = MISSING, *, decides: str = RESULT, before: Any = MISSING) -> Any:
    """A field of a recipe; a field declared without this decides the result.

    Args:
        default: as in `dataclasses.field`; without one, the field is required.
        decides: RESULT, BITS, NOTHING or PLACE: what changing it on a resume would do.
        before: what runs did before the field existed, where that is not the default. A run whose recipe.yaml lacks
            the field continues like that. For a section: the fields in which it differs from the section's defaults.
    """
    metadata = {"decides": decides} | ({} if before is MISSING else {"before": before})
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Change:
    """A field that differs from when the run began."""

    name: str
    old: Any
    new: Any
    decides: str

    def __str__(self) -> str:
        said = {
            BITS: "the computation is the same, but its bits will differ",
            NOTHING: "this does not decide the result",
            PLACE: "only the place differs",
        }
        return f"{self.name}: {self.old!r} -> {self.new!r} ({said[self.decides]})"


@dataclass
class Resumption(Generic[T]):
    """A recipe compared with the one that its run began with.

    Attributes:
        recipe: what to continue with.
        changes: the fields that differ, and may.
        kept: sentences about fields that the run's recipe.yaml lacks, which stay as they were before they existed.
        different: `field: old -> new` of the fields that may not change; with any, this is another run.
    """

    recipe: T
    changes: list[Change] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def resumption(old: dict[str, Any], recipe: T) -> Resumption[T]:
    """Compare a recipe (a dataclass, or a mapping whose fields all decide) with the mapping that a run began with."""
    found = Resumption(recipe)
    if isinstance(recipe, dict):
        found.different = differing_fields(old, recipe)
        return found
    mapping = _compare(found, type(recipe), old, to_mapping(recipe), "")
    if found.kept:
        found.recipe = from_mapping(type(recipe), mapping)
    return found


def as_before(cls: type, old: dict[str, Any]) -> dict[str, Any]:
    """The mapping that a run began with; fields that it lacks are as they were before they existed."""
    full, hints = dict(old), typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        was, section = old.get(one.name, _before(one)), section_of(hints[one.name])
        if was is not MISSING:
            full[one.name] = as_before(section, was) if section and isinstance(was, dict) else was
    return full


def _compare(found: Resumption[Any], cls: type, old: dict[str, Any], new: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill `found` from two mappings of one section; returns the mapping to continue with."""
    fields, hints, settled = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls), dict(new)
    for name, one in fields.items():
        section, value = section_of(hints[name]), new[name]
        if name in old:
            was = old[name]
        else:
            usual, was = _usual(one), _before(one)
            if was is not MISSING and was != value and value == usual:
                settled[name] = was
                found.kept.append(f"{where}{name} stays {was!r}: the run began before this field existed")
                continue
        if section and isinstance(was, dict) and isinstance(value, dict):
            settled[name] = _compare(found, section, was, value, f"{where}{name}.")
        elif was is MISSING or was != value:
            _judge(found, one.metadata.get("decides", RESULT), f"{where}{name}", was, value)
    for name in old.keys() - fields.keys():
        found.different.append(f"{where}{name}: {old[name]!r} -> a field that this version does not know")
    return settled


def _judge(found: Resumption[Any], decides: str, name: str, old: Any, new: Any) -> None:
    if old is MISSING:
        found.different.append(f"{name}: not named -> {new!r}")
    elif decides == PLACE and old is not None and new is not None and PurePath(old) == PurePath(new):
        pass  # a slash at the end, say
    elif decides == RESULT:
        found.different += differing_fields({name: old}, {name: new})
    else:
        found.changes.append(Change(name, old, new, decides))


def _usual(one: dataclasses.Field[Any]) -> Any:
    """A field's default as plain data."""
    value = one.default_factory() if one.default_factory is not MISSING else one.default
    return to_mapping(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _before(one: dataclasses.Field[Any]) -> Any:
    """What runs did before the field existed; MISSING for a field that was always required."""
    if "before" not in one.metadata:
        return _usual(one)
    before, usual = one.metadata["before"], _usual(one)
    return merge(usual, before) if isinstance(before, dict) and isinstance(usual, dict) else before
