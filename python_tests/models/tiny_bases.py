"""Random decoders of the usual architectures, small enough for tests, with memory layers that do something."""

import torch

from fastmem.models import MemoryModel
from fastmem.nn import MemoryConfig

VOCABULARY, WIDTH = 200, 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLASSES = {
    "llama": ("Llama", SIZES | ATTENTION),
    "gemma2": ("Gemma2", SIZES | ATTENTION | {"sliding_window": 8}),
    "gemma3": ("Gemma3", SIZES | ATTENTION | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SIZES | ATTENTION),
    "qwen3": ("Qwen3", SIZES | ATTENTION),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "mamba": ("Mamba", SIZES | {"state_size": 8}),
}


def make_base(kind="llama", dtype=torch.float32):
    """A random base in evaluation mode; the same weights at every call."""
    import transformers

    name, sizes = CLASSES[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**sizes, **TOKENS)
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that states of different contexts differ
    model.generation_config.eos_token_id = None  # answers have the length that was asked for
    return model.to(dtype).eval()


def config(**changes):
    """Small banks that are full after a few prompts."""
    sizes = {"buffer_slots": 12, "store_slots": 6, "memory_dim": 32, "num_heads": 2, "surprise_dim": 16, "gate_dim": 16}
    return MemoryConfig(**({"hidden_dim": WIDTH} | sizes | {"novelty_threshold": 0.9} | changes))


def make_model(base=None, seed=2, **changes):
    """A memory model in evaluation mode whose reads change the stream about as much as a trained one's."""
    base = make_base() if base is None else base
    torch.manual_seed(seed)
    model = MemoryModel(base, config(**changes))
    hidden, _ = model.record(input_ids=prompt(99, 16, batch=24))
    with torch.no_grad():
        for layer, x in zip(model.memory_layers, hidden, strict=True):
            layer.calibrate(x.flatten(0, 1))
            layer.key_proj.weight.add_(0.01 * torch.randn_like(layer.key_proj.weight))
            layer.content_proj.weight.normal_(std=0.02)
            layer.attention.out_gain.fill_(0.1)
            layer.attention.null_score.fill_(1.0)
            layer.store.predictor[2].weight.normal_(std=0.1)
    return model.eval()


def prompt(seed, length=10, batch=1):
    """(batch, length) token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tensors_of(model, session):
    """Everything that a session holds, name -> tensor."""
    out = {}
    for i, state in enumerate(model.memory.states_of(session)):
        for part in ("buffer", "store", "stats"):
            for field, x in getattr(state, part)._asdict().items():
                out[f"{i}.{part}.{field}"] = x
    return out


def assert_same_memory(model, session, expected, tolerance=1e-4):
    """The session holds what `expected` (from `tensors_of`) says."""
    for name, x in tensors_of(model, session).items():
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
