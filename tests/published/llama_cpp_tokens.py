"""Greedy tokens from llama.cpp, through xllamacpp; needs nothing of this project.

`python llama_cpp_tokens.py JOB.json` reads `{"model": FILE.gguf, "prompts": [[ids]], "new_tokens": n}` and writes
`{"tokens": [[ids]], "log_probabilities": [[of each of them]], "build": xllamacpp's version}` to JOB.out.json.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def main(file: Path) -> None:
    job = json.loads(file.read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path = job["model"]
    settings.n_ctx, settings.n_parallel, settings.warmup = 1024, 1, False
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    tokens, found = [], []
    for prompt in job["prompts"]:
        ask = {"prompt": prompt, "n_predict": job["new_tokens"], "temperature": 0.0, "n_probs": 1}
        answer = server.handle_completions(ask | {"ignore_eos": True, "cache_prompt": False})
        content = answer["choices"][0]["logprobs"]["content"]
        tokens.append([step["id"] for step in content])
        found.append([step["logprob"] for step in content])
    out = {"tokens": tokens, "log_probabilities": found, "build": version("xllamacpp")}
    file.with_suffix(".out.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
