"""A random Llama and a tokenizer made of the task's own sentences, in a folder, and a training run of seconds."""

import itertools
import json
import random

import torch

from fastmem.experiments.llm_memory_train import TrainingConfig, load_base, new_model
from fastmem.experiments.memory_training import MemoryTrainer
from fastmem.models.chat import ChatFormat
from fastmem.nn import MemoryConfig
from fastmem.tasks import conversations, facts

MEMORY = MemoryConfig(buffer_slots=32, store_slots=16, memory_dim=32, surprise_dim=16, gate_dim=16)
REPLIES = [("What is the capital of France?", "Paris, I think."), ("Tell me a joke.", "No."), ("Why?", "Because.")]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_base(folder):
    """Write model and tokenizer; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = random.Random(0)
    talks = [conversations.draw("train", rng, num_facts=5, num_chatter=3) for _ in range(100)]
    texts = [turn.text for talk in talks for turn in talk.turns] + [f.answer for talk in talks for f in talk.facts]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(base, folder, **changes):
    """Four steps of three conversations; the base's replies are given, not generated."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base_replies.json").write_text(json.dumps({"model": str(base), "replies": REPLIES}))
    numbers = {"num_train": 12, "epochs": 1, "batch_size": 3, "num_val": 1, "warmup_steps": 2, "lr": 3e-3}
    numbers |= {"save_every": 2, "eval_every": 100, "dtype": "float32", "device": "cpu", "memory": MEMORY}
    return TrainingConfig(model=str(base), checkpoint_dir=folder, **(numbers | changes))


def make_trainer(config):
    """(model, trainer) as `train` makes them."""
    base, tokenizer = load_base(config.model, getattr(torch, config.dtype), "cpu")
    chat = ChatFormat(tokenizer)
    model = new_model(config, base, chat)
    return model, MemoryTrainer(model, chat, REPLIES)


def some_talks(count=3, seed=0, **changes):
    """Training conversations with chatter and a correction here and there."""
    rng = random.Random(seed)
    settings = {"num_facts": 3, "num_chatter": 2, "correct": 0.3} | changes
    return list(itertools.islice(iter(lambda: conversations.draw("train", rng, **settings), None), count))


def names():
    """First names of training."""
    return facts.values("first_name", "train")
