"""Errors for people, and the frame of every command line in the project.

The exit codes, the same for every command:

    0    done
    1    failed, or refused because of the state found: a folder of another run, a lock, a diverged run, a full disk
    2    bad usage or input: an argument, a recipe, a path that is missing or holds something else
    130  interrupted (SIGINT); what can be resumed was saved
    141  the output is no longer read (`| head`)
    143  terminated (SIGTERM); likewise
"""

import argparse
import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from periln.family import part

USAGE, FAILURE = 2, 1
INTERRUPTED, TERMINATED = 130, 143
_PIPES = part("pipes")
UNREAD: int = _PIPES["UNREAD"]
unread: Callable[[], bool] = _PIPES["unread"]
until_unread: Callable[[Callable[[], int | None]], int] = _PIPES["until_unread"]


class UserError(Exception):
    """Something the user can fix. The message is one sentence that names the field or the path."""

    exit_code = FAILURE


class UsageError(UserError):
    """A mistake in what was asked for: an argument, a recipe, or a path where nothing suitable is."""

    exit_code = USAGE


class StoppedBySignal(Exception):
    """The run was asked to stop, and has saved what it had."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` or nothing."""
    close = get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\n")

    def format_help(self) -> str:
        """The options of every command come last."""
        self._action_groups.sort(key=lambda group: group.title == EVERY_COMMAND)
        return super().format_help()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something: not None, a switch that is off, an empty list or one of our own files."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if (
            default is None
            or default is False
            or default == []
            or (isinstance(default, Path) and default.is_absolute())
        ):
            return action.help
        shown = super()._get_help_string(action)
        if shown is None or not (default is True or isinstance(default, (list, tuple))):
            return shown
        # As it is typed: several words, or one with commas; and a switch is on.
        typed = "on" if default is True else (" " if action.nargs else ",").join(map(str, default))
        return shown.replace("%(default)s", typed.replace("%", "%%"))


EVERY_COMMAND = "options of every command"
MORE = "more options"
WIDTH = 78  # characters of a description's line


def make_parser(prog: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of a command: errors in one line; `--help` shows examples and defaults.

    Args:
        prog: what is typed, such as `periln bench`.
        description: one sentence on what the command is for.
        examples: what may follow `prog`, a line each.

    Options that few users need belong in `more_options(parser)`. `--stop-with-parent` and `--bar` are for commands
    that start others, and are not shown.
    """
    lines = "".join(f"\n  {prog} {words}" for words in examples)
    heading = f"\n\nexample{'s' if len(examples) > 1 else ''}:" if examples else ""
    about = textwrap.fill(description, WIDTH) + heading + lines
    parser = _Parser(prog=prog, description=about, formatter_class=_Help)
    every = parser.add_argument_group(EVERY_COMMAND)
    every.add_argument("--threads", type=int, metavar="N", help="CPU threads; torch's own number when left out")
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--stop-with-parent", type=int, help=argparse.SUPPRESS)  # a process id
    parser.add_argument("--bar", type=int, default=0, help=argparse.SUPPRESS)  # the progress bar's line, from 0
    return parser


def more_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group of the options that few users need: shown after the others."""
    return parser.add_argument_group(MORE)


def run_command(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command's main function and turn what it raises into one sentence and an exit code.

    See the table at the top. With `args.debug` the traceback is shown as well. Characters that the terminal's
    encoding lacks are written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(args) or 0
    except StoppedBySignal as stop:
        print(f"{stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and unread():
            return UNREAD
        if args.debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror.lower()}{where}" if error.strerror else " ".join(str(error).split())
        print(f"error: {text}", file=sys.stderr)
        return USAGE if isinstance(error, FileNotFoundError) and _was_named(error.filename, args) else FAILURE
    except Exception as error:
        if args.debug:
            raise
        print(
            f"error: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows the traceback)",
            file=sys.stderr,
        )
        return FAILURE


def _was_named(path: str | bytes | None, args: argparse.Namespace) -> bool:
    """Whether the command line names the path, rather than our code."""
    words = [word for value in vars(args).values() for word in (value if isinstance(value, list) else [value])]
    return path is not None and os.fsdecode(path) in {str(word) for word in words}
