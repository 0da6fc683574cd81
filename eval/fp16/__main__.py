"""Rewrite a model so that it runs in FP16, the same function: `python -m eval.fp16 MODEL OUT`.

Two exact rewrites, by powers of two that are chosen from measured peaks: the stream's scale (embedding, output norms'
gains, epsilons), and the scale of a module's output before its output norm. `layout.py` says where factors can stand.
The written model loads with its stock class; it is loaded again and compared in FP32 before OUT appears.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging as transformers_logging

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from eval.stability.data import Samples, random_samples, read_data, text_samples
from runkit.environment import describe_environment
from runkit.errors import UsageError, UserError, make_parser, run_command
from runkit.folder import RunFolder, weights_hash, write_folder, write_json, write_text
from runkit.process import start_stage
from runkit.progress import progress_bar

from .cure import Wish, check_announced, cure, logits_of
from .layout import EPSILON_OF
from .table import as_markdown

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def find_source(model: str, revision: str | None) -> Path:
    """The folder of a model: itself, a run folder's newest checkpoint, or what a Hub id is downloaded to.

    Raises:
        UserError: there is none.
    """
    path = Path(model)
    if (path / "recipe.yaml").exists():
        checkpoints = RunFolder(path).checkpoints()
        if not checkpoints:
            raise UserError(f"{path} has no checkpoint")
        return checkpoints[-1]
    if (path / "config.json").exists():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(
            f"{model} is neither a model folder (config.json), nor a run folder (recipe.yaml), nor a Hub id"
        )
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{model} is no folder here, and was not found on the Hub: {reason}") from error


def load(source: Path, trusted: bool) -> PreTrainedModel:
    """The model in FP32, from safetensors only, with an FP32 stream."""
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trusted}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {source}: {' '.join(str(error).split())}") from error
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:
        raise UserError(f"{source} lacks weights, the first is {missing[0]}")
    if getattr(model.config, "residual_dtype", None) is not None:
        model.config.residual_dtype = None  # it belongs to a run
    return model.eval()


def find_samples(args: argparse.Namespace, source: Path, config: Any) -> tuple[Samples, Any]:
    """What the peaks are measured on, and the tokenizer, if the model has one."""
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or args.context
    tokens = min(args.context, longest)
    tokenizer = None
    if any((source / name).exists() for name in TOKENIZER_FILES):  # without, Transformers makes an empty one
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    data = args.data or ("random" if tokenizer is None else "wikitext")
    if data == "random":
        if args.data is None:
            print(f"{source} has no tokenizer: peaks are measured on random token ids", file=sys.stderr)
        return random_samples(config.vocab_size, args.samples, tokens, args.seed), tokenizer
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer for --data {data}: use --data random")
    texts = read_data(data)
    return text_samples(tokenizer, texts, data, args.samples, tokens, args.seed, config.vocab_size), tokenizer


def source_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def write_model(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> list[str]:
    """Weights in `dtype` where it holds them exactly, else in FP32 (names are given); configuration, tokenizer."""
    state, wide = {}, []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        narrow = tensor.to(dtype)
        exact = torch.equal(narrow.float(), tensor)
        state[name] = (narrow if exact else tensor).clone()
        if not exact:
            wide.append(name)
    model.save_pretrained(folder, state_dict=state)
    if model.config.model_type == "peri_llama":
        custom_object_save(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return wide


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    _check(args)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source = find_source(args.model, args.revision)
    config = AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    dtype = source_dtype(config)
    samples, tokenizer = find_samples(args, source, config)
    model = load(source, args.trust_remote_code).to(args.device)
    batches = list(samples.batches(args.batch_size, args.device))
    wish = Wish(args.margin, args.loss_scale, args.backward, args.keep_eps, args.scale_sums, args.tolerance)
    with progress_bar(args, len(batches) + 2, "measuring", "batch") as bar:
        record, ids, reference = cure(model, batches, wish, bar.update)
    if not record["needed"]:
        print(f"nothing has to move: in FP16 all is finite, and every peak is {args.margin:g} bits below 65504")
        print(f"{args.out} was not written")
        return
    head = {"model": args.model, "weights_sha256": weights_hash(source), "data": samples.described}
    with write_folder(args.out) as folder:
        wide = write_model(model.cpu(), tokenizer, folder, dtype)
        del model
        written = load(folder, args.trust_remote_code).to(args.device)
        difference = check_announced(record, logits_of(written, ids), reference)
        more = {"written_difference": difference, "written_in_fp32": wide, "dtype": str(dtype).removeprefix("torch.")}
        record = head | record | more | {"environment": describe_environment(torch.device(args.device))}
        write_json(folder / "fp16_rewrite.json", record)
        write_text(folder / "fp16_rewrite.md", as_markdown(record))
    print(as_markdown(record, rows=12))
    print(f"written: {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"{args.out} exists: nothing is overwritten, give another OUT")
    for name, least in (("samples", 1), ("context", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.margin <= 12:
        raise UsageError(f"--margin must be between 0 and 12 bits, not {args.margin:g}")
    for name in ("loss_scale", "tolerance"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA device")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        "python -m eval.fp16", f"Make a model FP16-safe, the same function. For {', '.join(EPSILON_OF)}."
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its newest checkpoint) or Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder; nothing is overwritten")
    parser.add_argument("--data", "--text", metavar="DATA", help="for the peaks: wikitext, hf:NAME, random, "
                        "or a file or folder of text; wikitext when left out (random without a tokenizer)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=64, help="samples")
    parser.add_argument("--context", type=int, default=512, help="tokens a sample (at most the model's positions)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--margin", type=float, default=2.0, metavar="BITS", help="bits between peaks and 65504")
    parser.add_argument("--loss-scale", type=float, default=1.0, help="of the backward pass that must stay finite")
    backward = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--backward", help="look at gradients too", **backward)
    parser.add_argument(
        "--keep-eps", action="store_true", help="leave the one epsilon of a family without slots as it is"
    )
    parser.add_argument(
        "--scale-sums", action="store_true", help="where norms stand on the stream: a factor for each sum"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="largest difference of logits, of the largest logit"
    )
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository carries")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", file=sys.stderr)
    arguments = parse()
    sys.exit(run_command(main, arguments))
