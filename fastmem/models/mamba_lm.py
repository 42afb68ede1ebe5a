"""The Mamba language model: train it, load the weights that others trained, generate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmem._files import atomic_files
from fastmem.nn._checks import check_count, check_number
from fastmem.nn.mamba import Mamba, MambaState, check_sizes

CONFIG, WEIGHTS = "config.json", "model.safetensors"

State = tuple[MambaState, ...]  # one for each layer


@dataclass(frozen=True)
class MambaLMConfig:
    """Sizes of a MambaLM.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    """Inner channels per channel; d_inner = int(expand * d_model)."""
    dt_rank: int | Literal["auto"] = "auto"
    conv_bias: bool = True
    bias: bool = False
    """Whether in_proj and out_proj have a bias."""
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    """Whether the residual stream of a half-precision model is float32."""
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer"):
            check_count(name, getattr(self, name))
        check_sizes(self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank)
        check_number("norm_eps", self.norm_eps, above=0)
        for name in ("conv_bias", "bias", "residual_in_fp32", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")


class MambaLM(nn.Module):
    """Embedding, `n_layer` times (x + Mamba(RMSNorm(x))), RMSNorm, head.

    Parameters have the names of mamba-ssm's MambaLMHeadModel; `from_state_dict` takes its weights, and those of Hugging
    Face's MambaForCausalLM.

    Args:
        config: the sizes.
        device, dtype: of the parameters.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3.4.
    """

    def __init__(
        self,
        config: MambaLMConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = _Backbone(config, device, dtype)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device, dtype=dtype)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @property
    def _layers(self) -> list[_Layer]:
        return cast("list[_Layer]", list(self.backbone.layers))

    # ---------------------------------------------------------------------------------------------------------- forward

    @overload
    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: Literal[True],
    ) -> tuple[Tensor, State]: ...

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Logits of the next token, after each token.

        Args:
            ids: (B, L) int64 tokens.
            state: what an earlier call returned, to go on from.
            reset: (B, L) bool, true where a new sequence starts.
            cu_seqlens: (n + 1,) int, B = 1: bounds of n sequences packed into one row.
            return_state: also return the state after the last token.

        Returns:
            (B, L, vocab_size), and the state when asked.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape.
        """
        features, new = self._features(ids, state, reset, cu_seqlens)
        logits = self.lm_head(features)
        return (logits, new) if return_state else logits

    def get_features(
        self,
        ids: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: (B, L, d_model) after the last norm. Arguments and errors as in `forward`."""
        return self._features(ids, state, reset, cu_seqlens)[0]

    def _features(
        self, ids: Tensor, state: State | None, reset: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        self._check(ids, 2, state)
        x, new = self.backbone.embedding(ids), []
        for i, layer in enumerate(self._layers):
            x = self._residual(x)
            before = None if state is None else state[i]
            y, after = layer.mixer(_norm(layer.norm, x), before, reset, cu_seqlens, return_state=True)
            x = x + y
            new.append(after)
        return _norm(self.backbone.norm_f, x), tuple(new)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token.

        Args:
            ids: (B,) int64.
            state: what `forward`, `step` or `empty_state` returned; left as it is.

        Returns:
            Logits of the next token (B, vocab_size) and the new state.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape.
        """
        self._check(ids, 1, state)
        x, new = self.backbone.embedding(ids), []
        for layer, before in zip(self._layers, state, strict=True):
            x = self._residual(x)
            y, after = layer.mixer.step(_norm(layer.norm, x), before)
            x = x + y
            new.append(after)
        return self.lm_head(_norm(self.backbone.norm_f, x)), tuple(new)

    def empty_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        return tuple(layer.mixer.empty_state(batch) for layer in self._layers)

    def _residual(self, x: Tensor) -> Tensor:
        return x.float() if self.config.residual_in_fp32 and x.dtype != torch.float64 else x

    def _check(self, ids: object, ndim: int, state: State | None) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids: expected a tensor of int64, got {what}")
        if ids.ndim != ndim:
            raise ValueError(f"ids: expected {'(B, L)' if ndim == 2 else '(B,)'}, got {tuple(ids.shape)}")
        if state is not None and len(state) != self.config.n_layer:
            raise ValueError(f"state: expected one for each of {self.config.n_layer} layers, got {len(state)}")

    # ------------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Go on from prompts: one pass over the prompt, then a step for each token.

        Args:
            ids: (B, L) prompts of one length, L at least 1.
            max_new_tokens: how many tokens at most.
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the fewest tokens whose probabilities add up to at least this.
            eos: a row ends with this token, and is filled up with it; when all rows have ended, generation stops.
            generator: for the draws, on the device of ids.

        Returns:
            (B, L + new) prompts and what follows.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or size.
        """
        self._check(ids, 2, None)
        if ids.shape[1] < 1:
            raise ValueError("ids: expected at least one token to go on from, got none")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected more than 0, at most 1, got {top_p}")
        if max_new_tokens == 0:
            return ids
        features, state = self._features(ids, None, None, None)
        logits, tokens = self.lm_head(features[:, -1]), [ids]
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for left in range(max_new_tokens - 1, -1, -1):
            token = _pick(logits, temperature, top_k, top_p, generator).to(ids.dtype)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended = ended | (token == eos)
            tokens.append(token[:, None])
            if left == 0 or (eos is not None and ended.all()):
                break
            logits, state = self.step(token, state)
        return torch.cat(tokens, 1)

    # ----------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_state_dict(
        cls, weights: Mapping[str, Tensor], *, norm_eps: float = 1e-5, residual_in_fp32: bool = True
    ) -> MambaLM:
        """A model with these weights, whose sizes tell the config.

        Args:
            weights: of a MambaLM, of mamba-ssm's MambaLMHeadModel with RMS norms, or of Hugging Face's MambaForCausalLM
                or MambaModel; copied. A head that is missing or equal to the embedding is tied to it.
            norm_eps, residual_in_fp32: what weights do not tell; both packages start with these.

        Raises:
            ValueError: if these are not the weights of such a model.
        """
        copied = {name: x.detach().clone() for name, x in weights.items()}
        return cls._from_weights(copied, norm_eps, residual_in_fp32)

    @classmethod
    def _from_weights(cls, weights: Mapping[str, Tensor], norm_eps: float, residual_in_fp32: bool) -> MambaLM:
        named = {_our_name(name): x for name, x in weights.items()}
        embedding, head = named.get("backbone.embedding.weight"), named.get("lm_head.weight")
        tied = head is None or (
            embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)
        )
        try:
            config = _config_of(named, norm_eps, residual_in_fp32, tied)
            model = cls(config, device="meta")
            if tied and embedding is not None:
                named["lm_head.weight"] = embedding
            model.load_state_dict(named, assign=True)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"weights: expected those of a Mamba language model; {error}") from None
        model._tie()
        for layer in model._layers:
            layer.mixer._mark_parameters()
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights as JSON and safetensors, replacing what was there.

        Args:
            directory: the folder; made where it is missing.

        Raises:
            ImportError: if the extra `llm` is missing.
            OSError: if the files cannot be written.
        """
        save = _safetensors().torch.save
        weights = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        config = {"format": 1, "model": "fastmem.models.MambaLM", "config": asdict(self.config)}
        atomic_files(directory, {WEIGHTS: save(weights), CONFIG: (json.dumps(config, indent=2) + "\n").encode()})

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaLM:
        """A model from a folder that `save_pretrained` wrote, or a folder of a Hugging Face Mamba in safetensors.

        Args:
            directory: the folder.
            device, dtype: where the model goes and in which type; None: as it was saved.

        Raises:
            ImportError: if the extra `llm` is missing.
            ValueError: if there is no such model in the folder, or its files are damaged.
        """
        safetensors = _safetensors()
        folder = Path(directory)
        try:
            entry = json.loads((folder / CONFIG).read_text())
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise ValueError("no *.safetensors; read other files yourself and call from_state_dict")
            weights = {name: x for file in files for name, x in safetensors.torch.load_file(file).items()}
            model = cls._from_weights(weights, *_settings(entry))
        except FileNotFoundError:
            raise ValueError(
                f"{folder}: expected a folder with a model, {CONFIG} is missing; names on a hub are not fetched"
            ) from None
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder}: not a Mamba language model ({type(error).__name__}: {error})") from None
        return model.to(device=device, dtype=dtype)


class _Backbone(nn.Module):
    """Holds the layers under the names that checkpoints have for them; MambaLM runs them."""

    def __init__(self, config: MambaLMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(_Layer(config, device, dtype) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)


class _Layer(nn.Module):
    def __init__(self, config: MambaLMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.mixer = Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            config.dt_rank,
            conv_bias=config.conv_bias,
            bias=config.bias,
            device=device,
            dtype=dtype,
        )
        with torch.no_grad():  # so that the residual stream does not grow with the number of layers
            self.mixer.out_proj.weight /= math.sqrt(config.n_layer)
            for bias in (self.mixer.in_proj.bias, self.mixer.out_proj.bias):
                if bias is not None:
                    bias.zero_()


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the dtype of the residual stream; the result in that of the weights."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps).to(norm.weight.dtype)


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B,) tokens from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        needless = ordered.cumsum(-1) - ordered >= top_p  # those before it are enough
        logits = logits.masked_fill(needless.gather(1, order.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _our_name(name: str) -> str:
    """mamba-ssm's name for a weight of Hugging Face's, or of a model without head."""
    if not name.startswith(("backbone.", "lm_head.")):
        name = f"backbone.{name}"
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def _config_of(weights: Mapping[str, Tensor], norm_eps: float, residual_in_fp32: bool, tied: bool) -> MambaLMConfig:
    vocab_size, d_model = weights["backbone.embedding.weight"].shape
    mixer = "backbone.layers.0.mixer."
    inner, d_state = weights[f"{mixer}A_log"].shape
    expand = inner // d_model if inner % d_model == 0 else inner / d_model
    if int(expand * d_model) != inner:
        expand = math.nextafter(expand, math.inf)
    return MambaLMConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layer=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("backbone.layers.")),
        d_state=d_state,
        d_conv=weights[f"{mixer}conv1d.weight"].shape[-1],
        expand=expand,
        dt_rank=weights[f"{mixer}dt_proj.weight"].shape[1],
        conv_bias=f"{mixer}conv1d.bias" in weights,
        bias=f"{mixer}in_proj.bias" in weights,
        norm_eps=norm_eps,
        residual_in_fp32=residual_in_fp32,
        tie_embeddings=tied,
    )


def _settings(entry: dict[str, Any]) -> tuple[float, bool]:
    """norm_eps and residual_in_fp32 from a config.json, ours or Hugging Face's."""
    if entry.get("model_type") == "mamba":
        if entry.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {entry['hidden_act']!r}")
        return entry.get("layer_norm_epsilon", 1e-5), entry.get("residual_in_fp32", True)
    if "config" not in entry:
        raise ValueError(f"model_type: expected 'mamba', got {entry.get('model_type')!r}")
    config = MambaLMConfig(**entry["config"])
    return config.norm_eps, config.residual_in_fp32


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("a saved MambaLM needs safetensors: pip install safetensors") from None
    return safetensors
