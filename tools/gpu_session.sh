#!/usr/bin/env bash
# GPU tests, then the benchmark sweep, in one command of less than ten minutes; no network needed.
#
#   tools/gpu_session.sh                 results go to $OUT, or to benchmarks/results
#   tools/gpu_session.sh --fetch         with a network: wheels of peers and trainer to wheels/
#   ROWS=rows.safetensors tools/gpu_session.sh   rows of a trained head instead of generated ones
#   tools/gpu_session.sh --skip NAME     without a provider; arguments go to python -m benchmarks
#   DRY=1 tools/gpu_session.sh           the same steps on a CPU, shrunk
#
# Where only the checkout travels, put wheels/ and the rows into an ignored folder and take it along.
# LIMIT_SECONDS (560) bounds the whole; TEST_SECONDS (230) the tests; the sweep gets what is left.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

if [ "${1:-}" = "--fetch" ]; then
    exec "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
        trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 liger-kernel==0.8.5 \
        cut-cross-entropy==25.1.1 fla-core==0.6.0 flash-linear-attention==0.6.0 \
        tomli-w==1.2.0 tyro==1.0.17 docstring-parser typeguard \
        math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 \
        matplotlib==3.11.2 contourpy cycler fonttools kiwisolver pillow pyparsing
fi

[ -n "${DRY:-}" ] && OUT=${OUT:-$(mktemp -d)} # a rehearsal leaves no results behind
out=${OUT:-benchmarks/results}
limit=${LIMIT_SECONDS:-560}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

# PYTHONPATH comes before the machine's own packages, and a wheel must not replace one of them
peers=$(mktemp -d)
missing=()
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] || continue
    name=$(basename "$wheel")
    has='import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])'
    "$python" -c "$has" "${name%%-*}" 2>/dev/null || missing+=("$wheel")
done
# in one call: two wheels may fill one folder
[ ${#missing[@]} -eq 0 ] || "$python" -m pip install --quiet --no-index --no-deps --target "$peers" \
    "${missing[@]}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$peers"

# Only files with such tests: others may import what this machine lacks, and one that cannot be
# imported stops all. pytest-timeout may be missing too, and addopts name its options.
mapfile -t files < <(grep -rlE "mark\.gpu" tests --include="test_*.py")
timeout -k 10 "${TEST_SECONDS:-230}" "$python" -m pytest "${files[@]}" -m gpu \
    --continue-on-collection-errors \
    -q -o addopts= -p no:cacheprovider 2>&1 | tee "$out/gpu-tests.log" | tail -n 40
status=${PIPESTATUS[0]}
unread=$(grep -c "ERROR collecting" "$out/gpu-tests.log")
if [ "$status" -eq 1 ] && [ "$unread" -gt 0 ] && ! grep -qE " failed|ERROR at " "$out/gpu-tests.log"; then
    status=unread # nothing that could be imported failed
fi
case $status in 0 | unread) grep -q " passed" "$out/gpu-tests.log" || status=5 ;; esac # all skipped
case $status in
    0) note="GPU tests before this run: passed" ;;
    5) note="GPU tests before this run: none ran" ;;
    unread) note="GPU tests before this run: passed, save $unread files of missing packages" ;;
    124) note="GPU tests before this run: out of time" ;;
    *) note="GPU tests before this run: FAILED, so these times prove nothing" ;;
esac
echo "$note (exit status $status, $SECONDS s)"

sweep=${DRY:+dry}
left=$((limit - SECONDS - 25)) # the last case may end after its budget
timeout -k 10 $((left + 20)) "$python" -m benchmarks "--${sweep:-gpu}" \
    --budget-seconds "$left" --note "$note" --out "$out/gpu-sweep.json" \
    ${ROWS:+--rows "$ROWS"} "$@" 2>&1 | tee "$out/gpu-sweep.log"
swept=${PIPESTATUS[0]}
if [ -e "$out/gpu-sweep.json" ]; then
    "$python" -m benchmarks.report "$out/gpu-sweep.json" --markdown "$out/gpu-sweep.md"
else
    echo "the sweep ended before its first case was done: no table"
fi
echo "total $SECONDS s"
{ [ "$status" = 0 ] || [ -n "${DRY:-}" ]; } && [ "$swept" -eq 0 ]
