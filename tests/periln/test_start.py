"""Commands answer `--help` and mistakes before anything heavy is imported."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from periln import command_line
from periln.start import main_of, module_of
from periln.verbs import OTHERS, VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "trl", "peft", "accelerate", "pandas", "matplotlib", "scipy")
COMMANDS = [verb.command for verb in VERBS if verb.command != "convert"] + list(OTHERS)
# Mistakes that argparse does not see.
WRONG = {
    "bench": ["here", "--samples", "0"],
    "cure": ["here", "out", "--margin", "13"],
    "formats": ["here", "--formats", "INT3"],
    "widen": ["nowhere.gguf", "out"],
    "bounds": ["here", "--out", "new", "--data", "nowhere.txt"],
    "figures": ["fig99", "here"],
    "report": ["here", "--out", "file"],
    "demo": ["--out", "file"],
    "prepare-data": ["--out", "new", "--tokenizer", "cl100k_base", "--vocab-size", "512"],
    "pretrain": ["--config", "nowhere.yaml"],
    "sweep": ["plan", "nowhere.yaml"],
    "plan": ["nowhere.yaml"],
    "benchmarks": ["here", "--limit", "0"],
    "evaluate": ["here", "--suite", "none"],
    "loss": ["here", "--documents", "0"],
    "watch": ["here", "--out", "new"],
    "tables": [],
    "sft": ["--config", "nowhere.yaml"],
    "select": ["nowhere"],
    "compare": ["nowhere"],
    "serve": [],
    "push": ["here", "--repo", "no-organization"],
    "card": ["here", "there", "--out", "new.md"],
    "zoo": ["here", "--out", "file"],
    "convert": ["here", "full", "--to", "llama"],
    "retrofit": ["here", "full", "--to", "peri"],
    "retrofit-report": ["here", "here", "--out", "new", "--samples", "0"],
    "study": ["plan", "--budget", "8", "--out", "new"],
    "gpu-check": ["--out", "file"],
    "coordinate-check": ["nowhere.yaml", "--out", "new"],
    "live": ["nowhere"],
}
PROBE = """
import json, sys
from periln.command_line import main

codes = []
for words in json.loads(sys.argv[1]):
    try:
        codes.append(main(words))
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps([codes, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


@pytest.fixture
def somewhere(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("precious")
    return tmp_path


def python(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code, *rest = map(str, words)
    return subprocess.run([sys.executable, "-c", path + code, *rest], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("name", [verb.name for verb in VERBS])
def test_help_and_mistakes_are_answered_without_heavy_imports(name, somewhere):
    asked = [[name, "--help"], [name, "--no-such-option"] if name != "serve" else [name], [name, *WRONG[name]]]
    done = python(PROBE, json.dumps(asked), json.dumps(HEAVY), cwd=somewhere)
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert codes[:2] == [0, 2] and codes[2] in (1, 2)
    assert re.match(rf"usage: periln {name}\b", done.stdout)
    assert done.stderr.count("error: ") == done.stderr.count("\n") == 2, done.stderr
    assert sorted(p.name for p in somewhere.iterdir()) == ["file", "full", "here"]


@pytest.mark.parametrize("command", COMMANDS)
def test_modules_answer_help_without_heavy_imports(command):
    code = (
        "import json, runpy, sys\n"
        "command, heavy = sys.argv[1], json.loads(sys.argv[2])\n"
        "sys.argv = [command, '--help']\n"
        "try:\n    runpy.run_module(command, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )
    done = python(code, command, json.dumps(HEAVY), cwd=ROOT)
    assert done.stdout.startswith(f"usage: python -m {command} "), done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_every_command_has_a_main_where_it_is_looked_for():
    for command in [*COMMANDS, "convert"]:
        name = module_of(command)
        source = (ROOT / Path(*name.split(".")[0 if command == "convert" else 1 :])).with_suffix(".py").read_text()
        assert re.search(r"^def main\(", source, re.MULTILINE), name
        if command != "convert":
            assert command_line.arguments_of(command).startswith(f"periln.{command.split('.')[0]}.arguments.")


def test_the_overview_names_every_verb_and_how_to_install_it(capsys):
    assert command_line.main(["--help"]) == 0
    said = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb.name} +{re.escape(verb.sentence)}$", said, re.MULTILINE)
    assert "pip install 'peri-llama[bench]'" in said and "pip install peri-llama\n" in said


def test_a_verb_that_there_is_not_is_one_sentence(capsys):
    assert command_line.main(["ebnch"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: periln has no verb 'ebnch' (did you mean 'bench'?)") and said.count("\n") == 1
    assert command_line.main([]) == 2
    assert capsys.readouterr().err.endswith("error: name a verb\n")


def test_the_converter_offers_the_architectures_there_are():
    from modeling_periln import conversions, convert_options

    assert (*conversions.ARCHITECTURES, conversions.PERI_LLAMA) == convert_options.TARGETS


def test_the_figures_listed_are_those_that_are_drawn():
    from periln.eval.figures.catalogue import CATALOGUE
    from periln.eval.figures.titles import TITLES

    assert list(TITLES) == list(CATALOGUE)


FINDER = """
import importlib.abc, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            {act}

sys.meta_path.insert(0, Finder())
from periln.command_line import main

sys.exit(main(sys.argv[2:]))
"""


def test_a_missing_package_is_one_sentence_with_the_line_that_installs_it(somewhere):
    code = FINDER.format(act="raise ModuleNotFoundError('gone', name=name)")
    done = python(code, "scipy", "bench", "here", "--data", "random", cwd=somewhere)
    assert done.returncode == 1
    assert done.stderr == "error: scipy is not installed: pip install 'peri-llama[bench]'\n"


def test_ctrl_c_during_the_imports_ends_at_once_and_without_a_traceback(somewhere):
    code = FINDER.format(act="os.kill(os.getpid(), signal.SIGINT)")
    done = python(code, "torch", "bench", "here", "--data", "random", cwd=somewhere)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_no_garbage_is_looked_for_during_the_imports_alone(tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text("import gc\nseen = gc.isenabled()\ndef main(args): return seen\n")
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main_of("heavy")(None) is False and gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        main_of("broken")
    assert gc.isenabled()


def test_the_readme_names_the_extras():
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("`periln --help`"))
    assert set(re.findall(r"`(\w+)`", line)) == {extra for verb in VERBS for extra in verb.extra.split(",") if extra}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bench", "no such/model"], "no such/model does not exist"),
        (["bench", "here", "--tokenizer", "no such"], "--tokenizer no such does not exist"),
        (["bench", "here", "--out", "file"], "--out file is not a folder"),
        (["cure", "here", "full"], "full exists: nothing is overwritten"),
        (["formats", "here", "--out", "full"], "full holds something else than measured formats"),
        (["formats", "here", "--targets", "weight"], "--targets has no 'weight' (did you mean 'weights'?)"),
        (["bounds", "here", "--out", "full"], "full exists: nothing is overwritten"),
        (["prepare-data", "--out", "new", "--tokenizer", "cl100k"], "(did you mean 'cl100k_base'?)"),
        (["prepare-data", "--out", "file"], "--out file is not a folder"),
        (["convert", "here", "new", "--to", "llama", "--text", "nowhere"], "--text nowhere is not a file"),
        (["pretrain", "--config", "file", "--runs", "file"], "file must hold a mapping"),
        (["card", "here", "--out", "full"], "--out full is a folder"),
    ],
)
def test_cheap_checks_come_before_imports_and_downloads(words, named, somewhere):
    done = python(PROBE, json.dumps([words]), json.dumps(HEAVY), cwd=somewhere)
    codes, imported = json.loads(done.stdout)
    assert codes[0] in (1, 2) and imported == []
    assert named in done.stderr and done.stderr.count("\n") == 1
