"""A random Llama of 4 layers, a tokenizer of whole words with a chat template, an adapter; all without a network."""

import pytest
import torch

from fastmem.models import ExperimentConfig, MemoryAugmentedModel, MemoryModel
from fastmem.nn import MemoryConfig

WORDS = (
    *(
        "user",
        "assistant",
        "hello",
        "my",
        "name",
        "is",
        "am",
        "i",
        "alice",
        "bob",
        "sarah",
        "what",
        "where",
        "do",
        "no",
    ),
    *("live", "in", "lisbon", "dog", "rex", "please", "remember", "hi", "the", "a", "green", "color", "favorite"),
    *(".", "?", "!", ",", "'", ":", "_"),
)
SIZES = {"buffer_slots": 24, "store_slots": 8, "memory_dim": 32, "surprise_dim": 16, "gate_dim": 16}
SIZES["novelty_threshold"] = 0.9999  # random keys are alike; here every token has its own slot
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors gain nothing from threads, and on a busy machine lose a lot. Import it where it is to hold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def make_tokenizer():
    """One token for each word of WORDS, <unk> for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_base(layers=4):
    """The same random weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(folder, seed=0, **changes):
    """An adapter with random weights for `make_base()`; returns the folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 64, "memory_layer_positions": (1, 3)} | SIZES | changes
    model = MemoryModel(make_base(), MemoryConfig(**sizes))
    with torch.no_grad():
        for layer in model.memory_layers:
            layer.attention.out_gain.fill_(0.1)
    model.save_pretrained(folder)
    return folder


def save_base(folder):
    """Base and tokenizer as a folder that --model takes; returns the folder."""
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_model(checkpoint=None, **changes):
    """A MemoryAugmentedModel on the tiny base."""
    memory = MemoryConfig(hidden_dim=64, **SIZES)
    config = ExperimentConfig(**{"checkpoint": checkpoint, "memory": memory, "max_new_tokens": 5} | changes)
    return MemoryAugmentedModel(config, make_base(), make_tokenizer())
