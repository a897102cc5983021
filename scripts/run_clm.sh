#!/usr/bin/env bash
# Fine-tune OPT on raw WikiText-2 from the hub:
#   scripts/run_clm.sh [batch size per GPU] [memory cap in GB, 0 for none] [model] [number of GPUs] [more flags]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# *//p' "$0" && exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" hub
exec albireo train opt --plugin gemini --data wikitext/wikitext-2-raw-v1 --checkpointing \
    --batch-size "${1:-16}" --mem-cap "${2:-0}" --model "${3:-6.7b}" --gpus "${4:-1}" "${@:5}"
