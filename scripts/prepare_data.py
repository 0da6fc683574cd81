"""Text to tokens: `python -m scripts.prepare_data --source installed-python --out data/`."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from runkit.errors import UsageError, UserError, make_parser, run_command
from runkit.folder import read_json, write_folder, write_json
from runkit.process import start_stage

from .corpus import INSTALLED, Corpus, read_corpus

END_OF_TEXT, PAD = "<|end_of_text|>", "<|pad|>"
# Reserved from the start, so that fine-tuning on conversations adds no row to the embedding.
ROLES = ("<|user|>", "<|assistant|>", "<|end_of_turn|>")
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *ROLES)
# Words with their leading space, numbers in groups of three, punctuation, white space.
SPLIT_PATTERN = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError where the vocabulary is smaller than the 256 bytes and the special tokens."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is smaller than the 256 bytes and {len(SPECIAL_TOKENS)} special tokens: "
            f"it must be at least {smallest}"
        )


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, and decoding gives it back.

    Raises:
        UsageError: the vocabulary is too small for the 256 bytes and the special tokens.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def write_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, out: Path, fingerprint: str, options: dict
) -> None:
    """Tokens of the training documents, each followed by the end-of-text token, and the index last."""
    size = len(tokenizer)
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
    ends, total = [], 0
    with open(out / "train.bin", "wb") as file:
        for start in tqdm(range(0, len(corpus.train), 256), desc="tokens", unit="batch of documents"):
            texts = [text for _, text in corpus.train[start : start + 256]]
            for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
                ids = np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=dtype)
                file.write(ids.tobytes())
                total += len(ids)
                ends.append(total)
    with open(out / "heldout.jsonl", "w", encoding="utf-8") as file:
        for name, text in corpus.heldout:
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
    index = {
        "dtype": str(dtype.name),
        "tokens": total,
        "vocab_size": size,
        "documents": len(corpus.train),
        "document_ends": ends,
        "bytes": sum(len(text.encode()) for _, text in corpus.train),
        "heldout_documents": len(corpus.heldout),
        "heldout_bytes": sum(len(text.encode()) for _, text in corpus.heldout),
        "skipped": {reason: {"count": len(names), "names": names} for reason, names in corpus.skipped.items()},
        "options": options,
        "fingerprint": fingerprint,
    }
    write_json(out / "index.json", index)


def prepare(source: str, out: Path, vocab_size: int, max_bytes: int, heldout_share: float, context: int) -> dict:
    """Prepare `out`, whole or not at all; data that stands there with the same options is kept.

    Returns:
        index.json's content.
    Raises:
        UsageError, UserError: see `read_corpus`, `train_tokenizer`; or `out` holds something else.
    """
    check_vocab_size(vocab_size)
    if not 0 < heldout_share < 1:
        raise UsageError(f"heldout_share must lie between 0 and 1, not {heldout_share}")
    if max_bytes < 1:
        raise UsageError(f"max_bytes must be at least 1, not {max_bytes}")
    where = source if source == INSTALLED else str(Path(source).resolve())
    options = {"source": where, "vocab_size": vocab_size, "max_bytes": max_bytes, "heldout_share": heldout_share}
    options["context"] = context
    if (out / "index.json").exists():
        index = read_json(out / "index.json")
        if index["options"] != options:
            raise UserError(f"{out} holds data of other options ({index['options']}); give another folder")
        return index
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no prepared data; give another folder")
    print(f"reading text from {source}")
    corpus = read_corpus(source, max_bytes, heldout_share)
    tokenizer = train_tokenizer([text for _, text in corpus.train], vocab_size, context)
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for _, text in corpus.train:
        digest.update(hashlib.sha256(text.encode()).digest())
    with write_folder(out) as folder:
        tokenizer.save_pretrained(folder / "tokenizer")
        write_tokens(corpus, tokenizer, folder, digest.hexdigest(), options)
    return read_json(out / "index.json")


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    index = prepare(args.source, args.out, args.vocab_size, args.max_bytes, args.heldout_share, args.context)
    skipped = ", ".join(f"{v['count']} {k}" for k, v in index["skipped"].items()) or "none"
    print(
        f"{args.out}: {index['documents']} documents, {index['bytes'] / 1e6:.1f} MB, {index['tokens']:,} tokens of "
        f"{index['vocab_size']}; held out {index['heldout_documents']} documents; skipped: {skipped}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m scripts.prepare_data", "Text to a tokenizer and token files.")
    parser.add_argument("--source", default=INSTALLED, help=f"'{INSTALLED}', or a folder of .txt/.jsonl/.parquet")
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries of the byte-level BPE")
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="read at most so much text")
    parser.add_argument("--heldout-share", type=float, default=0.02, help="share of documents held out")
    parser.add_argument("--context", type=int, default=512, help="the tokenizer's model_max_length")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
