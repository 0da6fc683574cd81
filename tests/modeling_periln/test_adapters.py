"""PEFT: adapters find their modules by the model's type, train alone, and merge into the same model."""

import pytest
import torch
from tiny_models import NORMS_OF, random_ids, shaken_model
from transformers import AutoModelForSequenceClassification

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

EVERY = [*NORMS_OF, "mix"]
IDS = random_ids(4, 12)


def trained(adapted, steps: int = 15, lr: float = 1e-2) -> list[float]:
    """Losses of a few steps on one batch; afterwards in evaluation mode, with the last step's gradients kept."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    adapted.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapted.eval()
    return losses


def lora(model, **more):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **more))


@pytest.mark.parametrize("placement", EVERY)
def test_lora_with_the_default_modules_trains_is_saved_and_merges(placement, tmp_path):
    shaken_model(norm_placement=placement).save_pretrained(tmp_path / "base")
    base = shaken_model(norm_placement=placement)
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = lora(base)
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    losses = trained(adapted)
    assert losses[-1] < losses[0] - 0.3
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(learned) == 3 * 2 * 2  # layers, modules, A and B
    for name, tensor in adapted.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    logits = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)
    assert not torch.allclose(logits, shaken_model(norm_placement=placement)(IDS).logits, atol=1e-1)


def test_lora_on_all_linear_layers_leaves_the_head_and_the_norms():
    adapted = lora(shaken_model(qk_norm="full"), target_modules="all-linear")
    names = {name.split(".lora_")[0].split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_with_gradient_checkpointing_has_the_same_gradients(use_reentrant):
    """With reentrant checkpointing and a frozen embedding the layers' input must be made to need a gradient."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        base = shaken_model()
        base.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_, c=checkpointing: runs.append(c))
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        adapted = lora(base, init_lora_weights=False).train()
        adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert runs == [False, True, True]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("placement", ["post", "peri"])
@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("IA3Config", 3 * (12 + 12 + 28)),  # k, v and the MLP's inner size, a layer
        ("PrefixTuningConfig", 4 * 3 * 2 * 12),  # tokens, layers, keys and values, key/value heads x head size
        ("PromptTuningConfig", 4 * 20),
    ],
)
def test_other_adapters_train_and_generate_with_their_defaults(method, size, placement):
    tokens = {} if method == "IA3Config" else {"num_virtual_tokens": 4}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        shaken_model(norm_placement=placement), getattr(peft, method)(task_type="CAUSAL_LM", **tokens)
    )
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == size
    losses = trained(adapted, lr=0.1)
    assert losses[-1] < losses[0] - 0.3
    made = adapted.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    ids = IDS  # by hand and without a cache: the prompt is before the text once
    for _ in range(3):
        ids = torch.cat([ids, adapted(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_ia3_merges_into_the_same_logits():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(shaken_model(), peft.IA3Config(task_type="CAUSAL_LM"))
    trained(adapted, lr=0.1)
    logits = adapted(input_ids=IDS).logits
    assert torch.allclose(adapted.merge_and_unload()(IDS).logits, logits, atol=1e-5)


def test_a_head_for_classification_is_trained_beside_the_adapter():
    config = shaken_model(pad_token_id=60, num_labels=3).config
    model = AutoModelForSequenceClassification.from_config(config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trainable)
    assert all("lora_" in name or "score" in name for name in trainable)
    adapted(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
