"""Copies of the checkout, and surroundings in which another copy of `periln` is found first."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("eval", "model_cards", "modeling_periln", "periln", "runkit", "scripts", "sft")
BUILT_FROM = (*FOLDERS, "docs", "examples", "tests")


def copy_to(folder: Path, *names: str) -> Path:
    """A copy of folders (and of the files next to them), without what Python and tools left in them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy2(file, folder / file.name)
    return folder


def dependencies() -> list[str]:
    """The folders with the installed packages that this process sees."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def run(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A process in its own environment: `HF_HUB_OFFLINE`, one thread, and what is given."""
    surroundings = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(cwd), **env}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=surroundings, capture_output=True, text=True, check=False)
