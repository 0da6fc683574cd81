"""The house: imports go down only, in no circle, and files stay short. See the picture in `FLOORS`."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import those that it names, and nothing else of ours. `sft` is a whole floor.
FLOORS = {
    "modeling_periln": set(),
    "runkit": {"modeling_periln"},
    "model_cards": {"runkit", "modeling_periln"},
    "eval.text_table": {"runkit"},
    "eval.records": {"runkit"},
    "eval.arguments": {"runkit"},
    "eval.targets": {"runkit", "modeling_periln"},
    "eval.texts": {"runkit", "modeling_periln", "eval.arguments"},
    "eval.structure": {"runkit", "modeling_periln"},
    "eval.scoring": {"runkit", "eval.targets", "eval.arguments"},
    "eval.options": {"runkit", "eval.arguments", "eval.scoring"},
    "eval.tables": {"runkit", "eval.records", "eval.text_table"},
    "eval.figures": {"runkit", "eval.arguments", "eval.records"},
    "eval.report": {
        *("runkit", "eval.arguments", "eval.records", "eval.tables", "eval.text_table", "eval.figures"),
    },
    "eval.live": {"runkit", "eval.arguments", "eval.records", "eval.figures"},
    "eval.bounds": {
        *("runkit", "eval.arguments", "eval.structure", "eval.texts", "eval.targets", "eval.records"),
        "eval.text_table",
    },
    "eval.stability": {
        *("runkit", "modeling_periln", "eval.structure", "eval.texts", "eval.targets", "eval.records"),
        *("eval.text_table", "eval.bounds", "eval.arguments"),
    },
    "eval.study": {
        *("runkit", "eval.arguments", "eval.records", "eval.structure", "eval.texts", "eval.targets", "eval.bounds"),
        "eval.stability",
    },
    "eval.fp16": {
        *("runkit", "modeling_periln", "eval.arguments", "eval.structure", "eval.texts", "eval.targets"),
        "eval.stability",
    },
    "eval.formats": {
        *("runkit", "eval.arguments", "eval.structure", "eval.texts", "eval.targets", "eval.records"),
        *("eval.text_table", "eval.figures", "eval.fp16"),
    },
    "eval.retrofit": {
        *("runkit", "eval.arguments", "eval.structure", "eval.texts", "eval.targets", "eval.stability"),
        *("eval.text_table", "eval.figures", "eval.formats", "eval.scoring"),
    },
    "scripts.gpus": set(),
    "scripts.costs": {"modeling_periln"},
    "scripts.optimizers": {"runkit"},
    "scripts.parametrization": {"runkit"},
    "scripts.recipe": {"runkit", "modeling_periln", "scripts.optimizers", "scripts.parametrization"},
    "scripts.origin": {"runkit", "modeling_periln", "scripts.recipe"},
    "scripts.data": {"runkit"},
    "scripts.prepare_data": {"runkit", "scripts.data"},
    "scripts.training": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.costs", "scripts.gpus", "scripts.data"),
        *("scripts.origin", "scripts.optimizers", "scripts.parametrization"),
    },
    "scripts.pretrain": {"runkit", "scripts.recipe", "scripts.origin", "scripts.data", "scripts.training"},
    "scripts.synthetic_data": {"scripts.data", "scripts.prepare_data"},
    "scripts.bench": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.costs", "scripts.synthetic_data", "scripts.training"),
    },
    "scripts.plan": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.costs", "scripts.gpus", "scripts.training"),
        *("scripts.origin", "scripts.optimizers"),
    },
    "scripts.sweep": {
        *("runkit", "scripts.recipe", "scripts.costs", "scripts.gpus", "scripts.plan", "scripts.pretrain"),
        "scripts.origin",
    },
    "scripts.gpu_check": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.costs", "scripts.synthetic_data"),
        *("scripts.training", "scripts.plan"),
    },
    "scripts.coordinate_check": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.parametrization", "scripts.training"),
    },
    "scripts.study": {
        *("runkit", "modeling_periln", "scripts.recipe", "scripts.costs"),
    },
    "scripts.demo": {"runkit", "modeling_periln", "scripts.recipe", "scripts.data"},
    "scripts.push": {"runkit", "model_cards"},
    "scripts.retrofit": {"runkit", "modeling_periln", "scripts.data", "scripts.origin"},
    "sft": {"runkit", "modeling_periln"},
}
COMMANDS = ("eval.bench", "eval.benchmarks", "eval.evaluate", "eval.loss", "eval.watch", "eval.widen")
FOR_COMMANDS = {
    *("runkit", "eval.arguments", "eval.options", "eval.scoring", "eval.targets", "eval.text_table"),
    "eval.texts",
}
LONGEST = 400
ROOMS = ("eval", "scripts")  # folders of rooms; the others are one room each
FOLDERS = ("modeling_periln", "runkit", "model_cards", "eval", "scripts", "sft")


def files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def ours(name: str) -> str:
    return name.removeprefix("periln.")


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    package, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {ours(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ours(".".join([*above, *([node.module] if node.module else [])]))
            found |= {f"{base}.{alias.name}" if exists(f"{base}.{alias.name}") else base for alias in node.names}
    return {name for name in found if name.split(".")[0] in FOLDERS}


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] in ROOMS and parts[1:2] == ["arguments"] and parts[2:] not in ([], ["shared"]):
        return f"{parts[0]}.{parts[2]}"  # the options of a command are a part of it
    return ".".join(parts[:2]) if parts[0] in ROOMS else parts[0]


GRAPH = {module_of(path): imported(path) - {module_of(path)} for path in files()}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_down_only(module):
    room = room_of(module)
    if module in ("eval", "scripts", "scripts.arguments", "eval.tasks.mini_prompts"):
        allowed = set()
    elif room in COMMANDS:
        allowed = FOR_COMMANDS
    else:
        allowed = FLOORS[room]
    above = {room_of(name) for name in GRAPH[module]} - {room} - allowed
    assert not above, f"{module} may not import {', '.join(sorted(above))}"


def test_no_module_imports_itself_through_others():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        # A package's own name is the package's __init__, which its modules may stand below of.
        for name in sorted(GRAPH.get(module, ()) - {module.rpartition(".")[0]}):
            visit(name)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_the_floors_have_no_circle_and_name_rooms_that_are_there():
    left = dict(FLOORS)
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]
    roomless = {"eval", "eval.tasks", "scripts", "scripts.arguments", *COMMANDS}
    assert {room_of(module) for module in GRAPH} - roomless == set(FLOORS)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_the_recipes_of_contributing_name_files_that_exist_three_at_most():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipes = text.partition("## Recipes")[2].partition("## Prose")[0].split("\n\n**")[1:]
    assert len(recipes) == 8
    for recipe in recipes:
        named = re.findall(r"`((?:[a-z_]+/)+[\w.]+\.(?:py|yaml|jsonl))`", recipe)
        steps = re.findall(r"(?<!\w)(\d)\. ", recipe)
        assert named and len(steps) <= 3, recipe
        assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_the_address_of_the_project_is_one_field():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    texts = [ROOT / name for name in tracked if name.endswith((".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".j2"))]
    assert texts or not (ROOT / ".git").exists()
    holding = [file.name for file in texts if file.exists() and address.removeprefix("https://") in file.read_text()]
    assert holding in (["pyproject.toml"], [])


def test_the_test_files_that_begin_first_are_there():
    named = re.findall(r'^    "([\w/]+\.py)",$', (ROOT / "tests" / "conftest.py").read_text(), re.MULTILINE)
    assert named and all((ROOT / "tests" / name).is_file() for name in named)
