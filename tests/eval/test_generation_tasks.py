"""Tasks whose answer is generated, through the harness."""

import json

import pytest
import torch
from small_models import make_run

from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.targets import find_target

ITEMS = [
    {"a": f"{i} and {i}" + " and more" * (i % 3), "good": "eggs " * (i % 4 + 1) + str(i), "bad": f"water {i}"}
    for i in range(1, 8)
]
GENERATION = """\
task: repeats
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{a}}}} "
doc_to_target: "{{{{good}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.parametrize("size", [1, 3])
def test_generation_until_a_string_gives_what_greedy_decoding_gives(tmp_path, size):
    """Rows of different lengths, padded on the left: at batch 3 the answers are those of one row alone."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "repeats.yaml").write_text(GENERATION.format(data=folder / "items.jsonl"))
    run = make_run(tmp_path / "run")
    tasks = Benchmarks(["repeats"], Settings(batch_size=size), [folder])
    target = find_target(run.path)
    lm = tasks.load_model(target)
    answer = tasks.run("repeats", lm, target, log_samples=True)
    samples = sorted(answer["samples"]["repeats"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ITEMS)
    for sample, item in zip(samples, ITEMS, strict=True):
        ids = lm.tokenizer(f"{item['a']} ", return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, lm.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] in torch.tensor(lm.model.generation_config.eos_token_id):  # the text's end, and a turn's
                break
        text = lm.tokenizer.decode(ids[0, start:], skip_special_tokens=True).split("\n")[0]
        assert sample["resps"][0][0] == text
