#!/usr/bin/env bash
# Install Albireo and train OPT: scripts/train.sh [flags of `albireo train opt`]
# Without flags: a small model on a text made up on the spot, within three minutes on two cores, or on the GPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
exec albireo train opt "$@"
