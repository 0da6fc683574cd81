"""How a command starts: its arguments are parsed and checked before anything that takes seconds is imported."""

import argparse
import gc
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from periln.runkit.errors import INTERRUPTED, UserError, run_command, until_unread
from periln.verbs import extra_of, install_line


def start(
    command: str,
    parse: Callable[[list[str] | None], argparse.Namespace],
    check: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> int:
    """Run the `main` of a command, such as `eval.report`, and return its exit code.

    An impossible argument is refused before the command's module is imported. Ctrl-C until then ends the process
    at once: nothing has begun, and an import has nothing to save. A package that the command needs and that is
    not installed is named in one sentence with the extra that brings it. When the output is no longer read
    (`| head`), the command ends silently.
    """
    return until_unread(lambda: _started(command, parse, check, argv))


def _started(
    command: str,
    parse: Callable[[list[str] | None], argparse.Namespace],
    check: Callable[[argparse.Namespace], None],
    argv: list[str] | None,
) -> int:
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    args = parse(argv)
    if code := run_command(check, args):
        return code

    def main(args: argparse.Namespace) -> int | None:
        try:
            work = main_of(module_of(command))
            if interruptible:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            return work(args)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("periln", "modeling_periln"):
                raise
            raise UserError(f"{error.name} is not installed: {install_line(extra_of(command))}") from error

    return run_command(main, args)


def main_of(module: str) -> Callable[[argparse.Namespace], int | None]:
    """The `main` of a module, imported without looking for garbage: torch and Transformers are a fifth quicker so.

    What the import leaves is not looked at again either.
    """
    if module not in sys.modules and gc.isenabled():
        gc.disable()
        try:
            importlib.import_module(module)
            gc.freeze()
        finally:
            gc.enable()
    work: Callable[[argparse.Namespace], int | None] = importlib.import_module(module).main
    return work


def module_of(command: str) -> str:
    """The module whose `main` does the work: the command's own, or `command` (else `__main__`) of a package."""
    name = f"periln.{command}"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return name
    inside = f"{name}.command"
    return inside if importlib.util.find_spec(inside) is not None else f"{name}.__main__"


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
