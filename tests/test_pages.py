"""Every command and every piece of code in README.md and in docs/ runs.

The test command runs README.md and the quickstart. ``bash tests/docs.sh`` runs every page.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["README.md", "docs/quickstart.md"]
PAGES = FIRST
SHORT = os.environ.get("EMO_PAGES") != "all"  # one epoch of the demonstration in place of six
if not SHORT:
    others = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    PAGES = [*FIRST, *(page for page in others if page not in FIRST)]
# this very run; what needs a network; what tests/evaluation/test_lm_eval.py runs
NOT_RUN = ("bash tests/run.sh", "python -m stanford_alpaca.data.fetch", "lm_eval run")
STAND_INS = {  # what a reader puts in -> what the test has
    "DEMO_MODE=mle bash train_emo.sh": "bash train_emo.sh data/tiny-base mle --max_steps 1",
    "--samples 4": "--samples 4 --limit 24",  # the first command evaluates on all
    "MODEL_PATH": "my-model",
    "--nproc_per_node 4": "--nproc_per_node 2",
    "NPROC=4": "NPROC=2",
    "ENGINE=fsdp": "ENGINE=ddp OMP_NUM_THREADS=1",  # FSDP on CPU has its own test
    "/data/alpaca.json": "data/instructions/train.json",
    "/data/chats.jsonl": "chats.jsonl",
    "/data/text.txt": "text.txt",
    "/data/icl": "icl",
}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page: str) -> list[str]:
    """Returns the lines of a page's bash blocks, in order, with continued lines joined."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *NOT_RUN))]


def runnable(line: str) -> str:
    trains = "MODEL_PATH" in line or "--config" in line
    for name, stand_in in STAND_INS.items():
        line = line.replace(name, stand_in)
    ends = "--max_steps 1" if "--save_steps" in line else "--max_steps 1 --save_strategy no"
    if line.startswith("bash train_emo.sh data/tiny-base mle") or (
        trains and "_batch" not in line and "train_emo.sh" in line
    ):
        ends += " --global_batch 8"
    return f"{line} {ends}" if trains else line


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    """A copy of what git tracks, so that outputs do not land in the repository."""
    folder = tmp_path_factory.mktemp("pages") / "clone"
    tracked = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(tracked, cwd=root, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    shutil.copytree(root / "data" / "tiny-base", folder / "my-model")
    pages = [root / "SECURITY.md", *sorted((root / "docs").glob("*.md"))]
    prose = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    (folder / "text.txt").write_text("\n".join(line for line in prose if len(line.split()) > 12))
    chats = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "Yes."}]}
        for word in ("Big?", "Small?", "Old?", "New?") * 4
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "icl").mkdir()
    for split, count in (("train", 30), ("test", 6)):
        rows = [{"text": f"What is the name of land {i}?", "label": i % 6} for i in range(count)]
        (folder / "icl" / f"trec_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def environment():
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"PYTHON": sys.executable, "PATH": f"{bin_folder}:{os.environ['PATH']}"}


def run_module(argv: list[str]) -> None:
    """Runs ``python -m`` in a process that has imported everything before."""
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"exit status {end.code}") from None


def test_the_commands_run_in_their_order(clone, environment, monkeypatch):
    """A command that several pages have runs once, and its outputs are there for all."""
    monkeypatch.chdir(clone)
    pages: dict[str, str] = {}  # command -> the first page that has it
    for page in PAGES:
        for line in commands(page):
            pages.setdefault(line, page)
    for line, page in pages.items():
        if line.startswith("python -m "):
            run_ranks(1, run_module, shlex.split(runnable(line))[2:], launched=False)
            continue
        report = {} if line == "bash train_emo.sh" else {"REPORT": "no"}  # seconds less each
        report |= {"DEMO_EPOCHS": "1", "DEMO_RECORDS": "40"} if SHORT else {}
        ended = subprocess.run(
            ["bash", "-c", runnable(line)],
            cwd=clone,
            env=environment | report,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        said = f"{page}: {line}\n{ended.stdout[-1500:]}\n{ended.stderr[-3000:]}"
        assert ended.returncode == 0, said
        if line == "bash train_emo.sh":
            check_demonstration(ended.stdout)


def test_the_front_page_begins_with_the_demonstration():
    assert commands("README.md")[0] == commands("docs/quickstart.md")[0] == "bash train_emo.sh"


def check_demonstration(out: str) -> None:
    """The table has the promised rows, and exact match rose from below 10 % to 60 %, or 30 %."""
    lines = out.partition(" minus ")[0].splitlines()  # a table of differences follows
    # values come with intervals: 0.68 [0.62, 0.74]
    table = [re.split(" {2,}", line.strip()) for line in lines]
    # before, after, the references by themselves
    rows = {name: values for name, *values in table if len(values) == 3}
    wanted = ("nll", "emo", "perplexity", "token accuracy", "exact match", "supervised tokens/s")
    for measure in (*wanted, "peak memory, MiB"):
        assert measure in rows, measure
    before, after = (float(value.split()[0]) for value in rows["exact match"][:2])
    assert before < 0.1 and after >= (0.3 if SHORT else 0.6)
    assert float(rows["nll"][1].split()[0]) < float(rows["nll"][0].split()[0])
    assert "checkpoint: " in out
    (report,) = re.findall(r"^report: +(\S+)$", out, re.M)
    assert '"transport":{"records":[' in Path(report).read_text()


CODE = [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), CODE)
def test_the_python_blocks_run(root, tmp_path, monkeypatch, page, number):
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")[number]
    code = code.replace("MODEL_PATH", str(root / "data" / "tiny-base"))
    exec(compile(code, f"{page} block {number}", "exec"), {"__name__": "page"})
