"""Serving a fine-tuned checkpoint through `transformers serve`, as far as it goes without the server's packages."""

import sys

import pytest
from small import make_run

from periln.runkit.errors import run_command
from periln.sft import serve
from periln.sft.conversations import CHAT_TEMPLATE


@pytest.fixture
def checkpoint(tmp_path):
    folder = make_run(tmp_path).checkpoints()[-1]
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def test_the_server_finds_our_class_and_gets_every_word(checkpoint, monkeypatch):
    commands = pytest.importorskip("transformers.cli.transformers")
    model_manager = pytest.importorskip("transformers.cli.serving.model_manager")
    found = {}

    def stand_in():
        found["class"] = model_manager.transformers.PeriLlamaForCausalLM
        found["words"] = sys.argv

    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    monkeypatch.setattr(commands, "main", stand_in)
    monkeypatch.setattr(sys, "argv", ["serve"])
    words = [str(checkpoint), "--port", "8123"]
    assert run_command(serve.main, serve.parse(words)) == 0
    assert found["words"] == ["transformers", "serve", *words]
    assert found["class"].from_pretrained(checkpoint).config.model_type == "peri_llama"


def test_what_cannot_be_served_is_said(checkpoint, monkeypatch, capsys):
    def said(*words: object) -> str:
        assert run_command(serve.main, serve.parse([*map(str, words)])) in (1, 2)
        return capsys.readouterr().err

    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert "pip install 'transformers[serving]'" in said(checkpoint)
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    (checkpoint / "chat_template.jinja").unlink()
    assert "has no chat template" in said(checkpoint)
    assert "is neither a run folder (recipe.yaml) nor a checkpoint (config.json)" in said(checkpoint.parent)


def test_a_chat_template_that_parses_contents_is_said(checkpoint, capsys):
    serve.warn_of_old_template([str(checkpoint)])
    assert capsys.readouterr().err == ""
    old = "{% for m in messages %}<|user|>{{ m['content'] }}<|end_of_turn|>{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(old)
    serve.warn_of_old_template([str(checkpoint), "--port", "8000"])
    assert "chat_template.jinja was written by an earlier version" in capsys.readouterr().err
    serve.warn_of_old_template(["--help"])
    assert capsys.readouterr().err == ""
