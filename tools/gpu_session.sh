#!/usr/bin/env bash
# A minute's profile (tools/gpu_profile.py), GPU tests, then the benchmark sweep, in one command of less
# than ten minutes; no network needed.
#
#   tools/gpu_session.sh                 results go to $OUT, or to benchmarks/results
#   tools/gpu_session.sh --fetch         with a network: wheels of peers and trainer to wheels/
#   tools/gpu_session.sh --fetch cute    also QuACK's and Liger's CuTe kernels: 100 MB more
#   ROWS=rows.safetensors tools/gpu_session.sh   rows of a trained head instead of generated ones
#   tools/gpu_session.sh --skip NAME     without a provider; arguments go to python -m benchmarks
#   PHASES=tests tools/gpu_session.sh    a part in a call of its own; the others: profile, sweep
#   DRY=1 tools/gpu_session.sh           the same steps on a CPU, shrunk
#
# The tests: first those marked gpu, then, whole, every file of kernel tests whose device is the GPU
# where there is one (TEST_FILES: these files instead of both). Where only the checkout travels, put
# wheels/ and the rows into an ignored folder and take it along. LIMIT_SECONDS (560) bounds the whole,
# TEST_SECONDS (230, or all of it) the tests; the sweep gets what is left, less KEEP_SECONDS (25).
cd "$(dirname "$0")/.." || exit 1

if [ "${1:-}" = "--fetch" ]; then
    wheels=(
        trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash liger-kernel==0.8.5
        cut-cross-entropy==25.1.1 fla-core==0.6.0 flash-linear-attention==0.6.0 verl==0.9.1
        tomli-w==1.2.0 tyro==1.0.17 docstring-parser typeguard shtab
        math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2
        matplotlib==3.11.2 contourpy cycler fonttools kiwisolver pillow pyparsing
    )
    [ "${2:-}" = "cute" ] && wheels+=(
        quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1
        nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1
        apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
    )
    exec "${PYTHON:-python3}" -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
        -d wheels "${wheels[@]}"
fi

source tools/gpu_common.sh
require "pytest, triton, riskpo_kernels"
[ -n "${DRY:-}" ] && export CUDA_VISIBLE_DEVICES=""
phases=${PHASES:-profile tests sweep}
[[ $phases == *sweep* ]] && reserved=$((limit - ${TEST_SECONDS:-230})) || reserved=5

if [[ $phases == *profile* ]]; then # it may fail: what follows does not hang on it
    timeout -k 10 60 "$python" -m tools.gpu_profile ${DRY:+--dry} --out "$out/gpu-profile.json" 2>&1 |
        tee "$out/gpu-profile.log"
fi

verdict="" # of all tests so far, kept with the results
failed=0
# $1: which, $2: seconds; the rest: arguments of pytest
run_tests() {
    local which=$1 log=$out/gpu-tests-$1.log status unread said
    timeout -k 10 "$2" "$python" -m pytest "${@:3}" --continue-on-collection-errors "${workers[@]}" \
        -q -o addopts= -p no:cacheprovider 2>&1 | tee "$log" | tail -n 40
    status=${PIPESTATUS[0]}
    unread=$(grep "ERROR collecting" "$log" | sort -u | wc -l) # files that import what this machine lacks
    if [ "$status" -eq 1 ] && [ "$unread" -gt 0 ] && ! grep -qE " failed|ERROR at " "$log"; then
        status=unread # nothing that could be imported failed
    fi
    case $status in 0 | unread) grep -q " passed" "$log" || status=5 ;; esac # all skipped
    case $status in
        0) said="passed" ;;
        5) said="none ran" ;;
        unread) said="passed, save $unread files of missing packages" ;;
        124 | 137) said="out of time" ;;
        *) said="FAILED, so these times prove nothing" ;;
    esac
    [ "$status" = 0 ] || failed=1
    verdict="${verdict:+$verdict; }GPU tests ($which) before this run: $said"
    echo "$which: $said (exit status $status, $SECONDS s)"
}

if [[ $phases == *tests* ]]; then
    # pytest-timeout may be missing, and addopts name its options; the compiler takes most of the time
    workers=()
    "$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
    [ -n "${DRY:-}" ] && workers=("${workers[@]/8/2}")
    # one file that cannot be imported stops all: only those with such tests, and none of the trainer's
    mapfile -t marked < <(grep -lE "mark\.gpu" tests/test_*.py)
    mapfile -t whole < <(grep -lE "^def test_.*\bdevice\b" tests/test_*.py |
        xargs grep -LE "^(from|import) riskpo\b[ .]")
    if [ -n "${TEST_FILES:-}" ]; then
        read -ra marked <<<"$TEST_FILES"
        whole=("${marked[@]}")
    fi
    run_tests marked $(($(seconds_left) - reserved)) "${marked[@]}" -m gpu
    left=$(($(seconds_left) - reserved))
    # the interpreter's rehearsal is the usual test run: here they are only collected
    if [ "$left" -ge 10 ]; then
        run_tests whole "$left" "${whole[@]}" -m "not gpu" ${DRY:+--collect-only}
    else
        verdict="$verdict; (whole files): no time" failed=1
    fi
fi

swept=0
if [[ $phases == *sweep* ]]; then
    name=gpu-sweep sweep=${DRY:+dry}
    keep=${KEEP_SECONDS:-25} # the last case may end after its budget; then come the tables
    left=$(($(seconds_left) - keep))
    timeout -k 10 $((left + keep - 5)) "$python" -m benchmarks "--${sweep:-gpu}" \
        --budget-seconds "$left" --note "${verdict:-no tests in this run}" --out "$out/$name.json" \
        ${ROWS:+--rows "$ROWS"} "$@" 2>&1 | tee "$out/$name.log"
    swept=${PIPESTATUS[0]}
    if [ -e "$out/$name.json" ]; then
        "$python" -m benchmarks.report "$out/$name.json" --markdown "$out/$name.md"
    else
        echo "the sweep ended before its first case was done: no table"
    fi
fi
echo "total $SECONDS s"
{ [ "$failed" -eq 0 ] || [ -n "${DRY:-}" ]; } && [ "$swept" -eq 0 ]
