#!/usr/bin/env bash
# Runs all checks, also the long ones: `bash tests/long.sh [pytest arguments]`.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --long "$@"
