#!/usr/bin/env bash
# Measure a GPU: the most important figures first, in about ten minutes on a fast GPU. Each part writes its own file in
# OUT, so that an interruption loses only the parts that have not begun.
#
#     bash benchmarks/gpu.sh [OUT]        # default: outputs/gpu
#
# Needs the package with its `dev` extra and a PyTorch build for the GPU. It writes a base of SDXL's sizes with random
# weights (7 GB) beside the results. A GPU before the RTX 30 series, such as a T4, computes in fp16. A GPU of less than
# 48 GB runs no comparison of arms in one process, which needs a base for each. On a CPU, SMALL=1 BASE=FOLDER shows in a
# minute that all parts run.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-outputs/gpu}" && cd "${1:-outputs/gpu}" && pwd)
PYTHON=${PYTHON:-python}
BASE=${BASE:-$OUT/random_sdxl}
export HF_HUB_OFFLINE=1
failed=0

part() { # NAME SECONDS COMMAND...: writes the output of the command to NAME.txt; a failure does not end the script
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" > "$OUT/$name.txt" 2>&1; then
        echo "   failed: $(tail -n 1 "$OUT/$name.txt")"
        failed=1
    fi
}

step_time() { # NAME FLAGS...
    local name=$1
    shift
    part "step_$name" 300 "$PYTHON" -m benchmarks.train_step --base "$BASE" --out "$OUT/step_$name.json" "$@"
}

training() { # RUN JSON FLAGS...: a training run, which checks itself on a GPU, and its step time and peak memory
    local name=$1 json=$2
    shift 2
    part "$name" 400 "$PYTHON" -m flatlora_diffusion train "${run[@]}" "$@" --pretrained_model_name_or_path "$BASE" \
        --instance_data_dir samples/icons_3d --output_dir "$OUT/$name" --report_to none --seed 0
    part "$json" 180 "$PYTHON" -m benchmarks.gpu_memory "$OUT/$name" "$OUT/$json.json"
}

if [ "${SMALL:-0}" = 1 ]; then
    run=(--max_train_steps 2 --preset paper)
    training paper_run memory
    training lora_run memory_lora --method lora
    step_time small --seconds 0 --threads 1 --mixed_precision bf16 --arms low-rank
    part layer_cost 300 "$PYTHON" -m benchmarks.layer_cost --small --seconds 0 --threads 1 --out "$OUT/layer_cost.json"
else
    part environment 60 "$PYTHON" -m torch.utils.collect_env
    read -r precision gigabytes < <("$PYTHON" -c '
import torch
from flatlora_diffusion.families.device import has_bf16
device = torch.device("cuda")
print("bf16" if has_bf16(device) else "fp16", torch.cuda.get_device_properties(device).total_memory // 10**9)')
    if [ -z "${precision:-}" ]; then
        echo "PyTorch finds no GPU; SMALL=1 BASE=FOLDER runs all parts on the CPU"
        exit 1
    fi
    part random_sdxl 180 "$PYTHON" -m benchmarks.random_sdxl "$BASE"
    run=(--preset paper --max_train_steps 100 --train_batch_size 1 --resolution 1024 --cache_latents)
    run+=(--mixed_precision "$precision" --gradient_checkpointing)
    training paper_run memory
    training lora_run memory_lora --method lora
    part contracts 120 "$PYTHON" -m pytest -n 0 -m gpu tests
    part layer_cost 180 "$PYTHON" -m benchmarks.layer_cost --seconds 3 --out "$OUT/layer_cost.json"
    if [ "$gigabytes" -ge 48 ]; then
        half=(--resolution 1024 --mixed_precision "$precision" --seconds 15)
        step_time batch1 "${half[@]}" --gradient_checkpointing
        step_time batch4 "${half[@]}" --gradient_checkpointing --batch 4
        step_time batch1_all_kept "${half[@]}"
        step_time int8 "${half[@]}" --gradient_checkpointing --quantize_base int8
        step_time nf4 "${half[@]}" --gradient_checkpointing --quantize_base nf4
    fi
fi
ls "$OUT"/*.json
exit $failed
