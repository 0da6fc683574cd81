"""What the documentation's pages do not hold themselves: MkDocs calls the hooks below when it builds them.

    <!-- generated: NAME -->   in a page is replaced by what `GENERATED[NAME]` returns
    folder/*                   in the navigation means the pages of that folder that it does not name
    [text](repo:PATH)          is a link to a file of the repository, which must exist

So a page about options, fields or placements says what the code says.
"""

import argparse
import ast
import dataclasses
import importlib
import io
import json
import re
import sys
import tempfile
import tokenize
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOLDERS = ("eval", "model_cards", "runkit", "scripts", "sft")
MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
TO_REPOSITORY = re.compile(r"\]\(repo:([^)#]+)(#[^)]*)?\)")
RECIPES = {  # heading: the dataclass, and where it is
    "Pretraining": "periln.scripts.recipe:Recipe",
    "Fine-tuning": "periln.sft.recipe:Recipe",
    "Demo": "periln.scripts.demo.recipe:DemoRecipe",
}
_temporary: list[tempfile.TemporaryDirectory] = []


class DocumentationError(ValueError):
    """A page that names what there is not."""


def repository() -> str:
    """The project's address, which pyproject.toml alone has."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


# --- the hooks -------------------------------------------------------------------------------------------------------
def on_config(config: Any) -> Any:
    """Fill in the navigation and the repository, and lay the packages out as an installation has them."""
    sys.path.insert(0, str(ROOT))
    config.nav = expand(config.nav)
    # In the footer: the header's link has every page ask GitHub how many stars there are.
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": repository(), "name": "The code"}]
    config.edit_uri = ""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(lay_out())]
    return config


on_config.mkdocs_priority = 100  # before mkdocstrings reads its paths; what `mkdocs.plugins.event_priority` sets


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the marks of a page."""
    return fill_in(markdown, page.file.src_uri)


def on_shutdown() -> None:
    """Remove the links."""
    while _temporary:
        _temporary.pop().cleanup()


def lay_out() -> Path:
    """A folder of links in which `periln.eval` is where mkdocstrings, which imports nothing, expects it."""
    _temporary.append(tempfile.TemporaryDirectory())
    place = Path(_temporary[-1].name)
    (place / "periln").mkdir()
    (place / "modeling_periln").symlink_to(ROOT / "modeling_periln")
    for name in FOLDERS:
        (place / "periln" / name).symlink_to(ROOT / name)
    for file in (ROOT / "periln").glob("*.py"):
        (place / "periln" / file.name).symlink_to(file)
    return place


def expand(nav: list[Any]) -> list[Any]:
    """The navigation with `folder/*` replaced by the folder's other pages, in the order of their names."""
    named = set(_pages(nav))

    def other(pattern: str) -> list[str]:
        pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(f"{pattern[:-1]}*.md"))
        return [page for page in pages if page not in named]

    def walk(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, dict):
                yield {key: list(walk(value)) if isinstance(value, list) else value for key, value in entry.items()}
            elif entry.endswith("/*"):
                yield from other(entry)
            else:
                yield entry

    return list(walk(nav))


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, dict):
            for value in entry.values():
                yield from _pages(value) if isinstance(value, list) else (value,)
        else:
            yield entry


def fill_in(markdown: str, where: str) -> str:
    """A page with its marks replaced.

    Raises:
        DocumentationError: a mark or a file that there is not; names the page.
    """

    def generated(found: re.Match[str]) -> str:
        if found[1] not in GENERATED:
            raise DocumentationError(f"{where}: nothing is generated as {found[1]!r}: {', '.join(GENERATED)}")
        return GENERATED[found[1]]()

    def link(found: re.Match[str]) -> str:
        if not (ROOT / found[1]).exists():
            raise DocumentationError(f"{where}: the repository has no {found[1]}")
        kind = "tree" if (ROOT / found[1]).is_dir() else "blob"
        return f"]({repository()}/{kind}/main/{found[1]}{found[2] or ''})"

    return TO_REPOSITORY.sub(link, MARK.sub(generated, markdown))


# --- the command line ------------------------------------------------------------------------------------------------
class _Parser(Exception):
    """Carries the parser of a command that was about to parse."""


def parser_of(command: str, prog: str) -> argparse.ArgumentParser:
    """The parser that a command's `parse` builds."""
    from periln.command_line import arguments_of

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parser(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            importlib.import_module(arguments_of(command)).parse(["--help"], prog=prog)
        except _Parser as found:
            return found.args[0]
    raise DocumentationError(f"{command} parses without a parser")


def command_line() -> str:
    """Every command: what it is for, examples, and its options."""
    from periln.verbs import OTHERS, VERBS

    verbs = [(f"periln {verb.name}", verb.command, verb.extra) for verb in VERBS]
    others = [(f"python -m {command}", command, extra) for command, extra in OTHERS.items()]
    return "\n\n".join(_command(*row) for row in verbs + others)


def _command(prog: str, command: str, extra: str) -> str:
    from periln.verbs import install_line

    parser = parser_of(command, prog)
    about, _, examples = (parser.description or "").partition("\n\n")
    lines = [f"## {prog}", "", " ".join(about.split()), ""]
    also = "`periln-convert`" if command == "convert" else f"`python -m {command}`"
    same = "" if prog.startswith("python") else f" From a clone, without installing: {also}."
    lines += [f"Needs `{install_line(extra)}`.{same}", ""]
    lines += ["```bash", *(line.strip() for line in examples.splitlines()[1:]), "```", ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if actions and not group.title.endswith("every command"):
            title = {"positional arguments": "Arguments", "options": "Options"}.get(group.title, group.title.title())
            lines += ["", f"**{title}**", "", "| | default | |", "|---|---|---|", *map(_row, actions)]
    if parser.epilog and command != "figures":
        lines += ["", "```text", parser.epilog, "```"]
    return "\n".join(lines)


def _row(action: argparse.Action) -> str:
    value = action.metavar or ("" if action.nargs == 0 or action.choices else action.dest.upper())
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    name = ", ".join(action.option_strings)
    shown = f"`{name}`" + (f" `{value}`" if value else "") if name else f"`{action.metavar or action.dest}`"
    if not name and action.choices:
        shown += f" `{value}`"
    default = action.default
    said = not (
        default is None or default is False or default == [] or (isinstance(default, Path) and default.is_absolute())
    )
    default = " ".join(map(str, default)) if isinstance(default, list) else default
    told = (action.help or "") % {"default": default, "prog": ""} if "%(" in (action.help or "") else action.help or ""
    required = "required" if action.required and name else f"`{default}`" if said else ""
    return f"| {_cell(shown)} | {_cell(required)} | {_cell(_text(told))} |"


def _text(words: str) -> str:
    """A help text as Markdown: what looks like a tag or a pattern is none."""
    return re.sub(r"([<>*_])", r"\\\1", words)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


# --- recipes ---------------------------------------------------------------------------------------------------------
def recipes() -> str:
    """A table of fields for every recipe, its sections below it."""
    return "\n\n".join(_recipe(heading, place) for heading, place in RECIPES.items())


def _recipe(heading: str, place: str) -> str:
    from periln.runkit.recipes import section_of

    module, _, name = place.partition(":")
    todo, parts = [("", getattr(importlib.import_module(module), name))], [f"## {heading}"]
    while todo:
        section, schema = todo.pop(0)
        sections = {f.name: section_of(typing.get_type_hints(schema)[f.name]) for f in dataclasses.fields(schema)}
        todo[:0] = [(f"{section}{name}.", kind) for name, kind in sections.items() if kind]
        parts.append(_fields(section, schema, sections))
    return "\n\n".join(parts)


def _fields(section: str, schema: type, sections: dict[str, Any]) -> str:
    source = Path(sys.modules[schema.__module__].__file__ or "")
    said, hints, lines = comments(source, schema.__name__), typing.get_type_hints(schema), []
    if section:
        lines += [f"**Section `{section.rstrip('.')}`**", ""]
    lines += [" ".join((schema.__doc__ or "").split("\n\n")[0].split()), ""]
    lines += ["| field | type | default | | on a resume |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(schema):
        kind = "section" if sections[field.name] else spelled(hints[field.name])
        default = "required" if _required(field) else "" if sections[field.name] else f"`{_default(field)}`"
        changed = {"result": "fixed", "bits": "may change; other bits", "nothing": "may change", "place": "may move"}
        resumed = "" if sections[field.name] else changed[field.metadata.get("decides", "result")]
        cells = (f"`{section}{field.name}`", kind, default, said.get(field.name, ""), resumed)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(value) if value is None or isinstance(value, (bool, list, dict)) else str(value) or '""'


def spelled(hint: Any) -> str:
    """A type as a writer of YAML knows it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(spelled, parts))
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin is list:
        return f"list of {spelled(parts[0])}"
    if hint is dict or origin is dict:
        return "mapping"
    return {type(None): "null", str: "text", typing.Any: "any"}.get(hint, getattr(hint, "__name__", str(hint)))


def comments(source: Path, name: str) -> dict[str, str]:
    """The comment of every field of a dataclass: behind it, or in the lines above it."""
    text = source.read_text()
    lines = {t.start[0]: t.string.lstrip("# ") for t in _tokens(text) if t.type == tokenize.COMMENT}
    alone = {number for number in lines if text.splitlines()[number - 1].lstrip().startswith("#")}
    tree = ast.parse(text)
    fields = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for node in fields:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, number = [], node.lineno - 1
            while number in alone:
                above.insert(0, lines[number])
                number -= 1
            behind = [lines[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in lines]
            found[node.target.id] = _text("; ".join(words for words in (" ".join(above), *behind) if words))
    return found


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


# --- records, placements, figures, pages -----------------------------------------------------------------------------
def step_record() -> str:
    """The fields of a line of metrics.jsonl, with their units."""
    from periln.runkit.steps import StepRecord

    rows = [f"| `{f.name}` | {spelled(f.type)} | {_cell(f.metadata['unit'])} |" for f in dataclasses.fields(StepRecord)]
    return "\n".join(["| key | type | unit or meaning |", "|---|---|---|", *rows])


def placements() -> str:
    """The table of placements, from the rows of data."""
    from modeling_periln.placements import MIXTURES, PLACEMENTS

    head = (
        "placement",
        "A",
        "B",
        "C",
        "inside",
        "embedding",
        "final",
        "alpha, s, c",
        "other for one sublayer",
        "init gain",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in PLACEMENTS.items():
        inside = [
            key for key in ("q_norm", "k_norm", "v_norm", "attn_inner_norm", "mlp_inner_norm") if getattr(row, key)
        ]
        own = [f"{sub}: {_plain(dict(getattr(row, sub)))}" for sub in ("attn", "mlp") if getattr(row, sub)]
        slots = (row.input_norm, row.output_norm, row.residual_norm)
        ends = (row.embedding_norm, row.final_norm)
        factors = ", ".join(map(_plain, (row.alpha, row.s, row.c)))
        cells = (f"`{name}`", *map(_tick, slots), ", ".join(inside), *map(_tick, ends), factors, "; ".join(own))
        lines.append("| " + " | ".join((*cells, _plain(row.init_gain))) + " |")
    for name, mixture in MIXTURES.items():
        layers = "; ".join(map(_plain, mixture.layers(4)))
        lines.append(f"| `{name}` | in 4 layers: {layers} |" + " |" * (len(head) - 2))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_plain(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tick(slot: Any) -> str:
    return "N" if slot else ""


def figures() -> str:
    """The figures there are."""
    from periln.eval.figures.titles import TITLES

    return "\n".join(["| FIG | shows |", "|---|---|", *(f"| `{name}` | {title} |" for name, title in TITLES.items())])


def extras() -> str:
    """Which extra brings which verb."""
    from periln.verbs import VERBS

    lines = ["| extra | verbs |", "|---|---|"]
    for extra in dict.fromkeys(verb.extra for verb in VERBS):
        names = ", ".join(f"`{verb.name}`" for verb in VERBS if verb.extra == extra)
        lines.append(f"| {f'`{extra}`' if extra else 'none'} | {names} |")
    return "\n".join(lines)


def result_pages() -> str:
    """Links to the pages of results."""
    pages = sorted(path for path in (DOCS / "results").glob("*.md") if path.name != "index.md")
    titles = {path: re.search(r"^# (.+)$", path.read_text(), re.MULTILINE) for path in pages}
    return "\n".join(f"- [{found[1] if found else path.stem}]({path.name})" for path, found in titles.items())


def study() -> str:
    """The study's tables, as `periln study export` wrote them next to its records."""
    text = (DOCS / "results" / "records" / "study" / "verdicts.md").read_text()
    return text.partition("\n")[2].strip()


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "extras": extras,
    "figures": figures,
    "placements": placements,
    "recipes": recipes,
    "results": result_pages,
    "step-record": step_record,
    "study": study,
}
