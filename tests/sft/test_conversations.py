"""Conversations: the schema, the chat template, and what the loss is taken on."""

import json
import re

import pytest
from jinja2 import Environment

from periln.runkit.errors import UsageError, UserError, run_command
from periln.runkit.recipes import from_mapping, read_yaml
from periln.scripts.prepare_data import train_tokenizer
from periln.sft import conversations, train
from periln.sft.conversations import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    Conversations,
    check_messages,
    load_conversations,
    to_messages,
)
from periln.sft.recipe import Recipe
from periln.sft.tokens import IGNORED, marked, tokenize

LIMA_RECIPE = conversations.MINI_FILE.parents[1] / "recipes" / "lima.yaml"


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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": ["hi", "half \ud83d"]}, r"turn 2 cannot be trained on: it holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\udc00 hi"}, {"role": "assistant", "content": "yes"}]}, "turn 1"),
        ({"conversations": ["hi", "a" * 30_000]}, "turn 2 cannot be trained on: it has 30,000 characters of one kind"),
    ],
)
def test_what_training_would_choke_on_is_named_with_its_row_when_data_are_checked(tmp_path, capsys, row, message):
    good = {"conversations": ["hi", "hello"]}
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, good, row)))
    args = train.parse(["--config", str(LIMA_RECIPE), "--set", f"data={tmp_path / 'talk.jsonl'}", "--check-data"])
    assert run_command(train.main, args) == 1
    error = capsys.readouterr().err
    assert re.search(rf"^error: talk\.jsonl, row 3: .*{message}", error) and len(error.splitlines()) == 1


def test_a_byte_order_mark_is_not_a_part_of_the_first_row(tmp_path):
    (tmp_path / "talk.jsonl").write_bytes(b'\xef\xbb\xbf{"conversations": ["hi", "hello"]}\n')
    assert len(load_conversations(str(tmp_path / "talk.jsonl"))) == 1


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


def chat(*roles):
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat("user", "user", "assistant"), "x, row 3: turns 1 and 2 are both the user's"),
        (chat("user", "assistant", "assistant"), "x, row 3: turns 2 and 3 are both the assistant's"),
        (chat("user"), "x, row 3: a conversation with 1 turn"),
        (chat("assistant", "user"), "x, row 3: the first turn is the assistant's"),
        (chat("tool", "user", "assistant"), "x, row 3: turn 1 has the role 'tool'; only system, user and assistant"),
        (chat("user", "Assistant"), "x, row 3: turn 2 has the role 'Assistant'"),
        (chat("user", "assistant", "system"), "x, row 3: turn 3 has the role 'system', which only the first may have"),
        (chat("system", "assistant"), "x, row 3: the first turn is the assistant's"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, *chat("assistant")],
            "x, row 3: turn 1: content part 1 is of type 'image'; only text",
        ),
        (
            [*chat("user"), {"role": "assistant", "content": "a", "tool_calls": [{}]}],
            r"x, row 3: turn 2 \(assistant\) has tool_calls",
        ),
        (chat("user", "assistant", "user"), "x, row 3: 3 turns: the last one is a user's"),
        ("hi", "x, row 3: `messages` must be a list"),
    ],
)
def test_chat_messages_that_do_not_take_turns_are_named(messages, message):
    with pytest.raises(UserError, match=message):
        check_messages(messages, "x, row 3")


def test_the_bundled_set_loads_whole():
    rows = conversations.MINI_FILE.read_text().splitlines()
    loaded = load_conversations("mini", multi_turn=True)
    assert len(loaded) == len(rows) >= 60
    assert [m["content"] for m in loaded.messages[0]] == json.loads(rows[0])["conversations"]
    single = load_conversations("mini")
    assert {len(messages) for messages in single.messages} == {2}
    assert len(rows) - len(single) == sum("multi_turn" in row for row in rows) > 0


def test_a_file_is_read_with_either_column_and_its_rows_keep_their_numbers(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [
        {"conversations": ["a", "b", "c", "d"], "source": "multi_turn"},
        {"conversations": ["q", "a"], "source": "own"},
        {"messages": chat("user", "assistant")},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_conversations(str(file))
    assert loaded.rows == [2, 3]
    assert [m[-1]["content"] for m in loaded.messages] == ["a", "assistant 1"]
    file.write_text(file.read_text() + "\n" + json.dumps({"messages": chat("user", "user")}))
    with pytest.raises(UserError, match=r"own.jsonl, row 4: turns 1 and 2 are both the user's"):
        load_conversations(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "own.jsonl, row 1: not valid JSON"),
        ('{"text": "x"}', "own.jsonl, row 1: has neither `conversations` nor `messages`"),
        ("", "own.jsonl holds no conversation"),
        (None, "own.jsonl cannot be read .* give hub, mini, or a .jsonl"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_conversations(str(tmp_path / "own.jsonl"))


def test_what_is_exported_is_what_was_loaded(tmp_path):
    loaded = load_conversations("mini", multi_turn=True)
    loaded.export(tmp_path / "mini.jsonl")
    assert all(set(json.loads(line)) == {"messages"} for line in (tmp_path / "mini.jsonl").read_text().splitlines())
    assert load_conversations(str(tmp_path / "mini.jsonl")).sha256 == loaded.sha256
    loaded.export(tmp_path / "mini.jsonl")
    (tmp_path / "mini.jsonl").write_text("mine")
    with pytest.raises(UserError, match="mini.jsonl exists and holds something else; it is left alone"):
        loaded.export(tmp_path / "mini.jsonl")
    assert (tmp_path / "mini.jsonl").read_text() == "mine"


def test_rows_that_are_cut_or_left_out_are_counted_by_number(tokenizer):
    turns = [["egg", "water"], ["egg", "water " * 30], ["egg " * 30, "water"]]
    some = Conversations([to_messages(t, "row") for t in turns], [4, 7, 9], "own")
    lengths = [len(tokenizer.apply_chat_template(m)["input_ids"]) for m in some.messages]
    tokens = tokenize(some, tokenizer, max_length=lengths[0])
    assert (tokens.truncated, tokens.dropped) == ([7], [9])
    counts = tokens.counts()
    assert (counts["conversations"], counts["all_tokens"]) == (2, 2 * lengths[0])
    assert counts["assistant_tokens"] == sum(label != IGNORED for row in tokens.labels for label in row)
    with pytest.raises(UserError, match="own: no answer begins within max_length 2"):
        tokenize(some, tokenizer, max_length=2)


def test_what_is_trained_on_can_be_read(tokenizer):
    messages = to_messages(["How long?", "Seven.", "And soft?", "Five."], "row")
    tokens = tokenize(Conversations([messages], [1], "own"), tokenizer, 100)
    assert next(marked(tokens, tokenizer, 1)) == (
        f"<|user|>How long?{END_OF_TURN}<|assistant|>>>>Seven.{END_OF_TURN}<<<"
        f"<|user|>And soft?{END_OF_TURN}<|assistant|>>>>Five.{END_OF_TURN}<<<"
    )


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("no\nroute"),
            r"GAIR/lima cannot be loaded: the Hub \(https://huggingface.co\) does not answer",
        ),
        (RuntimeError("Dataset 'GAIR/lima' is a gated dataset"), "it is gated on the Hub: accept its terms .*log in"),
        (ConnectionError("offline mode is enabled"), "the Hub is switched off"),
    ],
)
def test_a_set_that_cannot_be_had_is_one_sentence_that_says_what_to_do(monkeypatch, error, message):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=message) as caught:
        load_conversations("hub")
    assert "\n" not in str(caught.value)


def test_the_paper_is_the_default():
    shipped = from_mapping(Recipe, read_yaml(LIMA_RECIPE))
    for recipe in (Recipe(), shipped):
        recipe.check()
        assert (recipe.data, recipe.epochs, recipe.batch_size, recipe.learning_rate) == ("hub", 15, 128, 1e-5)
        assert not recipe.include_multi_turn and not recipe.packing
        assert (recipe.save_strategy, recipe.keep) == ("epoch", None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("learning_rate", 0.0, "learning_rate must be above 0"),
        ("micro_batch_size", 3, "batch_size 128 is not a multiple of micro_batch_size 3"),
        ("warmup", 2.0, "warmup is a share of the steps"),
        ("keep", 0, "keep must be at least 1, or null, not 0"),
        ("peft", {"r": 0}, "peft.r and peft.alpha must be at least 1"),
        ("peft", {"rank": 4}, "unknown field peft.rank"),
        ("peft", {"dropout": 1.0}, "peft.dropout must be at least 0 and below 1"),
    ],
)
def test_recipe_mistakes_name_field_and_value(field, value, message):
    with pytest.raises(UsageError, match=message):
        from_mapping(Recipe, {field: value}).check()
