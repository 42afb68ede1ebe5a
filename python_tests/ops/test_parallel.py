"""The kernels' threads, through an op: same bits whatever the threads, from many Python threads, after a fork."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastmem
from fastmem import _native
from fastmem.ops import _typical

pytestmark = pytest.mark.skipif(_native.missing is not None, reason="needs the C++ extension")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["gated_write", "topk_attention"])
def call(request):
    args, kwargs = _typical.calls("cpu")[request.param]

    def run():
        out = getattr(fastmem, request.param)(*args, **kwargs, backend="cpp")
        return out if isinstance(out, torch.Tensor) else torch.cat([t.flatten() for part in out for t in part])

    return run


def test_same_bits_with_any_number_of_threads(call, threads):
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(call())
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_many_python_threads_at_once(call, threads):
    """One gets the pool, the others work alone; all get the same."""
    threads(2)
    expected, wrong, start = call(), [], threading.Barrier(6)

    def work():
        start.wait()
        wrong.extend(1 for _ in range(30) if not torch.equal(call(), expected))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers) and not wrong


def printed(code: str, threads: str) -> str:
    """What a fresh process prints whose kernels compute on `threads`."""
    environment = os.environ | {"FASTMEM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_bits_on_threads_of_torch_and_on_own_ones():
    code = """
import hashlib, torch, fastmem
from fastmem.ops import _threads, _typical
torch.set_num_threads(3)
args, kwargs = _typical.calls("cpu")["gated_write"]
digest = hashlib.sha256()
for _ in range(20):
    torch.ones(300, 300) @ torch.ones(300, 300)  # torch's threads take turns with ours
    for part in fastmem.gated_write(*args, **kwargs, backend="cpp"):
        for x in part:
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
print(_threads.BORROWED, digest.hexdigest())
"""
    borrowed, theirs = printed(code, "torch").split()
    own, ours = printed(code, "own").split()
    assert own == "False" and theirs == ours
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert borrowed == "True"


def test_an_empty_variable_is_one_that_is_not_set():
    environment = os.environ | {"FASTMEM_THREADS": "", "FASTMEM_CPU_ISA": ""}
    done = subprocess.run([sys.executable, "-c", "import fastmem"], capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


def test_threads_of_nobody_are_an_error():
    environment = os.environ | {"FASTMEM_THREADS": "omp"}
    code = "import fastmem; fastmem.explain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1 and "FASTMEM_THREADS: expected own or torch, got 'omp'" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", ["torch", "own"])
def test_first_call_after_a_fork(threads):
    """The parent used torch's threads and no kernel; its child must not wait for them either."""
    code = """
import os, torch, fastmem
from fastmem.ops import _typical
args, kwargs = _typical.calls("cpu")["topk_attention"]
torch.set_num_threads(2)
torch.randn(500, 500) @ torch.randn(500, 500)
torch.randn(1 << 20).exp()
child = os.fork()
if child == 0:
    fastmem.topk_attention(*args, **kwargs, backend="cpp")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    assert printed(code, threads) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", ["torch", "own"])
def test_after_a_fork(threads):
    """A forked child has none of the parent's threads and must not wait for them."""
    code = """
import os, torch, fastmem
from fastmem.ops import _typical
args, kwargs = _typical.calls("cpu")["topk_attention"]
torch.set_num_threads(2)
def call():
    return fastmem.topk_attention(*args, **kwargs, backend="cpp")
expected = call()  # the pool has its threads now
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(call(), expected) and torch.equal(call(), expected) else 7)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(call(), expected)
print("same")
"""
    assert printed(code, threads) == "same\n"
