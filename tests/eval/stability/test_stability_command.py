"""The command: a run's checkpoints, other models, what is there already, mistakes, and records that others read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from local_hub import LocalHub
from stability_families import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from periln.eval.arguments.stability import left_out, parse
from periln.eval.stability.command import main
from periln.eval.stability.files import BenchFolder
from periln.eval.targets import find_measured
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder

WORDS = [f"w{i}" for i in range(90)]
TEXT = " ".join(WORDS[(7 * i) % 90] for i in range(800))
QUICK = ["--samples", "6", "--tokens", "12", "--backward-samples", "2", "--skip-samples", "2", "--fp16-samples", "1"]


def tokenizer():
    vocabulary = {"<eos>": 0} | {word: i for i, word in enumerate(WORDS, start=1)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A text, a checkpoint of another family, and a run of two checkpoints, the second with a larger embedding."""
    root = tmp_path_factory.mktemp("stability")
    (root / "text.txt").write_text(TEXT)
    build("gemma3").save_pretrained(root / "gemma")
    tokenizer().save_pretrained(root / "gemma")
    run = RunFolder(root / "run")
    run.claim({"seed": 1})
    model = build("peri_llama:pre")
    for step in (10, 20):
        with write_checkpoint(run.checkpoint_path(step), model, tokenizer()):
            pass
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(10)
    return root


def command(place: Path, *words: str) -> None:
    main(parse([*words, *QUICK, "--data", str(place / "text.txt")]))


@pytest.fixture(scope="module")
def measured(place) -> Path:
    command(place, str(place / "run"), str(place / "gemma"), "--out", str(place / "out"))
    return place


def test_a_run_s_checkpoints_are_all_measured_into_the_run(measured):
    folder = measured / "run" / "eval" / "stability"
    names = {p.name for p in folder.iterdir()}
    for step in ("00000010", "00000020"):
        assert {f"step_{step}.parquet", f"angles_{step}.parquet", f"certificate_{step}.json"} <= names
    table = pd.read_parquet(folder / "step_00000020.parquet")
    assert list(table.columns) == ["step", "layer", "sublayer", "tensor", "stat", "value"]
    assert set(table.step) == {20} and set(table.sublayer) == {"embedding", "attn", "mlp", "layer", "final"}
    assert list(pd.read_parquet(folder / "angles_00000010.parquet").columns) == ["step", "layer", "other", "value"]
    record = json.loads((folder / "stability.json").read_text())
    assert [e["step"] for e in record["checkpoints"]] == [10, 20]
    assert record["growth"]["steps"] == [10, 20]
    assert record["verdict"][0].startswith("From step 10 to step 20 the variance of the stream")
    entry = record["checkpoints"][0]
    assert entry["data"]["samples"] == 6 and entry["data"]["tokens"] == 12 and entry["dtype"] == "float32"
    assert len(entry["weights_sha256"]) == 64 and entry["versions"]["torch"]
    assert entry["fits"]["variance"]["linear"]["r2"] <= 1


def test_with_out_the_run_s_records_are_there_as_well(measured):
    copied = measured / "out" / "run" / "stability.json"
    assert copied.read_text() == (measured / "run" / "eval" / "stability" / "stability.json").read_text()


def test_another_model_is_measured_into_a_folder_of_its_name(measured):
    folder = measured / "out" / "gemma"
    assert {"step_00000000.parquet", "angles_00000000.parquet", "certificate.json", "stability.json"} <= {
        p.name for p in folder.iterdir()
    }
    entry = json.loads((folder / "stability.json").read_text())["checkpoints"][0]
    assert entry["model_type"] == "gemma3_text"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["limit"] == 65504
    assert any(row["measured"] is not None for row in certificate["rows"])


def test_what_is_measured_is_not_measured_again_unless_asked(measured, capsys):
    file = measured / "out" / "gemma" / "step_00000000.parquet"
    before = file.stat().st_mtime_ns
    command(measured, str(measured / "gemma"), "--out", str(measured / "out"))
    assert "measured already" in capsys.readouterr().out and file.stat().st_mtime_ns == before
    table = pd.read_parquet(file)
    command(measured, str(measured / "gemma"), "--out", str(measured / "out"), "--again")
    assert file.stat().st_mtime_ns > before
    pd.testing.assert_frame_equal(pd.read_parquet(file), table)


def test_a_checkpoint_of_a_run_writes_to_the_run(measured):
    model = find_measured(str(measured / "run" / "checkpoints" / "step_00000010"))
    assert model.run == (measured / "run").resolve() and [c.step for c in model.checkpoints] == [10]


def test_another_model_s_records_are_not_overwritten(measured):
    other = measured / "elsewhere" / "gemma"
    shutil.copytree(measured / "gemma", other)
    before = (measured / "out" / "gemma" / "stability.json").read_text()
    with pytest.raises(UserError, match="holds the measurements of another model .*give another --out"):
        command(measured, str(other), "--out", str(measured / "out"))
    assert (measured / "out" / "gemma" / "stability.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--samples", "0"], "--samples must be at least 1, not 0"),
        (["RUN", "--tokens", "100000"], "--tokens 100000 is more than the 64 positions"),
        (["RUN", "--angles", "some"], "--angles must be all or a number of layers, not 'some'"),
        (["RUN", "--data", "wikitex"], "did you mean 'wikitext'"),
        ([], "name at least one run folder"),
        (["RUN", "--explain", "RUN"], "leave the models out"),
        (["RUN", "--data", "SHORT"], "fewer than one sample"),
        (["NOWHERE"], "does not exist and is not an id of the Hub"),
        (["EMPTY"], "neither a run folder"),
        (["PICKLED"], "has no weights in safetensors"),
        (["BARE"], "--data random"),
        (["HEADLESS", "--data", "random"], "lacks 1 of the model's weights, lm_head.weight the first"),
    ],
)
def test_mistakes_are_named_before_any_work(place, tmp_path, words, said):
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "empty").mkdir()
    for name in ("pickled", "bare"):
        shutil.copytree(place / "gemma", tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    build("llama").model.save_pretrained(tmp_path / "headless")  # Transformers would make up a head
    known = {"RUN": place / "gemma", "SHORT": tmp_path / "short.txt", "EMPTY": tmp_path / "empty"}
    known |= {"NOWHERE": tmp_path / "no" / "such", "PICKLED": tmp_path / "pickled", "BARE": tmp_path / "bare"}
    known["HEADLESS"] = tmp_path / "headless"
    words = [str(known.get(word, word)) for word in words]
    data = [] if "--data" in words else ["--data", str(place / "text.txt")]
    with pytest.raises((UsageError, UserError), match=said):
        main(parse([*QUICK, *words, *data, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over_by_name(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step_00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert [c.step for c in find_measured(str(tmp_path / "run")).checkpoints] == [10]
    assert "passing over a checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_and_wikitext_of_the_hub(place, tmp_path):
    """The command line, a Hub id and the data set `wikitext`, through the real client and a Hub on loopback."""
    store = tmp_path / "store"
    shutil.copytree(place / "gemma", store / "models" / "someone" / "tiny-gemma")
    folder = store / "datasets" / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = pd.DataFrame({"text": ["", " = w1 = \n", TEXT + "\n", TEXT + "\n"]})
    rows.to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", index=False)
    files = "configs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n"
    (folder / "README.md").write_text(f"---\n{files}    path: wikitext-2-raw-v1/test-*.parquet\n---\n")
    with LocalHub(store) as hub:
        surroundings = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        words = ["someone/tiny-gemma", *QUICK, "--data", "wikitext", "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "eval.stability", *words],
            cwd=Path(__file__).parents[3],
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "What flows through the layers" in done.stdout and "the stream's variance goes from" in done.stdout
    entry = json.loads((tmp_path / "out" / "someone--tiny-gemma" / "stability.json").read_text())["checkpoints"][0]
    assert entry["data"]["data"] == "wikitext" and len(entry["revision"]) == 40


def test_quick_is_what_is_done_where_no_run_is_given(place):
    run, model = str(place / "run"), str(place / "gemma")
    assert parse([model]).samples == 16 and parse([model]).skip_tokens == 128
    for words in ([run], [run, model], [str(place / "run" / "checkpoints" / "step_00000010")], [model, "--no-quick"]):
        args = parse(words)
        assert (args.samples, args.backward_samples, args.skip_samples, args.fp16_samples) == (1000, 32, 16, 4), words
        assert args.skip_tokens is None and left_out(args) == ""
    asked = parse([run, "--quick", "--samples", "40"])
    assert asked.samples == 40 and asked.backward_samples == 1
    said = left_out(asked)
    assert "40 of 1000 samples" in said and "1 of 32 samples for gradients" in said and "--no-quick" in said


def test_a_record_that_was_stopped_is_measured_again(measured):
    folder = measured / "out" / "gemma"
    entry = json.loads((folder / "stability.json").read_text())["checkpoints"][0]
    records = BenchFolder(folder, str(measured / "gemma"), single=True)
    assert records.has(0, entry["asked"], entry["weights_sha256"])
    records.old["checkpoints"][0]["stopped"] = "backward"
    assert not records.has(0, entry["asked"], entry["weights_sha256"])
