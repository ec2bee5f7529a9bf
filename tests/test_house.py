"""The shape of the package: what keeps it readable in one sitting."""

import ast
import subprocess
from pathlib import Path

AT_THE_DOOR = 10  # modules beside the folders
LINES, PARAMETERS = 60, 8  # of a function
COLUMNS = 100  # of a line that holds no address
CODE = ("stanford_alpaca", "benchmarks", "experiments", "docs")
MANY_PARAMETERS = {  # the public functions of the loss, and the Triton kernels
    "stanford_alpaca/objective/attach.py:attach_objective",
    "stanford_alpaca/losses/functional.py:linear_emo_loss",
    "stanford_alpaca/losses/functional.py:linear_loss_and_stats",
    "stanford_alpaca/losses/backends/chunked.py:linear_loss",
    "stanford_alpaca/losses/backends/vocab_parallel.py:linear_loss",
    "stanford_alpaca/losses/backends/triton_kernels.py:_statistics",
    "stanford_alpaca/losses/backends/triton_kernels.py:_gradient",
}


def functions(root: Path, folders: tuple[str, ...]):
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file.relative_to(root).as_posix(), node


def test_few_modules_stand_at_the_packages_top(root):
    names = {file.name for file in (root / "stanford_alpaca").glob("*.py")} - {"__init__.py"}
    assert len(names) <= AT_THE_DOOR, names


def test_functions_are_short(root):
    lengths = {
        f"{file}:{node.name}": node.end_lineno - node.lineno + 1
        for file, node in functions(root, (*CODE, "tests"))
    }
    assert len(lengths) > 2000
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_parameter_lists_are_short_but_of_losses_and_kernels(root):
    found = {}
    for file, node in functions(root, CODE):
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS and f"{file}:{node.name}" not in MANY_PARAMETERS:
            found[f"{file}:{node.name}"] = count
    assert found == {}


def test_lines_are_short(root):
    kinds = [f"*.{kind}" for kind in ("py", "js", "css", "toml", "sh", "yml", "yaml")]
    tracked = ["git", "ls-files", "-co", "--exclude-standard", "--", *kinds]
    files = subprocess.run(tracked, cwd=root, capture_output=True, text=True, check=True)
    names = [name for name in files.stdout.splitlines() if (root / name).is_file()]
    assert {Path(name).suffix for name in names} >= {".py", ".js", ".css", ".toml", ".sh", ".yaml"}
    found = [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate((root / name).read_text("utf-8").splitlines(), 1)
        if len(line) > COLUMNS and "://" not in line
    ]
    assert found == []


def test_tests_stand_where_what_they_test_stands(root):
    """A folder of the package has a folder of tests with its name."""
    package, tests = root / "stanford_alpaca", root / "tests"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= {path.name for path in tests.iterdir() if path.is_dir()}
