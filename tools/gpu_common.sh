# Sourced by the other tools/gpu_*.sh, from the root of the checkout: the interpreter, the folder of
# the results, the time limit, wheels that travel along, and the GPU.
#
#   PYTHON         the interpreter (python3)
#   OUT            the folder of the results (benchmarks/results); created
#   LIMIT_SECONDS  of the whole script (560); what is left of it: seconds_left
#   DRY=1          a rehearsal on the CPU, whose results go to a temporary folder unless OUT is set
# shellcheck shell=bash
set -u
python=${PYTHON:-python3}
[ -n "${DRY:-}" ] && OUT=${OUT:-$(mktemp -d)} # a rehearsal leaves no results behind
out=${OUT:-benchmarks/results}
limit=${LIMIT_SECONDS:-560}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# PYTHONPATH comes before the machine's own packages, and a wheel must not replace one of them
packages=$(mktemp -d)
missing=()
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] || continue
    name=$(basename "$wheel")
    has='import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])'
    "$python" -c "$has" "${name%%-*}" 2>/dev/null || missing+=("$wheel")
done
if [ ${#missing[@]} -gt 0 ]; then # in one call: two wheels may fill one folder
    into=("$python" -m pip install --quiet --no-index --no-deps --target "$packages")
    "${into[@]}" "${missing[@]}" || for wheel in "${missing[@]}"; do
        "${into[@]}" "$wheel" || echo "not installed: $wheel"
    done
fi
export PYTHONPATH="$PWD:${PYTHONPATH:+$PYTHONPATH:}$packages" # riskpo need not be installed

seconds_left() { echo $((limit - SECONDS)); }

# Does this machine have what the command needs? $1: Python modules, as in an import statement.
require() {
    if ! "$python" -c "import $1"; then
        echo "$0: $python cannot import what is needed (see above). Install riskpo[train], or" >&2
        echo "  put the missing wheels into wheels/ and take that folder along." >&2
        exit 2
    fi
    [ -n "${DRY:-}" ] && return
    if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        echo "$0: $python sees no CUDA device; this is for one. DRY=1 rehearses it on a CPU." >&2
        exit 2
    fi
}
