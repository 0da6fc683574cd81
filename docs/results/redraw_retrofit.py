"""Redraw docs/results/retrofit.md from the records next to it: `python docs/results/redraw_retrofit.py`.

`python docs/results/redraw_retrofit.py --keep NAME=FILE...` first stores the numbers of `retrofit.json` and
`report.json` files as records/retrofit/NAME.json: losses and shares, no weights, no texts, no paths.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "retrofit"


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a retrofit.json or a report.json."""
    about = {name: record["environment"].get(name) for name in ("commit", "processor", "threads", "versions")}
    if "plan" in record:
        rules = {}
        for name, rule in record["calibration"]["rules"].items():
            errors: dict[str, list[float]] = {}
            for place in rule["places"]:
                errors.setdefault(place["slot"], []).append(round(place["error"], 4))
            rules[name] = {"calibration": rule["calibration"]["loss"], **rule["check"], "errors": errors}
        names = ("to", "soften", "kept_layers", "samples", "exact", "seconds", "new_gains", "unties")
        found = {name: record.get(name) for name in names}
        source = {name: one["loss"] for name, one in record["calibration"]["source"].items()}
        return found | {"source": source, "rules": rules, "chosen": record["calibration"]["chosen"], **about}
    models = [{k: v for k, v in m.items() if k not in ("nats", "asked")} for m in record["models"]]
    return {"samples": record["samples"], "models": models, "said": record["said"], **about}


def keep(words: list[str]) -> None:
    """Store records by name."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for word in words:
        name, _, file = word.partition("=")
        record = kept(json.loads(Path(file).read_text()))
        record.get("samples", {})["data"] = Path(record["samples"]["data"]).name
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
    lines = ["| target | rule | loss, calibration text | loss, other text | KL | unexplained, median over places |",
             "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, shown in names.items():
        record = read(name)
        source = record["source"]
        lines.append(f"| {shown} | source | {source['calibration']:.3f} | {source['check']:.3f} | | |")
        for rule, one in record["rules"].items():
            error = statistics.median(error for errors in one["errors"].values() for error in errors)
            mark = "**" if rule == record["chosen"] and len(record["rules"]) > 1 else ""
            numbers = f"{one['calibration']:.3f} | {one['loss']:.3f} | {one['kl']:.3f} | {error:.2f}"
            lines.append(f"| | {mark}{rule}{mark} | {numbers} |")
    return "\n".join(lines)


def report_table(name: str) -> str:
    """A report's models: loss, KL, headroom, massive activations, formats."""
    models = read(name)["models"]
    formats = [found["row"] for found in models[0]["formats"]]
    head = ["model", "loss", "KL", "bits left in FP16", "massive activations", *formats]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for model in models:
        massive = max((m["largest"]["value"] for m in model["massive_activations"]), default=None)
        shares = [found.get("rise_share") for found in model["formats"]]
        cells = [model["name"], f"{model['loss']:.3f}", "" if model["kl"] is None else f"{model['kl']:.3f}",
                 f"{model['largest']['headroom_bits']:.1f}", "none" if massive is None else f"to {massive:.3g}",
                 *("not finite" if share is None else f"{100 * share:+.1f} %" for share in shares)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    page = (HERE / "retrofit.md.in").read_text()
    page = page.replace(
        "<!-- smollm2 rules -->", rules_table({f"smollm2-{n}": n for n in ("sandwich", "peri", "output")})
    )
    page = page.replace("<!-- tiny rules -->", rules_table({f"tiny-{n}": n for n in ("peri", "output")}))
    for name in ("smollm2-report", "tiny-report"):
        page = page.replace(f"<!-- {name} -->", report_table(name))
    (HERE / "retrofit.md").write_text(page)


if __name__ == "__main__":
    keep(sys.argv[2:]) if sys.argv[1:2] == ["--keep"] else main()
