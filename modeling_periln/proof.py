"""The proof of a conversion: two model folders give the same logits in FP32, on random tokens and on text.

The text is WikiText (its test split, one small file of the Hub) or the user's own file. Where it is not available, the
record says why, and the comparison on random tokens decides alone.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedConfig

from .configuration_periln import PeriLlamaConfig
from .conversions import ARCHITECTURES, ConversionRefused
from .convert_options import NO_TEXT, WIKITEXT, WIKITEXT_2
from .modeling_periln import PeriLlamaForCausalLM

TOLERANCE = 1e-5  # of the largest logit
CHECKED_SHAPES = ((1, 1), (2, 7), (3, 33))  # batch, tokens
WINDOWS, LONGEST = 3, 1024  # a model with a sliding window is compared over three windows, up to this many tokens
SEED = 20250202
TEXT_WINDOWS, TEXT_LENGTH = 2, 256

WIKITEXT_FILE = (WIKITEXT_2[0], f"{WIKITEXT_2[1]}/{WIKITEXT_2[2]}-00000-of-00001.parquet")


class ConversionFailed(RuntimeError):
    """The source is damaged, or the export is not the same function; nothing was left at the destination."""


class TextMissing(Exception):
    """Why there is no text to compare on."""


Batch = dict[str, torch.Tensor]


def random_batches(config: PreTrainedConfig) -> list[Batch]:
    """Random tokens in several shapes, the first row of each padded on the left."""
    generator, batches = torch.Generator().manual_seed(SEED), []
    window = getattr(config, "sliding_window", None)
    shapes = CHECKED_SHAPES if window is None else (*CHECKED_SHAPES, (2, min(WINDOWS * window, LONGEST)))
    for batch, length in shapes:
        length = min(length, config.max_position_embeddings)
        ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batches.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return batches


def text_batches(folder: Path, config: PreTrainedConfig, text: str | Path) -> tuple[list[Batch], dict[str, Any]]:
    """The text's first tokens by the folder's tokenizer, as one batch of windows; and a description of it.

    Raises:
        TextMissing: there is no tokenizer, no such text, or not one whole window.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TextMissing("the source has no tokenizer")
    words, source = _wikitext() if text == WIKITEXT else _file(Path(text))
    try:
        ids = AutoTokenizer.from_pretrained(folder)(words, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # tokenizers of every kind, which may need their own libraries
        raise TextMissing(f"the source's tokenizer cannot be used: {' '.join(str(error).split())}") from error
    length = min(TEXT_LENGTH, config.max_position_embeddings)
    windows = min(TEXT_WINDOWS, len(ids) // length)
    if windows < 1:
        raise TextMissing(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    tokens = torch.tensor(ids[: windows * length]).view(windows, length)
    if int(tokens.max()) >= config.vocab_size:
        raise TextMissing(f"the tokenizer gives token {int(tokens.max())}, the model has {config.vocab_size}")
    positions = torch.arange(length).expand(windows, -1)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": positions}
    return [batch], source | {"sha256": hashlib.sha256(words.encode()).hexdigest(), "shape": [windows, length]}


def _file(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        return path.read_text(encoding="utf-8-sig")[: 1 << 16], {"source": path.name}
    except (OSError, UnicodeDecodeError) as error:
        raise TextMissing(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _wikitext() -> tuple[str, dict[str, Any]]:
    """The beginning of WikiText-2's test split. One file is fetched and kept in the Hub's cache."""
    repository, name = WIKITEXT_FILE
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TextMissing("WikiText is a parquet file, and pyarrow is not installed") from error
    try:
        if not isinstance(try_to_load_from_cache(repository, name, repo_type="dataset"), str):
            # One request first: where there is no network, the download would try again and again for half a minute.
            get_session().head(hf_hub_url(repository, name, repo_type="dataset"), timeout=10)
        file = hf_hub_download(repository, name, repo_type="dataset")
        lines = parquet.read_table(file, columns=["text"]).column("text").to_pylist()
    except Exception as error:  # offline, refused, an unexpected file: all the same to the caller
        reason = (str(error).splitlines() or [""])[0]
        raise TextMissing(f"WikiText is not available from the Hub ({type(error).__name__}: {reason})") from error
    return "".join(lines)[: 1 << 16], {"source": f"{repository}, {name}"}


def compare(
    src: Path,
    dst: Path,
    src_config: PreTrainedConfig,
    dst_config: PreTrainedConfig,
    text: str | Path | None = None,
) -> dict[str, Any]:
    """The largest difference of the logits of two model folders in FP32, and how it was measured.

    The two models are in memory one after the other. Random tokens and text must each be within the tolerance.

    Args:
        text: a file, `wikitext`, `none`; None: WikiText if available, else the record says why not.

    Raises:
        ConversionRefused: the text that was asked for is not available.
        ConversionFailed: a difference is above `TOLERANCE` of the largest logit, or not a number.
    """
    random, about = random_batches(src_config), {"skipped": "not asked for"}
    written: list[Batch] = []
    if text != NO_TEXT:
        try:
            written, about = text_batches(src, src_config, text or WIKITEXT)
        except TextMissing as error:
            if text is not None:
                raise ConversionRefused(f"--text {text}: {error}") from error
            about = {"skipped": str(error)}
    ours, theirs = (_logits(f, c, [*random, *written]) for f, c in ((src, src_config), (dst, dst_config)))
    measured = {"random tokens": _difference(ours[: len(random)], theirs[: len(random)], "random tokens")}
    if written:
        measured["text"] = _difference(ours[len(random) :], theirs[len(random) :], "text")
    worst = max(measured.values(), key=lambda m: m["largest_difference"] / m["largest_logit"])
    shapes = [list(b["input_ids"].shape) for b in random]
    how = {"dtype": "float32", "seed": SEED, "shapes": shapes, "text": about | measured.get("text", {})}
    return {**worst, "tolerance": TOLERANCE, "compared": how | {"random_tokens": measured["random tokens"]}}


def _difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], where: str) -> dict[str, float]:
    largest = max(x.abs().max().item() for x in ours)
    # Python's max() would pass over NaN
    difference = torch.stack([(x - y).abs().max() for x, y in zip(ours, theirs, strict=True)]).max().item()
    if not difference <= TOLERANCE * largest:
        much = f"by {difference:.3g} on {where}, more than {TOLERANCE:g} of the largest, {largest:.3g}"
        raise ConversionFailed(f"the export was removed: its logits differ from the source's {much}")
    return {"largest_difference": difference, "largest_logit": largest}


@torch.no_grad()
def _logits(folder: Path, config: PreTrainedConfig, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Logits (tokens, V) of each batch, of all tokens that are not padding."""
    model, info = model_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ConversionFailed(f"{type(model).__name__} does not load all weights: {info}")
    if config.model_type == PeriLlamaConfig.model_type:
        model.config.residual_dtype = None
    for weight in model.parameters():  # off the file's mapping, onto an aligned allocation: rounding depends on it
        weight.data = weight.data.clone()
    return [model(**b, use_cache=False).logits[b["attention_mask"].bool()] for b in batches]


def model_class(config: PreTrainedConfig) -> Any:
    """The causal model of a configuration of ours, or of one of the architectures."""
    ours = config.model_type == PeriLlamaConfig.model_type
    return PeriLlamaForCausalLM if ours else ARCHITECTURES[config.model_type].model_class


def in_words(record: dict[str, Any]) -> list[str]:
    """What was compared, one line for each kind of input; for a terminal."""
    compared, lines = record["compared"], []
    for name, kind in (("random tokens", compared["random_tokens"]), ("text", compared["text"])):
        if "skipped" in kind:
            lines.append(f"not compared on {name}: {kind['skipped']}")
            continue
        what = f"{name} ({kind['source']})" if "source" in kind else name
        lines.append(f"{what}: largest difference {kind['largest_difference']:.3g} of {kind['largest_logit']:.6g}")
    return lines
