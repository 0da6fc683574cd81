"""Model cards and the index of a zoo: pure functions of run folders on disk.

Below the stages: this package imports `modeling_periln` and `runkit` only; of it `scripts.push` uses `render_card`,
`Subject` and `find_subject`, and nothing else.
"""

from .cards import CardOptions, render_card
from .subject import Subject, find_subject

__all__ = ["CardOptions", "Subject", "find_subject", "render_card"]
