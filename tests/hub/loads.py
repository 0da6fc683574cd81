"""Load a repository in every way, in whatever environment runs this: no import of the project but the one asked for.

argv: repository, file for the tensors, `remote` or `installed`; as JSON: names that must not be importable, token ids,
other repositories for their logits alone.
"""

import importlib.util
import json
import sys
from collections.abc import Callable

REPO, OUT, KIND = sys.argv[1:4]
ABSENT, IDS, OTHERS = map(json.loads, sys.argv[4:7])
SAID: dict = {"present": [name for name in ABSENT if importlib.util.find_spec(name)]}
if KIND == "installed":
    import modeling_periln  # noqa: F401 (it registers the family)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

TRUST = {"trust_remote_code": True} if KIND == "remote" else {}
TEXT = "the function returns a value"


def refused(call: Callable[[], object]) -> str | None:
    """What a call raised, on one line; None if it did not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def logits(repo: str = REPO, **options) -> torch.Tensor:
    """The logits of a causal model loaded with these options, in the dtype that it has."""
    return AutoModelForCausalLM.from_pretrained(repo, **options, **TRUST)(ids).logits


ids, tensors = torch.tensor(IDS), {}
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(REPO, **TRUST)
    SAID["class"] = [type(model).__name__, type(model).__module__.split(".")[0], str(model.dtype)]
    SAID["use_cache"] = model.config.use_cache
    tensors["logits"] = model(ids).logits
    tensors["tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    tensors["early_logits"] = logits(revision="step_4")
    tensors["half_logits"] = logits(dtype=torch.bfloat16)
    SAID["device_map"] = refused(lambda: tensors.update(mapped_logits=logits(device_map="cpu")))
    tensors |= {repo: logits(repo) for repo in OTHERS}
    tensors["hidden"] = AutoModel.from_pretrained(REPO, **TRUST)(ids).last_hidden_state
    classifier = AutoModelForSequenceClassification.from_pretrained(REPO, num_labels=3, pad_token_id=2, **TRUST)
    SAID["labels"] = list(classifier(ids).logits.shape)

tokenizer = AutoTokenizer.from_pretrained(REPO, **TRUST)
greedy = GenerationConfig(max_new_tokens=6, do_sample=False)
SAID["pipeline"] = pipeline("text-generation", model=REPO, **TRUST)(TEXT, generation_config=greedy)[0]["generated_text"]
prompt = tokenizer(TEXT, return_tensors="pt").input_ids
SAID["by_hand"] = tokenizer.decode(model.generate(prompt, generation_config=greedy)[0], skip_special_tokens=True)
chat = [{"role": "user", "content": "how do i boil the egg"}]
SAID["chat"] = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
if KIND == "remote":
    load = AutoModelForCausalLM.from_pretrained
    SAID["no trust"] = refused(lambda: load(REPO, trust_remote_code=False))
    SAID["no repository"] = refused(lambda: load("acme/nowhere", **TRUST))
    SAID["no revision"] = refused(lambda: load(REPO, revision="step_5", **TRUST))
SAID["imported"] = sorted({name.split(".")[0] for name in sys.modules} & {*ABSENT})
save_file({k: v.contiguous() for k, v in tensors.items()}, OUT)
print("REPORT" + json.dumps(SAID))
