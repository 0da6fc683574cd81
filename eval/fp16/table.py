"""The record of a rewrite as a page for people."""

from typing import Any


def as_markdown(record: dict[str, Any], rows: int | None = None) -> str:
    """A page with what overflowed, what moved, what differs, and the peaks (the `rows` with the least headroom)."""
    differences, largest = record["differences"], record["differences"]["largest_logit"]
    lines = [f"# FP16 rewrite of {record['model']} ({record['model_type']})", ""]
    for name, found in (("before", record["before"]), ("after", record["after"])):
        lines.append(f"- in FP16, {name}: {_state(found)}")
    if record["backward_given_up"]:
        lines.append(f"- the backward pass was given up: {record['backward_given_up']}")
    lines.append(f"- {_epsilon(record['epsilon'])}")
    lines += [f"- {text}" for text in record["remains"]]
    if (left := record["logits_left_out"]) is not None:
        lines.append(
            f"- the head was left out for {left['samples']} samples, whose logits are below {left['bound']:.4g}"
        )
    if record["written_in_fp32"]:
        some = ", ".join(record["written_in_fp32"][:3])
        lines.append(
            f"- {len(record['written_in_fp32'])} tensors are in FP32, {record['dtype']} cannot hold them: {some}"
        )
    lines += [
        "",
        "| logits against the source's in FP32 | largest difference | of the largest logit |",
        "|---|---:|---:|",
    ]
    said = {
        "fp32": "rewritten, in memory",
        "written_difference": "written and loaded again",
        "weights_rounded_to_fp16_before": "source, weights rounded to FP16",
        "weights_rounded_to_fp16": "rewritten, weights rounded to FP16",
        "fp16_pass": "rewritten, all in FP16",
    }
    for key, words in said.items():
        value = record[key] if key in record else differences[key]
        share = "" if value is None else f"{value / largest:.2g}" if largest else ""
        lines.append(f"| {words} | {'not finite' if value is None else f'{value:.3g}'} | {share} |")
    lines += ["", "| group | exponent |", "|---|---:|"]
    lines += [f"| {group} | {exponent:+d} |" for group, exponent in record["exponents"].items()]
    return "\n".join([*lines, "", *_peaks(record["peaks"], rows), ""])


def _state(found: dict[str, Any]) -> str:
    for way in ("forward", "backward"):
        if found[way] is not None:
            scale = f" at loss scale {found['loss_scale']:g}" if way == "backward" else ""
            return f"{found[way]['where']} is not finite ({way}{scale})"
    scale = found["largest_finite_loss_scale"]
    return "all is finite" + (f", gradients up to a loss scale of {scale:g}" if scale else "")


def _epsilon(epsilon: dict[str, Any]) -> str:
    if epsilon["before"] == epsilon["after"]:
        return f"{epsilon['field']} is as it was" + ("" if epsilon["exact"] else ", which is not exact")
    return f"{epsilon['field']} follows the scales of what the norms read"


def _peaks(peaks: list[dict[str, Any]], rows: int | None) -> list[str]:
    def headroom(row: dict[str, Any]) -> float:
        return min(x for x in (row["headroom_bits"], row["gradient_headroom_bits"], 99.0) if x is not None)

    shown = sorted(peaks, key=headroom)[:rows]
    lines = [
        "| tensor | largest before | exponent | headroom (bits) after | of its gradient |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in shown:
        bits = ["" if row[k] is None else f"{row[k]:.1f}" for k in ("headroom_bits", "gradient_headroom_bits")]
        lines.append(f"| {row['tensor']} | {row['forward']:.4g} | {row['exponent']:+d} | {bits[0]} | {bits[1]} |")
    return lines
