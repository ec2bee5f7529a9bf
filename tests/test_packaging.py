"""Tests what `pip install` installs.

It is one package, with everything that its commands read.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from stanford_alpaca.training.engines import ds_configs

FIND = """
import site, sys
site.addsitedir(sys.argv[1])
import stanford_alpaca
from stanford_alpaca.training.engines import ds_configs
from stanford_alpaca.evaluation.fewshot.tasks import TASK_TEMPLATES
print(*stanford_alpaca.__path__, ds_configs(), TASK_TEMPLATES)
"""


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """Installs into a folder as pip does, from a wheel or as an editable install."""
    source = tmp_path_factory.mktemp("source") / "project"
    names = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        if name.startswith(("stanford_alpaca/", "ds_configs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())

    def install(editable: bool) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp("site-packages")
        kind = "build_editable" if editable else "build_wheel"
        build = f"from setuptools import build_meta; build_meta.{kind}({str(place)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
        (name,) = (path.name for path in place.iterdir() if path.suffix == ".whl")
        with zipfile.ZipFile(place / name) as wheel:
            wheel.extractall(place)
        (place / name).unlink()
        return place, source

    return install


def found_from(place: Path) -> list[str]:
    """Returns where an installed package is and what its commands find.

    Nothing of this checkout is on the path.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = [sys.executable, "-P", "-c", FIND, str(place)]
    return subprocess.run(
        asked, cwd=place, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def test_a_wheel_is_one_package_with_all_that_it_reads(installed):
    place, source = installed(editable=False)
    tops = {path.name for path in place.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"stanford_alpaca"}
    package = place / "stanford_alpaca"
    modules = {path.relative_to(source) for path in (source / "stanford_alpaca").rglob("*.py")}
    assert {path.relative_to(place) for path in package.rglob("*.py")} == modules
    for name in (
        "py.typed",
        "evaluation/page/page.html",
        "evaluation/page/page.js",
        "evaluation/fewshot/templates/trec.yaml",
    ):
        assert (package / name).read_bytes() == (source / "stanford_alpaca" / name).read_bytes()
    shipped = {path.name: path.read_bytes() for path in (package / "ds_configs").iterdir()}
    assert shipped == {
        path.name: path.read_bytes() for path in (source / "ds_configs").glob("*.json")
    }
    assert found_from(place) == [
        str(package),
        str(package / "ds_configs"),
        str(package / "evaluation/fewshot/templates"),
    ]


def test_an_editable_install_reads_the_checkout(installed):
    place, source = installed(editable=True)
    package = source / "stanford_alpaca"
    assert found_from(place) == [
        str(package),
        str(source / "ds_configs"),
        str(package / "evaluation/fewshot/templates"),
    ]


def test_a_checkout_reads_its_own(root):
    assert (
        ds_configs() == root / "ds_configs"
        and (root / "ds_configs" / "zero3_offload.json").is_file()
    )


def test_pyproject_names_every_package(root):
    import tomllib

    named = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(
        [*find_packages(root, include=["stanford_alpaca*"]), "stanford_alpaca.ds_configs"]
    )
