#!/usr/bin/env bash
# Everything that a machine with a GPU is asked for, in one command and under nine minutes: build, test, tune, measure, gate.
#
#     benchmarks/gpu.sh          results go to ${OUT:-benchmarks/results}
#
# Needs python3 with torch ≥ 2.11 and Triton ≥ 3.6, pytest and hypothesis, a C++ compiler and nvcc; no network, no .venv, no make.
# Wheels of peers in ./.whl are installed beside (into a temporary folder, with nothing that they depend on). $COMMIT names what
# is measured where there is no clone. Each stage has its own limit, the next one runs whatever happened, and the last lines are a
# summary; the exit code is not 0 if any stage failed. STAGES="build tests" runs only these; some run only where they are named,
# for the time of all is more than one command gets: "sync", a weight push beside a device copy (STAGES="build sync"), and
# "train_step", attention kernels against fp64 and whole updates at 16K tokens (STAGES="peers build train_step"), which also needs
# transformers ≥ 5.17, accelerate, pydantic and rich, and matplotlib for its pictures. SUITE_SECONDS is the suite's limit, within
# which gates whose cases were not reached count as broken.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
OUT=${OUT:-benchmarks/results}
STAGES=${STAGES:-peers build tests tune suite}
SUITE_SECONDS=${SUITE_SECONDS:-285}
mkdir -p "$OUT"
: >"$OUT/gpu.log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
site=$scratch/site
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
summary=()
failed=0

# stage NAME SECONDS COMMAND…: runs it under a limit, keeps its log, notes how it ended.
stage() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  [[ " $STAGES " == *" $name "* ]] || return 0
  echo "=== $name (at most ${limit} s): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$scratch/$name.log" | tee -a "$OUT/gpu.log"
  code=${PIPESTATUS[0]}
  local verdict=ok
  [[ $code -eq 0 ]] || { verdict="FAILED, exit code $code"; failed=1; }
  [[ $code -ne 124 && $code -ne 137 ]] || verdict="FAILED, stopped after ${limit} s"
  summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

install_peers() {
  shopt -s nullglob
  local wheels=(.whl/*.whl)
  [[ ${#wheels[@]} -gt 0 ]] || { echo "no wheels in .whl: no peers"; return 0; }
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${wheels[@]}"
}
export -f install_peers
export site

stage peers 20 bash -c install_peers
stage build 90 python3 setup.py --quiet build_ext --inplace
stage tests 100 python3 -m pytest tests/kernels -q --maxfail=5 -p no:cacheprovider
stage tune 40 python3 -m benchmarks.kernels --tune --device cuda --out "$OUT"
# The gates are judged by the figures of the same run, whose first cases they are.
minutes=$(python3 -c "print(max(1, $SUITE_SECONDS - 55) / 60)")
stage suite "$SUITE_SECONDS" python3 -m benchmarks.kernels --full --gate --device cuda --minutes "$minutes" --out "$OUT"

stage sync 240 python3 -m benchmarks.weight_sync --sizes 0.1b,1.5b,14b --out "$OUT/weight_sync-gpu.json"

# What one GPU holds of the recipe, as planned: 14.77 billion parameters in 117 GB with gradients in bf16, 7.6 in 79.
train_step_large() {
  local memory common
  memory=$(python3 -c 'import torch; print(torch.cuda.mem_get_info()[1] // 10**9)') || return
  common="--context 16384 --weights bfloat16 --optimizer adamw8bit --checkpointing --rounds 3"
  if ((memory >= 130)); then
    python3 -m benchmarks.train_step qwen2.5-14b $common --gradients bfloat16 --gate --out "$OUT/train_step-14b-gpu.json"
  else
    python3 -m benchmarks.train_step qwen2.5-7b $common --out "$OUT/train_step-7b-gpu.json"
  fi
}
export -f train_step_large
export OUT PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

stage train_step 60 python3 -m pytest tests/trainer/test_attention_gpu.py -q -rs -p no:cacheprovider
stage train_step 240 bash -c train_step_large
stage train_step 200 python3 -m benchmarks.train_step qwen2.5-1.5b --context 16384 --checkpointing --rounds 3 \
  --compare selective offload compile-checkpointing --out "$OUT/train_step-1.5b-gpu.json"

echo "=== summary, $SECONDS s in all"
printf '%s\n' "${summary[@]}"
if [[ -f $scratch/suite.log ]]; then
  grep -E '^(held|BROKEN|–) ' "$scratch/suite.log" | cut -c1-200
  tail -n 1 "$scratch/suite.log"
fi
exit "$failed"
