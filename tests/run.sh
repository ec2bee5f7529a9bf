#!/usr/bin/env bash
# Installs what is missing and runs all checks: `bash tests/run.sh [pytest arguments]`.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/ensure_env.sh"
ensure_env test requirements.txt tests/requirements.txt
cd "$ROOT"
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && \
    ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "installing chromium, in which the report's page is tested;" \
        "without it those tests are skipped" >&2
    { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
        timeout 600 apt-get -qq install -y --no-install-recommends chromium; } \
        >/dev/null 2>&1 </dev/null || true
fi
WORKERS=${WORKERS:-$(env -u OMP_NUM_THREADS nproc)} # nproc reads that variable
# One test worker per core, and no thread that waits busily.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PYTHON HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -c "from importlinter.cli import lint_imports_command; lint_imports_command()" \
    --no-logo --no-cache
exec "$PYTHON" -m pytest -n "$WORKERS" --dist worksteal "$@"
