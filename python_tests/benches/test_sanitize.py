import pytest

from benches import _sanitize
from fastmem import _native


@pytest.mark.skipif(_native.missing is not None, reason="needs the C++ extension")
def test_every_typical_call_agrees_to_the_second_derivative(capsys):
    """What runs on the GPU under a sanitizer, here with the C++ kernels."""
    _sanitize.main("cpp", "cpu")
    assert len(capsys.readouterr().out.splitlines()) == len(_sanitize._typical.calls("cpu"))
