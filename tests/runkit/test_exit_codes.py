"""One table of exit codes for all commands: a path that is missing is bad input, 2, whichever command is told of it."""

import errno
import importlib
import os
import re
from argparse import Namespace
from pathlib import Path

import pytest

from modeling_periln import convert
from periln.command_line import arguments_of
from periln.runkit.errors import StoppedBySignal, UsageError, UserError, run_command
from periln.runkit.folder import called
from periln.start import module_of

ROOT = Path(__file__).resolve().parents[2]
MISSING, OUT = "<missing>", "<out>"
COMMANDS = {
    "scripts.prepare_data": ["--source", MISSING, "--out", OUT],
    "scripts.pretrain": ["--config", MISSING, "--runs", OUT],
    "scripts.demo": ["--text", MISSING, "--out", OUT],
    "scripts.plan": [MISSING],
    "scripts.push": [MISSING, "--repo", "acme/model"],
    "scripts.coordinate_check": [MISSING, "--out", OUT],
    "scripts.study": ["run", "--out", MISSING],
    "scripts.retrofit": [MISSING, OUT, "--to", "peri"],
    "scripts.sweep": ["run", MISSING, "--runs", OUT],
    "eval.report": [MISSING],
    "eval.bench": [MISSING],
    "eval.watch": [MISSING, "--wait", "0", "--tasks", "mini"],
    "eval.tables": [MISSING],
    "eval.figures": ["all", MISSING, "--out", OUT],
    "eval.fp16": [MISSING, OUT],
    "eval.formats": [MISSING, "--out", OUT],
    "eval.bounds": [MISSING, "--out", OUT],
    "eval.retrofit": [MISSING, MISSING, "--out", OUT],
    "eval.evaluate": [MISSING],
    "eval.live": [MISSING],
    "eval.study": ["report", MISSING],
    "eval.stability": [MISSING],
    "eval.loss": [MISSING],
    "eval.widen": [MISSING, OUT],
    "eval.benchmarks": [MISSING, "--tasks", "mini", "--out", OUT],
    "model_cards.render": [MISSING],
    "model_cards.zoo": [MISSING],
    "sft.compare": [MISSING],
    "sft.select": [MISSING, "--suite", "mini"],
    "sft.serve": [MISSING],
    "sft.train": ["--set", "data=mini", "--model", MISSING],
}
WITHOUT_INPUT = {"scripts.bench", "scripts.gpu_check", "model_cards.paper"}  # they read no path


def started(module: str, *words: object) -> int:
    arguments = importlib.import_module(arguments_of(module))
    args = arguments.parse([str(word) for word in words])
    return run_command(arguments.check, args) or run_command(importlib.import_module(module_of(module)).main, args)


def test_every_command_is_in_the_table():
    files = [file for folder in ("scripts", "eval", "sft", "model_cards") for file in (ROOT / folder).rglob("*.py")]
    commands = {name for file in files for name in re.findall(r"\bstart\(\"([\w.]+)\",", file.read_text())}
    assert commands == set(COMMANDS) | WITHOUT_INPUT


@pytest.mark.parametrize("module", COMMANDS)
def test_a_missing_path_is_2_one_sentence_and_leaves_nothing(module, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing, out = tmp_path / "nowhere" / "really", tmp_path / "out"
    words = [{MISSING: missing, OUT: out}.get(word, word) for word in COMMANDS[module]]
    if module == "sft.train":
        words += ["--config", ROOT / "sft" / "recipes" / "lima.yaml"]
    assert started(module, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(missing) in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("scripts.prepare_data", ["--out", MISSING, "--verify"]),
        ("scripts.prepare_data", ["--source", "installed-python", "--out", OUT, "--tokenizer", f"{MISSING}"]),
        ("scripts.demo", ["--recipe", MISSING, "--out", OUT]),
        ("sft.train", ["--config", MISSING, "--check-data"]),
        ("sft.train", ["--set", f"data={MISSING}", "--check-data"]),
        ("eval.evaluate", ["--heldout", MISSING, "--check-data"]),
    ],
)
def test_so_is_a_missing_path_of_an_option(module, words, tmp_path, capsys):
    missing, out = tmp_path / "nowhere" / "really", tmp_path / "out"
    words = [word.replace(MISSING, str(missing)).replace(OUT, str(out)) for word in words]
    if module == "sft.train" and "--config" not in words:
        words += ["--config", str(ROOT / "sft" / "recipes" / "lima.yaml")]
    assert started(module, *words) == 2
    assert str(missing) in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_converter_keeps_the_table_too(tmp_path, capsys):
    assert convert.main([str(tmp_path / "nowhere" / "x"), str(tmp_path / "out"), "--to", "llama"]) == 2
    assert "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_each_kind_of_end_has_its_code(tmp_path, capsys):
    def code(end: BaseException | None) -> int:
        def main(args: Namespace) -> None:
            if end is not None:
                raise end

        return run_command(main, Namespace(debug=False, config=[tmp_path / "x.yaml"]))

    assert code(None) == 0
    assert code(UserError("another run's")) == code(RuntimeError("a bug")) == code(OSError(errno.ENOSPC, "full")) == 1
    assert code(UsageError("no such field")) == 2
    named = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / "x.yaml"))
    assert code(named) == 2  # the user's
    assert code(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/tmp/of/ours")) == 1
    assert code(KeyboardInterrupt()) == code(StoppedBySignal(130, "saved")) == 130
    assert code(StoppedBySignal(143, "saved")) == 143
    capsys.readouterr()


def test_a_message_never_names_a_folder_by_nothing(tmp_path, monkeypatch):
    (tmp_path / "run" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "sft")
    assert called("runs/a/sft") == "runs/a/sft"
    assert [called("."), called("./"), called("..")] == [str(Path.cwd()), str(Path.cwd()), str(Path.cwd().parent)]
