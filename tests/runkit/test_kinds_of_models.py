"""What is not a causal LM of plain weights is refused in one sentence, before anything is loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest

from periln.eval.arguments.widen import check
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import check_room
from periln.runkit.models import check_loadable, find_model


def folder(tmp_path, config: dict, weights: str = "model.safetensors"):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / weights).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}},
            "is quantized .bitsandbytes.",
        ),
        ({"model_type": "llama", "quantization_config": {}}, "is quantized .unknown."),
        ({"model_type": "bert"}, "is an encoder .model_type bert."),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder with a decoder .model_type t5."),
        ({"model_type": "gemma3", "vision_config": {}}, "reads more than text .model_type gemma3, vision_config."),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "audio_config"),
        ([], "not a mapping"),
    ],
)
def test_another_kind_of_model_is_named(tmp_path, config, said):
    with pytest.raises(UsageError, match=said):
        check_loadable(folder(tmp_path, config))


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "bert", "is_decoder": True}])
def test_a_causal_model_passes(tmp_path, config):
    check_loadable(folder(tmp_path, config))


def test_gguf_names_the_command_that_widens_it(tmp_path):
    path = folder(tmp_path, {"model_type": "llama"}, "weights.Q4_0.gguf")
    with pytest.raises(UsageError, match=rf"periln widen {path}/weights.Q4_0.gguf OUT"):
        check_loadable(path)
    with pytest.raises(UsageError, match=rf"periln widen {path}/weights.Q4_0.gguf OUT"):
        find_model(path / "weights.Q4_0.gguf")


def test_pickles_are_not_read(tmp_path):
    with pytest.raises(UsageError, match="pickled ones .* are not read"):
        check_loadable(folder(tmp_path, {"model_type": "llama"}, "pytorch_model.bin"))


def test_a_disk_without_room_is_named_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**29))
    with pytest.raises(UserError, match=r"the copy takes 2\.0 GiB, and the disk has 1\.5 GiB free"):
        check_room(tmp_path / "not" / "yet", 2**31, "the copy")
    check_room(tmp_path / "not" / "yet", 2**30, "the copy")


def test_what_is_not_gguf_is_not_widened(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="is not a GGUF file"):
        check(SimpleNamespace(file=tmp_path / "a.gguf", out=tmp_path / "out"))
    with pytest.raises(UsageError, match="is not a file"):
        check(SimpleNamespace(file=tmp_path / "b.gguf", out=tmp_path / "out"))
