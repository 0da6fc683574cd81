"""The command: what it writes, keeps and refuses; and the table's sentences."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from planted import with_large_stream
from stability_families import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from periln.eval.arguments.formats import check, parse
from periln.eval.formats import command, cured
from periln.eval.formats.command import main, sample_sizes
from periln.eval.formats.heat_map import draw
from periln.eval.formats.recipes import RECIPES, ROWS, WEIGHTS, Recipe, Scaled, chosen
from periln.eval.formats.summary import cheapest, said
from periln.eval.texts.samples import Samples
from periln.runkit.errors import UsageError, UserError

SMALL = ["--data", "random", "--samples", "3", "--tokens", "12"]
INT8_OF_WEIGHTS = ["--targets", "weights", "--formats", "INT8"]


@pytest.fixture
def models(tmp_path) -> Path:
    build("llama").save_pretrained(tmp_path / "llama")
    with_large_stream("llama").save_pretrained(tmp_path / "overflows")
    return tmp_path


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The keys of the rows that are measured."""
    keys, measure = [], command.measure_recipe

    def counting(located, recipe, *args):
        keys.append(recipe.key)
        return measure(located, recipe, *args)

    monkeypatch.setattr(command, "measure_recipe", counting)
    return keys


def run(models: Path, *words: str) -> dict:
    main(parse([str(models / "llama"), "--out", str(models / "out"), *SMALL, *words]))
    return json.loads((models / "out" / "formats.json").read_text())


def test_it_writes_tables_a_picture_and_records(models, counted, capsys):
    record = run(models, "--formats", "INT8,INT4")
    names = {path.name for path in (models / "out").iterdir()}
    assert names == {"cells", "formats.json", "formats.csv", "formats.md", "formats.png", "slots.csv"}
    assert len(counted) == len(chosen(False, formats=["INT8", "INT4"])) == len(record["rows"])
    frame = pd.read_csv(models / "out" / "formats.csv")
    assert frame.row.tolist()[:2] == ["INT8 per row", "INT4 per row"] and frame.variant.unique().tolist() == [
        "as it is"
    ]
    assert frame.bits_weights.tolist()[:3] == [8, 4, 4.25]
    slots = pd.read_csv(models / "out" / "slots.csv")
    assert {"self_attn.q_proj+self_attn.k_proj+self_attn.v_proj", "mlp.down_proj"} <= set(
        slots.slot[slots.target == "activations"]
    )
    assert (models / "out" / "formats.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "By emulation: scaled, cast, cast back" in printed.out and "-- KV cache" in printed.out
    assert "on 3 samples of 12 tokens: about" in printed.err and "GiB of memory at most" in printed.err
    assert "| INT8 per channel |" in (models / "out" / "formats.md").read_text()


def test_what_is_there_is_kept_and_what_is_missing_is_added(models, counted, monkeypatch):
    run(models, *INT8_OF_WEIGHTS)
    assert counted == ["weights: INT8 per row"]
    record = run(models, "--targets", "weights", "--formats", "INT8,INT4")
    assert counted == ["weights: INT8 per row", "weights: INT4 per row", "weights: INT4 per block of 128"]
    assert [row["row"] for row in record["rows"]] == ["INT8 per row", "INT4 per row", "INT4 per block of 128"]
    monkeypatch.setattr(command, "_load", lambda *args: pytest.fail("all is there: the model is not wanted"))
    again = run(models, "--targets", "weights", "--formats", "INT8,INT4")
    assert again["rows"] == record["rows"]


def test_a_stop_keeps_the_rows_that_were_measured(models, monkeypatch):
    measure, left = command.measure_recipe, [2]

    def stopping(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(*args)

    monkeypatch.setattr(command, "measure_recipe", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(models, "--formats", "INT4")
    assert len(list((models / "out" / "cells").iterdir())) == 2
    monkeypatch.setattr(command, "measure_recipe", measure)
    assert len(run(models, "--formats", "INT4")["rows"]) == len(chosen(False, formats=["INT4"]))


def test_records_of_other_samples_or_another_model_are_left_alone(models):
    run(models, *INT8_OF_WEIGHTS)
    before = (models / "out" / "formats.json").read_bytes()
    with pytest.raises(UserError, match=r"holds other measurements \(samples 3, not 4; .*\): give another --out"):
        run(models, *INT8_OF_WEIGHTS, "--samples", "4")
    with pytest.raises(UserError, match="holds other measurements"):
        main(parse([str(models / "overflows"), "--out", str(models / "out"), *SMALL]))
    assert (models / "out" / "formats.json").read_bytes() == before
    (models / "mine").mkdir()
    (models / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="mine holds something else than measured formats"):
        check(parse([str(models / "llama"), "--out", str(models / "mine")]))


def test_the_cure_mends_plain_casts_and_leaves_shared_scales(models, capsys):
    words = [*SMALL, "--out", str(models / "cured"), "--cure", "--targets", "stream", "--formats", "FP16,INT8"]
    main(parse([str(models / "overflows"), *words]))
    record = json.loads((models / "cured" / "formats.json").read_text())
    rows = {(row["variant"], row["row"]): row for row in record["rows"]}
    assert set(rows) == {
        *(("as it is", name) for name in ("FP16", "INT8 per tensor", "INT8 per token", "INT8 per channel")),
        *(("cured", name) for name in ("FP16", "INT8 per tensor")),
    }
    assert not rows["as it is", "FP16"]["survives"] and rows["cured", "FP16"]["survives"]
    assert rows["as it is", "INT8 per tensor"]["kl"] == pytest.approx(rows["cured", "INT8 per tensor"]["kl"], rel=0.01)
    sentence = next(text for text in record["said"] if "before the cure" in text)
    assert sentence.startswith("stream in FP16: not finite (not finite: stream after mlp, layer 2) before the cure, ")


def test_loss_is_counted_in_bits_a_byte_of_the_text(models, capsys):
    words = [f"w{i}" for i in range(90)]
    backend = Tokenizer(WordLevel({"<eos>": 0} | {w: i for i, w in enumerate(words, start=1)}, unk_token="<eos>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(models / "llama")
    (models / "text.txt").write_text(" ".join(words[(7 * i) % 90] for i in range(200)))
    record = run(models, *INT8_OF_WEIGHTS, "--data", str(models / "text.txt"))
    assert record["unit"] == "byte" and all(30 <= size <= 11 * 4 for size in record["sizes"])
    bits = sum(record["reference"]["nats"]) / math.log(2) / sum(record["sizes"])
    cell = json.loads((models / "out" / "cells" / "as_it_is_weights_int8_per_row.json").read_text())
    rise = sum(cell["nats"]) / math.log(2) / sum(record["sizes"]) - bits
    row = record["rows"][0]
    assert row["rise"] == pytest.approx(rise, abs=1e-9) and row["rise_share"] == pytest.approx(rise / bits, abs=1e-9)
    out = " ".join(capsys.readouterr().out.split())
    assert f"FP32: {bits:.4f} bits a byte." in out and "bits a byte lost [95 %]" in out


def test_what_cannot_be_located_is_said_and_the_rest_measured(models, capsys):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64)).save_pretrained(
        models / "opt"
    )
    words = ["--targets", "weights,stream", "--formats", "INT8", "--out", str(models / "out"), *SMALL]
    main(parse([str(models / "opt"), *words]))
    printed = capsys.readouterr()
    assert "not measured: stream, because " in printed.err and "Not measured: stream, because " in printed.out
    record = json.loads((models / "out" / "formats.json").read_text())
    assert [row["row"] for row in record["rows"]] == ["INT8 per row"] and set(record["missing"]) == {"stream"}


def test_a_model_that_needs_no_cure_is_told_so(models, capsys):
    record = run(models, "--cure", "--targets", "stream", "--formats", "FP16")
    assert {row["variant"] for row in record["rows"]} == {"as it is"}
    assert "nothing has to move" in record["cure"]["refused"]
    assert "Not measured after the cure: in FP16" in capsys.readouterr().out


def test_only_rows_whose_range_matters_are_measured_after_the_cure():
    names = {row.key for row in cured.rows_that_change(ROWS)}
    assert {"stream: FP16", "recipes: FP16 all", "stream: FP8 E4M3", "stream: INT8 per tensor"} <= names
    assert {"stream: BF16", "recipes: BF16 all", "weights: INT8 per row", "stream: MXFP8"}.isdisjoint(names)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--samples", "0"], "--samples must be at least 1, not 0"),
        (["--targets", "stream", "--formats", "INT4"], "no row has INT4 for stream in the quick table"),
        (["--formats", "FP8"], "--formats has no 'FP8'"),
        (["--data", "wikitxt"], "(did you mean 'wikitext'?)"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(models, words, why):
    with pytest.raises(UsageError) as error:
        check(parse([str(models / "llama"), *words]))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_sizes_are_the_bytes_of_the_text_that_is_predicted():
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join(chr(i) for i in ids)

    samples = Samples(torch.tensor([[1, 97, 228, 98], [1, 97, 98, 99]]), {})
    assert sample_sizes(Letters(), samples) == [4, 3] and sample_sizes(None, samples) == [3, 3]


def _row(name: str, rise: float | None, within: bool, variant: str = "as it is") -> dict:
    share = None if rise is None else rise / 2
    return {"row": name, "variant": variant, "rise": rise, "rise_share": share, "within": within, "first": None}


def test_the_cheapest_has_the_fewest_bits_of_those_within_one_per_cent():
    table = {row.key: row for row in ROWS}
    keys = ("weights: BF16", "weights: INT8 per row", "weights: INT4 per row", "weights: INT4 per block of 128")
    rises = (0.0, 0.001, 0.2, 0.015)
    pairs = [(table[key], _row(key, rise, rise < 0.02)) for key, rise in zip(keys, rises, strict=True)]
    two = [(table[f"recipes: {name}"], _row(name, 0.01, True)) for name in ("INT4 W4A16", "MXFP4 W4A4", "INT8 KV8")]
    assert cheapest([*pairs, *two]) == {WEIGHTS: "INT4 per block of 128", RECIPES: "MXFP4 W4A4"}
    # Channels' own scales cannot be taken out of a product's sum; those of keys can.
    channels = [(table[f"{t}: INT4 per channel"], _row("INT4 per channel", 0.0, True)) for t in ("activations", "kv")]
    token = (table["activations: INT8 per token"], _row("INT8 per token", 0.001, True))
    assert cheapest([*channels, token]) == {"activations": "INT8 per token", "kv": "INT4 per channel"}
    none = [(table["kv: INT8 per token"], _row("INT8 per token", 0.5, False))]
    assert cheapest(none) == {"kv": None}
    assert said(none, cheapest(none)) == [
        "The cheapest format of the KV cache within 1% of FP32's loss: none of those measured."
    ]


@pytest.mark.parametrize(
    ("rises", "ends"),
    [
        ((0.5, 0.3, 0.01), ": outliers decide, and separate scales for channels recover 98% of the loss."),
        ((0.5, -0.01, 0.2), ": outliers decide, and separate scales for tokens recover 100% of the loss."),
        ((None, 0.3, 0.01), ": outliers decide, and separate scales for channels recover 100% of the loss."),
        ((0.5, 0.5, 0.4), ": a few tokens or channels do not decide."),
        ((0.0001, 0.0001, 0.0001), "+0.01%, +0.01% and +0.01% of the loss."),
    ],
)
def test_whether_outliers_decide_is_said_from_the_three_scalings(rises, ends):
    names = ("INT8 per tensor", "INT8 per token", "INT8 per channel")
    cells = [
        (
            Recipe("stream", name, {"stream": Scaled("INT8", scaling)}),
            _row(name, rise, rise is not None and rise < 0.02),
        )
        for name, scaling, rise in zip(names, ("tensor", "row", "channel"), rises, strict=True)
    ]
    sentence = said(cells, {})[0]
    assert sentence.startswith("The stream in INT8 with a scale per tensor, token and channel: ")
    assert sentence.endswith(ends)


def test_every_row_has_a_name_of_its_own_and_the_picture_is_the_same_twice():
    assert len({row.key for row in ROWS}) == len(ROWS)
    slot = {"target": WEIGHTS, "layer": 1, "slot": "mlp.up_proj", "snr_db": 20.0, "exact": False}
    recipe = next(row for row in ROWS if row.group == WEIGHTS)
    records = [(recipe, {"slots": [slot, slot | {"layer": 2, "snr_db": None}]})]
    assert draw("A model", records) == draw("A model", records) and draw("A model", []) is None
