# Sourced by train_emo.sh and tests/run.sh. `ensure_env FILE...` sets PYTHON to an interpreter that has the packages of the
# requirement files: the running one if its versions lie in pyproject.toml's ranges, else that of .venv, made if needed.

satisfied() { # does interpreter $1 have what pyproject.toml asks for, the extra $2 included?
    "$1" - "$ROOT/pyproject.toml" "$2" 2>/dev/null <<'PYTHON'
import importlib.metadata
import sys
import tomllib

from packaging.requirements import Requirement

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"].get(sys.argv[2], [])
for requirement in map(Requirement, wanted):
    version = importlib.metadata.version(requirement.name)  # raises where the package is missing
    assert requirement.specifier.contains(version, prereleases=True), (requirement, version)
PYTHON
}

ensure_env() {
    local extra=none file arguments=()
    for file in "$@"; do
        arguments+=(-r "$ROOT/$file")
        [ "$file" = tests/requirements.txt ] && extra=test
    done
    PYTHON=${PYTHON:-$(command -v python3 || command -v python || true)}
    [ -n "$PYTHON" ] || { echo "error: no python3 found: install Python 3.11 or newer" >&2; exit 2; }
    satisfied "$PYTHON" "$extra" && return
    if [ ! -x "$ROOT/.venv/bin/python" ]; then
        echo "creating $ROOT/.venv" >&2
        "$PYTHON" -c "import sys; raise SystemExit(sys.version_info < (3, 11))" || {
            echo "error: $PYTHON is older than Python 3.11: install a newer one, or set PYTHON=" >&2; exit 2; }
        "$PYTHON" -m venv "$ROOT/.venv" || {
            echo "error: no virtual environment could be made: install your system's python3-venv" >&2; exit 2; }
    fi
    PYTHON=$ROOT/.venv/bin/python
    satisfied "$PYTHON" "$extra" && return
    echo "installing ${*} into $ROOT/.venv" >&2
    "$PYTHON" -m pip install --disable-pip-version-check "${arguments[@]}" packaging >&2 || {
        echo "error: the installation failed: see the lines above" >&2; exit 2; }
}
