#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests, compute-sanitizer on a small one, and the benches.
# Usage: benches/gpu_check.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

name=$("$python" -c "from fastmem import _system; print(_system.slug(_system.gpu_name() or ''))")
if [ -z "$name" ]; then
    echo "gpu-check: no CUDA device that torch can use on this machine" >&2
    exit 1
fi

"$python" -m pytest -m gpu
sanitizer=$(command -v compute-sanitizer || true)
for toolkit in "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
    [ -n "$sanitizer" ] || [ ! -x "$toolkit" ] || sanitizer=$toolkit
done
if [ -z "$sanitizer" ]; then
    echo "gpu-check: compute-sanitizer is not installed (it comes with the CUDA toolkit)" >&2
    exit 1
fi
# torch's caching allocator hides overruns between its blocks, so it is off here.
for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m benches._sanitize
done

"$python" -m benches rows --device cuda
"$python" -m benches ratios --device cuda
echo "gpu-check: passed; results in benches/results/$name.json"
