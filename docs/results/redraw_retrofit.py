"""Redraw docs/results/retrofit.md from the records next to it: `python docs/results/redraw_retrofit.py`.

`python docs/results/redraw_retrofit.py --keep NAME=FILE...` first stores the numbers of files `retrofit.json` and
`report.json` as records/retrofit/NAME.json: losses and shares, no weights, no texts, no paths.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "retrofit"
LARGE = 0.4  # of a branch's squares left unexplained


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a retrofit.json or a report.json."""
    about = {name: record["environment"].get(name) for name in ("commit", "processor", "threads", "versions")}
    if "plan" not in record:
        models = [{k: v for k, v in m.items() if k not in ("nats", "asked")} for m in record["models"]]
        return {"samples": record["samples"], "models": models, "said": record["said"], **about}
    rules = {}
    for name, rule in record["calibration"]["rules"].items():
        errors: dict[str, list[float]] = {}
        for place in rule["places"]:
            errors.setdefault(place["slot"], []).append(round(place["error"], 4))
        rules[name] = {"calibration": rule["calibration"]["loss"], **rule["check"], "errors": errors}
    names = ("to", "soften", "kept_layers", "samples", "exact", "seconds", "new_gains", "unties")
    source = {name: one["loss"] for name, one in record["calibration"]["source"].items()}
    chosen = {"source": source, "rules": rules, "chosen": record["calibration"]["chosen"]}
    return {name: record.get(name) for name in names} | chosen | about


def keep(words: list[str]) -> None:
    """Store records by name."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for word in words:
        name, _, file = word.partition("=")
        record = kept(json.loads(Path(file).read_text()))
        record["samples"]["data"] = Path(record["samples"]["data"]).name
        text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
        (RECORDS / f"{name}.json").write_text(text + "\n")


def read(name: str) -> dict[str, Any]:
    """A record; a missing one ends the script with its name."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        sys.exit(f"{path} is missing")
    return json.loads(path.read_text())


def rules_table(names: dict[str, str]) -> str:
    """Loss and KL after each rule, a row a target and rule."""
    lines = [
        "| target | rule | loss, calibration text | loss, other text | KL from the source | unexplained, median |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, shown in names.items():
        record = read(name)
        source = record["source"]
        lines.append(f"| {shown} | source | {source['calibration']:.3f} | {source['check']:.3f} | | |")
        for rule, one in record["rules"].items():
            error = statistics.median(error for errors in one["errors"].values() for error in errors)
            mark = "**" if rule == record["chosen"] and len(record["rules"]) > 1 else ""
            cells = [f"{one[key]:.3f}" for key in ("calibration", "loss", "kl")]
            lines.append(f"| | {mark}{rule}{mark} | {' | '.join(cells)} | {error:.2f} |")
    return "\n".join(lines)


def large_places(name: str, rule: str) -> str:
    """Where a rule leaves most unexplained: `MLP of layer 12 (0.88), ...`, largest first."""
    errors = read(name)["rules"][rule]["errors"]
    found = [(error, slot, i + 1) for slot, row in errors.items() for i, error in enumerate(row) if error >= LARGE]
    kinds = {"attn_output_norm": "attention", "mlp_output_norm": "MLP"}
    return ", ".join(f"the {kinds[slot]} of layer {layer} ({error:.2f})" for error, slot, layer in sorted(found)[::-1])


def report_table(name: str) -> str:
    """A report's models: loss, KL, headroom, massive activations, formats."""
    models = read(name)["models"]
    formats = [found["row"] for found in models[0]["formats"]]
    head = ["model", "loss", "KL", "bits left in FP16", "massive activations", *formats]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for model in models:
        massive = max((m["largest"]["value"] for m in model["massive_activations"]), default=None)
        shares = [found.get("rise_share") for found in model["formats"]]
        cells = [
            model["name"],
            f"{model['loss']:.3f}",
            "" if model["kl"] is None else f"{model['kl']:.3f}",
            f"{model['largest']['headroom_bits']:.1f}",
            "none" if massive is None else f"to {massive:.3g}",
            *("not finite" if share is None else f"{100 * share:+.1f} %" for share in shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# A trained model with another norm placement: what it costs

`periln retrofit` folds what is exact and calibrates the rest. This page is about the rest: output norms in a model that
was trained without them. The short answer: on a published model, calibration alone leaves nothing usable, and one
activation is why. On tiny models without such an activation it costs little.

## SmolLM2-135M becomes `sandwich`

SmolLM2-135M-Instruct (Pre-LN, 30 layers; Q4_1 weights widened to FP32) got an output norm behind every attention and MLP.
Calibrated on {samples} windows of {tokens} tokens of WikiText-2's validation split, looked at on {check} other windows of it.
Losses in nats a token; chance is ln(49,152) = 10.80.

{smollm2}

The import itself is exact (largest difference of logits {exact:g}). No rule is usable. Unit gains, one scalar and the root
mean square of channels end *above* chance, and least squares, the best of the four, at {best:.1f} where the source has
{base:.1f}.

The branches say why. A norm makes all tokens' branches the same size, so what a gain cannot explain is how much that size
differs from token to token. Measured along the calibrated model, half of all branches lose less than {median:.0%} of their
squares by it (least squares). A few lose most of them: {large}.
SmolLM2 has a massive activation: from layer 12's MLP on the first token carries 2.9e4 in channel 507, and that MLP writes
it for one token alone. One gain cannot be right for this token and for the others: root mean squares give the others a
piece of it, least squares less of it, and both take most of it from the first token, on which attention rests in later
layers. The layers behind it are then calibrated on a stream that they were never trained on.

What this means: a Peri-LN or sandwich retrofit of a model with massive activations needs training, and calibration is at
best a beginning for it. `--keep` (leave these layers as they are) and `--soften` (an epsilon as large as the largest
token's branch) are there to go around it; neither was measured on SmolLM2.

## Tiny models

A Pre-LN model of 4 layers and 128 channels, trained on 410 thousand tokens of WikiText-2 (vocabulary 2,048), calibrated on
32 windows of 128 tokens of other text and looked at on 32 more:

{tiny_rules}

Without a massive activation the size of a branch differs little between tokens, and least squares leaves 0.13 to 0.16 nats.
Unit gains are bad here too (1.3 nats and more). `output`, which also loses its input norms, costs a little more than `peri`.

{healing}
## What was not measured

- `peri` and `output` on SmolLM2, and `--keep`, `--soften`, formats, headroom and healing there: the time on two shared cores
  did not suffice. Healing SmolLM2 with a million tokens takes most of a day on them. So nothing here says whether the
  massive activation or the table of formats changes after healing.
- The five tasks.
- More than one seed; any model between 1M and 135M parameters.

## How to have these numbers again

    periln retrofit SMOLLM2 OUT --to sandwich --data validation.parquet --samples {samples} --check-samples {check} --tokens {tokens}

Measured on 2026-11-29, one thread of a shared 2-core {processor} CPU, torch {torch}, transformers {transformers}. This page is
drawn from `docs/results/records/retrofit/` by `docs/results/redraw_retrofit.py`.
"""


def main() -> None:
    smollm2 = read("smollm2-sandwich")
    found, rule = smollm2["samples"], smollm2["rules"]["least-squares"]
    versions = smollm2["versions"]
    page = PAGE.format(
        **{"samples": found["samples"], "tokens": found["tokens"], "check": found["check_samples"]},
        smollm2=rules_table({"smollm2-sandwich": "`sandwich`"}),
        exact=smollm2["exact"]["largest_difference"],
        best=rule["loss"],
        base=smollm2["source"]["check"],
        median=statistics.median(error for errors in rule["errors"].values() for error in errors),
        large=large_places("smollm2-sandwich", "least-squares"),
        tiny_rules=rules_table({"tiny-peri": "`peri`", "tiny-output": "`output`"}),
        healing=healing(),
        processor=smollm2["processor"],
        **{name: versions[name] for name in ("torch", "transformers")},
    )
    (HERE / "retrofit.md").write_text(page)


def healing() -> str:
    """The tiny model healed, beside the placement from the start."""
    return f"{report_table('tiny-report')}\n\n"


if __name__ == "__main__":
    keep(sys.argv[2:]) if sys.argv[1:2] == ["--keep"] else main()
