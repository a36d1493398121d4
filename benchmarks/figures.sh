#!/usr/bin/env bash
# The figures of docs/performance.md that come from engines and servers, on two GPUs or four:
#   benchmarks/figures.sh OUT two served large formats      benchmarks/figures.sh OUT four r1
# Each step writes OUT/STEP/ and OUT/STEP.log; if one fails, the next runs. Where SGLang has
# tuned no kernels for a rank's experts, they get another number's (`sglang-dwdp kernels`), but for `plain`, which is
# expert parallelism as it comes. DRY_RUN=1 prints the commands. PYTHON, CUDA_VISIBLE_DEVICES: as usual.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=$(realpath -m "${1:?usage: figures.sh OUT STEP...}")
shift
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
sglang=$("$PYTHON" -c 'from sglang_dwdp.planner import tuned; print((tuned.sglang_folder() / tuned.CONFIGS).parent)')
# What fits: layers of a model that no single GPU holds, and engines beside each other.
large=60 together=8
case "$gpu" in *H100*) large=48 together=4 ;; esac

run() { # STEP SECONDS COMMAND...
  local step=$1 limit=$2
  shift 2
  echo "$step: $*"
  [ -z "${DRY_RUN:-}" ] || return 0
  timeout --kill-after 20 "$limit" "$@" >"$out/$step.log" 2>&1 || echo "$step failed: $out/$step.log"
}

engines() { # STEP SECONDS OPTIONS... Plain --tp was not ready within 300 s, twice.
  local step=$1 limit=$2
  shift 2
  run "$step" "$limit" "$PYTHON" benchmarks/engines.py --out "$out/$step" --time-limit "$((limit - 60))" \
    --start-limit 600 "$@"
}

tuned() { # MODEL RANKS: kernels for all variants that follow
  export SGLANG_MOE_CONFIG_DIR="$out/kernels-$(basename "$1")-$2"
  [ -n "${DRY_RUN:-}" ] || [ -e "$SGLANG_MOE_CONFIG_DIR" ] ||
    "$PYTHON" -m sglang_dwdp.cli kernels "$1" --gpu "$gpu" --group-size "$2" --out "$SGLANG_MOE_CONFIG_DIR"
}

prefills="prefill:512 prefill:1024 prefill:2048 prefill:4096 prefill:8192 prefill:16384"
draft="speculative_algorithm=NEXTN speculative_num_steps=3 speculative_eagle_topk=1 speculative_num_draft_tokens=4"
for step in "$@"; do
  unset SGLANG_MOE_CONFIG_DIR
  case "$step" in
  two)
    tuned qwen3-30b-a3b 2
    engines two 1500 --variants dwdp-exchange dwdp dep plain=dep gatherv=dep replicas in-tree tp \
      --set plain "SGLANG_MOE_CONFIG_DIR=$sglang" --set gatherv SGLANG_DP_USE_GATHERV=1 \
      --at-a-time $together --repeats 2 \
      --cases $prefills prefill:4096:20 prefill:8192:20 decode:1 decode:8 decode:32 decode:64 decode:32:1
    ;;
  tokens) engines tokens 600 --variants dwdp dwdp-exchange dep replicas --tokens --cases ;;
  served)
    tuned qwen3-30b-a3b 2
    served=benchmarks/scenarios/serving/two_gpu.yaml
    run served 1800 "$PYTHON" benchmarks/compare_serving.py $served --out "$out/served" --time-limit 1740
    ;;
  large)
    sed 's/"n_routed_experts": 128/"n_routed_experts": 256/' benchmarks/models/mtp/config.json >"$out/large.json"
    tuned "$out/large.json" 2
    engines large 1800 --variants dwdp-exchange dep in-tree tp --layers $large --experts 256 --mem-fraction 0 \
      --set in-tree mem_fraction_static=0.9 --at-a-time 1 --repeats 2 --prompts-per-rank 12 --decode-tokens 96 \
      --cases prefill:4096 prefill:8192 prefill:16384 decode:1 decode:8 decode:32
    ;;
  formats) # Marlin's kernels are compiled at first use, for minutes
    engines formats 1800 --variants nvfp4=dwdp nvfp4-replicas=replicas int4=dwdp int4-replicas=replicas mtp=dwdp \
      mtp-replicas=replicas --set nvfp4 model_path=benchmarks/models/nvfp4 \
      --set nvfp4-replicas model_path=benchmarks/models/nvfp4 --set int4 model_path=benchmarks/models/int4 \
      --set int4-replicas model_path=benchmarks/models/int4 --set mtp model_path=benchmarks/models/mtp $draft \
      --set mtp-replicas model_path=benchmarks/models/mtp $draft --at-a-time 6 --repeats 2 --start-limit 900 \
      --cases prefill:4096 prefill:8192 decode:8 decode:32
    ;;
  four)
    tuned qwen3-30b-a3b 4
    engines four 1200 --variants exchange=dwdp-exchange pairs=dwdp-exchange dep plain=dep replicas \
      --set pairs dwdp_group_size=2 --set plain "SGLANG_MOE_CONFIG_DIR=$sglang" --at-a-time $together --repeats 2 \
      --cases $prefills decode:1 decode:8 decode:32 decode:64
    ;;
  r1) # DeepSeek-R1's shape with fewer layers; DeepGEMM would compile for minutes
    engines r1 1200 --model benchmarks/models/r1 --variants dwdp-exchange dep --set all load_format=dummy \
      moe_runner_backend=triton fp8_gemm_runner_backend=triton --at-a-time $((together / 4)) --repeats 2 \
      --prompts-per-rank 8 --cases prefill:4096 prefill:8192 decode:8 decode:32
    ;;
  *)
    echo "figures.sh: error: $step is none of two, tokens, served, large, formats, four, r1" >&2
    exit 2
    ;;
  esac
done
