#!/usr/bin/env bash
# Install Albireo with all that its tests need, and check everything: format, lint, types, floors, tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
cd "$root"
# The tests need no network and must not wait for one.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
echo "== format and lint" && ruff format --check . && ruff check .
echo "== types" && mypy
echo "== floors" && lint-imports --no-cache
echo "== tests" && python -m pytest "$@"
