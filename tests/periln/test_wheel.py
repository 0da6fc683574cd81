"""The distribution: what is in it, and that it works where there is no checkout."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from copies import BUILT_FROM, ROOT, copy_to, dependencies, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

pytestmark = pytest.mark.slow
FAMILY = ("convert.py", "configuration_periln.py", "modeling_periln.py", "placements.py", "py.typed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it: (sdist, wheel)."""
    pytest.importorskip("build", reason="the distribution is built with build")
    folder = tmp_path_factory.mktemp("dist")
    source = copy_to(tmp_path_factory.mktemp("source") / "peri-llama", *BUILT_FROM)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The programs of a new environment with the wheel, which borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join(dependencies()) + "\n")  # whose own .pth files are not read
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    done = subprocess.run([*map(str, command), str(built[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin", site


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    PeriLlamaForCausalLM(PeriLlamaConfig(norm_placement="pre", vocab_size=40, **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "a": 1, "b": 2}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[unk]").save_pretrained(folder)
    return folder


def test_the_wheel_holds_the_family_and_the_stages_and_no_other_name(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"modeling_periln", "periln"}
    inside = {name.split("/")[1] for name in names if name.startswith("periln/") and name.count("/") > 1}
    assert inside == {"eval", "model_cards", "runkit", "scripts", "sft"}
    assert {f"modeling_periln/{name}" for name in FAMILY} <= set(names) and "periln/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    for folder in ("eval", "model_cards", "runkit", "scripts", "sft"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"periln/{file.relative_to(ROOT)}" in names


def test_the_sdist_holds_what_builds_and_tests_it(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "constraints.txt",
        "setup.py",
        "docs/images/demo-fp16-headroom.png",
        "mkdocs.yml",
        "LICENSE",
    } <= names
    for file in (ROOT / "tests").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


def test_the_index_page_is_sound(built):
    twine = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], capture_output=True, text=True
    )
    assert twine.returncode == 0, twine.stdout + twine.stderr
    wheel = zipfile.ZipFile(built[1])
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert pictures and all(picture.startswith(urls["Repository"] + "/raw/") for picture in pictures)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]*)", text.partition("\n\n")[2])
    inside = [link.removeprefix(urls["Repository"] + "/blob/main/") for link in links if "/blob/main/" in link]
    assert inside and all((ROOT / path).exists() for path in inside)
    assert all(link.startswith("https://") for link in links if link)
    metadata = email.message_from_string(text)
    assert f"Repository, {urls['Repository']}" in metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_bench_needs_no_harness_and_no_trainer():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[<>=;]", line)[0] for line in project["optional-dependencies"]["bench"]}
    assert not names & {"lm-eval", "trl", "peft", "accelerate", "tiktoken", "peri-llama"}


def test_the_installed_code_is_the_wheels(installed, tmp_path):
    programs, site = installed
    code = "import periln.eval.stability.command as m, modeling_periln as f; print(m.__file__, f.__file__)"
    done = run(programs / "python", "-c", code, cwd=tmp_path)
    assert all(Path(file).is_relative_to(site) for file in done.stdout.split()), done.stdout + done.stderr
    lost = run(programs / "python", "-c", "import importlib.util as i; print(i.find_spec('scripts'))", cwd=tmp_path)
    assert lost.stdout == "None\n"


def test_the_command_answers_everywhere(installed, tmp_path):
    programs, _ = installed
    done = run(programs / "periln", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "  bench " in done.stdout, done.stderr
    assert re.fullmatch(r"periln \d+\.\d+.*\n", run(programs / "periln", "--version", cwd=tmp_path).stdout)
    for words in (["periln", "convert"], ["periln-convert"]):
        done = run(programs / words[0], *words[1:], "--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {' '.join(words)} "), done.stderr


def test_a_model_is_converted(installed, model, tmp_path):
    done = run(installed[0] / "periln", "convert", model, "out", "--to", "llama", "--text", "none", cwd=tmp_path)
    assert done.returncode == 0 and "peri_llama -> llama" in done.stdout, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = run(installed[0] / "periln-convert", model, "out", "--to", "llama", cwd=tmp_path)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


def test_a_model_is_measured_without_harness_and_trainer(installed, model, tmp_path):
    words = ["bench", str(model), "--data", "random", "--samples", "4", "--tokens", "16", "--out", "measured"]
    words += ["--backward-samples", "2", "--skip-samples", "2", "--fp16-samples", "1"]
    code = (
        "import sys; from periln.command_line import main; code = main(sys.argv[1:])\n"
        "assert not {'lm_eval', 'trl', 'scripts', 'eval'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    done = run(installed[0] / "python", "-c", code, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measured" / "tiny" / "stability.json").is_file() and "What flows through" in done.stdout


def test_children_are_the_installed_ones_also_inside_a_checkout(installed, tmp_path):
    """Data is prepared by worker processes; the working folder holds another `periln`, which must not run."""
    (tmp_path / "periln").mkdir()
    (tmp_path / "periln" / "__init__.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "text.txt").write_text("Some words, and some more of them.\n" * 200)
    words = ["prepare-data", "--source", "text.txt", "--out", "data", "--workers", "2", "--vocab-size", "300"]
    done = run(installed[0] / "periln", *words, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "data" / "index.json").is_file(), done.stderr
