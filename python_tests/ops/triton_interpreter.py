"""Makes triton's interpreter work with numpy 2.4 and later. Import it before a kernel runs.

The interpreter turns a scalar into a loop bound by int(array of one element), which numpy no longer allows.
"""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
