"""What the project says of versions in several files is one thing."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# torch is chosen by itself, and the extras name the project.
ELSEWHERE = {"torch", "peri-llama"}


def pins(file: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def required(extras: tuple[str, ...]) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    return {name: requirement for name, requirement in found.items() if name not in ELSEWHERE}


DEV = required(("bench", "train", "eval", "data", "sft", "test"))
DOCS = required(("docs",))  # the oldest environment builds no documentation


@pytest.mark.parametrize("name", sorted(DEV))
def test_every_floor_is_what_the_oldest_environment_has(name):
    floors = [Version(s.version) for s in DEV[name].specifier if s.operator == ">="]
    assert floors == [Version(pins("constraints-oldest.txt")[name])]


def test_the_oldest_environment_pins_nothing_else():
    assert set(pins("constraints-oldest.txt")) == set(DEV)


@pytest.mark.parametrize("name", sorted(DEV | DOCS))
def test_the_pinned_version_is_admitted(name):
    assert (DEV | DOCS)[name].specifier.contains(pins("constraints.txt")[name])


def installed_closure(requirements: list[Requirement]) -> dict[str, str]:
    """Name and installed version of everything that the requirements bring, but for what torch brings."""
    found, waiting, seen = {}, [(r, {""}) for r in requirements], set()
    while waiting:
        requirement, extras = waiting.pop()
        name, key = canonicalize_name(requirement.name), (requirement.name, frozenset(requirement.extras))
        marker = requirement.marker
        needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if not needed or name in ELSEWHERE or key in seen:
            continue
        seen.add(key)
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        waiting += [(Requirement(line), {"", *requirement.extras}) for line in requires(name) or []]
    return found


def test_everything_that_the_dependencies_bring_is_pinned():
    installed, pinned = installed_closure(list(DEV.values())), pins("constraints.txt")
    others = [name for name, pin in pinned.items() if name in installed and Version(installed[name]) != Version(pin)]
    if others:
        pytest.skip(f"other versions than those of constraints.txt are installed: {', '.join(others)}")
    assert sorted(set(installed) - set(pinned)) == []


# The workflow


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_every_command_of_the_workflow_is_a_target_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for job in workflow()["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for end in ("oldest", "newest"):
            words = command.replace("${{ matrix.end }}", end).split()
            assert words[0] == "make" and words[1] in targets, command


def test_pushes_and_pull_requests_run_lint_and_the_suite_and_the_schedule_both_ends():
    text = workflow()
    triggers = text[True]  # YAML 1.1 reads the key `on` as a boolean
    assert {"push", "pull_request", "schedule"} <= set(triggers)
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in text["jobs"].items()}
    assert runs["lint"][0].startswith("make lint") and runs["suite"][0].startswith("make test ")
    assert runs["versions"][0].startswith("make test-${{ matrix.end }}")
    assert text["jobs"]["versions"]["strategy"]["matrix"]["end"] == ["oldest", "newest"]
