"""Where documents come from: files, installed Python text, datasets of the Hub. One at a time, in one fixed order.

A source is read lazily, and can resume where an earlier process stopped: `position()` says where, in a few numbers.
"""

from pathlib import Path

from periln.runkit.errors import UsageError, did_you_mean
from periln.scripts.data.documents import Document as Document
from periln.scripts.data.documents import Source
from periln.scripts.data.hub_dataset import HubDataset
from periln.scripts.data.local_files import InstalledPython, LocalFiles
from periln.scripts.data.machine_text import InstalledText

INSTALLED, MACHINE, HUB = "installed-python", "installed", "hf:"
OF_THIS_MACHINE = (INSTALLED, MACHINE)  # sources without a place
BPE = "bpe"  # the tokenizer that is trained on the text


def open_source(
    source: str,
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Source:
    """`installed-python`, `installed`, `hf:` and a dataset's id, or the path of a file or folder.

    Raises:
        UserError, UsageError: nothing of that name.
    """
    if not source.startswith(HUB) and (config is not None or revision is not None or split != "train"):
        raise UsageError(f"dataset_config, split and revision belong to a source {HUB}..., not to {source}")
    if source == INSTALLED:
        return InstalledPython()
    if source == MACHINE:
        return InstalledText()
    if source.startswith(HUB):
        if not source.removeprefix(HUB):
            raise UsageError(f"the source {source!r} names no dataset: {HUB}owner/name")
        return HubDataset(source.removeprefix(HUB), config, split, revision, column)
    if not Path(source).exists() and (hint := did_you_mean(source, OF_THIS_MACHINE)):
        raise UsageError(f"unknown source {source!r}{hint}")
    return LocalFiles(Path(source), column)
