"""Which model a path or an id of the Hub means, and how its weights are loaded: one answer for every stage.

What is damaged is named, and passed over or refused. Missing weights are refused, since Transformers fills them
with random numbers; so are weights that the model has no place for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from periln.runkit.checkpoints import checked, chosen_checkpoint, named_best, whole_checkpoints
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, read_json
from periln.runkit.hub import hub_error, quiet_hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")  # of a Hub model; never a pickle


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class FoundModel:
    """A model folder, or a run that holds some.

    `run` is the run folder it belongs to, `whole_run` whether that was asked for; `revision` is the Hub's commit.
    """

    asked: str
    path: Path
    run: Path | None = None
    whole_run: bool = False
    revision: str | None = None

    def checkpoint(self, tell: Callable[[str], None] = to_stderr) -> Path:
        """The checkpoint that represents it: see `runkit.checkpoints.chosen_checkpoint`.

        Raises:
            UserError: a run without a whole checkpoint, or a damaged one that was asked for.
        """
        if not self.whole_run:
            return checked(self.path)
        run = RunFolder(self.path)
        found = chosen_checkpoint(run, tell)
        if found is None:
            raise UserError(f"{self.path} has no whole checkpoint (status: {run.status or 'not started'})")
        return found

    def checkpoints(self, tell: Callable[[str], None] = to_stderr) -> list[Path]:
        """Every whole checkpoint of a run, oldest first; otherwise the only one. Raises as `checkpoint`."""
        if not self.whole_run:
            return [checked(self.path)]
        found = list(whole_checkpoints(RunFolder(self.path), tell))[::-1]
        return found or [self.checkpoint(lambda text: None)]

    @property
    def is_chosen(self) -> bool:
        """Whether best.json of a fine-tuning decides which checkpoint represents it."""
        return self.whole_run and named_best(RunFolder(self.path)) is not None


def find_model(asked: str | Path, revision: str | None = None) -> FoundModel:
    """The model at a path, or else with an id of the Hub.

    Raises:
        UsageError: a revision of a local path.
        UserError: it is neither a run, nor a model folder, nor a model of the Hub.
    """
    path = Path(asked)
    if not is_local(asked):
        found, commit = _download(str(asked), revision)
        return FoundModel(str(asked), found, revision=commit)
    if revision is not None:
        raise UsageError(f"--revision {revision} is for models of the Hub, and {asked} is not one")
    path = path.resolve()
    if path.suffix == ".gguf" and path.is_file():
        raise UsageError(f"{asked} is GGUF: widen it first, periln widen {asked} OUT, and name OUT")
    if (path / "recipe.yaml").exists():
        return FoundModel(str(asked), path, path, whole_run=True)
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        what = "is neither a run folder (recipe.yaml) nor a checkpoint (config.json)"
        raise UsageError(f"{path} {what}" if path.exists() else f"{asked} does not exist and is not an id of the Hub")
    run = path.parent.parent
    inside = path.parent.name in ("checkpoints", "merged") and (run / "recipe.yaml").exists()
    return FoundModel(str(asked), path, run if inside else None)


def is_local(asked: str | Path) -> bool:
    """Whether a path is meant rather than an id of the Hub."""
    return Path(asked).exists() or not _HUB_ID.fullmatch(str(asked))


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint by its name; 0 for one that is not named by a step."""
    name = checkpoint.name.removeprefix("step_")
    return int(name) if name.isdigit() else 0


def check_loadable(checkpoint: Path) -> None:
    """Refuse, before anything is imported, what cannot be loaded as a causal LM with plain weights.

    Raises:
        UserError: an adapter alone, no weights in safetensors, quantized weights, or a model of another kind.
    """
    if (checkpoint / "adapter_config.json").exists():
        raise UsageError(f"{checkpoint} holds an adapter alone: merge it (sft.train --peft --merge), and use merged/")
    if not any(checkpoint.glob("*.safetensors")):
        raise UsageError(_no_weights(checkpoint, [path.name for path in checkpoint.iterdir()], f"{checkpoint}/"))
    check_kind(checkpoint, read_json(file) if (file := checkpoint / "config.json").exists() else {})


def _no_weights(name: object, files: list[str], where: str = "") -> str:
    """Why a model of these files cannot be read: it has no safetensors."""
    if gguf := sorted(file for file in files if file.endswith(".gguf")):
        return f"{name} holds GGUF alone ({gguf[0]}): widen it first, periln widen {where}{gguf[0]} OUT"
    return f"{name} has no weights in safetensors; pickled ones (.bin, .pt) are not read"


# Encoders on which Transformers silently puts a causal head.
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet"),
    *("roberta", "xlm-roberta"),
)


def check_kind(name: object, config: Any) -> None:
    """Refuse, by its configuration, a model that is quantized, is an encoder, or reads more than text.

    Raises:
        UsageError: which of these it is.
    """
    if not isinstance(config, dict):
        raise UsageError(f"{name} has a config.json that is not a mapping")
    kind = config.get("model_type")
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise UsageError(f"{name} is quantized ({method}): name the model in full precision that it was made from")
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{name} is an encoder with a decoder (model_type {kind}), not a causal LM")
    if kind in ENCODERS and not config.get("is_decoder"):
        raise UsageError(f"{name} is an encoder (model_type {kind}), not a causal LM")
    more = [field for field in ("vision_config", "audio_config") if config.get(field) is not None]
    if more:
        said = f"{name} reads more than text (model_type {kind}, {more[0]})"
        raise UsageError(f"{said}: save its language model by itself, and name that")


def load_causal_lm(
    checkpoint: Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, name: str | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode, from safetensors alone.

    Raises:
        UserError: it cannot be loaded, its code would have to be trusted, or its weights are not those of the model.
    """
    import transformers

    import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)

    check_loadable(checkpoint)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, **options)
    except Exception as error:
        raise not_loaded(name or checkpoint, error) from error
    refuse_other_weights(name or checkpoint, info)
    return model.eval()


def refuse_other_weights(name: object, info: dict[str, Any]) -> None:
    """Refuse a model whose file lacks weights or holds others; `info` is what `from_pretrained` reports about them.

    Raises:
        UserError: how many, and the first.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} the first")
    if unexpected := sorted(info["unexpected_keys"]):
        raise UserError(
            f"{name} holds {len(unexpected)} weights that the model does not have, {unexpected[0]} the first"
        )
    if mismatched := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ())):
        raise UserError(
            f"{name} has {len(mismatched)} weights of another shape than the model, {mismatched[0]} the first"
        )


def not_loaded(name: object, error: Exception) -> UserError:
    """What Transformers raised, of whatever kind, as one sentence."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UserError(f"{name} brings its own code, which runs only with --trust-remote-code: read it first")
    return UserError(f"{name} cannot be loaded as a causal LM ({text[:200]})")


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a Hub model in the cache (weights in safetensors, never pickles), and its commit."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    quiet_hub()
    at = f"{name}@{revision}" if revision else name
    try:
        if constants.is_offline_mode():
            found = snapshot_download(name, revision=revision, local_files_only=True)
            return Path(found), Path(found).name
        info = HfApi().model_info(name, revision=revision)
        # Folders hold the same weights in another format, or nothing of the model.
        files = [s.rfilename for s in info.siblings if "/" not in s.rfilename and s.rfilename.endswith(_FILES)]
        if not any(file.endswith(".safetensors") for file in files):
            raise UsageError(_no_weights(at, [s.rfilename for s in info.siblings]))
        if "config.json" in files:  # before gigabytes are fetched
            check_kind(at, read_json(Path(hf_hub_download(name, "config.json", revision=info.sha))))
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files)), info.sha
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises a dozen kinds; the user needs one sentence
        raise hub_error(f"{at} is not a folder here, and", error) from error
