"""Style and scripts of the pages that are written (report, zoo) and served (live): read into each, so that a page is
one file that loads nothing else."""

import base64
import hashlib
from pathlib import Path

_HERE = Path(__file__).parent


def asset(name: str) -> str:
    """The text of a style sheet or script of this folder, `page.css` say."""
    return (_HERE / name).read_text(encoding="utf-8")


def policy(script: str, connect: str = "'none'") -> str:
    """A content security policy under which a page runs this one script, asks for nothing, and shows data URLs.

    `connect` is what the script may fetch. Text that a model wrote cannot run as a script then, whatever it is.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
