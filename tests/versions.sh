#!/usr/bin/env bash
# Runs the tests at one end of pyproject.toml's ranges: `bash tests/versions.sh low|new [pytest
# arguments]`. low: the lower bound of each dependency of the package. new: the newest releases.
# It makes an environment under TMPDIR, installs there, and removes it at the end. That needs a
# network and 10 GB. Without arguments for pytest it leaves out the suites that take longest: the
# commands of the pages, the launchers and the faults.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
END=${1:-}
case $END in
    low | new) shift ;;
    *) echo "usage: bash tests/versions.sh low|new [pytest arguments]" >&2; exit 2 ;;
esac
[ $# -gt 0 ] || set -- -n 2 tests --ignore tests/faults --ignore tests/test_pages.py \
    --ignore tests/test_launcher.py --ignore tests/test_launch.py --ignore tests/test_multi_node.py
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$ROOT"
"${PYTHON:-python3}" -m venv "$WORK/env"
export PYTHON=$WORK/env/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

"$PYTHON" - "$END" >"$WORK/requirements.txt" <<'PYTHON'
import re
import sys
import tomllib

EXACT = ("torch", "transformers", "datasets", "peft", "accelerate")  # others: any patch release
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"]:
    name, bound = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    lowest = f"{name}=={bound}{'' if name in EXACT else '.*'}"
    print(lowest if sys.argv[1] == "low" else requirement)
print(*project["optional-dependencies"]["test"], sep="\n")
if sys.argv[1] == "low":
    print("numpy<2.4")  # newer ones fail in the interpreter of Triton 3.6, which torch 2.11 brings
PYTHON
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }
install -r <(grep -v '^trl' "$WORK/requirements.txt")
install --no-deps -r <(grep '^trl' "$WORK/requirements.txt") # its bounds are higher than ours
"$PYTHON" -m pip freeze | grep -E '^(torch|transformers|datasets|peft|accelerate|trl|triton)=='
"$PYTHON" -m pytest -p no:cacheprovider "$@"
