"""Hugging Face transformers' Mamba, FalconMamba, Jamba and Zamba on fastmem's kernels, on CPU and GPU.

    from fastmem.integrations.transformers import accelerate

    model = accelerate(AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf"))

Nothing of transformers is changed: each Mamba layer of this one model gets a `forward` of its own, which is
transformers' code with the convolution, the scan and their steps looked up here. `restore(model)` takes it off again.

Sequences packed into one row are kept apart, in the convolution and in the scan. They are told as transformers'
collators tell them: `seq_idx`, `cu_seq_lens_q`, or `position_ids` that start again; the last only without an attention
mask and a cache, as transformers itself has it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastmem.compat.causal_conv1d import causal_conv1d_update
from fastmem.compat.causal_conv1d.causal_conv1d_interface import starts
from fastmem.compat.mamba_ssm.ops.selective_scan_interface import scan
from fastmem.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from fastmem.ops._sequence import check_cu_seqlens
from fastmem.ops.causal_conv1d import causal_conv1d

CHECKPOINT = "_gradient_checkpointing_func"  # of a transformers layer
CACHES = ("cache", "past_key_values", "cache_params")  # an argument's names
MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer")

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let the Mamba layers of a transformers model run on fastmem, in training and in generation.

    Copies of the model stay accelerated; one that was pickled comes back as transformers has it. Does nothing to a
    model that is already.

    Args:
        model: any module that holds Mamba, FalconMamba, Jamba or Zamba layers of transformers 5; changed and returned.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if the model has no such layer.
        RuntimeError: if this transformers is built in a way that fastmem does not know; nothing has changed then.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise ImportError("accelerate needs transformers: pip install transformers") from None
    mixers = [module for module in model.modules() if _is_mixer(module)]
    if not mixers:
        name = type(model).__name__
        raise ValueError(f"model: expected one with Mamba, FalconMamba, Jamba or Zamba layers, got {name}")
    forwards = [_mixer_forward(type(mixer)) for mixer in mixers]  # type: ignore[arg-type]
    for mixer, forward in zip(mixers, forwards, strict=True):
        _install(mixer, forward)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _install(module, _keeping_sequences_apart(type(module).forward))
    return model


def restore(model: Model) -> Model:
    """Take off what `accelerate` put on; what was there before is there again.

    Args:
        model: changed and returned; one that is not accelerated stays as it is.

    Raises:
        RuntimeError: if something else has wrapped a layer's `forward` since; that has to come off first.
    """
    ours = [(module, module.__dict__["_fastmem"]) for module in model.modules() if _is_accelerated(module)]
    slots = [_slot_of(module, installed.forward) for module, installed in ours]
    for (module, installed), slot in zip(ours, slots, strict=True):
        del module.__dict__["_fastmem"], module.__dict__["_replicate_for_data_parallel"]
        if installed.before is not None:
            module.__dict__[slot] = installed.before
        elif slot == "forward":
            del module.__dict__["forward"]
        else:  # a hook of accelerate came later and calls it
            module.__dict__[slot] = MethodType(type(module).forward, module)
    for layer in model.modules():
        if isinstance(checkpoint := layer.__dict__.get(CHECKPOINT), _Checkpoint):
            layer.__dict__[CHECKPOINT] = checkpoint.original
    return model


@contextmanager
def accelerated(model: Model) -> Iterator[Model]:
    """`accelerate` for the time of a context; a model that was accelerated before stays so.

    With gradient checkpointing the backward pass runs layers again, so it belongs into the context too.

    Args, Raises: as in `accelerate`.
    """
    was = any(map(_is_accelerated, model.modules()))
    accelerate(model)
    try:
        yield model
    finally:
        if not was:
            restore(model)


# ---------------------------------------------------------------------------------------- putting a forward on a module


class _Installed(NamedTuple):
    """Kept in the module, so that copies of a model have their own: methods are copied with what they are bound to."""

    forward: MethodType
    before: Any  # what the module had in its own dict; None: its class's method


def _is_accelerated(module: nn.Module) -> bool:
    """A pickled module is not: its methods come back as those of its class."""
    installed = module.__dict__.get("_fastmem")
    return installed is not None and hasattr(installed.forward.__func__, "of_fastmem")


def _install(module: nn.Module, function: Callable[..., Any]) -> None:
    if _is_accelerated(module):
        return
    # Where accelerate's hooks (a device map, offloading) are on, `forward` is theirs and calls `_old_forward`.
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    installed = _Installed(MethodType(function, module), module.__dict__.get(slot))
    module.__dict__[slot] = installed.forward
    module.__dict__["_fastmem"] = installed
    module.__dict__["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, module)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """A replica for DataParallel, which copies a module's dict as it is: methods there are bound to the original."""
    replica = type(self)._replicate_for_data_parallel(self)
    installed = self.__dict__["_fastmem"]
    own = MethodType(installed.forward.__func__, replica)
    replica.__dict__[_slot_of(self, installed.forward)] = own
    replica.__dict__["_fastmem"] = installed._replace(forward=own)
    return replica


def _slot_of(module: nn.Module, forward: MethodType) -> str:
    for slot in ("forward", "_old_forward"):
        if module.__dict__.get(slot) is forward:
            return slot
    raise RuntimeError(f"{type(module).__name__}.forward was wrapped after accelerate; undo that first")


def _is_mixer(module: nn.Module) -> bool:
    return any(c.__name__ in MIXERS and c.__module__.startswith("transformers.models.") for c in type(module).__mro__)


@functools.cache
def _mixer_forward(cls: type[Any]) -> Callable[..., Any]:
    """The layer's own code with our functions in it."""
    if not hasattr(cls, "cuda_kernels_forward"):
        return _keeping_sequences_apart(_with_globals(cls.forward, OURS))

    # Older layers have one code for kernels and one for plain PyTorch. In training the former calls mamba_inner_fn,
    # which heeds no padding, and which in FalconMamba has its norm in another place than the latter.
    kernels_forward = _with_globals(cls.cuda_kernels_forward, OURS)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kernels_forward(_InEvaluation(self), *args, **{k: v for k, v in kwargs.items() if k in taken})

    taken = inspect.signature(kernels_forward).parameters
    functools.update_wrapper(forward, cls.forward)
    return _keeping_sequences_apart(forward)


class _InEvaluation:
    """A module as it is, but for `training`."""

    training = False

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_globals(function: Callable[..., Any], replaced: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function, with its decorators, that finds `replaced` where it would find its module's names."""
    assert isinstance(function, FunctionType)
    inner = getattr(function, "__wrapped__", None)
    names, closure = function.__globals__, function.__closure__
    if inner is None:
        if not {"causal_conv1d_fn", "causal_conv1d_update"} <= {*function.__code__.co_names}:
            raise _unknown(function)
        names = {**names, **replaced}
    else:
        closure = tuple(CellType(_with_globals(inner, replaced)) if _holds(c, inner) else c for c in closure or ())
        if not any(_holds(cell, inner) for cell in function.__closure__ or ()):
            raise _unknown(function)
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    if inner is None:
        del copy.__wrapped__  # type: ignore[attr-defined]
    return copy


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _unknown(function: Callable[..., Any]) -> RuntimeError:
    import transformers

    where = f"{function.__module__}.{function.__qualname__}"
    return RuntimeError(
        f"transformers {transformers.__version__} is not known to fastmem: {where} is built differently"
    )


# ----------------------------------------------------------------------------------------------------- packed sequences


class _Running(threading.local):  # torch.compile sees through it, not through a ContextVar
    """The forward that is running in this thread."""

    def __init__(self) -> None:
        self.reset: Tensor | None = None  # (B, L)


_running = _Running()


def _keeping_sequences_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that marks, for the layers inside, where sequences start."""
    names = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mixer = _is_mixer(self)
        before = None if mixer else self.__dict__["_fastmem"].before
        call = functools.partial(function, self) if before is None else before
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if self.training and not mixer and torch.is_grad_enabled():
            _keep_checkpoints(self)
        if mixer:
            call = functools.partial(_mix, self, given, call)
        reset = _marks_in(given) if _running.reset is None else None
        return call(*args, **kwargs) if reset is None else _with_reset(reset, call, *args, **kwargs)

    forward.of_fastmem = True  # type: ignore[attr-defined]
    return forward


def _with_reset(reset: Tensor | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before, _running.reset = _running.reset, reset
    try:
        return function(*args, **kwargs)
    finally:
        _running.reset = before


class _Checkpoint:
    """A layer's checkpoint function: what the backward pass runs again, it runs as the forward pass did.

    One for all calls and threads: which sequences are running is asked for when a layer is.
    """

    def __init__(self, original: Callable[..., Any], layer: nn.Module) -> None:
        self.original, self.layer = original, layer

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.original(functools.partial(_again, self.layer, _running.reset, function), *args, **kwargs)


def _again(layer: nn.Module, reset: Tensor | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not any(map(_is_accelerated, layer.modules())):
        raise RuntimeError(
            "the backward pass runs checkpointed layers again, but the model has been restored since its forward pass; "
            "call backward() before, or inside accelerated()"
        )
    return _with_reset(reset, function, *args, **kwargs)


def _keep_checkpoints(model: nn.Module) -> None:
    for layer in model.modules():
        original = layer.__dict__.get(CHECKPOINT)
        if original is None or isinstance(original, _Checkpoint) or not getattr(layer, "gradient_checkpointing", False):
            continue
        if any(map(_is_accelerated, layer.modules())):
            layer.__dict__[CHECKPOINT] = _Checkpoint(original, layer)


def _mix(mixer: nn.Module, given: dict[str, Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mixer's forward. Of the inputs that its cache keeps for the next convolution, only the last sequence's stay."""
    out = call(*args, **kwargs)
    cache: Any = next((given[k] for k in CACHES if given.get(k) is not None), None)
    if _running.reset is not None and hasattr(cache, "get_conv_state"):
        kept = cache.get_conv_state(mixer.layer_idx, state_idx=0)
        marks = _marks(kept).long()  # type: ignore[union-attr]
        kept.masked_fill_((marks.flip(1).cumsum(1).flip(1) > marks)[:, None], 0)
    return out


def _marks_in(given: dict[str, Any]) -> Tensor | None:
    """(B, L) bool, true where a sequence starts, from the arguments of a forward; None where there is one per row."""
    x = next((given[k] for k in ("input_ids", "inputs_embeds", "hidden_states") if given.get(k) is not None), None)
    seq_idx = given.get("seq_idx")
    bounds = next((given[k] for k in ("cu_seq_lens_q", "cu_seqlens") if given.get(k) is not None), None)
    for name, marks in (("seq_idx", seq_idx), ("cu_seq_lens_q", bounds)):
        if marks is not None and not isinstance(marks, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(marks).__name__}")
    if seq_idx is not None and x is not None:
        if seq_idx.ndim != 2 or seq_idx.shape[0] not in (1, x.shape[0]) or seq_idx.shape[1] != x.shape[1]:
            raise ValueError(f"seq_idx: expected {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}")
        return starts(seq_idx)
    if bounds is not None and x is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q: expected packed sequences in one row, got {x.shape[0]} rows")
        bounds = check_cu_seqlens(bounds, 1, x.shape[1], x.device)
        reset = torch.zeros(1, x.shape[1] + 1, dtype=torch.bool, device=x.device)
        return reset.index_fill(1, bounds[:-1], True)[:, :-1]  # one that starts at the end is empty
    positions = given.get("position_ids")
    if positions is None or positions.ndim != 2 or any(given.get(k) is not None for k in ("attention_mask", *CACHES)):
        return None
    reset = torch.cat([torch.zeros_like(positions[:, :1], dtype=torch.bool), positions.diff(dim=1) != 1], 1)
    return reset if reset.any() else None


def _marks(x: Tensor) -> Tensor | None:
    """The marks for x (B, D, L): one row may stand for all, and a cache may have put earlier inputs before L."""
    reset = _running.reset
    if reset is None:
        return None
    earlier = x.shape[2] - reset.shape[1]
    return nn.functional.pad(reset, (earlier, 0)).expand(x.shape[0], -1)


# -------------------------------------------------------------------------------- what transformers' code calls instead


def _causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    fused, after = _activation(activation)
    y = causal_conv1d(x.transpose(1, 2), weight, bias, activation=fused, reset=_marks(x))
    return after(y).transpose(1, 2)


def _causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    fused, after = _activation(activation)
    return after(causal_conv1d_update(x, conv_state, weight, bias, fused))


def _activation(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """What the convolution does by itself, and what comes after it: any activation of transformers goes."""
    if name in (None, "silu", "swish"):
        return None if name is None else "silu", lambda x: x
    from transformers.activations import ACT2FN

    return None, ACT2FN[name]


def _selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset=_marks(u))
    return (y, state) if return_last_state else y


def _no_inner_fn(*_: Any, **__: Any) -> None:
    """Where mamba_inner_fn gives None, transformers goes on with convolution and scan; these heed padding."""


OURS = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_inner_fn": _no_inner_fn,
    # transformers has had two names for each of these.
    "mamba_selective_scan": _selective_scan_fn,
    "selective_scan_fn": _selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "selective_state_update": selective_state_update,
}
