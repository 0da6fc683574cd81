"""`periln ... | head -1`: a command whose reader has gone ends without a traceback, with the code of a closed pipe."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from periln.runkit.errors import UNREAD, run_command, until_unread
from periln.verbs import OTHERS, VERBS

ROOT = Path(__file__).resolve().parents[2]
PRINTS = """
import sys
sys.path.insert(0, {root!r})
from argparse import Namespace
from periln.runkit.errors import UserError, run_command, until_unread

def main(args):
    print("a line")
    {then}

sys.exit(until_unread(lambda: run_command(main, Namespace(debug=False))))
"""


def unread(*words: str, stream: str = "stdout", buffered: bool = True) -> tuple[int, str]:
    """Exit code, and what is on the other stream, of a Python process whose `stream` is not read."""
    ours, theirs = os.pipe()
    os.close(ours)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: theirs}
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, text=True, **streams)
    finally:
        os.close(theirs)
    return done.returncode, done.stderr if stream == "stdout" else done.stdout


@pytest.mark.parametrize("buffered", [True, False])
def test_the_overview_may_go_unread(buffered):
    assert unread("-m", "periln", "--help", buffered=buffered) == (UNREAD, "")


def test_so_may_a_sentence_on_standard_error():
    assert unread("-m", "periln", "no-such-verb", stream="stderr") == (UNREAD, "")


@pytest.mark.parametrize("command", [*(f"periln {verb.name}" for verb in VERBS), *OTHERS, "modeling_periln.convert"])
def test_so_may_the_help_of_every_command(command):
    code, said = unread("-m", *command.split(), "--help")
    assert (code, said) == (UNREAD, "")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("then", ["pass", "print('x' * 100_000)", "raise UserError('refused')"])
def test_a_command_at_work_may_lose_its_reader(then, buffered):
    code, said = unread("-c", PRINTS.format(root=str(ROOT), then=then), buffered=buffered)
    assert code == UNREAD and said in ("", "error: refused\n")


def test_another_broken_pipe_is_an_error_as_before(capsys):
    def main(args: Namespace) -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        try:
            os.write(theirs, b"for nobody")
        finally:
            os.close(theirs)

    assert run_command(main, Namespace(debug=False)) == 1
    assert capsys.readouterr().err == "error: broken pipe\n"
    with pytest.raises(BrokenPipeError):
        until_unread(lambda: main(Namespace()))
