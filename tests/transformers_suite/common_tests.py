"""Transformers' own common model tests, imported from a folder with its source, as the package `tests`.

A git checkout of Transformers has all of the test modules. The source distribution on the package index has only
those named `tests/test_*.py`; for each other module that they import, a stand-in takes its place here, and `NOTES`
says what that costs.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers

NOTES: list[str] = []

# For `ConfigTester`: values that differ from the defaults and that every configuration must keep.
_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["LlamaModel"],
    "id2label": {0: "yes", 1: "no", 2: "maybe"},
    "label2id": {"yes": 0, "no": 1, "maybe": 2},
    "problem_type": "regression",
    "tie_word_embeddings": True,
    "bos_token_id": 6,
    "pad_token_id": 7,
    "eos_token_id": 8,
}


def source_version(source: Path) -> str:
    """The version that a folder with Transformers' source is of.

    Raises:
        ValueError: the folder does not hold Transformers' source.
    """
    init = source / "src" / "transformers" / "__init__.py"
    if not (source / "tests" / "test_modeling_common.py").is_file() or not init.is_file():
        raise ValueError(f"{source} holds no tests/test_modeling_common.py and src/transformers")
    found = re.search(r'^__version__ = "(.+)"', init.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{init} names no __version__")
    return found.group(1)


def install(source: Path) -> None:
    """Make `import tests` mean Transformers' tests, in this process and in those that it spawns. Idempotent."""
    folder = source / "tests"
    if str(folder) in getattr(sys.modules.get("tests"), "__path__", ()):
        return
    NOTES.clear()
    sys.path.insert(0, str(source))  # for a spawned process, to which multiprocessing hands this list
    for name in [m for m in sys.modules if m == "tests" or m.startswith("tests.")]:
        del sys.modules[name]
    # Made by hand: our own `tests` folder is on the path too, and without an `__init__.py` in theirs (a source
    # distribution) the two would be one namespace package.
    _add_module("tests", path=folder)
    if not (folder / "__init__.py").is_file():
        # Theirs looks for `tests/__init__.py` to import Transformers by its path.
        mock.patch("transformers.utils.direct_transformers_import", return_value=transformers).start()

    _stand_in("generation.test_utils", "no tests of generation", GenerationTesterMixin=_empty("GenerationTesterMixin"))
    _stand_in("exporters.test_export", "no tests of export", ExportTesterMixin=_empty("ExportTesterMixin"))
    _stand_in(
        "utils.test_configuration_utils",
        f"configurations are tested with {len(_COMMON_KWARGS)} of our own common fields",
        config_common_kwargs=_COMMON_KWARGS,
    )
    if importlib.util.find_spec("tests.distributed_testing_utils") is None:
        launcher = importlib.import_module("rank_processes")
        sys.modules["tests.distributed_testing_utils"] = launcher
        _note("distributed_testing_utils", "a launcher of our own starts the processes of the parallel tests")


def _empty(name: str) -> type:
    return type(name, (), {"__doc__": "Stands in for a mixin that this folder does not have."})


def _add_module(name: str, path: Path | None = None, **contents: object) -> None:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__spec__.submodule_search_locations = module.__path__
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


def _stand_in(name: str, cost: str, **contents: object) -> None:
    package, _, _ = name.partition(".")
    folder = Path(sys.modules["tests"].__path__[0])
    if (folder / (name.replace(".", "/") + ".py")).is_file():
        return
    if not (folder / package).is_dir():
        _add_module(f"tests.{package}", path=folder / package)
    else:
        importlib.import_module(f"tests.{package}")
    _add_module(f"tests.{name}", **contents)
    _note(name, cost)


def _note(name: str, cost: str) -> None:
    NOTES.append(f"{cost}: tests/{name.replace('.', '/')}.py is not in this folder, a git checkout has it")
