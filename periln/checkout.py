"""A checkout runs its own code, whatever is installed: `python -m eval.report` is the checkout's `periln.eval.report`.

The folders of a checkout are found twice, as `eval` and as `periln.eval`. Both names mean one module, so nothing
has two copies of its state, and `periln` is the folder next to them rather than an installed one.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


class _SameModule(SourceFileLoader):
    """Gives `eval.report` the module `periln.eval.report`; `python -m` reads the source through it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"periln.{spec.name}")
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system put the other name's there


class _Finder(MetaPathFinder):
    """Finds `eval.report` as `periln.eval.report` where `eval` is the folder of this checkout."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = fullname.partition(".")[0]
        if folder == fullname or sys.modules.get(folder) is not sys.modules.get(f"periln.{folder}"):
            return None
        own = importlib.util.find_spec(f"periln.{fullname}")
        if own is None or own.origin is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            own.origin,
            loader=_SameModule(fullname, own.origin),
            submodule_search_locations=own.submodule_search_locations,
        )


def bind(folder: str) -> None:
    """Make `folder`, a package at the top of this checkout, another name of `periln.<folder>` of this checkout.

    Raises:
        ImportError: another copy of `periln` is already imported.
    """
    init = HERE / "__init__.py"
    found = sys.modules.get("periln")
    if found is None:
        spec = importlib.util.spec_from_file_location("periln", init, submodule_search_locations=[str(HERE)])
        assert spec is not None and spec.loader is not None
        found = sys.modules["periln"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    if not found.__file__ or Path(found.__file__).resolve() != init:
        raise ImportError(f"{folder} is the folder in {HERE.parent}, but periln was imported from {found.__file__}")
    if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    sys.modules[folder] = importlib.import_module(f"periln.{folder}")
