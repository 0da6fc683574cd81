"""A tokenizer's own chat template: what the loss counts, what stays text, and which templates are refused."""

import re
from types import SimpleNamespace

import pytest
from chatting import CHATML, ENDS, FAMILIES, byte_tokenizer, family
from small import make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from periln.runkit.control_tokens import JOINER
from periln.runkit.errors import UserError
from periln.sft.before_after import answers
from periln.sft.chat_template import CHAT_TEMPLATE
from periln.sft.conversations import Conversations
from periln.sft.own_template import own_template
from periln.sft.tokens import IGNORED, chat_tokenizer, knows_turns, marked, tokenize, turn_end


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + said


def read(tokenizer, messages):
    return tokenize(Conversations([messages], [7], "talk"), tokenizer, 10_000)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_on_the_answers_and_their_ends_alone(name):
    tokenizer, end = family(name), ENDS[name]
    messages = turns("how long?", "Seven.", "and soft\nones?", "Five\n\nminutes.")
    tokens = read(tokenizer, messages)
    assert tokens.ids == [tokenizer.apply_chat_template(messages)["input_ids"]]
    (text,) = marked(tokens, tokenizer, 1)
    assert re.findall(">>>(.*?)<<<", text, re.DOTALL) == [f"Seven.{end}", f"Five\n\nminutes.{end}"]
    assert text.replace(">>>", "").replace("<<<", "") == tokenizer.apply_chat_template(messages, tokenize=False)
    for turn in (1, 3):  # the tokens before an answer are those that generation begins with
        asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert tokens.ids[0][: len(asked)] == asked
        assert tokens.labels[0][len(asked) - 1] == IGNORED != tokens.labels[0][len(asked)]
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_content_that_spells_control_tokens_stays_text(name):
    tokenizer = family(name, more=("<think>",))
    control = {*FAMILIES[name][1], "<think>"}
    spelled = "".join(sorted(control)) + " x " + "<|im_".join(control) + ENDS[name]
    messages = turns(spelled, f"a{spelled}b{spelled}")
    (ids,), (labels,) = read(tokenizer, messages).ids, read(tokenizer, messages).labels
    numbers = set(tokenizer.convert_tokens_to_ids([*control]))
    plain = tokenizer.apply_chat_template(turns("u", "a"))["input_ids"]
    assert [i for i in ids if i in numbers] == [i for i in plain if i in numbers]
    assert [i for i in labels if i in numbers] == [turn_end(tokenizer)]
    # Nothing is lost or added: the text is the one that was written, and no joiner is in it.
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == rendered


def test_a_token_that_the_model_finds_by_itself_is_text_without_another_character():
    """`<|>` is an added token and a word of the vocabulary, as HTML's tags are in Gemma's."""
    tokenizer = family("chatml")
    tokenizer.add_tokens([AddedToken("<|>", normalized=False)])
    messages = turns("u", "a <|> b")
    assert "<|>" in tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(messages)["input_ids"])
    (ids,) = read(tokenizer, messages).ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<|>" not in tokenizer.convert_ids_to_tokens(ids)
    # A token that takes the blanks behind it, and parts cannot be read by themselves.
    tokenizer.add_tokens([AddedToken("<|tool|>", normalized=False, special=True, rstrip=True)])
    tokenizer.chat_template += "{# another #}"
    with pytest.raises(UserError, match="cannot keep a control token in a content apart without another character"):
        read(tokenizer, messages)
    assert len(read(tokenizer, turns("u", f"a{JOINER} <|im_end|>")).ids) == 1


def test_a_joiner_that_would_be_read_as_the_unknown_token_is_refused():
    """As by Llama 2's template with a tokenizer that knows no bytes and begins a text alone with a blank."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(char, -3.0) for char in "abdx<>/sINT[]▁"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    assert len(read(tokenizer, turns("a", "b z")).ids) == 1  # z is unknown by itself
    with pytest.raises(UserError, match="cannot keep a control token in a content apart without another character"):
        read(tokenizer, turns("a", "b </s> d"))


def test_the_tokenizer_itself_is_not_changed(tmp_path):
    family("chatml").save_pretrained(tmp_path / "base")
    tokenizer = chat_tokenizer(tmp_path / "base")
    read(tokenizer, turns("<|im_end|>", "<|im_start|>"))
    tokenizer.save_pretrained(tmp_path / "tuned")
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()
    assert knows_turns(tmp_path / "base")


def test_ours_is_for_those_that_have_none_or_ours(tmp_path):
    _, tokenizer = make_model()
    assert own_template(tokenizer) is None
    for template in (
        CHAT_TEMPLATE,
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>{% endfor %}",
    ):
        tokenizer.chat_template = template
        assert own_template(tokenizer) is None, template
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end_of_turn|>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    kept = chat_tokenizer(tmp_path)
    assert kept.chat_template == tokenizer.chat_template and own_template(kept) is not None
    bare = byte_tokenizer(None, ["<eos>"], eos_token="<eos>")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no token <\|user\|>, .* and no chat template of its own: put the"):
        chat_tokenizer(tmp_path / "bare")


def chatml(answer: str = "{{ m.content }}<|im_end|>\n", before: str = "", after: str = "") -> str:
    """ChatML with something else where an answer is, at the beginning and at the end."""
    return (
        before
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}" + after
    )


BROKEN = {
    "drops earlier turns": (
        CHATML.replace("for message in messages", "for message in messages[-2:]"),
        "leaves out or changes turn 1, the user's: change the conversation, or chat_template.jinja",
    ),
    "writes a thought before the last answer": (
        chatml("{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"),
        "has more or less than answer 2 between its generation prompt and the next <think>: put {% generation %}",
    ),
    "strips the thoughts of earlier answers": (
        chatml("{{ m.content if loop.last else m.content.split(' so ')[-1] }}<|im_end|>\n"),
        "leaves out or changes turn 2, the assistant's",
    ),
    "shows another prompt to generation": (
        chatml().replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\nSure: {% endif"),
        "writes what precedes answer 2 otherwise than its generation prompt would have it",
    ),
    "ends no answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "ends an answer without a control token: write one in chat_template.jinja",
    ),
    "leaves the end to the next turn": (
        "{% for m in messages %}{{ '<|im_end|>' if not loop.first }}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}",
        "ends an answer without a control token",
    ),
    "changes contents": (
        chatml("{{ m.content }}<|im_end|>").replace("m.content }}<|im_end|>\n", "m.content | upper }}<|im_end|>\n"),
        "leaves out or changes turn 1, the user's",
    ),
    "ends the last answer otherwise": (
        chatml("{{ m.content }}{{ '<|end|>' if loop.index0 == 3 else '<|im_end|>' }}\n"),
        "ends one answer with <|end|> and another with <|im_end|>: edit chat_template.jinja",
    ),
    "writes control tokens for some contents": (
        chatml(before="{% if 'tool' in messages[0].content %}<think>{% endif %}"),
        "writes other control tokens around these contents than around others",
    ),
    "writes the date": (chatml(before="{{ strftime_now('%Y') }}"), "writes the day's date (strftime_now): write a "),
    "sets the date itself": (
        chatml(before="{% set date_string = strftime_now('%Y') %}{{ date_string }}"),
        "writes the day's date (strftime_now): write a ",
    ),
    "marks the users": (
        chatml().replace("{{ m.content }}<|im_end|>\n{% endif %}", "{% generation %}{{ m.content }}<|im_end|>"
                         "{% endgeneration %}{% endif %}"),
        "marks something else as generated than answer 2: put {% generation %}",
    ),
    "marks the ends alone": (
        chatml("{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}\n"),
        "marks something else as generated than answer 2: put {% generation %}",
    ),
    "marks no end": (
        chatml("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"),
        "leaves the end of the turn out of what it marks as generated: put {% generation %}",
    ),
    "marks the last answer alone": (
        chatml("{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
               "{{ m.content }}<|im_end|>{% endif %}"),
        "marks 1 of 2 answers",
    ),
    "has a prompt that ends inside a token": (
        chatml("{{ '\n' + m.content }}<|im_end|>\n").replace("assistant\n{% endif", "assistant\n\n{% endif"),
        "has a generation prompt that ends inside a token of the answer: put {% generation %}",
    ),
    "cannot be read": ("{% for %}", "refuses the conversation (Expected"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_template_that_is_not_certain_is_refused_in_one_sentence(broken, tmp_path):
    template, message = BROKEN[broken]
    family("chatml", template, ("<|end|>", "<think>", "</think>")).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as error:
        read(chat_tokenizer(tmp_path / "model"), turns("tool?", "no so b", "c", "so d"))
    said = str(error.value)
    assert message in said and f"the chat template of {tmp_path / 'model'} " in said and "\n" not in said


def test_marks_do_not_begin_inside_a_token_of_the_prompt():
    """Two more line ends make one token with the prompt's: the marks would have the prompt's own trained on."""
    marks = chatml("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n")
    with pytest.raises(UserError, match="row 7: .* joins the beginning of an answer and the generation prompt"):
        read(family("chatml", marks), turns("u", "\n\nb"))
    both = Conversations([turns("u", "\n\nb"), turns("u", "\tb")], [7, 8], "talk")
    assert tokenize(both, family("chatml", marks), 10_000).joined == [7]
    always = "{% generation %}{{ '\n' + m.content }}<|im_end|>{% endgeneration %}\n"
    always = chatml(always).replace("assistant\n{% endif", "assistant\n\n{% endif")
    assert len(read(family("chatml", always), turns("u", "b")).ids) == 1


def test_a_clock_that_is_read_in_some_conversations_alone_is_refused_there():
    clock = "{# date_string #}{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}"
    tokenizer = family("chatml", chatml(before=clock))
    assert len(read(tokenizer, turns("a", "b")).ids) == 1
    with pytest.raises(UserError, match=r"talk, row 7: the chat template of .* writes the day's date \(strftime_now\)"):
        read(tokenizer, turns("a", "b", system="be"))


def test_what_a_template_refuses_names_the_row():
    with pytest.raises(UserError, match=r"talk, row 7: the chat template of .* refuses the conversation \(System role"):
        read(family("gemma"), turns("a", "b", system="be"))
    text = next(marked(read(family("llama3"), turns("a", "b", system="be")), family("llama3"), 1))
    assert "system<|end_header_id|>\n\nbe<|eot_id|>" in text and text.endswith("\n\n>>>b<|eot_id|><<<")


def test_marks_are_used_as_they_are():
    """Here what is marked begins before the generation prompt's end, and white space follows the end of the turn."""
    own = "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + own + "{% else %}<|im_start|>{{ m.role }}\n"
    template += "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    tokenizer = family("chatml", template)
    messages = turns("a <|im_end|>", "b<|im_start|>", "c", "d")
    (text,) = marked(read(tokenizer, messages), tokenizer, 1)
    assert re.findall(">>>(.*?)<<<", text, re.DOTALL) == [
        "<|im_start|>assistant\nb<|im_start|><|im_end|>\n",
        "<|im_start|>assistant\nd<|im_end|>\n",
    ]


def test_marks_around_a_whole_conversation_are_not_believed():
    """With one exchange there are as many marks as answers, and the answer is within them."""
    tokenizer = family("chatml", "{% generation %}" + chatml() + "{% endgeneration %}")
    with pytest.raises(UserError, match="marks what comes before answer 2 as generated: put {% generation %}"):
        read(tokenizer, turns("a", "b"))


def test_the_questions_before_and_after_have_the_date_that_was_trained_with(monkeypatch):
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    tokenizer, asked = family("chatml", template), []

    class Model:
        device, config = "cpu", SimpleNamespace(max_position_embeddings=500)

        def generate(self, ids, **more):
            asked.append(tokenizer.decode(ids[0]))
            return ids

    assert len(answers(Model(), tokenizer, lambda: None)) == len(asked) > 1
    assert [text[:23] for text in asked] == ["26 Jul 2024<|im_start|>"] * len(asked)


def test_a_fixed_date_is_written_where_the_template_takes_one():
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = family("chatml", template)
    assert next(marked(read(tokenizer, turns("a", "b")), tokenizer, 1)).startswith("26 Jul 2024<|im_start|>")
    assert own_template(tokenizer).described()["date_string"] == "26 Jul 2024"


def test_answers_that_begin_inside_a_token_of_the_prompt_are_left_out_or_refused():
    tokenizer = family("chatml")
    rows = [turns("a", "b"), turns("a", "\n\n b"), turns("a", " b")]
    tokens = tokenize(Conversations(rows, [1, 2, 3], "talk"), tokenizer, 100)
    assert (len(tokens.ids), tokens.dropped, tokens.joined, tokens.truncated) == (2, [2], [2], [])
    with pytest.raises(UserError, match=r"row 2: .* joins the beginning of an answer .* begin turn 2 with a letter"):
        tokenize(Conversations(rows[1:2], [2], "talk"), tokenizer, 100)


def test_a_cut_answer_has_no_end():
    tokenizer = family("chatml")
    tokens = tokenize(Conversations([turns("a", "b" * 50)], [1], "talk"), tokenizer, 60)
    assert tokens.truncated == [1] and turn_end(tokenizer) not in tokens.labels[0]


def test_a_tokenizer_whose_content_could_become_a_token_is_refused(tmp_path):
    tokenizer = family("chatml", more=("Q",))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has the token 'Q': content could become it"):
        chat_tokenizer(tmp_path)
    several = family("chatml")
    several.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match="has several chat templates, and none is named default"):
        own_template(several)
