"""Folders that are no base model, or that lack something, end in one line that names them."""

import json
import shutil

import pytest
import torch
from tiny_chat import one_thread, save_adapter, save_base

from fastmem import cli
from fastmem.models.base_model import load_base

pytest.importorskip("transformers")
__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture
def folder(whole, tmp_path):
    """A base model in a folder, to be damaged."""
    return shutil.copytree(whole, tmp_path / "base")


def load(name):
    return load_base(str(name), torch.float32, "cpu")


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder, said, capfd):
    capfd.readouterr()
    with pytest.raises(OSError, match=said) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no report of a library's beside it


def test_a_whole_one_loads(folder, monkeypatch):
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).unlink()  # what a model can do without
    base, tokenizer = load(folder)
    assert not base.training and tokenizer.padding_side == "left"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert torch.equal(load("~/base")[0].lm_head.weight, base.lm_head.weight)
    monkeypatch.chdir(folder.parent)
    assert torch.equal(load("base")[0].lm_head.weight, base.lm_head.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(folder):
    with pytest.raises(ValueError, match=r"^device: no cuda here"):
        load_base(str(folder), torch.float32, "cuda")


def test_no_model(folder, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty: no base model here \(config.json is missing\)$", capfd)
    refused(tmp_path / "nowhere", "nowhere: no such folder$", capfd)
    refused(folder / "config.json", "config.json: a file, expected a folder$", capfd)
    adapter = save_adapter(tmp_path / "adapter")
    refused(adapter, r"adapter: a memory adapter, no base model \(config.json is missing\)$", capfd)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", r"no base model here \(config.json is missing\)$"),
        ("model.safetensors", r"no base model to be had \(.*no file named model.safetensors"),
        ("tokenizer.json", r"no tokenizer to be had \(tokenizer.json is missing\)$"),
    ],
)
def test_a_file_is_missing(folder, capfd, file, said):
    (folder / file).unlink()
    refused(folder, said, capfd)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe\x00", b"hello"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_is_damaged(folder, capfd, file, content):
    (folder / file).write_bytes(content)
    refused(folder, "no tokenizer to be had" if file == "tokenizer.json" else "no base model to be had", capfd)


def test_weights_are_truncated(folder, capfd):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "no base model to be had", capfd)


def test_weights_that_the_configuration_does_not_name(folder, capfd):
    """transformers would fill them with random numbers."""
    change(folder, num_hidden_layers=5)
    refused(folder, r"its weights lack model.layers.4.\S+ as its config.json wants it \(9 in all\)$", capfd)
    change(folder, num_hidden_layers=4, intermediate_size=100)
    refused(folder, r"its weights lack model.layers.0.mlp\S+ as its config.json wants it \(12 in all\)$", capfd)


def test_other_kinds_of_model(folder, capfd):
    change(folder, model_type="fly")
    refused(folder, "no base model to be had .*`fly`", capfd)
    change(folder, model_type="resnet")
    refused(folder, "no base model to be had .*ResNetConfig", capfd)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    pytest.importorskip("tyro")
    (tmp_path / "empty").mkdir()
    adapter = save_adapter(tmp_path / "adapter")
    flags = ["--model", str(tmp_path / "empty"), "--checkpoint", str(adapter), "--device", "cpu"]
    assert cli.main(["memory", "simple", *flags]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(err) == 1 and "empty: no base model here (config.json is missing)" in err[0]
