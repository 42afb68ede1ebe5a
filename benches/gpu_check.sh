#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests, compute-sanitizer on a small one where it is installed, and the benches.
# The first that fails ends it, with its status. Usage: benches/gpu_check.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

name=$("$python" -c "from fastmem import _system; print(_system.slug(_system.gpu_name() or ''))")
if [ -z "$name" ]; then
    echo "gpu-check: no CUDA device that torch can use on this machine" >&2
    exit 1
fi

"$python" -m pytest -m gpu
toolkit=${CUDA_HOME:-/usr/local/cuda}
sanitizer=$(command -v compute-sanitizer || true)
for file in "$toolkit/bin/compute-sanitizer" "$toolkit/compute-sanitizer/compute-sanitizer"; do
    [ -n "$sanitizer" ] || [ ! -x "$file" ] || sanitizer=$file
done
if [ -n "$sanitizer" ]; then
    left_out=
    # torch's caching allocator hides overruns between its blocks, so it is off here.
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m benches._sanitize
    done
else
    left_out=", compute-sanitizer left out"
    echo "gpu-check: compute-sanitizer is not installed (it comes with the CUDA toolkit); its checks are left out" >&2
    "$python" -m benches._sanitize
fi

"$python" -m benches rows --device cuda
"$python" -m benches ratios --device cuda
echo "gpu-check: passed$left_out; results in benches/results/$name.json"
