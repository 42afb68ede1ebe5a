"""Tiny models of transformers with Mamba layers, with weights that make something of what they read."""

import torch
from transformers.models.falcon_mamba import FalconMambaConfig, FalconMambaForCausalLM
from transformers.models.jamba import JambaConfig, JambaForCausalLM
from transformers.models.mamba import MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.zamba import ZambaConfig, ZambaForCausalLM

VOCABULARY = 40
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
HYBRID = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 3,
    "pad_token_id": 0,
}
if hasattr(MambaMixer, "cuda_kernels_forward"):  # an older transformers does without kernels only where told to
    HYBRID["use_mamba_kernels"] = False
JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
}
ZAMBA = {
    "num_hidden_layers": 8,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "attention_hidden_size": 32,
    "attention_head_dim": 16,
    "n_mamba_heads": 2,
}
MAKERS = {
    "mamba": lambda **more: MambaForCausalLM(MambaConfig(**{**MAMBA, **more})),
    "falcon_mamba": lambda **more: FalconMambaForCausalLM(FalconMambaConfig(**{**MAMBA, **more})),
    "jamba": lambda **more: JambaForCausalLM(JambaConfig(**{**HYBRID, **JAMBA, **more})),
    "zamba": lambda **more: ZambaForCausalLM(ZambaConfig(**{**HYBRID, **ZAMBA, **more})),
}


def make(kind, seed=0, **more):
    torch.manual_seed(seed)
    model = MAKERS[kind](tie_word_embeddings=False, **more).eval()  # tied, it repeats the last token
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 2 else 0.05) * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def prompt(*shape, seed=1):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
