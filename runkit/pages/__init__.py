"""Style and scripts of the pages that are written (report, zoo) and served (live): read into each, so that a page is
one file that asks for nothing else."""

from pathlib import Path

_HERE = Path(__file__).parent


def asset(name: str) -> str:
    """The text of a style sheet or script of this folder, `page.css` say."""
    return (_HERE / name).read_text(encoding="utf-8")
