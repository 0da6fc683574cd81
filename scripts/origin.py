"""What a run begins with where `init_from` names a model: continued pretraining of any checkpoint of the family.

A Llama, OLMo 2, HyperCLOVA X or GLM-4 is converted in memory. The model's configuration becomes the recipe's `model`,
and the hash of its weights the recipe's `init_sha256`, so that the run folder alone says what the run began with: once
it has its own checkpoint, the source may be gone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.conversions import ARCHITECTURES, ConversionRefused, periln_config
from modeling_periln.convert import from_native
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, read_json, weights_hash
from periln.runkit.models import FoundModel, check_loadable, find_model, load_causal_lm
from periln.scripts.recipe import NOT_THE_MODELS, Recipe

FAMILY = PeriLlamaConfig.model_type
# A recipe may say these in another way than the source: no weight has a meaning for another value.
CHANGEABLE = ("max_position_embeddings", "rope_parameters", "attention_dropout", "attn_implementation")
_TOKENIZER_PARTS = ("model", "normalizer", "pre_tokenizer")  # of tokenizer.json, what decides a text's ids


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run begins with, and its configuration, as it is there and in this family."""

    asked: str
    checkpoint: Path
    revision: str | None
    native: PreTrainedConfig
    config: PeriLlamaConfig

    def record(self, sha256: str) -> dict[str, Any]:
        """What environment.json keeps of it."""
        return {
            "source": self.asked,
            "checkpoint": self.checkpoint.name,
            "revision": self.revision,
            "weights_sha256": sha256,
            "model_type": self.native.model_type,
            "converted": self.native.model_type != FAMILY,
        }


def find_origin(asked: str, field: str = "init_from", revision: str | None = None) -> Origin:
    """The checkpoint that `init_from`, or another field, names: a folder, a run folder (as `runkit.models` chooses), or
    a Hub id, at `revision`.

    Raises:
        UsageError, UserError: there is none, it is damaged, or this family cannot hold it; the message says which.
    """
    try:
        found: FoundModel = find_model(asked, revision)
        checkpoint = found.checkpoint()
        check_loadable(checkpoint)
        kind = read_json(checkpoint / "config.json").get("model_type")
    except UserError as error:
        raise type(error)(f"{field}: {error}") from error
    if kind != FAMILY and kind not in ARCHITECTURES:
        known = ", ".join((FAMILY, *ARCHITECTURES))
        raise UsageError(f"{field}: {asked} is {kind!r}, which this family cannot hold: it holds {known}")
    try:
        config_class: Any = PeriLlamaConfig if kind == FAMILY else ARCHITECTURES[kind].config_class
        native = config_class.from_pretrained(checkpoint)
        if getattr(native, "quantization_config", None) is not None:
            raise ConversionRefused("quantization_config: quantized weights cannot be trained")
        config = native if kind == FAMILY else periln_config(native)
    except (ConversionRefused, ValueError, TypeError) as error:
        raise UsageError(f"{field}: {asked}: {' '.join(str(error).split())}") from error
    return Origin(str(asked), checkpoint, found.revision, native, config)


def adopt_origin(recipe: Recipe, run: RunFolder | None = None) -> Origin | None:
    """Fill in `model` and `init_sha256` of a recipe that has `init_from`, `distill_sha256` of one with `distill_from`.

    Returns:
        the source; None without `init_from`, or where `run` has a checkpoint to resume from: its recipe says it all.

    Raises:
        UsageError, UserError: see `find_origin`; or the recipe's `model`, `init_sha256` or `distill_sha256` is not the
            source's.
    """
    _adopt_teacher(recipe)
    if recipe.init_from is None:
        if recipe.init_sha256 is not None:
            raise UsageError("init_sha256 is the hash of what init_from names, and the recipe has no init_from")
        return None
    began = run.recipe if run is not None and run.checkpoints() and (run.path / "recipe.yaml").exists() else {}
    if began.get("init_from") == recipe.init_from:
        recipe.model = began["model"] | recipe.model
        recipe.init_sha256 = recipe.init_sha256 or began.get("init_sha256")
        return None
    origin = find_origin(recipe.init_from)
    recipe.model = _merged(origin, recipe.model)
    found = hash_of(origin.checkpoint)
    if recipe.init_sha256 not in (None, found):
        raise UserError(f"init_from: the weights of {origin.checkpoint} are not those of init_sha256: {found}")
    recipe.init_sha256 = found
    return origin


def _adopt_teacher(recipe: Recipe) -> None:
    """Fill in `distill_sha256`; the model that `distill_from` names is needed until the run's last step."""
    if recipe.distill_from is None:
        if recipe.distill_sha256 is not None:
            raise UsageError("distill_sha256 is the hash of what distill_from names, and there is no distill_from")
        return
    found = hash_of(find_origin(recipe.distill_from, "distill_from").checkpoint)
    if recipe.distill_sha256 not in (None, found):
        raise UserError(f"distill_from: the weights of {recipe.distill_from} are not those of distill_sha256: {found}")
    recipe.distill_sha256 = found


def hash_of(checkpoint: Path) -> str:
    """`weights_hash`, computed once for files that have not changed."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return _hash_of(checkpoint, tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=8)
def _hash_of(checkpoint: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    return weights_hash(checkpoint)


def _merged(origin: Origin, asked: dict[str, Any]) -> dict[str, Any]:
    """The source's configuration as a recipe's `model`, with what the recipe itself may say."""
    for name in ("rope_theta", "rope_scaling"):
        if name in asked:
            raise UsageError(f"model.{name}: with init_from, say all of model.rope_parameters instead")
    theirs = _as_model(origin.config)
    try:
        merged = PeriLlamaConfig(**(theirs | asked))
    except Exception as error:  # as in Recipe.model_config
        raise UsageError(f"model: {' '.join(str(error).split())}") from error
    for name in asked:
        have, want = (getattr(config, name, None) for config in (origin.config, merged))
        if name not in (*CHANGEABLE, *NOT_THE_MODELS) and have != want:
            raise UsageError(f"model.{name} is {have!r} in init_from {origin.asked}, not {want!r}: leave it out")
    return theirs | asked


def _as_model(config: PeriLlamaConfig) -> dict[str, Any]:
    """A configuration as plain data: its vocabulary and placement, and what is not the default."""
    always, found = {"vocab_size", "norm_placement"}, {}
    for field in fields(PeriLlamaConfig):
        if field.name not in PeriLlamaConfig.__annotations__ or field.name in NOT_THE_MODELS:
            continue
        value = getattr(config, field.name, None)
        if field.name in always or value != field.default:
            found[field.name] = value
    return json.loads(json.dumps(found))


# --- the tokenizer ---------------------------------------------------------------------------------------------


def check_tokenizer(origin: Origin, data_tokenizer: Path, field: str = "init_from") -> None:
    """Refuse data that were encoded with another tokenizer than the source's own.

    Raises:
        UserError: names the first token that differs, or the part of the tokenizer.
    """
    remedy = f"prepare the data with --tokenizer {origin.asked}"
    theirs, ours = (_tokenizer(folder) for folder in (origin.checkpoint, data_tokenizer))
    if theirs is None:
        raise UserError(f"{field}: {origin.asked} has no tokenizer: nothing says which token each of its ids is")
    if ours is None:
        raise UserError(f"{field}: {data_tokenizer} holds no tokenizer that can be loaded: {remedy}")
    for token, i, j in _moved(theirs.get_vocab(), ours.get_vocab()):
        raise UserError(f"{field}: token {token!r} is {i} in {origin.asked} and {j} in the data: {remedy}")
    parts = (json.loads(t.backend_tokenizer.to_str()) for t in (theirs, ours))
    theirs_by_part, ours_by_part = ({part: one.get(part) for part in _TOKENIZER_PARTS} for one in parts)
    for part in _TOKENIZER_PARTS:
        if theirs_by_part[part] != ours_by_part[part]:
            raise UserError(f"{field}: the data's tokenizer has another {part} than {origin.asked}'s: {remedy}")


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except Exception:  # tokenizers of every kind, each with its own errors
        return None
    return found if getattr(found, "backend_tokenizer", None) is not None else None


def _moved(theirs: dict[str, int], ours: dict[str, int]) -> Iterator[tuple[str, int | None, int | None]]:
    """Tokens that have another id in one vocabulary than in the other, lowest ids first."""
    ids = {token: (theirs.get(token), ours.get(token)) for token in theirs.keys() | ours.keys()}
    moved = [(token, *pair) for token, pair in ids.items() if pair[0] != pair[1]]
    yield from sorted(moved, key=lambda row: (min(i for i in row[1:] if i is not None), row[0]))


# --- the weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def load_origin(recipe: Recipe, model: PeriLlamaForCausalLM) -> dict[str, Any]:
    """Put the weights that a checked recipe's `init_from` names, in FP32, into a model of their configuration.

    Returns:
        what environment.json keeps of the source.

    Raises:
        UserError: weights are missing, damaged, or others than when they were hashed.
    """
    assert recipe.init_from is not None and recipe.init_sha256 is not None
    origin = find_origin(recipe.init_from)
    if hash_of(origin.checkpoint) != recipe.init_sha256:
        raise UserError(f"init_from: the weights of {origin.checkpoint} have changed since the recipe was read")
    model.load_state_dict(load_weights(origin).state_dict())
    return origin.record(recipe.init_sha256)


def load_weights(origin: Origin, field: str = "init_from") -> PeriLlamaForCausalLM:
    """The source as a model of this family, in FP32 and in evaluation mode.

    Raises:
        UserError: weights are missing or damaged.
    """
    try:
        source: Any = load_causal_lm(origin.checkpoint, dtype=torch.float32, name=origin.asked)
    except UserError as error:
        raise type(error)(f"{field}: {error}") from error
    return source if origin.native.model_type == FAMILY else from_native(source)
