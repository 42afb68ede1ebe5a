"""A frozen causal language model with memory layers after some of its blocks."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem._files import atomic_files
from fastmem.models.kv_cache import cache_among, cached_length
from fastmem.models.sessions import Sessions
from fastmem.nn import DualMemoryLayer, DualMemoryState, MemoryConfig
from fastmem.nn.memory_cross_attention import MemoryView

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "memory_config.json", "memory_adapter.safetensors"
_CONFIG_IN_WEIGHTS = "memory_config"  # key of the weights' metadata
DEFAULT_DEPTHS = (0.45, 0.69, 0.93)  # for 30 blocks: 13, 20, 27


@dataclass
class _Call:
    """What the hooks of one forward pass share."""

    active: bool = False
    """Whether memory takes part; not where the base is called past its MemoryModel."""
    enabled: bool = True
    update: bool = True
    write_mask: Tensor | None = None
    read_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    prompt: int | None = None
    """Length of the prompt that `generate` got; what comes after it is not written. None: all is prompt."""
    offset: int = 0
    """Tokens in the KV cache that `generate` was given beside the prompt."""
    padding: Tensor | None = None
    """Attention mask that `generate` got, (B, prompt)."""
    values: Tensor | None = None
    start: int = 0
    """Tokens before this pass, in the KV cache."""
    end: int = 0
    """Tokens up to and with the latest pass."""
    written_to: int = 0
    """Tokens of the prompt that have been written."""
    record: dict[int, Tensor] | None = None
    """Where hidden states are collected instead of read and written."""
    given: list[DualMemoryState] | None = None
    """States to read from instead of the sessions' own (training)."""
    views: list[MemoryView] | None = None
    last_hidden: dict[int, Tensor] = field(default_factory=dict)


class _Lock:
    """A lock that one thread may take several times, and that a copy of its owner has for itself."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


class _RecordingDone(Exception):
    """Everything that was to be recorded is there; the blocks above need not run."""


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """How many prompts a call of forward or generate brings, and their length."""
    for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds")):
        if isinstance(x, Tensor):
            return x.shape[0], x.shape[1]
    return None


def _text_config(base: Any) -> Any:
    config: Any = getattr(base, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config_in_weights(content: bytes) -> dict[str, Any] | None:
    """The configuration that a file of adapter weights carries; None: it was written before they did."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = header.get("__metadata__", {}).get(_CONFIG_IN_WEIGHTS)
    return None if text is None else dict(json.loads(text)["config"])


def hidden_size(base: Any) -> int:
    """Width of a Hugging Face model's hidden states."""
    return _text_config(base).hidden_size


def decoder_blocks(base: Any) -> nn.ModuleList:
    """The list of decoder blocks of a Hugging Face causal LM of any architecture.

    Raises:
        ValueError: if there is no list of `num_hidden_layers` blocks.
    """
    wanted = getattr(_text_config(base), "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(
        f"base: expected a decoder with a ModuleList of {wanted} blocks, found none in {type(base).__name__}"
    )


class MemoryModel(nn.Module):
    """A causal LM that stores what it is told and recalls it when the context is gone.

    The base is frozen and not changed; memory hangs on forward hooks. `generate` and `forward` are the base's own.
    Every batch row belongs to a session; sessions never see each other's memory. A pass of several tokens (a prompt)
    writes them and reads at its last token; single tokens (decoding) read. `write_mask` narrows what is written; all
    tokens that are not written read. What a call of `forward` or `generate` writes is kept when the call is through: an
    error or interrupt inside of it leaves the memory as it was. Calls of the base itself know of no memory. Threads
    wait for each other, call after call.

    Args:
        base: a Hugging Face causal LM (Llama, Gemma, Qwen, GPT-2, Mamba, ...).
        config: sizes; hidden_dim must be the base's hidden size.

    Raises:
        ValueError: if the base lacks the named blocks or has another width.
    """

    def __init__(self, base: Any, config: MemoryConfig) -> None:
        super().__init__()
        blocks = decoder_blocks(base)
        if config.hidden_dim != hidden_size(base):
            raise ValueError(
                f"config.hidden_dim: expected {hidden_size(base)}, the base's width, got {config.hidden_dim}"
            )
        positions = config.memory_layer_positions
        if positions is None:
            positions = tuple(dict.fromkeys(min(int(d * len(blocks)), len(blocks) - 1) for d in DEFAULT_DEPTHS))
        for p in positions:
            if not 0 <= p < len(blocks):
                raise ValueError(f"memory_layer_positions: the base has blocks 0 to {len(blocks) - 1}, got {p}")
        if len(set(positions)) != len(positions) or not positions:
            raise ValueError(f"memory_layer_positions: expected distinct blocks, got {positions}")
        base.requires_grad_(False)
        self.base: Any = base
        self.config = replace(config, memory_layer_positions=tuple(sorted(positions)))
        self.layers = nn.ModuleList(DualMemoryLayer(self.config) for _ in positions)
        self.layers.to(next(base.parameters()).device)
        self.memory = Sessions(self.layers, self._fingerprint())
        self._call = _Call()
        self._alone = _Lock()
        self._handles: list[Any] = []
        self.attach()

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryModel:
        """A copy with a base, layers and memories of its own."""
        attached = bool(self._handles)
        try:
            base = copy.deepcopy(self.unload(), memo)
        except BaseException:
            if attached:
                self.attach()
            raise
        new = type(self)(base, self.config)
        new.layers.load_state_dict(self.layers.state_dict())
        new.train(self.training)
        for name in self.memory.names:
            new.memory.put([name], self.memory.states_of(name))
        if attached:
            self.attach()
        else:
            new.unload()
        return new

    def _apply(self, fn: Any, recurse: bool = True) -> MemoryModel:
        """Memory stays in float32 when the base is brought to a smaller type."""
        super()._apply(fn, recurse)
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.layers.parameters()):
            self.layers.float()
        return self

    def attach(self) -> None:
        """Hang the memory layers on the base, as the constructor does."""
        if self._handles:
            return
        blocks = decoder_blocks(self.base)
        self._handles = [
            self.base.register_forward_pre_hook(self._before, with_kwargs=True),
            self.base.get_input_embeddings().register_forward_hook(self._embedded),
            *(blocks[p].register_forward_hook(self._hook(i)) for i, p in enumerate(self.positions)),
            self.base.register_forward_hook(self._after),
        ]

    def unload(self) -> Any:
        """Take the memory layers off and return the base as it was before; `attach` puts them back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.base

    @property
    def positions(self) -> tuple[int, ...]:
        """Blocks after which memory stands."""
        assert self.config.memory_layer_positions is not None
        return self.config.memory_layer_positions

    @property
    def memory_layers(self) -> list[DualMemoryLayer]:
        """The memory layers, in order of depth."""
        return [cast(DualMemoryLayer, layer) for layer in self.layers]

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self.base.parameters()).device

    def _fingerprint(self) -> dict[str, Any]:
        c = self.config
        return {
            "model_type": getattr(self.base.config, "model_type", ""),
            "vocab_size": getattr(_text_config(self.base), "vocab_size", 0),
            "memory_layer_positions": list(self.positions),
            "hidden_dim": c.hidden_dim,
            "memory_dim": c.memory_dim,
            "buffer_slots": c.buffer_slots,
            "store_slots": c.store_slots,
        }

    # The hooks of one pass, in the order in which they run.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        if not call.active:
            return
        call.start = cached_length(cache_among(kwargs), call.end)
        if call.prompt is not None and call.end == 0 and call.start >= call.prompt:
            call.offset = call.start  # generate got the new tokens alone, behind a cache
        call.attention_mask = kwargs.get("attention_mask")
        embeds = kwargs.get("inputs_embeds")
        call.values = None if embeds is None else self._content(embeds)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._call.active:
            self.memory.commit()

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._call.active and self._call.values is None:
            self._call.values = self._content(output)

    @staticmethod
    def _content(embeddings: Tensor) -> Tensor:
        return F.rms_norm(embeddings.float(), embeddings.shape[-1:], eps=1e-6)

    def _hook(self, i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not (self._call.active and self._call.enabled):
                return None
            x = output[0] if isinstance(output, tuple) else output
            y = self._memory(i, x)
            if y is x:
                return None
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _memory(self, i: int, x: Tensor) -> Tensor:
        call, layer = self._call, self.memory_layers[i]
        if call.record is not None:
            call.record[i] = x
            if len(call.record) == len(self.layers):
                raise _RecordingDone
            return x
        B, T = x.shape[:2]
        reads = call.read_mask
        if reads is not None:
            reads = reads[:, -T:] if reads.shape[1] >= T else None
        if call.given is not None:
            if call.views is None or len(call.views) <= i:
                call.views = [layer.view(state) for layer, state in zip(self.memory_layers, call.given, strict=True)]
            return layer.read(x, call.views[i], reads)
        written = None
        if call.update and T > 1:
            written, reads = self._roles(x)
        previous = call.last_hidden.get(i) if call.start and call.start == call.end else None
        end = call.start + T
        new = call.written_to < (end if call.prompt is None else min(end, call.offset + call.prompt))
        if i == len(self.layers) - 1:
            call.end, call.written_to = end, max(call.written_to, end)
        call.last_hidden[i] = x[:, -1].detach()
        if written is None or not new:
            return layer.read(x, self.memory.view(i, B), reads)
        beams = B // self.memory.batch_of(B)
        if beams == 1:
            y, state = layer(
                x,
                self.memory.states(i, B),
                values=call.values,
                previous=previous,
                write_mask=written,
                read_mask=reads,
            )
        else:
            y, state = self._beam_update(i, x, previous, written, reads, beams)
        self.memory.replace(i, state)
        return y

    def _beam_update(
        self, i: int, x: Tensor, previous: Tensor | None, written: Tensor | None, reads: Tensor | None, beams: int
    ) -> tuple[Tensor, DualMemoryState]:
        """Beams of a prompt are the same prompt: the first one writes, all read."""
        call, layer = self._call, self.memory_layers[i]
        view = self.memory.view(i, x.shape[0])
        y = layer.read(x, view, reads)

        def first(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[::beams]

        _, state = layer(
            x[::beams],
            self.memory.states(i, x.shape[0] // beams),
            values=first(call.values),
            previous=first(previous),
            write_mask=first(written),
            read_mask=first(reads),
        )
        return y, state

    def _roles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) bool each: tokens to be written, and tokens that read."""
        call = self._call
        B, T = x.shape[:2]
        here = torch.arange(T, device=x.device)
        real = self._real(B, T, x.device)
        before, real = real[:, :-1], real[:, 1:]
        prompt = real if call.prompt is None else real & (call.start + here < call.offset + call.prompt)
        wanted = prompt
        if call.write_mask is not None:
            given = call.write_mask.to(x.device).repeat_interleave(B // call.write_mask.shape[0], 0)
            column = here if call.prompt is None else call.start - call.offset + here
            wanted = prompt & given[:, column.clamp(max=given.shape[1] - 1)]
        reads = real & ~wanted
        if call.prompt is None or call.start + T >= call.offset + call.prompt:
            last = (prompt * (here + 1)).argmax(1, keepdim=True)
            reads = reads | (prompt & (here == last))
        return wanted & before & (call.start + here >= call.written_to), reads

    def _real(self, B: int, T: int, device: torch.device) -> Tensor:
        """(B, 1 + T) bool, false on padding: the token before this pass, and those in it."""
        call = self._call
        given, first = call.padding, call.start - 1
        if isinstance(call.attention_mask, Tensor) and call.attention_mask.ndim == 2:
            given = call.attention_mask
            first = given.shape[1] - T - 1
        if given is None:
            return torch.ones(B, 1 + T, dtype=torch.bool, device=device)
        given = given.to(device).bool().repeat_interleave(B // given.shape[0], 0)
        column = torch.arange(first, first + T + 1, device=device)
        inside = (column >= 0) & (column < given.shape[1])
        return torch.where(inside, given[:, column.clamp(0, given.shape[1] - 1)], column >= 0)

    # What callers use.

    def forward(
        self,
        *args: Any,
        sessions: Sequence[str] | None = None,
        write_mask: Tensor | None = None,
        update_memory: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The base's forward pass with memory: all of the input is prompt, and the base's own output comes back.
        Arguments and errors as in `generate`."""
        with self._pass(sessions, write_mask, update_memory, _shape(args, kwargs)):
            return self.base(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        sessions: Sequence[str] | None = None,
        write_mask: Tensor | None = None,
        update_memory: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The base's own generate (KV cache, batches, left padding, beams, streamers) with memory.

        Args:
            sessions: one session per prompt; None: "default", or "default-0", "default-1", ... for a batch.
            write_mask: (B, T) bool over the prompt, true where a token may be stored; None: all but padding.
            update_memory: whether the prompt is stored; what is generated never is.
            *args, **kwargs: the base's own.

        Returns:
            What the base's generate returns.

        Raises:
            TypeError: sessions are no strings.
            ValueError: write_mask is not shaped like the prompt, or there is not one session for each prompt.
        """
        shape = _shape(args, kwargs)
        with self._pass(sessions, write_mask, update_memory, shape):
            self._call.prompt = None if shape is None else shape[1]
            self._call.padding = kwargs.get("attention_mask")
            return self.base.generate(*args, **kwargs)

    @contextmanager
    def _pass(
        self, sessions: Sequence[str] | None, write_mask: Tensor | None, update: bool, shape: tuple[int, int] | None
    ) -> Iterator[None]:
        if write_mask is not None and shape is not None and tuple(write_mask.shape) != shape:
            raise ValueError(f"write_mask: expected {shape} like the prompt, got {tuple(write_mask.shape)}")
        write_mask = None if write_mask is None else write_mask.bool()
        with self._alone:
            before = self._call
            self.memory.activate(sessions, None if shape is None else shape[0])
            self._call = _Call(active=True, enabled=before.enabled, update=update, write_mask=write_mask)
            try:
                yield
            except BaseException:
                self.memory.rollback()
                raise
            finally:
                self.memory.deactivate()
                self._call = before

    @contextmanager
    def turn(self, session: str) -> Iterator[None]:
        """Within this context no other thread passes the model, and an error leaves the session as it was before."""
        with self._alone, self.memory.unless_failed(session):
            yield

    @contextmanager
    def disable_memory(self) -> Iterator[None]:
        """Within this context the model is the base, bit for bit."""
        with self._alone:
            before, self._call.enabled = self._call.enabled, False
            try:
                yield
            finally:
                self._call.enabled = before

    @torch.no_grad()
    def record(self, **inputs: Any) -> tuple[list[Tensor], Tensor]:
        """Run the base up to the last memory layer, and neither read nor write.

        Args:
            **inputs: of the base's forward.

        Returns:
            Hidden states (B, T, hidden_dim) at each memory layer, and the tokens' content (B, T, hidden_dim).
        """
        with self._alone:
            before = self._call
            self._call = call = _Call(active=True, record={})
            try:
                self.base(**inputs)
            except _RecordingDone:
                pass
            finally:
                self._call = before
        assert call.record is not None and call.values is not None
        return [call.record[i] for i in range(len(self.layers))], call.values

    @contextmanager
    def reading(self, states: list[DualMemoryState], read_mask: Tensor | None = None) -> Iterator[None]:
        """Within this context passes read from these states, one per layer, and write nothing. Differentiable."""
        with self._alone:
            before = self._call
            self._call = _Call(active=True, update=False, given=states, read_mask=read_mask)
            try:
                yield
            finally:
                self._call = before

    def trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) parameters."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in PEFT's words."""
        trained, total = self.trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter (no base weights, no memory contents) as JSON and safetensors, replacing what was there.

        The weights' file carries the configuration too, so that files of two adapters are not taken for one.

        Args:
            directory: where to.
            dtype: of the weights on disk; float16 halves the file.
        """
        from safetensors.torch import save

        weights = {
            name: x.detach().cpu().to(dtype if x.ndim else x.dtype).contiguous()
            for name, x in self.layers.state_dict().items()  # scalars stay: counts outgrow float16
        }
        config = {"format": 1, "config": asdict(self.config)}
        meta = {"format": "pt", _CONFIG_IN_WEIGHTS: json.dumps(config)}
        atomic_files(
            directory,
            {
                ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
                ADAPTER_WEIGHTS: save(weights, metadata=meta),
            },
        )

    @classmethod
    def from_pretrained(cls, base: Any, directory: str | Path) -> MemoryModel:
        """Put a saved adapter on a base.

        Args:
            base: the causal LM that it was trained for.
            directory: what `save_pretrained` wrote.

        Raises:
            ValueError: if the files are missing or damaged, belong to another base, or to two adapters (a save that
                was cut off between them).
        """
        from safetensors.torch import load

        folder = Path(directory)
        try:
            entry = json.loads((folder / ADAPTER_CONFIG).read_text())
            if entry["format"] != 1:
                raise ValueError(f"format {entry['format']}, this version of fastmem reads format 1")
            config = MemoryConfig(**entry["config"])
            content = (folder / ADAPTER_WEIGHTS).read_bytes()
            weights, saved = load(content), _config_in_weights(content)
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: no memory adapter here ({Path(error.filename).name} is missing)") from None
        except Exception as error:
            raise ValueError(f"{folder}: not a memory adapter ({type(error).__name__}: {error})") from None
        if saved is not None and saved != entry["config"]:
            here = entry["config"]
            k = next(k for k in sorted({*here, *saved}) if here.get(k) != saved.get(k))
            raise ValueError(
                f"{folder}: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are of two adapters "
                f"({k}: {here.get(k)} and {saved.get(k)}); save it again"
            )
        model = cls(base, config)
        try:
            model.layers.load_state_dict({name: x.float() for name, x in weights.items()})
        except RuntimeError as error:
            model.unload()
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{folder}: the weights do not fit their configuration ({reason})") from None
        model.eval()
        return model


def get_memory_model(base: Any, config: MemoryConfig | None = None) -> MemoryModel:
    """Put fresh memory layers on a frozen base. They add nothing until they are trained.

    Args:
        base: a Hugging Face causal LM.
        config: sizes; None: the defaults at the base's width.

    Raises:
        ValueError: if the base lacks the named blocks or has another width.
    """
    if config is None:
        config = MemoryConfig(hidden_dim=hidden_size(base))
    return MemoryModel(base, config)
