#!/usr/bin/env bash
# What a GPU has to tell, the most important first, in about ten minutes on a fast one; each part leaves its own file
# in OUT, so that being cut off loses only what was not begun.
#
#     bash benchmarks/gpu.sh [OUT]        # default: outputs/gpu
#
# Needs the package with its `dev` extra and a PyTorch build for the GPU. It writes a base of SDXL's sizes with random
# weights (7 GB) beside the results. On a CPU, SMALL=1 BASE=FOLDER shows in a minute that all parts run.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-outputs/gpu}" && cd "${1:-outputs/gpu}" && pwd)
PYTHON=${PYTHON:-python}
BASE=${BASE:-$OUT/random_sdxl}
export HF_HUB_OFFLINE=1
failed=0

part() { # NAME SECONDS COMMAND...: the command's output in NAME.txt; what fails is told and passed over
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

if [ "${SMALL:-0}" = 1 ]; then
    step_time small --seconds 0 --threads 1 --mixed_precision bf16 --arms low-rank
    part layer_cost 300 "$PYTHON" -m benchmarks.layer_cost --small --seconds 0 --threads 1 --out "$OUT/layer_cost.json"
    run=(--max_train_steps 2 --preset paper)
else
    part environment 60 "$PYTHON" -m torch.utils.collect_env
    part contracts 120 "$PYTHON" -m pytest -n 0 -m gpu tests
    part random_sdxl 180 "$PYTHON" -m benchmarks.random_sdxl "$BASE"
    bf16=(--resolution 1024 --mixed_precision bf16 --seconds 15)
    step_time batch1 "${bf16[@]}" --gradient_checkpointing
    step_time batch4 "${bf16[@]}" --gradient_checkpointing --batch 4
    part layer_cost 180 "$PYTHON" -m benchmarks.layer_cost --seconds 3 --out "$OUT/layer_cost.json"
    run=(--preset paper --resolution 1024 --mixed_precision bf16 --gradient_checkpointing)
fi
part paper_run 400 "$PYTHON" -m flatlora_diffusion train "${run[@]}" --pretrained_model_name_or_path "$BASE" \
    --instance_data_dir samples/icons_3d --output_dir "$OUT/paper_run" --report_to none --seed 0
part memory 180 "$PYTHON" -m benchmarks.gpu_memory "$OUT/paper_run" "$OUT/memory.json"
if [ "${SMALL:-0}" != 1 ]; then
    step_time batch1_all_kept "${bf16[@]}"
    step_time int8 "${bf16[@]}" --gradient_checkpointing --quantize_base int8
    step_time nf4 "${bf16[@]}" --gradient_checkpointing --quantize_base nf4
fi
ls "$OUT"/*.json
exit $failed
