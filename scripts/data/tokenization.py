"""Tokenizers of prepared data: a BPE trained on the text, any Hugging Face tokenizer, tiktoken's cl100k_base."""

import base64
import binascii
import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from periln.runkit.control_tokens import END_OF_TEXT, PAD, ROLES, control_tokens, ignore_joiners
from periln.runkit.errors import UsageError, UserError

# The roles are reserved from the start, so that fine-tuning on conversations adds no row to the embedding.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *ROLES)
# Words with their leading space, numbers in groups of three, punctuation, white space.
SPLIT_PATTERN = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TiktokenEncoding:
    """What tiktoken knows about an encoding besides its rank file.

    Attributes:
        pattern: splits text into the pieces within which bytes are merged, as Oniguruma reads it.
        special_tokens: name to id; above the ranks, with holes.
        end_of_text: the special token that ends a document.
        sha256: of the rank file; None: not checked.
    """

    pattern: str
    special_tokens: dict[str, int]
    end_of_text: str
    sha256: str | None = None


TIKTOKEN = {
    "cl100k_base": TiktokenEncoding(
        # tiktoken's own has possessive quantifiers. Oniguruma takes {1,3}+ for "groups of 1 to 3, again and again",
        # so it is written without them; no alternative here can give back what it took and still match.
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        special_tokens={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        end_of_text="<|endoftext|>",
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    )
}


# --- a BPE of our own -------------------------------------------------------------------------------------
def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError where the vocabulary is smaller than the 256 bytes and the special tokens."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is smaller than the 256 bytes and {len(SPECIAL_TOKENS)} special tokens: "
            f"it must be at least {smallest}"
        )


def _byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, and decoding gives it back (but for the joiner of a neutralized
    control token, see `runkit.control_tokens`).

    Raises:
        UsageError: the vocabulary is too small for the 256 bytes and the special tokens.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _byte_level(SPLIT_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, END_OF_TEXT, context)


def _wrapped(tokenizer: Tokenizer, end_of_text: str, context: int) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    ignore_joiners(wrapped.backend_tokenizer, control_tokens(wrapped))
    return wrapped


# --- tiktoken ---------------------------------------------------------------------------------------------
def read_ranks(path: Path, sha256: str | None = None) -> dict[bytes, int]:
    """A tiktoken rank file: lines of base64 bytes and their rank.

    Raises:
        UserError: unreadable, another file than `sha256` says, or ranks with holes; names the path.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{path} is not the rank file asked for: its SHA-256 is not {sha256}")
    try:
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"{path} is not a rank file of tiktoken (lines of base64 and a number): {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([i]) in ranks for i in range(256)):
        raise UsageError(f"{path} is not a whole rank file of tiktoken: ranks or bytes are missing")
    return ranks


def _ranks_of_tiktoken(name: str) -> dict[bytes, int]:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            f"tokenizer {name} needs the package tiktoken (pip install tiktoken), or its rank file: --tiktoken-file"
        ) from error
    try:
        return tiktoken.get_encoding(name)._mergeable_ranks
    except Exception as error:  # requests' errors, or a cached file with a wrong hash
        raise UserError(
            f"tiktoken could not load {name} ({type(error).__name__}); give its rank file: --tiktoken-file"
        ) from error


def convert_tiktoken(ranks: dict[bytes, int], encoding: TiktokenEncoding, context: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that gives every text the ids of tiktoken's `encode_ordinary`.

    The ids that tiktoken leaves free below its last special token are filled, because ids of added tokens must
    follow on each other: with our padding and role tokens first, then with reserved ones. No id of tiktoken's moves.
    """
    # GPT-2's writing of bytes as printable characters, which ByteLevel reads.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    # tiktoken merges whatever neighbours make a token, lowest rank first: so all ways to cut a token are merges.
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        known.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in known]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    # ignore_merges: a piece that is a token as a whole is that token, as in tiktoken.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _byte_level(encoding.pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_names_by_id(len(ranks), encoding))
    return _wrapped(tokenizer, encoding.end_of_text, context)


def _names_by_id(first: int, encoding: TiktokenEncoding) -> list[str]:
    """The names of all ids from `first` on. The first hole is left to itself: it lies among the ranks' ids."""
    named = {number: name for name, number in encoding.special_tokens.items()}
    last = max(named)
    free = [number for number in range(min(named), last) if number not in named]
    if len(free) < len(ROLES) + 1:  # no room between: after the end
        free = list(range(last + 1, last + 2 + len(ROLES)))
    named |= dict(zip(free, (PAD, *ROLES), strict=False))
    return [named.get(number, f"<|reserved_{number}|>") for number in range(first, max(named) + 1)]


# --- any of them ------------------------------------------------------------------------------------------
def load_tokenizer(
    name: str, revision: str | None = None, tiktoken_file: str | None = None, context: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer by name: one of `TIKTOKEN`, or a folder or Hub id of any Hugging Face tokenizer.

    Raises:
        UserError: not found, not fast (Rust), or without an end-of-text token.
    """
    if name in TIKTOKEN:
        encoding = TIKTOKEN[name]
        ranks = read_ranks(Path(tiktoken_file), encoding.sha256) if tiktoken_file else _ranks_of_tiktoken(name)
        return convert_tiktoken(ranks, encoding, context or 8192)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # each library below has its own
        reason = " ".join(str(error).split())
        raise UsageError(f"no tokenizer could be loaded from {name}: {type(error).__name__}: {reason[:200]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {name} has no fast (tokenizer.json) form")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name} has no eos_token, which must end every document")
    if context:
        tokenizer.model_max_length = context
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id plus one, which with holes is more than `len(tokenizer)`."""
    return max(tokenizer.get_vocab().values()) + 1
