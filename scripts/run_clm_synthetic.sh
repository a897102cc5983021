#!/usr/bin/env bash
# Train OPT from random weights on a text made up on the spot; no network is needed:
#   scripts/run_clm_synthetic.sh [batch size per GPU] [memory cap in GB, 0 for none] [model] [number of GPUs] [more flags]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# *//p' "$0" && exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
exec albireo train opt --plugin gemini --data synthetic --init random --checkpointing \
    --batch-size "${1:-16}" --mem-cap "${2:-0}" --model "${3:-125m}" --gpus "${4:-1}" "${@:5}"
