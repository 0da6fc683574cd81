"""The published checkpoints in llama.cpp, in F16: its own converter as it is, and xllamacpp as the runtime."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doors import load, record, samples
from published_models import CACHE, ROOT, model_folder, pip

pytestmark = [pytest.mark.published, pytest.mark.slow]

LLAMA_CPP = os.environ.get("LLAMA_CPP")
PACKAGES = ["xllamacpp==2026.10.11549", "sentencepiece"]
PROMPTS, PROMPT, NEW = 4, 64, 12


@pytest.fixture(scope="module")
def surroundings() -> dict[str, str]:
    """What finds llama.cpp's runtime and its converter's own packages."""
    folder = CACHE / "llama-cpp"
    if not folder.exists():
        pip("install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES)
    return os.environ | {"PYTHONPATH": f"{folder}:{Path(LLAMA_CPP or '') / 'gguf-py'}"}


@torch.no_grad()
def in_fp32(model: torch.nn.Module, prompt: list[int], given: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt, and the log-probabilities of the tokens `given` after it."""
    more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    greedy = model.generate(torch.tensor([prompt]), **more)[0, len(prompt) :].tolist()
    logits = model(input_ids=torch.tensor([prompt + given])).logits[0, len(prompt) - 1 : -1]
    return greedy, logits.log_softmax(-1).gather(-1, torch.tensor(given)[:, None])[:, 0].tolist()


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
@pytest.mark.parametrize(("name", "source"), [("smollm2", "smollm2"), ("gemma3", "gemma3"), ("gemma3-fp16", "gemma3")])
def test_llama_cpp_in_f16_continues_as_the_original_in_fp32(name, source, surroundings, tmp_path):
    if not (CACHE / name).exists() and name != source:
        pytest.skip("Gemma 3 is not cured yet: run test_published.py first")
    original = load(model_folder(source))
    prompts = [batch[0, :PROMPT].tolist() for batch in samples(CACHE / name, "WikiText-2", 256 * PROMPTS)]
    file, job = tmp_path / f"{name}.gguf", tmp_path / "job.json"
    words = [sys.executable, str(Path(LLAMA_CPP) / "convert_hf_to_gguf.py"), str(CACHE / name), "--outfile", str(file)]
    done = subprocess.run([*words, "--outtype", "f16"], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    job.write_text(json.dumps({"model": str(file), "prompts": prompts, "new_tokens": NEW}))
    words = [sys.executable, str(ROOT / "tests/published/llama_cpp_tokens.py"), str(job)]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(job.with_suffix(".out.json").read_text())
    same, largest = [], 0.0
    for prompt, tokens, theirs in zip(prompts, found["tokens"], found["log_probabilities"], strict=True):
        greedy, ours = in_fp32(original, prompt, tokens)
        assert all(map(math.isfinite, ours + theirs))
        same.append(sum(a == b for a, b in zip(greedy, tokens, strict=True)))
        largest = max(largest, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    kept = {"same_tokens": same, "of": NEW, "prompt_tokens": PROMPT, "largest_difference": largest}
    record(f"{name.replace('-', '_')}_llama_cpp", kept | {"xllamacpp": found["build"]})
    assert sum(same) >= 0.75 * NEW * PROMPTS  # two near tokens may change places, and what follows them
    assert largest < 0.05
