"""A chat model with a memory: one call is one turn, the context is gone after it, the memory stays."""

from __future__ import annotations

import glob
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.models.base_model import OFFLINE_MODEL, load_base
from fastmem.models.chat import Batch, ChatFormat
from fastmem.models.memory_model import ADAPTER_CONFIG, MemoryModel, hidden_size
from fastmem.models.sessions import DEFAULT
from fastmem.nn import DualMemoryLayer, MemoryConfig
from fastmem.nn._checks import check_count
from fastmem.ops.gated_write import Bank

PACKAGED_ADAPTER = Path(__file__).parent.parent / "data" / "smollm2_adapter"
TIERS = ("buffer", "store")
_NUM_SURPRISING = 5


@dataclass(frozen=True)
class ExperimentConfig:
    """Which model, which adapter, how it answers.

    Raises:
        ValueError, TypeError: if a number or type is out of range.
    """

    model_name: str = OFFLINE_MODEL
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    memory_layer_positions: tuple[int, ...] | None = None
    """Blocks after which memory stands, 0 the first; None: the checkpoint's, or those of `memory`."""
    checkpoint: str | Path | None = None
    """Trained adapter: a folder or a glob such as "checkpoints/best_step*"; None: untrained layers."""
    system: str | None = None
    """System message; None: the chat template's own."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    dtype: str = "auto"
    """Type of the base: float32, bfloat16, float16 or auto (bfloat16 on a GPU). Memory is float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Sizes and rates of untrained layers; hidden_dim follows the base. A checkpoint brings its own."""

    def __post_init__(self) -> None:
        if self.memory_layer_positions is not None:
            object.__setattr__(self, "memory_layer_positions", tuple(self.memory_layer_positions))
        check_count("max_new_tokens", self.max_new_tokens)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {self.dtype!r}")

    def torch_device(self) -> torch.device:
        """The device meant."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype meant."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return getattr(torch, self.dtype)


def find_checkpoint(path: str | Path) -> Path:
    """The adapter folder that a path or glob means; of several, the one of the highest step.

    An ending ".pt" is dropped where nothing has that name: checkpoints are folders.

    Raises:
        ValueError: if there is none.
    """
    text = str(path)
    for pattern in dict.fromkeys((text, text.removesuffix(".pt"))):
        if Path(pattern).is_dir():
            return Path(pattern)
        found = [Path(p) for p in glob.glob(pattern) if (Path(p) / ADAPTER_CONFIG).is_file()]
        if found:
            return max(found, key=lambda p: (_step(p), p.name))
    raise ValueError(f"{path}: no memory adapter here")


def _step(path: Path) -> int:
    number = re.search(r"(\d+)$", path.name)
    return int(number[1]) if number else -1


class MemoryAugmentedModel:
    """A frozen chat model that remembers what users said after the context is gone.

    `generate` is one turn: the user's text alone is the context, and of it the user's own words are what is stored.
    Each session has its own memory. `model` is the MemoryModel below it, `chat` its chat format.

    Args:
        config: which base, which adapter.
        base, tokenizer: a loaded causal LM and its tokenizer, instead of config.model_name.

    Raises:
        ValueError: if the adapter is missing or damaged, or does not fit the base or config.memory_layer_positions.
    """

    def __init__(self, config: ExperimentConfig, base: nn.Module | None = None, tokenizer: Any = None) -> None:
        if (base is None) != (tokenizer is None):
            raise ValueError("base, tokenizer: expected both or neither")
        checkpoint = None if config.checkpoint is None else find_checkpoint(config.checkpoint)  # before the slow part
        if checkpoint is not None and not (checkpoint / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{checkpoint}: no memory adapter here ({ADAPTER_CONFIG} is missing)")
        if base is None:
            base, tokenizer = load_base(config.model_name, config.torch_dtype(), config.torch_device())
        self.config = config
        self.chat = ChatFormat(tokenizer, config.system)
        self.model = self._fresh(base) if checkpoint is None else self._trained(base, checkpoint)

    @classmethod
    def default(cls, **changes: Any) -> MemoryAugmentedModel:
        """SmolLM2-135M-Instruct, offline, with the adapter that comes with the package.

        Args:
            **changes: other fields of ExperimentConfig.
        """
        return cls(ExperimentConfig(**{"checkpoint": PACKAGED_ADAPTER} | changes))

    def _fresh(self, base: nn.Module) -> MemoryModel:
        sizes = asdict(self.config.memory) | {"hidden_dim": hidden_size(base)}
        if self.config.memory_layer_positions is not None:
            sizes["memory_layer_positions"] = self.config.memory_layer_positions
        return MemoryModel(base, MemoryConfig(**sizes)).eval()

    def _trained(self, base: nn.Module, folder: Path) -> MemoryModel:
        model = MemoryModel.from_pretrained(base, folder)
        wanted = self.config.memory_layer_positions
        if wanted is not None and tuple(sorted(wanted)) != model.positions:
            model.unload()
            raise ValueError(f"{folder}: this adapter stands after blocks {model.positions}, asked for {wanted}")
        return model

    def load_checkpoint(self, path: str | Path) -> None:
        """Replace the memory layers by trained ones. The memory starts empty: it belongs to the weights that wrote it.

        Args:
            path: an adapter folder, or a glob of several, of which the one of the highest step is taken.

        Raises:
            ValueError: if there is none, it is damaged, or it does not fit; the layers of before go on then.
        """
        folder, old = find_checkpoint(path), self.model
        old.unload()
        try:
            self.model = self._trained(old.base, folder)
        except BaseException:
            old.attach()
            raise
        self.config = replace(self.config, checkpoint=folder)

    # One turn.

    def generate(
        self,
        text: str,
        update_memory: bool = True,
        session: str = DEFAULT,
        *,
        max_new_tokens: int | None = None,
        **generation: Any,
    ) -> tuple[str, dict[str, Any]]:
        """Answer one user turn from this text and the session's memory; greedy unless `generation` says otherwise.

        Args:
            text: what the user says.
            update_memory: whether the user's words are stored. The answer never is.
            session: whose memory; one that is new is empty.
            max_new_tokens: longest answer; None: the configuration's.
            **generation: further arguments of the base's generate().

        Returns:
            The answer, and info: session, prompt_tokens, new_tokens; written and live, each {"buffer": n, "store": n}
            slots summed over the memory layers; surprising, the most surprising of the user's tokens as (token,
            root mean square error of the prediction), empty unless update_memory; seconds, tokens_per_second.

        Raises:
            TypeError: if text or session is no str, or an argument asks for something else than tokens.
            ValueError: if text holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        if not isinstance(session, str):
            raise TypeError(f"session: expected str, got {type(session).__name__}")
        for name in ("inputs_embeds", "return_dict_in_generate"):
            if generation.get(name) is not None and generation[name] is not False:
                raise TypeError(f"{name}: a turn is text, and so is its answer; `model.generate` takes everything")
        started = time.perf_counter()
        batch = self.chat.batch([text]).to(self.model.device)
        arguments = {"do_sample": False, "pad_token_id": self.chat.pad} | generation
        with self.model.turn(session), torch.no_grad():
            with self._watch_surprise() as surprise:
                said = self.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    sessions=[session],
                    write_mask=batch.user,
                    update_memory=update_memory,
                    max_new_tokens=self.config.max_new_tokens if max_new_tokens is None else max_new_tokens,
                    **arguments,
                )
            new = said[0, batch.input_ids.shape[1] :]
            seconds = time.perf_counter() - started
            info = {
                "session": session,
                "prompt_tokens": batch.input_ids.shape[1],
                "new_tokens": len(new),
                "written": self._count(session, lambda bank: (bank.strength > 0) & (bank.age == 0), update_memory),
                "live": self._count(session, lambda bank: bank.strength > 0),
                "surprising": self._most_surprising(batch, surprise),
                "seconds": seconds,
                "tokens_per_second": len(new) / seconds,
            }
            return self.chat.tokenizer.decode(new, skip_special_tokens=True).strip(), info

    @contextmanager
    def _watch_surprise(self) -> Iterator[list[Tensor]]:
        """Collects the surprise (T,) of a prompt that is written, one per memory layer."""
        collected: list[Tensor] = []

        def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            assert isinstance(layer, DualMemoryLayer)
            n = layer.normalise(args[0][:1])
            values = n if kwargs.get("values") is None else kwargs["values"][:1]
            collected.append(layer.store.surprise(torch.cat([n[:, :1], n[:, :-1]], 1), values)[0])

        handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in self.model.memory_layers]
        try:
            yield collected
        finally:
            for handle in handles:
                handle.remove()

    def _most_surprising(self, batch: Batch, surprise: list[Tensor]) -> list[tuple[str, float]]:
        if not surprise or not batch.user.any():
            return []
        mean = torch.stack(surprise).mean(0)[batch.user[0]]
        ids = batch.input_ids[0, batch.user[0]]
        order = mean.argsort(descending=True)[:_NUM_SURPRISING].tolist()
        return [(self.chat.tokenizer.decode([ids[i].item()]), round(mean[i].item(), 3)) for i in order]

    def _count(self, session: str, which: Callable[[Bank], Tensor], counts: bool = True) -> dict[str, int]:
        if not counts or session not in self.model.memory:
            return dict.fromkeys(TIERS, 0)
        states = self.model.memory.states_of(session)
        return {tier: sum(int(which(getattr(s, tier)).sum()) for s in states) for tier in TIERS}

    # Memory contents.

    def held(self, session: str = DEFAULT, top: int = 10) -> list[dict[str, Any]]:
        """What a session holds in words: for each tier the strongest tokens, strongest first.

        A stored value is named by the token whose input embedding is nearest.

        Args:
            session: whose memory.
            top: how many tokens of each tier at most.

        Returns:
            Dicts of tier, token, strength (buffer: activation in [0, 1]; store: surprise), age in cycles, reads
            (attention received), and layers, the number of memory layers that hold it. Strength is the largest over
            layers; age and reads are those of that layer.

        Raises:
            KeyError: if there is no such session.
        """
        states = self.model.memory.states_of(session)
        embedding: Any = self.model.base.get_input_embeddings()
        directions = F.normalize(embedding.weight.detach().float(), dim=-1)
        rows = []
        for tier in TIERS:
            found: dict[int, dict[str, Any]] = {}
            for state in states:
                bank: Bank = getattr(state, tier)
                live = (bank.strength[0] > 0).nonzero().flatten()
                tokens = (bank.values[0, live].to(directions) @ directions.T).argmax(1)
                layer: dict[int, dict[str, Any]] = {}
                for slot, token in zip(live.tolist(), tokens.tolist(), strict=True):
                    entry = {
                        "tier": tier,
                        "token": self.chat.tokenizer.decode([token]),
                        "strength": bank.strength[0, slot].item(),
                        "age": int(bank.age[0, slot].item()),
                        "reads": bank.access[0, slot].item(),
                        "layers": 1,
                    }
                    if token not in layer or layer[token]["strength"] < entry["strength"]:
                        layer[token] = entry
                for token, entry in layer.items():
                    known = found.get(token)
                    if known is not None:
                        strongest = max(known, entry, key=lambda e: e["strength"])
                        entry = strongest | {"layers": known["layers"] + 1}
                    found[token] = entry
            rows += sorted(found.values(), key=lambda e: (-e["strength"], e["age"]))[:top]
        return rows

    def clear_memory(self, session: str | None = None) -> None:
        """Forget one session, or all.

        Raises:
            KeyError: if there is no such session.
        """
        self.model.memory.clear(session)

    def decay(self, cycles: int = 1, session: str | None = None) -> None:
        """Let decay cycles pass for one session, or all; every turn that is stored lets one pass by itself.

        Raises:
            KeyError: if there is no such session.
            TypeError, ValueError: if cycles are no int from 0 to 1e9.
        """
        self.model.memory.decay(cycles, session)

    def save_memory(self, path: str | Path, session: str | None = None) -> None:
        """Write the memory of one session, or all, to one file, whole or not at all.

        Raises:
            KeyError: if there is no such session.
            OSError: if the file cannot be written; an older one is intact.
        """
        self.model.memory.save(path, None if session is None else [session])

    def load_memory(self, path: str | Path) -> tuple[str, ...]:
        """Read sessions from a file; those of the same name are replaced, others stay. Returns their names.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, or of another model; nothing has changed then.
        """
        return self.model.memory.load(path)
