"""Files of the model family that import nothing, read without its package, which imports torch."""

import importlib.util
import runpy
from pathlib import Path
from typing import Any


def part(name: str) -> dict[str, Any]:
    """The names that `modeling_periln/<name>.py` defines."""
    spec = importlib.util.find_spec("modeling_periln")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("modeling_periln is not installed beside periln", name="modeling_periln")
    return runpy.run_path(str(Path(spec.origin).parent / f"{name}.py"))
