"""Every command of README.md runs, read from the file itself.

In the place of what needs a network or an hour there are substitutes, all of them in SUBSTITUTES and INSTEAD:

- `periln demo` takes a recipe of small models at the same rates; the second one stops after 6 steps;
- the model of the Hub is a small one that overflows (examples/overflowing_model.py), on random tokens, a few samples;
- `pip install` and `uv pip install` resolve and build the project without its dependencies, and install nothing;
- `make` prints what it would do.
"""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from documents import README, ROOT, blocks, commands

from modeling_periln import PLACEMENT_NAMES

HUB_MODEL = "google/gemma-3-270m"
FEW = ["--data", "random", "--samples", "4", "--tokens", "16"]
SUBSTITUTES = {  # words that are put behind a command
    "demo": ["--recipe", "demo.yaml"],
    "bench": [*FEW, "--backward-samples", "2", "--skip-samples", "1", "--fp16-samples", "1"],
    "cure": FEW,
    "bounds": FEW,
}
INSTEAD = {"pip install": ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation"], "make": ["-n"]}
TINY = {
    "text": {"source": "my_texts", "max_bytes": 10**6, "heldout_share": 0.05},
    "tokenizer": {"vocab_size": 300},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    },
    "placements": ["pre", "peri"],
    "seeds": [1],
    "evaluation": {"suite": "mini", "limit": 4, "batch_size": 16},
    "sft": {"data": "mini", "epochs": 1, "batch_size": 36, "learning_rate": 1e-3, "max_length": 96},
}


def periln_commands() -> list[list[str]]:
    return [words for words in commands(README) if words[0] == "periln"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader's: texts, a recipe of seconds, and the model that overflows."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_texts").mkdir()
    for i in range(60):
        (folder / "my_texts" / f"{i}.txt").write_text(" ".join(f"the {n} of {n * i % 89}" for n in range(150)))
    recipe = yaml.safe_load((ROOT / "scripts/recipes/demo.yaml").read_text().replace("2e-3", "0.002")) | TINY
    recipe["sft"]["learning_rate"] = 0.001
    recipe["pretraining"] |= {"batch_size": 4, "sequence_length": 32}
    (folder / "demo.yaml").write_text(yaml.safe_dump(recipe))
    recipe["pretraining"] |= {"steps": 6, "checkpoint_every": 6}
    (folder / "quick.yaml").write_text(yaml.safe_dump(recipe | {"high_learning_rate_seeds": []}))
    run(folder, [sys.executable, ROOT / "examples" / "overflowing_model.py", "overflowing"])
    return folder


def run(folder, words) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def substituted(words: list[str]) -> list[str]:
    """A command of `periln` as it is run here."""
    words = ["overflowing" if word == HUB_MODEL else word for word in words]
    more = [] if "--explain" in words else SUBSTITUTES.get(words[1], [])
    more = ["--recipe", "quick.yaml"] if "my_texts/" in words else more
    return [sys.executable, "-m", *words, *more]


@pytest.mark.notebooks  # minutes; `.ci/run` runs it with them
def test_the_starts_run_in_the_order_in_which_they_stand(place):
    said = {}
    for words in periln_commands():
        if words[1] != "--help":
            said[" ".join(words)] = run(place, substituted(words))
    assert len(said) == 10
    assert (place / "runs/demo/report.html").is_file() and list((place / "figures").glob("*.png"))
    assert "overflows FP16 in the forward pass" in said[f"periln bench {HUB_MODEL}"]
    assert "overflows FP16" not in said["periln bench gemma-fp16"]
    assert (place / "gemma-fp16/fp16_rewrite.json").is_file() and (place / "exported/conversion.json").is_file()

    (code,) = blocks(README, "python")  # needs the demo's checkpoint
    assert len([line for line in code.splitlines() if line]) == 5
    assert run(place, [sys.executable, "-c", code])


@pytest.mark.slow
def test_the_lines_that_install_resolve(tmp_path):
    lines = [words for words in commands(README) if "install" in words]
    asked = [words[words.index("install") + 1] for words in lines]
    assert asked[0] == asked[1] == ".[bench]" and lines[1] == ["uv", *lines[0]]  # uv installs what pip does
    source = shutil.copytree(
        ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "runs", "site", "*.egg-info")
    )
    for words in lines:
        if words[0] == "pip":
            run(source, [sys.executable, "-m", *words, *INSTEAD["pip install"]])
        elif shutil.which("uv"):
            run(
                source,
                [*words, "--python", sys.executable, "--dry-run", "--no-deps", "--no-index", "--no-build-isolation"],
            )


def test_the_two_commands_of_a_clone_are_targets():
    lines = [words for words in commands(README) if words[0] == "make"]
    assert [words[1] for words in lines] == ["demo", "test"]
    for words in lines:
        assert run(ROOT, [*words, *INSTEAD["make"]])


def test_no_command_is_left_out():
    others = [words for words in commands(README) if words[0] not in ("periln", "make", "pip", "uv")]
    assert not others


def test_it_is_short_and_begins_with_what_it_is():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert lines[0] == "# PeriLlama" and all(lines[2:5]) and not lines[5]
    assert sum(line.startswith("![") for line in lines) == 1  # one figure


def test_every_placement_is_in_its_table():
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    named = [name.strip("`") for row in rows[1:] for name in row.split("|")[1].strip().split(", ")]
    assert rows[0].startswith("| `norm_placement` |")
    assert sorted(named) == sorted(PLACEMENT_NAMES)
