#!/usr/bin/env bash
# The comparison of docs/evidence.md (a) to (c) with a larger model, trained from scratch on a GPU.
#
#   tools/gpu_evidence.sh                pages to $OUT, or to benchmarks/results
#   DRY=1 tools/gpu_evidence.sh          the same steps on a CPU, shrunk: two systems, two steps
#   tools/gpu_session.sh --fetch         with a network: the wheels that it needs too, into wheels/
#   SEEDS="0 1" SYSTEMS=grpo,riskpo-loo tools/gpu_evidence.sh --steps 100
#
# One seed after the other, its systems side by side (JOBS at a time, 5). After each whole seed the
# page over all seeds so far is written anew: gpu-evidence.md, .json, .png. Arguments go to `riskpo
# compare`. LIMIT_SECONDS (560) bounds a call; runs are kept in RUNS (runs/evidence-gpu, some 0.6 GB
# each) and resumed from their last checkpoint, so call it again until it says "complete". The logs
# of all runs come out as gpu-evidence-logs.tar.gz: unpacked into one RUNS, seeds of several machines
# make one page with `riskpo compare ... --page-only`. Exit status: 0 complete, 124 or 137 out of
# time, 2 nothing can run here, else a run failed.
cd "$(dirname "$0")/.." || exit 1

source tools/gpu_common.sh
require "riskpo.compare.page, riskpo.cli, riskpo.train"

config=docs/evidence-gpu.toml
runs=${RUNS:-${DRY:+$out/runs}}
runs=${runs:-runs/evidence-gpu}
systems=${SYSTEMS:-grpo,dapo,riskpo-paper,riskpo-loo,riskpo-seeking,riskpo-seeking-loo}
seeds=${SEEDS:-0 1 2 3 4}
jobs=${JOBS:-5}
if [ -n "${DRY:-}" ]; then
    config=$out/dry.toml
    shrink='s/^\(data\) = .*/\1 = "embedded:tiny"/; s/^\(steps\|save_every_steps\) = .*/\1 = 2/
            s/^\(questions_per_step\|eval_questions\) = .*/\1 = 10/
            s/^\(eval_samples\|responses_per_question\) = .*/\1 = 4/'
    sed -e "$shrink" docs/evidence-gpu.toml >"$config"
    systems=${SYSTEMS:-grpo,riskpo-loo} seeds=${SEEDS:-0} jobs=${JOBS:-1}
    export CUDA_VISIBLE_DEVICES=""
fi

# $1: seeds, comma by comma; the rest: options of riskpo compare
compare() {
    local chosen=$1 left
    shift
    left=$(seconds_left)
    # timeout signals its whole process group, so the runs' own processes end too
    timeout -k 20 $((left > 20 ? left : 20)) "$python" -m riskpo compare "$config" \
        --seeds "$chosen" --algorithms "$systems" --out "$runs" \
        --page gpu-evidence --against "${systems%%,*}" "$@"
}

every_seed() {
    local whole="" seed
    for seed in $seeds; do
        [ "$(seconds_left)" -ge 30 ] || return 124
        compare "$seed" --jobs "$jobs" "$@" || return
        whole=${whole:+$whole,}$seed
        compare "$whole" --page-only "$@" || return
        cp "$runs"/gpu-evidence.{md,json,png} "$out"/ || return
    done
}

nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null
every_seed "$@" 2>&1 | tee "$out/gpu-evidence.log"
status=${PIPESTATUS[0]}
logs=("$runs"/*/seed-*/metrics.jsonl)
[ -e "${logs[0]}" ] && tar -czf "$out/gpu-evidence-logs.tar.gz" -C "$runs" "${logs[@]#"$runs"/}"
case $status in
    0) echo "complete: $systems, seeds $seeds ($SECONDS s); pages in $out" ;;
    124 | 137) echo "out of time ($SECONDS s): give the same command again, it goes on" ;;
    *) echo "FAILED (exit status $status, $SECONDS s)" ;;
esac
exit "$status"
