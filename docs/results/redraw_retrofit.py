"""Redraw docs/results/retrofit.md from the records next to it: `python docs/results/redraw_retrofit.py`.

`python docs/results/redraw_retrofit.py --keep NAME=FILE...` first stores the numbers of files `retrofit.json`,
`report.json` and `certificate.json` (of `periln bounds`) as records/retrofit/NAME.json: losses, shares and bounds, no
weights, no texts, no paths.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from retrofit_page import AROUND, COMMANDS, HEALED, HEALING_SAYS, PAGE, SMOLLM2_HEALED

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "retrofit"
LARGE = 0.5  # of a branch's squares left unexplained
NAMES = {"smollm2": "source", "sandwich": "`sandwich`", "sandwich-keep": "... layers 2, 3, 12, 29, 30 kept",
         "sandwich-s1": "... `--soften 1`", "sandwich-keep-s1": "... both",
         "sandwich-s10": "... `--soften 10`",
         "gains": "... and its gains healed", "all": "... and everything"}  # fmt: skip
VARIANTS = ("sandwich", "keep12", "keep", "soften0.1", "soften1", "soften10", "keep-soften1", "peri", "output",
            "peri-soften10", "output-soften10")  # fmt: skip
BOUNDED = ("sandwich", "soften0.1", "soften1", "soften10", "keep-soften1")  # of which `periln bounds` was run


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a retrofit.json, a report.json or a certificate.json."""
    if "rows" in record:
        stream = [row["bound"] for row in record["rows"] if row["tensor"] == "stream"]
        above = sum(bound > record["limit"] for bound in stream)
        return {"stream_bound": max(stream), "tensors": len(stream), "above": above, "limit": record["limit"]}
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
        if "samples" in record:
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


def variants_table() -> str:
    """SmolLM2 by least squares: target, layers kept, softness; loss, KL, what is unexplained; a row each."""
    source, bound = read("smollm2-sandwich")["source"], read("bounds-source")["stream_bound"]
    lines = [
        "| target | layers kept | `--soften` | loss, calibration text | loss, other text | KL from the source | "
        "unexplained, median | stream, at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| source | | | {source['calibration']:.3f} | {source['check']:.3f} | | | {bound:.1e} |",
    ]
    for name in VARIANTS:
        record = read(f"smollm2-{name}")
        rule = record["rules"]["least-squares"]
        error = statistics.median(error for errors in rule["errors"].values() for error in errors)
        bound = f"{read(f'bounds-{name}')['stream_bound']:.1e}" if name in BOUNDED else ""
        kept = ", ".join(map(str, record["kept_layers"] or []))
        cells = [f"{rule[key]:.3f}" for key in ("calibration", "loss", "kl")]
        soft = f"{record['soften']:g}" if record["soften"] else ""
        lines.append(f"| `{record['to']}` | {kept} | {soft} | {' | '.join(cells)} | {error:.2g} | {bound} |")
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
            NAMES.get(model["name"], model["name"]),
            f"{model['loss']:.3f}",
            "" if model["kl"] is None else f"{model['kl']:.3f}",
            f"{model['largest']['headroom_bits']:.1f}",
            "none" if massive is None else f"to {massive:.3g}",
            *("not finite" if share is None else f"{100 * share:+.1f} %" for share in shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tasks_table(name: str) -> str:
    """A report's models: accuracy in each task in percent, with its standard error, and right answers' bits a byte."""
    models = read(name)["models"]
    tasks = list(dict.fromkeys(row["task"] for row in models[0]["tasks"]))
    lines = [
        "| " + " | ".join(["model", *(f"`{task}`" for task in tasks), "right answers, bits a byte"]) + " |",
        "|---|" + "---:|" * (len(tasks) + 1),
    ]
    for model in models:
        by = {(row["task"], row["metric"]): row for row in model["tasks"]}
        found = [by[task, "acc"] for task in tasks]
        cells = [f"{100 * row['value']:.0f} ± {100 * row['stderr']:.0f}" for row in found]
        bits = statistics.mean(by[task, "gold_bits_per_byte"]["value"] for task in tasks)
        lines.append("| " + " | ".join([NAMES.get(model["name"], model["name"]), *cells, f"{bits:.3f}"]) + " |")
    return "\n".join(lines)


SEEDS = (1, 2, 3)
BECAME = {
    "pre-300": "the source, `pre`",
    "peri": "calibrated, `peri`",
    "peri-gains": "6k tokens, its gains",
    "peri-kl": "55k more, KL from the source",
    "peri-ce": "or 55k more, the text's own tokens",
    "pre-more": "the source, 61k more tokens",
    "pre-360": "`pre` from the start, as many in all",
    "peri-360": "`peri` from the start, as many in all",
}


def seeds() -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """By what became of the tiny source: (its entry, the source's entry) of each seed."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for seed in SEEDS:
        models = read(f"tiny-seed{seed}")["models"]
        for name in BECAME:
            found.setdefault(name, []).append((next(m for m in models if m["name"] == f"{name}-s{seed}"), models[0]))
    return found


def rise(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Mean loss above the source's, nats a token."""
    return statistics.mean(model["loss"] - source["loss"] for model, source in pairs)


def seeds_table() -> str:
    """Loss, what it is above the source's, and KL; a row for each thing that a source became."""
    lines = [
        "| model | loss | above the source | lowest to highest | KL | bits left in FP16 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, pairs in seeds().items():
        rises = [model["loss"] - source["loss"] for model, source in pairs]
        cells = [
            f"{statistics.mean(model['loss'] for model, _ in pairs):.3f}",
            *(
                ["", "", ""]
                if name == "pre-300"
                else [
                    f"{statistics.mean(rises):+.3f}",
                    f"{min(rises):+.3f} to {max(rises):+.3f}",
                    f"{statistics.mean(model['kl'] for model, _ in pairs):.3f}",
                ]
            ),
            f"{statistics.mean(model['largest']['headroom_bits'] for model, _ in pairs):.1f}",
        ]
        lines.append(f"| {BECAME[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def around() -> str:
    """What became of SmolLM2, on other text."""
    report = read("smollm2-report")
    names = ("smollm2", "sandwich-keep", "sandwich")
    source, kept, hard = (next(m for m in report["models"] if m["name"] == name) for name in names)
    largest = [max(m["largest"]["value"] for m in model["massive_activations"]) for model in (source, kept, hard)]
    numbers = {
        **report["samples"],
        "smaller": largest[0] / largest[1],
        **{"hard": largest[0] / largest[2], "branch": hard["largest"]["value"]},
        "more_bits": kept["largest"]["headroom_bits"] - source["largest"]["headroom_bits"],
        "price": kept["loss"] - source["loss"],
    }
    return f"{AROUND.format(**numbers)}\n\n{report_table('smollm2-report')}"


def smollm2_healing() -> dict[str, Any]:
    """The numbers of SmolLM2's healing with five layers kept."""
    models = {model["name"]: model for model in read("smollm2-heal")["models"]}
    source, kept, gains, healed = (models[name] for name in ("smollm2", "sandwich-keep", "gains", "all"))

    def massive(model: dict[str, Any]) -> float:
        return max(found["largest"]["value"] for found in model["massive_activations"])

    def costs(row: str) -> str:
        found = [{f["row"]: f for f in model["formats"]}[row]["rise_share"] for model in (source, kept, healed)]
        return ", ".join(f"{100 * share:.1f} %" for share in found)

    bits = {name: model["largest"]["headroom_bits"] for name, model in models.items()}
    return {
        **{"gains_tokens": gains["step"] * 1024 // 1000, "all_tokens": healed["step"] * 1024 // 1000, "again": 12},
        **{"price": kept["loss"] - source["loss"], "gains_back": kept["loss"] - gains["loss"]},
        **{"back": kept["loss"] - healed["loss"], "left": healed["loss"] - source["loss"], "kl": healed["kl"]},
        **{"source_massive": massive(source), "kept_massive": massive(kept), "massive": massive(healed)},
        **{"source_bits": bits["smollm2"], "kept_bits": bits["sandwich-keep"], "bits": bits["all"]},
        **{"bits_left": bits["all"] - bits["smollm2"], "bits_won": bits["sandwich-keep"] - bits["smollm2"]},
        **{"int8": costs("activations: INT8 per tensor"), "mxfp4": costs("recipes: MXFP4 W4A4")},
        "limit": healed["tasks"][0]["n"],
        **{"table": report_table("smollm2-heal"), "tasks": tasks_table("smollm2-heal")},
    }


def dial() -> dict[str, Any]:
    """The numbers of the page's words about variants."""
    base, bounds = read("smollm2-sandwich")["source"]["check"], {n: read(f"bounds-{n}") for n in ("source", *BOUNDED)}

    def loss(name: str) -> float:
        return read(f"smollm2-{name}")["rules"]["least-squares"]["loss"]

    of = bounds["source"]
    return {
        **{"keep12": loss("keep12"), "keep": loss("keep"), "keep_rise": loss("keep") - base},
        **{"soft1_rise": loss("soften1") - base, "soft10_rise": abs(loss("soften10") - base)},
        **{"peri": loss("peri"), "output": loss("output")},
        **{"peri10": loss("peri-soften10"), "output10": loss("output-soften10")},
        "soft10_kl": read("smollm2-soften10")["rules"]["least-squares"]["kl"],
        **{"bound_source": of["stream_bound"], "bound_soft10": bounds["soften10"]["stream_bound"]},
        "times10": of["stream_bound"] / bounds["soften10"]["stream_bound"],
        "times1": of["stream_bound"] / bounds["soften1"]["stream_bound"],
        **{"above1": bounds["soften1"]["above"], "tensors": of["tensors"], "above_source": of["above"]},
    }


def healing() -> str:
    """The smaller tiny model: calibrated, healed, and beside what was trained from the start."""
    rises = {name: rise(pairs) for name, pairs in seeds().items()}
    (rule,) = {read(f"tiny-rules{seed}")["chosen"] for seed in SEEDS}  # the page has no words for seeds that differ

    def kl(name: str) -> float:
        return statistics.mean(model["kl"] for model, _ in seeds()[name])

    says = HEALING_SAYS.format(
        calibrated=rises["peri"],
        gains=rises["peri"] - rises["peri-gains"],
        kl=rises["peri-kl"],
        ce=rises["peri-ce"],
        times=kl("peri-ce") / kl("peri-kl"),
        start=-rises["peri-360"],
        pre_start=-rises["pre-360"],
    )
    return f"\n{HEALED.format(source_tokens=300 * 1024 // 1000, rule=rule)}\n\n{seeds_table()}\n\n{says}\n"


def page() -> str:
    """The page, from the records."""
    smollm2 = read("smollm2-sandwich")
    found, rule, versions = smollm2["samples"], smollm2["rules"]["least-squares"], smollm2["versions"]
    return PAGE.format(
        **{"samples": found["samples"], "tokens": found["tokens"], "check": found["check_samples"]},
        smollm2=rules_table({"smollm2-sandwich": "`sandwich`"}),
        exact=smollm2["exact"]["largest_difference"],
        best=rule["loss"],
        base=smollm2["source"]["check"],
        median=statistics.median(error for errors in rule["errors"].values() for error in errors),
        large=large_places("smollm2-sandwich", "least-squares"),
        around=around(),
        smollm2_healing=SMOLLM2_HEALED.format(**smollm2_healing()),
        healed_rise=smollm2_healing()["left"],
        variants=variants_table(),
        **dial(),
        tiny_rules=rules_table({"tiny-peri": "`peri`", "tiny-output": "`output`"}),
        healing=healing(),
        commands=COMMANDS.strip("\n"),
        processor=smollm2["processor"],
        **{name: versions[name] for name in ("torch", "transformers")},
    )


def main() -> None:
    (HERE / "retrofit.md").write_text(page())


if __name__ == "__main__":
    keep(sys.argv[2:]) if sys.argv[1:2] == ["--keep"] else main()
