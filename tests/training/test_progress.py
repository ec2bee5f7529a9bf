"""What a run prints and writes while it trains."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stanford_alpaca.train import train
from stanford_alpaca.training.progress import LOG_COLUMNS, LOG_FILE, Progress, in_words


def test_a_run_logs_in_columns_and_as_json(arguments, capsys, tmp_path):
    train(
        arguments(mode="emo", max_steps=3, logging_steps=1, save_strategy="no", eval_fraction=0.2)
    )
    printed = capsys.readouterr().out
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    written = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert [entry["step"] for entry in written if "loss" in entry] == [1, 2, 3]
    for mine, theirs in zip(written, state, strict=False):
        assert mine == {name: value for name, value in theirs.items() if name != "total_flos"}
    lines = printed.splitlines()
    heads = next(n for n, line in enumerate(lines) if line.split()[:3] == ["step", "epoch", "loss"])
    assert [line.split()[:2] for line in lines].count(["step", "epoch"]) == 1
    names, row = lines[heads].split(), lines[heads + 1].split()
    assert len(names) == len(row) and row[0] == "1"
    assert float(row[names.index("nll")]) == pytest.approx(written[0]["nll"], rel=1e-3)
    assert (
        "evaluation at step 3: loss " in printed and "mode emo: the loss has the value" in printed
    )
    assert "{'loss'" not in printed


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    file = tmp_path / LOG_FILE
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + "{half")
    state = SimpleNamespace(is_world_process_zero=True, global_step=2, max_steps=4)
    args = SimpleNamespace(output_dir=tmp_path, disable_tqdm=True)
    progress = Progress("mle")
    progress.on_train_begin(args, state, None)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_a_file_that_cannot_be_written_ends_no_training(tmp_path, capsys):
    (tmp_path / LOG_FILE).mkdir()
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=4)
    args = SimpleNamespace(output_dir=tmp_path, disable_tqdm=True)
    progress = Progress("mle")
    progress.on_train_begin(args, state, None)
    for _ in range(2):
        progress.on_log(args, state, None, logs={"loss": 1.0})
    printed = capsys.readouterr().out
    assert printed.count("cannot be written to") == 1 and printed.count("loss") == 1


def test_a_reader_that_goes_away_ends_no_training(arguments, tmp_path):
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "stanford_alpaca.train", *arguments(max_steps=2)]
    ended = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_column_holds_its_widest_value():
    progress, printed = Progress("mle"), []
    progress._say = printed.append
    entry = dict.fromkeys(LOG_COLUMNS, 123456.0) | {"learning_rate": 2e-5, "mfu": 0.41}
    progress._row(entry)
    assert len(printed[0].split()) == len(printed[1].split()) == len(LOG_COLUMNS)


@pytest.mark.parametrize(("seconds", "said"), [(12.4, "12 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, said):
    assert in_words(seconds) == said


PRINTS = """import sys
def loss(nll, log_emo):
    print("a line of a user", flush=True)
    print("a line of a user", file=sys.stderr, flush=True)
    return nll
"""


@pytest.mark.parametrize("shell", ["> /dev/full", "2> /dev/full"])
def test_what_others_print_ends_no_training(arguments, tmp_path, shell):
    (tmp_path / "own.py").write_text(PRINTS)
    argv = arguments("--loss", f"{tmp_path}/own.py:loss", max_steps=2)
    place = argv.index("--mode")
    del argv[place : place + 2]
    command = [sys.executable, "-m", "stanford_alpaca.train", *argv]
    ended = subprocess.run(["bash", "-c", f'"$@" {shell}', "-", *command], timeout=300)
    assert ended.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_line_above_the_bar_is_printable_too():
    progress, written = Progress("mle"), []
    progress._bar = SimpleNamespace(write=written.append)
    progress._say("a\x1b[2Jb https://me:pass@hub")
    assert written == ["a\\u001b[2Jb https://***@hub"]
