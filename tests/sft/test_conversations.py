"""Conversations: the schema, the chat template, and what the loss is taken on."""

import json

import pytest
from jinja2 import Environment

from runkit.errors import UsageError, UserError
from scripts.prepare_data import train_tokenizer
from sft import conversations
from sft.conversations import CHAT_TEMPLATE, END_OF_TURN, load_conversations, to_messages
from sft.recipe import Recipe


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["a little text about eggs and water"], 300, 512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_turns_become_messages_user_first():
    assert to_messages(["hi", "hello", "and?", "yes"], "row") == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["hi"], "x, row 3: a conversation with 1 turn"),
        ([], "x, row 3: a conversation with 0 turn"),
        (["hi", "hello", "more"], "x, row 3: 3 turns: the last one is a user's without an answer"),
        (["hi", " "], "x, row 3: turn 2 is empty"),
    ],
)
def test_a_malformed_conversation_is_named(turns, message):
    with pytest.raises(UserError, match=message):
        to_messages(turns, "x, row 3")


def test_the_loss_is_on_the_assistants_words_and_their_end_alone(tokenizer):
    messages = to_messages(["How long do eggs boil?", "Seven minutes.", "And soft ones?", "Five."], "row")
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    kept = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == f"Seven minutes.{END_OF_TURN}Five.{END_OF_TURN}"
    assert tokenizer.decode(out["input_ids"]) == (
        f"<|user|>How long do eggs boil?{END_OF_TURN}<|assistant|>Seven minutes.{END_OF_TURN}"
        f"<|user|>And soft ones?{END_OF_TURN}<|assistant|>Five.{END_OF_TURN}"
    )


def test_a_role_mark_is_one_token_and_a_prompt_ends_with_the_assistants(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, "<|assistant|>")]


def test_the_template_is_valid_jinja():
    plain = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = Environment().from_string(plain).render(messages=[{"role": "user", "content": "hi"}])
    assert text == f"<|user|>hi{END_OF_TURN}"


def test_the_bundled_set_loads_whole():
    rows = conversations.MINI_FILE.read_text().splitlines()
    loaded = load_conversations("mini")
    assert len(loaded) == len(rows) >= 60
    assert [m["content"] for m in loaded[0]] == json.loads(rows[0])["conversations"]


def test_a_repository_with_a_loading_script_is_read_from_its_parquet_rows(monkeypatch):
    asked = []

    def load_dataset(name, split, revision=None):
        asked.append((name, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found lima.py")
        return [
            {"conversations": ["q", "a"], "source": "stackexchange"},
            {"conversations": ["q", "a", "q", "a"], "source": "multi_turn"},
        ]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load_conversations("hub")) == 1
    assert asked == [("GAIR/lima", "train", None), ("GAIR/lima", "train", "refs/convert/parquet")]


def test_a_gated_set_is_one_sentence_that_says_what_to_do(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"accept its terms on its Hub page and log in .*no route") as caught:
        load_conversations("hub")
    assert "\n" not in str(caught.value)


def test_the_paper_is_the_default():
    recipe = Recipe()
    recipe.check()
    assert (recipe.data, recipe.epochs, recipe.batch_size, recipe.learning_rate) == ("hub", 15, 128, 1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("learning_rate", 0.0, "learning_rate must be above 0"),
        ("micro_batch_size", 3, "batch_size 128 is not a multiple of micro_batch_size 3"),
        ("warmup", 2.0, "warmup is a share of the steps"),
    ],
)
def test_recipe_mistakes_name_field_and_value(field, value, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**{field: value}).check()
