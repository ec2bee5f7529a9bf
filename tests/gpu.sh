#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in six minutes:
# `bash tests/gpu.sh [--toy] [--all] [--out DIR] [--states FILE]`. See benchmarks/README.md.
# It uses PYTHON (or python3) as it is and installs nothing.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
