"""The command `periln`: one verb for every stage."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from periln.family import part
from periln.runkit.errors import USAGE, did_you_mean, until_unread
from periln.start import start
from periln.verbs import VERBS, Verb, install_line


def overview() -> str:
    """What `periln --help` prints: every verb with its sentence, under the extra that brings its packages."""
    width = max(len(verb.name) for verb in VERBS)
    lines = ["usage: periln VERB ...      (periln VERB --help for its options)"]
    for extra in dict.fromkeys(verb.extra for verb in VERBS):
        lines += ["", install_line(extra)]
        lines += [f"  {verb.name:{width}}  {verb.sentence}" for verb in VERBS if verb.extra == extra]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns its exit code; 2 for an unknown verb."""
    return until_unread(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    if not words:
        print(f"{overview()}\n\nerror: name a verb", file=sys.stderr)
        return USAGE
    if words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"periln {part('version')['__version__']}")
        return 0
    verb = next((verb for verb in VERBS if verb.name == words[0]), None)
    if verb is None:
        names = [verb.name for verb in VERBS]
        near = did_you_mean(words[0], names)
        print(f"error: periln has no verb {words[0]!r}{near}: {', '.join(names)}", file=sys.stderr)
        return USAGE
    return run_verb(verb, words[1:])


def run_verb(verb: Verb, words: list[str]) -> int:
    """Run a verb with the words after it."""
    arguments = importlib.import_module(arguments_of(verb.command))
    return start(verb.command, partial(arguments.parse, prog=f"periln {verb.name}"), arguments.check, words)


def arguments_of(command: str) -> str:
    """The module with a command's `parse` and `check`."""
    stage, _, name = command.rpartition(".")
    return f"periln.{stage}.arguments.{name}" if stage else f"periln.{name}"
