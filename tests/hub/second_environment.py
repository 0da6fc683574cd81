"""A virtual environment that has only torch, transformers and what these two need.

Made by `venv` without pip; the distributions are linked, not copied, from the environment that runs the tests, so that
it is there in a second. Nothing else of that environment can be imported in it: not accelerate, not this project.
"""

import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOTS = ("torch", "transformers")
ABSENT = (
    "accelerate",
    "datasets",
    "peft",
    "trl",
    "pandas",
    "lm_eval",
    "modeling_periln",
    "runkit",
    "scripts",
    "pytest",
)


def closure(names: tuple[str, ...] = ROOTS) -> dict[str, metadata.Distribution]:
    """The distributions that some need, without extras, by their normalized names."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        key = requirement.name.lower().replace("_", "-")
        extras = requirement.extras or {""}
        if key in found:
            continue
        found[key] = metadata.distribution(requirement.name)
        for line in found[key].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


def create(folder: Path) -> Path:
    """The environment's interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for distribution in closure().values():
        root = Path(distribution.locate_file("")).resolve()
        tops = {Path(str(file)).parts[0] for file in distribution.files or ()}
        for top in sorted(tops - {"..", "__pycache__"}):
            if (root / top).exists() and not (site / top).exists():
                (site / top).symlink_to(root / top)
    return folder / "bin" / "python"
