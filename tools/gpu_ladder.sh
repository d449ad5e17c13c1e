#!/usr/bin/env bash
# The memory ladder of a 1.5B model on a GPU: every row of tools/memory_ladder.py, as far as it goes.
#
#   tools/gpu_ladder.sh                  memory-ladder-gpu.{json,md,png} to $OUT, or benchmarks/results
#   DRY=1 tools/gpu_ladder.sh            the same rows on a CPU: a tiny model, tiny contexts
#   LADDER_ROWS="5 7" FIRST="" BEYOND="262144 524288" tools/gpu_ladder.sh
#
# First 2^15 to 2^17 tokens for every row, then, for the rows that took them, doubling until a row
# fails (out of memory, as a rule). Each record is written as it is measured. LIMIT_SECONDS (560)
# bounds a call; attention grows with the square of the context, and by the plan's estimate a row
# takes about a minute up to 2^17 tokens, 2 minutes at 2^18, 5 at 2^19 and 19 at 2^20: go on with
# LADDER_ROWS and the same OUT. The row of 8-bit moments needs bitsandbytes. Exit status: 0 every
# row went as far as it could, 124 or 137 out of time, 1 nothing could be measured, 2 nothing can
# run here.
cd "$(dirname "$0")/.." || exit 1
source tools/gpu_common.sh
require "matplotlib, tools.memory_ladder"

kind=gpu options=(--gpu)
first=${FIRST-32768 65536 131072}
beyond=${BEYOND-262144 524288 1048576}
count='from tools.ladder_rows import GPU; print(*range(len(GPU.rows)))'
if [ -n "${DRY:-}" ]; then
    kind=dry options=(--dry)
    first=${FIRST-256 512} beyond=${BEYOND-1024}
    export CUDA_VISIBLE_DEVICES=""
fi
rows=${LADDER_ROWS:-$("$python" -c "$count")}
log=$out/memory-ladder-$kind.log

# $1: the row's number, $2: contexts
measure() {
    local left contexts
    read -ra contexts <<<"$2"
    left=$(seconds_left)
    [ "$left" -ge 10 ] || return 124
    timeout -k 10 "$left" "$python" -m tools.memory_ladder "${options[@]}" --out "$out" \
        --rows "$1" --tokens "${contexts[@]}" 2>&1 | tee -a "$log"
    return "${PIPESTATUS[0]}"
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null | tee "$log"
for contexts in "$first" "$beyond"; do
    [ -n "$contexts" ] || continue
    whole=""
    for row in $rows; do
        measure "$row" "$contexts"
        status=$?
        case $status in
            0) whole="$whole $row" ;;
            124 | 137)
                echo "out of time ($SECONDS s) in row $row of $rows at $contexts tokens"
                exit "$status"
                ;;
            *) echo "row $row ends within $contexts tokens (exit status $status)" ;;
        esac
    done
    rows=$whole
done
echo "$SECONDS s; rows that never failed:${rows:- none}; in $out"
grep -q '"measured"' "$log"
