"""A table of strings as text for a terminal, Markdown, LaTeX and HTML; its machine-readable twin as CSV."""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


def signed(value: float, digits: int) -> str:
    """`+1.20`, `-0.30`, and `0.00` for what rounds to nothing."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def values(records: Sequence[dict], key: str, how: str = "") -> str:
    """The values of a key in the records, each once: `512`, `512 and 1,024` (`how` is a format)."""
    return " and ".join(dict.fromkeys(format(record[key], how) for record in records))


@dataclass(frozen=True)
class Table:
    """`text` is shown, a block for each value of its first column; `numbers` is its source."""

    title: str
    text: pd.DataFrame
    numbers: pd.DataFrame
    notes: tuple[str, ...] = ()
    keys: int = 1  # columns of a block that name its rows
    csv: pd.DataFrame | None = None  # what `to_csv` writes

    @property
    def blocks(self) -> list[tuple[str, pd.DataFrame]]:
        """Heading and rows of every block, in order."""
        first = self.text.columns[0]
        return [(str(key), rows.drop(columns=first)) for key, rows in self.text.groupby(first, sort=False)]


def _head_lines(head: str, width: int) -> list[str]:
    """A column's head on as many lines as its width requires; task names break after an underscore."""
    lines = textwrap.wrap(head.replace("_", "_ "), width, break_long_words=False)
    return [line.replace("_ ", "_") for line in lines]


def _spread(columns: Sequence[list[str]], width: int, keys: int) -> list[list[int]]:
    """Column numbers in as many pieces as the width requires; every piece starts with the columns of the row names."""
    names = list(range(keys))
    start = sum(2 + len(columns[i][0]) for i in names) - 2
    pieces, used = [names.copy()], start
    for i in range(keys, len(columns)):
        wide = 2 + len(columns[i][0])
        if used + wide > width and len(pieces[-1]) > keys:
            pieces.append(names.copy())
            used = start
        pieces[-1].append(i)
        used += wide
    return pieces


def to_terminal(table: Table, width: int = 120) -> str:
    """Plain text; what is wider than `width` continues below, with the row names repeated."""
    heads = list(table.text.columns[1:])
    body = [rows.to_numpy().tolist() for _, rows in table.blocks]
    columns, tall = [], 1
    for i, head in enumerate(heads):
        cells = [str(row[i]) for rows in body for row in rows]
        lines = _head_lines(head, max(8, *map(len, cells)))
        columns.append((lines, cells, max(map(len, lines + cells))))
        tall = max(tall, len(lines))
    padded = []
    for i, (lines, cells, wide) in enumerate(columns):
        fit = str.ljust if i == 0 else str.rjust
        padded.append([fit(x, wide) for x in [""] * (tall - len(lines)) + lines + cells])
    out = textwrap.wrap(table.title, width)
    for piece in _spread(padded, width, table.keys):
        lines = ["  ".join(padded[i][k] for i in piece).rstrip() for k in range(len(padded[0]))]
        out += ["", *filter(None, lines[:tall])]
        at = tall
        for name, rows in table.blocks:
            out += [f"-- {name}", *lines[at : at + len(rows)]]
            at += len(rows)
    return "\n".join([*out, "", *(line for note in table.notes for line in textwrap.wrap(note, width))])


def to_markdown(table: Table) -> str:
    """A Markdown table under its title; the heading of a block is a separate row, every note a paragraph."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    heads = list(table.text.columns[1:])
    out = [f"**{table.title}**", "", line(heads), line(["---"] * table.keys + ["---:"] * (len(heads) - table.keys))]
    for name, rows in table.blocks:
        out.append(line([f"**{name}**"] + [""] * (len(heads) - 1)))
        out += [line(row) for row in rows.to_numpy().tolist()]
    return "\n".join(out) + "\n" + "".join(f"\n{note}\n" for note in table.notes)


def latex_text(text: str) -> str:
    """The text with every character that LaTeX reads as a command escaped."""
    return "".join(_LATEX.get(c, c) for c in str(text))


def to_latex(table: Table) -> str:
    """A `table` for LaTeX with the package booktabs; notes stand below in \\footnotesize."""
    heads = list(table.text.columns[1:])

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex_text, cells)) + r" \\"

    out = [r"\begin{table}", r"\centering", rf"\caption{{{latex_text(table.title)}}}"]
    out += [rf"\begin{{tabular}}{{{'l' * table.keys}{'r' * (len(heads) - table.keys)}}}", r"\toprule", line(heads)]
    for name, rows in table.blocks:
        out += [r"\midrule", rf"\multicolumn{{{len(heads)}}}{{l}}{{\textit{{{latex_text(name)}}}}} \\"]
        out += [line(row) for row in rows.to_numpy().tolist()]
    out += [r"\bottomrule", r"\end{tabular}", ""]
    out += [rf"{{\footnotesize {latex_text(note)}\par}}" for note in table.notes]
    return "\n".join([*out, r"\end{table}"]) + "\n"


def _csv_cell(value: object) -> object:
    """A float in four decimals, more if it is too small for four; nothing for what is missing."""
    if not isinstance(value, float):
        return "" if value is None else value
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.4g}"


def to_csv(table: Table) -> str:
    """The table's numbers with a header line; neither title nor notes."""
    frame = table.numbers if table.csv is None else table.csv
    return frame.astype(object).map(_csv_cell).to_csv(index=False, lineterminator="\n")


def to_html(table: Table) -> str:
    """A `<table>` with a caption and a row group a block; every text is escaped."""

    heads = list(table.text.columns[1:])

    def cell(i: int, text: str) -> str:
        if i < table.keys:
            return f'<th scope="row">{html.escape(text)}</th>'
        return f'<td data-label="{html.escape(heads[i])}">{html.escape(text)}</td>'  # the label is for narrow windows

    out = [f"<table><caption>{html.escape(table.title)}</caption>", "<thead><tr>"]
    out += [f'<th scope="col">{html.escape(head).replace("_", "_<wbr>")}</th>' for head in heads]
    out.append("</tr></thead>")
    for name, rows in table.blocks:
        out.append(
            f'<tbody><tr><th class="block" scope="rowgroup" colspan="{len(heads)}">{html.escape(name)}</th></tr>'
        )
        out += [
            "<tr>" + "".join(cell(i, str(x)) for i, x in enumerate(row)) + "</tr>" for row in rows.to_numpy().tolist()
        ]
        out.append("</tbody>")
    return "\n".join([*out, "</table>"])
