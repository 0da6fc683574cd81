"""`--help` of every command: one sentence, an example that parses, defaults that say something, and no internals."""

import argparse
import importlib
import re
import shlex

import pytest

from periln import convert
from periln.command_line import arguments_of
from periln.runkit.errors import EVERY_COMMAND, MORE
from periln.verbs import OTHERS, VERBS

COMMANDS = {verb.command: f"periln {verb.name}" for verb in VERBS} | {name: f"python -m {name}" for name in OTHERS}
INTERNAL = {"stop_with_parent", "bar", "peak_memory_of", "one_section", "started"}


class Found(Exception):
    """Carries the parser of a command that was about to parse."""


def arguments(command: str):
    return convert if command == "convert" else importlib.import_module(arguments_of(command))


def parser_of(command: str, monkeypatch, *words: str) -> argparse.ArgumentParser:
    """The parser that a command's `parse` builds; `--help` is the one word that all of them know."""

    def stop(parser, *_):
        raise Found(parser)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Found) as found:
            arguments(command).parse([*words, "--help"], prog=COMMANDS[command])
    return found.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_one_sentence_and_an_example(command, monkeypatch):
    about = parser_of(command, monkeypatch).description
    sentence, _, examples = about.partition("\n\n")
    assert re.fullmatch(r"[A-Z][^\n]{10,}\.", sentence.replace("\n", " ")), sentence
    lines = examples.splitlines()
    assert lines[0] == ("example:" if len(lines) == 2 else "examples:")
    assert lines[1:] and all(line.startswith(f"  {COMMANDS[command]} ") for line in lines[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_command_lines_that_parse(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    examples = re.findall(rf"^  {re.escape(COMMANDS[command])} (.*)$", parser.description, re.MULTILINE)
    for example in examples:
        assert arguments(command).parse(shlex.split(example), prog=COMMANDS[command]) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_internals_and_no_empty_defaults(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    shown = parser.format_help()
    for empty in ("None", "False", "[]", "''"):
        assert f"(default: {empty})" not in " ".join(shown.split())
    assert not re.search(r"\(default: (\[|\(|True)", " ".join(shown.split()))  # Python's writing, not what one types
    for name in INTERNAL:
        assert f"--{name.replace('_', '-')}" not in shown
    for action in parser._actions:
        assert (action.help == argparse.SUPPRESS) == (action.dest in INTERNAL), f"{action.dest} has no help"
    assert "/site-packages/" not in shown and str(arguments(command).__file__).rpartition("/")[0] not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_user_needs_first_stands_first(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    shown = parser.format_help()
    groups = [title for title in (MORE, EVERY_COMMAND) if f"\n{title}:\n" in shown]
    assert [shown.index(f"\n{title}:\n") for title in groups] == sorted(shown.index(f"\n{t}:\n") for t in groups)
    first = shown.partition(f"\n{MORE}:\n")[0].partition(f"\n{EVERY_COMMAND}:\n")[0]
    options = re.findall(r"^  (?:-\w, )?--([\w-]+)", first, re.MULTILINE)
    assert len(options) <= 14, f"{len(options)} options come first: move some to more_options()"
    required = {a.option_strings[0].lstrip("-") for a in parser._actions if a.required and a.option_strings}
    assert required <= set(options)


def test_the_refreshing_of_code_has_a_help_of_its_own(monkeypatch):
    parser = parser_of("convert", monkeypatch, "--refresh-code")
    assert "--refresh-code" in parser.format_help() and "example" in parser.description
