"""What is evaluated or measured: a model with the folder of its results, or a model with all its checkpoints.

Which checkpoint a path means, and how weights are loaded, `runkit.models` decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from periln.runkit.encoding import added_around, begin_documents_with
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, weights_hash
from periln.runkit.models import FoundModel, check_loadable, find_model, is_local, load_causal_lm, not_loaded, step_of

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@contextmanager
def _in_one_sentence(name: object) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an unsuitable architecture, file or shape fails in many ways
        raise not_loaded(name, error) from error


# --- a model and the folder of its results -------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate, and the folder that gets the results.

    `path` is its name in the results: within the run folder, a folder's name, or the Hub's id; `revision` the Hub's
    commit.
    """

    name: str
    checkpoint: Path
    results: Path
    path: str | None = None  # None: the checkpoint's name
    revision: str | None = None
    trust_remote_code: bool = False

    def evaluated(self) -> dict[str, Any]:
        """What was evaluated: path (within the run folder), revision, hash of the weights."""
        path = self.path or self.checkpoint.name
        return {"path": path, "revision": self.revision, "weights_sha256": weights_hash(self.checkpoint)}

    def load(self, device: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model (in the saved dtype unless another is named, in evaluation mode) and tokenizer.

        A tokenizer that ends every text does not end the prompts of a model that continues them.

        Raises:
            UserError: neither can be loaded, or the file's weights are not those of the model; in one sentence.
        """
        model = load_causal_lm(self.checkpoint, dtype, self.trust_remote_code, self.name)
        with _in_one_sentence(self.name):
            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint, trust_remote_code=self.trust_remote_code)
        begin, end = added_around(tokenizer)
        if end:
            begin_documents_with(tokenizer, begin)
        return model.to(torch.device(device)), tokenizer

    def positions(self) -> int | None:
        """How many tokens the model has positions for; None if there is no limit.

        Raises:
            UserError: its configuration cannot be read; in one sentence.
        """
        with _in_one_sentence(self.name):
            config = AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)


def _diverged(path: Path) -> bool:
    """Whether a run has diverged, or is the fine-tuning that would have followed from one."""
    if path.exists():
        return (path / "recipe.yaml").exists() and RunFolder(path).status == "diverged"
    return RunFolder(path.parent).status == "diverged"


def find_target(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False, out: Path | None = None
) -> Target | None:
    """The target of a path, else of a Hub id; `out` is a folder for results, instead of the run's `eval/`.

    None for a run that has diverged, and for the fine-tuning that would have followed from one.

    Raises:
        UsageError: a revision of a local path; a Hub id without `out`.
        UserError: see `runkit.models.find_model`; a checkpoint without a tokenizer.
    """
    if revision is None and _diverged(Path(name)):
        return None
    if not is_local(name) and out is None:
        raise UsageError(f"{name} is not a folder here; for a model of the Hub give --out, a folder for its results")
    found = find_model(name, revision)
    checkpoint = found.checkpoint()
    check_loadable(checkpoint)
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UsageError(f"{checkpoint} has no tokenizer (tokenizer_config.json)")
    if found.revision is not None:
        folder = f"{str(name).replace('/', '--')}-{found.revision[:8]}"
        return Target(str(name), checkpoint, out / folder, str(name), found.revision, trust_remote_code)
    home = found.run or found.path  # results of a run's checkpoint go to the run; those of any other to its own folder
    shown = checkpoint.relative_to(home).as_posix() if checkpoint != home else checkpoint.name
    results = home / "eval" if out is None else out / found.path.name
    return Target(found.path.name, checkpoint, results, shown, None, trust_remote_code)


# --- a model and all its checkpoints -------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk: its step (0 outside of runs) and the folder that it is loaded from."""

    step: int
    path: Path

    @property
    def weights_sha256(self) -> str:
        return weights_hash(self.path)

    def config(self, trust_remote_code: bool) -> Any:
        """The model's configuration.

        Raises:
            UserError: it cannot be read, or its code would have to be trusted.
        """
        with _in_one_sentence(self.path):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)

    def load(self, dtype: torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
        """The model, in `dtype`; see `runkit.models.load_causal_lm`."""
        return load_causal_lm(self.path, dtype, trust_remote_code).to(torch.device(device))


@dataclass(frozen=True)
class Model:
    """A model that was asked for: its name, its checkpoints, oldest first, and the folder of its run, if it has one.

    `chosen` is the checkpoint that counts where a single one is needed.
    """

    name: str
    asked: str
    revision: str | None
    checkpoints: tuple[Checkpoint, ...]
    run: Path | None
    chosen: Checkpoint

    @property
    def has_tokenizer(self) -> bool:
        """Whether its last checkpoint has one: without one, Transformers makes one that knows no words."""
        return _has_tokenizer(self.checkpoints[-1].path)

    def tokenizer(self, other: str | None, trust_remote_code: bool) -> Any:
        """The tokenizer of its last checkpoint, or `other`.

        Raises:
            UserError: there is none.
        """
        source = other or self.checkpoints[-1].path
        if Path(source).is_dir() and not _has_tokenizer(Path(source)):
            raise UsageError(f"{source} has no tokenizer: name one with --tokenizer, or measure on --data random")
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise UserError(
                f"the tokenizer of {self.asked} cannot be loaded ({' '.join(str(error).split())[:200]}): "
                "name another with --tokenizer, or measure on --data random"
            ) from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZERS)


def _measured_name(found: FoundModel) -> str:
    if found.revision is not None:
        return found.asked.replace("/", "--")
    inside = found.run is not None and found.path.parent.name == "checkpoints"
    return found.run.name if inside else found.path.name


def find_measured(asked: str, revision: str | None = None) -> Model:
    """The model of a path or a Hub id, with every whole checkpoint of a run.

    Raises:
        UserError: see `runkit.models.find_model`; an adapter alone, or no weights in safetensors.
    """
    found = find_model(asked, revision)
    folders = found.checkpoints()
    for folder in folders:
        check_loadable(folder)
    inside = found.path.parent.name == "checkpoints"
    run = found.run if found.whole_run or inside else None
    all_ = tuple(Checkpoint(step_of(folder) if run is not None else 0, folder) for folder in folders)
    best = found.checkpoint(lambda text: None) if found.is_chosen else folders[-1]
    chosen = Checkpoint(step_of(best) if run is not None else 0, best)
    return Model(_measured_name(found), asked, found.revision, all_, run, chosen)
