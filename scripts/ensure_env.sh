# Sourced by scripts/launcher.sh, tests/run.sh and tests/multi_node.sh, which set ROOT.
# `ensure_env "EXTRAS" FILE...` sets PYTHON to an interpreter that has the package's dependencies.
# This is the present PYTHON (or python3) if its packages lie in the version ranges of
# pyproject.toml, those of the extras too. Otherwise it is that of .venv, which is made if needed,
# and into which the requirement files are installed.

satisfied() { # whether interpreter $1 has what pyproject.toml asks for, with the extras after it
    "$1" - "$ROOT/pyproject.toml" "${@:2}" 2>/dev/null <<'PYTHON'
import importlib.metadata
import sys
import tomllib

from packaging.requirements import Requirement

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + [one for name in sys.argv[2:] for one in extras[name]]
for requirement in map(Requirement, wanted):
    version = importlib.metadata.version(requirement.name)  # raises where the package is missing
    assert requirement.specifier.contains(version, prereleases=True), (requirement, version)
PYTHON
}

ensure_env() {
    local extras=$1 file arguments=()
    shift
    for file in "$@"; do arguments+=(-r "$ROOT/$file"); done
    PYTHON=${PYTHON:-$(command -v python3 || command -v python || true)}
    [ -n "$PYTHON" ] || {
        echo "error: no python3 found: install Python 3.11 or newer" >&2; exit 2; }
    satisfied "$PYTHON" $extras && return
    if [ ! -x "$ROOT/.venv/bin/python" ]; then
        echo "creating $ROOT/.venv" >&2
        "$PYTHON" -c "import sys; raise SystemExit(sys.version_info < (3, 11))" || {
            echo "error: $PYTHON is older than Python 3.11:" \
                "install a newer one, or set PYTHON=" >&2; exit 2; }
        "$PYTHON" -m venv "$ROOT/.venv" || {
            echo "error: no virtual environment could be made:" \
                "install your system's python3-venv" >&2; exit 2; }
    fi
    PYTHON=$ROOT/.venv/bin/python
    satisfied "$PYTHON" $extras && return
    echo "installing ${*} into $ROOT/.venv" >&2
    "$PYTHON" -m pip install --disable-pip-version-check "${arguments[@]}" packaging >&2 || {
        echo "error: the installation failed: see the lines above" >&2; exit 2; }
}
