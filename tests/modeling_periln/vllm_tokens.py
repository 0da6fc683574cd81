"""Greedy tokens from vLLM; run by vLLM's own interpreter, which needs nothing of this project.

`python vllm_tokens.py JOBS.json` reads `{"prompts": [[ids]], "new_tokens": n, "jobs": {name: job}}`, a job being
`{"path", "impl", "ranks", "dtype"}` (one rank and float32 when left out). It writes `{"tokens": [[ids]], "class": the
class that vLLM ran}` or `{"error": ...}` to NAME.json beside it.
vLLM is imported once; each model then has its own process, forked, since an engine cannot be taken down cleanly.
"""

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def class_of(worker) -> str:
    """Name of the model's class, asked of a worker."""
    return type(worker.model_runner.model).__name__


def serve(out: Path, job: dict, prompts: list[list[int]], new_tokens: int) -> None:
    """Start an engine on one checkpoint, and write what it says."""
    from vllm import LLM, SamplingParams

    ranks = job.get("ranks", 1)
    if ranks > 1:  # a core each; left alone, it wants a memory node each
        cores = sorted(os.sched_getaffinity(0)) * ranks
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[:ranks]))
    try:
        llm = LLM(
            job["path"],
            model_impl=job["impl"],
            trust_remote_code=job["impl"] == "transformers",
            tensor_parallel_size=ranks,
            distributed_executor_backend="mp" if ranks > 1 else "uni",
            dtype=job.get("dtype", "float32"),
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=len(prompts),
        )
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        result = {"tokens": tokens, "class": llm.collective_rpc(class_of)[0]}
    except BaseException:
        result = {"error": traceback.format_exc()[-2000:]}
    out.write_text(json.dumps(result))
    os._exit(0)


def main(jobs_file: Path) -> None:
    from vllm import LLM  # noqa: F401 - before the forks, so that it is imported once

    work = json.loads(jobs_file.read_text())
    for name, job in work["jobs"].items():
        arguments = (jobs_file.with_name(f"{name}.json"), job, work["prompts"], work["new_tokens"])
        process = multiprocessing.get_context("fork").Process(target=serve, args=arguments)
        process.start()
        process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
