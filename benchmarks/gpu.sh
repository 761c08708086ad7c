#!/usr/bin/env bash
# Build, test and measure on this machine, within a limit of time:  benchmarks/gpu.sh MINUTES
#
# Uses the machine's own python3 (another one: PYTHON=...) and the torch it has; installs nothing, needs no network.
# Stop it at any time: every row is on disk as soon as it is measured, in benchmarks/results/<device>.json.
# Without a CUDA device it says so, leaves the tests to `make test`, and measures the rows of the CPU.
set -uo pipefail

minutes=${1:-}
if ! [[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    echo "usage: benchmarks/gpu.sh MINUTES" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
limit=$(awk -v minutes="$minutes" 'BEGIN { print int(minutes * 60) }')
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# An assembler that knows the newest chips; a path given by the caller counts more.
if [[ -z ${TRITON_PTXAS_PATH:-} && -f carry/ptxas-blackwell ]]; then
    export TRITON_PTXAS_PATH="$PWD/carry/ptxas-blackwell"
fi

child=
failed=0
left() { echo $((limit - SECONDS)); }

# run SECONDS COMMAND...: at most that long; in the background, so that a signal to this script is handled at once.
run() {
    local most=$1
    shift
    if ((most < 1)); then
        return 124
    fi
    timeout --kill-after=10 "$most" "$@" &
    child=$!
    wait "$child"
    local status=$?
    child=
    return "$status"
}

finish() {
    if [[ -f ${record:-} ]]; then
        echo
        echo "== $record, $SECONDS s"
        "$python" benchmarks/measure.py "$record"
    fi
}

stop() {
    [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
    wait
    exit 130
}
trap finish EXIT
trap stop INT TERM

"$python" -c 'import torch, numpy, tqdm' || exit 1
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
if ! has pytest; then
    echo "$python has no pytest: put one on PYTHONPATH" >&2
    exit 1
fi

echo "== build"
run "$(left)" "$python" setup.py --quiet build_ext --inplace || echo "no C++ extension; going on without it"
"$python" - <<'PYTHON' || exit 1
import fastattn, torch
from fastattn.profiling.environment import default_device, device_name, versions
print(device_name(default_device()), versions())
PYTHON
record=$("$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import measure; print(measure.result_file())')

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "== tests"
    if has hypothesis; then
        # More than half of the time is for the tests: a figure of a wrong kernel is worth nothing.
        run "$(($(left) * 6 / 10))" "$python" -m pytest tests -m "gpu or not gpu" -p no:cacheprovider --maxfail=50
        status=$?
        case $status in
            0) echo "all tests passed" ;;
            124 | 137) echo "the tests were stopped: no time left" ; failed=1 ;;
            *) failed=1 ;;
        esac
    else
        echo "no tests: $python has no hypothesis; put one on PYTHONPATH"
        failed=1
    fi
else
    echo "== no CUDA device: the rows of the CPU are measured, no tests are run (make test does)"
fi

# In order of importance, each in a process of its own: an error that ruins the device ruins no other group.
only=()
has pytest_benchmark && only=(--benchmark-only --benchmark-disable-gc -q)
for group in \
    "test_module and default" \
    "test_function and forward and not additive" \
    "test_function and training and not additive" \
    "test_layers" \
    "test_module and not default" \
    "few_queries or kv_cache or overhead" \
    "test_layer_norm or test_cell" \
    "varlen" \
    "additive"; do
    seconds=$(left)
    echo "== $group, $seconds s left"
    if ((seconds < 1)); then
        break
    fi
    # The row that is running when the time is over is cut; no row is begun in the last second.
    run "$seconds" "$python" -m pytest benchmarks -k "$group" -p no:cacheprovider \
        ${only[@]+"${only[@]}"} --record "$record" --seconds-left "$((seconds - 1))"
    status=$?
    ((status == 0 || status == 5 || status == 124 || status == 137)) || failed=1
done
exit "$failed"
