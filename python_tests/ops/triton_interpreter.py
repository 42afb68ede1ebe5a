"""Triton's interpreter, made to work with numpy 2.4, and to see what a GPU would not. Import it before a kernel runs.

It turns a scalar into a loop bound by int(array of one element), which numpy no longer allows. And it reads and writes
whatever lies at an address; here an address that is no element of an argument's raises IndexError.
"""

import numpy as np
import torch
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor

_elements = np.zeros(0, np.uint64)  # addresses of all elements of the running kernel's arguments, in order
_run = interpreter.GridExecutor.__call__


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    at = np.full(1, tensor.data_ptr(), np.uint64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride * tensor.element_size())
        at = (at[:, None] + steps).ravel()
    return at


def _run_checked(self, *args, **kwargs):
    global _elements
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    _elements = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_addresses, tensors)]))
    return _run(self, *args, **kwargs)


def _checked(access):
    def checked(self, pointers, *rest):
        mask = rest[0] if access is _load else rest[1]
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        at = at[np.broadcast_to(mask.data, at.shape).astype(bool)].astype(np.uint64)
        found = np.searchsorted(_elements, at)
        if (found == _elements.size).any() or (_elements[found] != at).any():
            raise IndexError(f"{at.size} addresses, of which some are no element of an argument")
        return access(self, pointers, *rest)

    return checked


_load, _store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
interpreter.GridExecutor.__call__ = _run_checked
interpreter.InterpreterBuilder.create_masked_load = _checked(_load)
interpreter.InterpreterBuilder.create_masked_store = _checked(_store)
