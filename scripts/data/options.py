"""What is to be prepared: the options that decide the result."""

from dataclasses import dataclass

from periln.runkit.errors import UsageError
from periln.runkit.resume import PLACE, setting
from periln.scripts.data.corpus import Limits
from periln.scripts.data.documents import Source
from periln.scripts.data.shards import LARGEST_SHARD
from periln.scripts.data.sources import BPE, open_source
from periln.scripts.data.tokenization import check_vocab_size


@dataclass(frozen=True)
class Options:
    """Everything that decides the result; recorded in index.json, part of the fingerprint (but for local paths).

    Attributes:
        source, dataset_config, split, revision, text_column: see `open_source`.
        tokenizer: `bpe`, `cl100k_base`, or a folder or Hub id.
        vocab_size: of the BPE; None where the tokenizer is another.
        context: the tokenizer's model_max_length; None: the tokenizer's own (512 for the BPE, 8192 for cl100k_base).
        sample_bytes: how much of the training text, from its start, the BPE is trained on.
        max_tokens: tokenizing ends with the document that reaches it; None: no limit.
        others: see `Limits`.
    """

    source: str = setting(decides=PLACE)
    vocab_size: int | None = None
    max_bytes: int | None = None
    heldout_share: float = 0.02
    context: int | None = None
    dataset_config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    tokenizer: str = setting(BPE, decides=PLACE)
    tokenizer_revision: str | None = None
    sample_bytes: int = 1 << 26
    max_tokens: int | None = None
    heldout_documents: int | None = None
    max_document_bytes: int | None = None
    shard_tokens: int = 1 << 27

    def check(self) -> None:
        """Raise UsageError for what cannot be, before anything is read."""
        if self.tokenizer == BPE:
            check_vocab_size(self.vocab_size)
        if not 0 < self.heldout_share < 1:
            raise UsageError(f"heldout_share must lie between 0 and 1, not {self.heldout_share}")
        for name in ("max_bytes", "max_tokens", "max_document_bytes", "sample_bytes", "heldout_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not 1 <= self.shard_tokens <= LARGEST_SHARD:
            raise UsageError(f"shard_tokens must lie between 1 and {LARGEST_SHARD}, not {self.shard_tokens}")

    @property
    def limits(self) -> Limits:
        return Limits(self.heldout_share, self.max_bytes, self.heldout_documents, self.max_document_bytes)

    def open_source(self) -> Source:
        return open_source(self.source, self.text_column, self.dataset_config, self.split, self.revision)
