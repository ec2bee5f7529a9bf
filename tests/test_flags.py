"""Tests how a command ends."""

import signal
from dataclasses import dataclass

import pytest

from stanford_alpaca import flags
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import end_at_once_on_sigint, exit_on_user_error


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_users_mistake_is_told_by_whichever_rank_finds_it(monkeypatch, capsys, rank):
    """Rank 0 reports immediately.

    Another rank waits first, so that the run can end with rank 0's report.
    """
    monkeypatch.setenv("RANK", rank)
    slept = []
    monkeypatch.setattr(flags.time, "sleep", slept.append)

    def command():
        raise UserError("no\nsuch thing")

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(command)
    assert end.value.code == 2 and capsys.readouterr().err == "error: no such thing\n"
    assert bool(slept) == (rank != "0")


def test_ctrl_c_is_one_line_and_during_imports_none(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_at_once_on_sigint()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(lambda: signal.raise_signal(signal.SIGINT), "stopped; all is kept")
        assert end.value.code == 130 and capsys.readouterr().err == "\nstopped; all is kept\n"
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
        end_at_once_on_sigint()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Options:
    """Some flags."""

    flags: str = ""
    text: str | None = None
    count: int = 1
    sure: bool = False


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--flags", "--lora True --steps 2"], Options(flags="--lora True --steps 2")),
        (["--text", "- a list", "--count", "3"], Options(text="- a list", count=3)),
        (["--text", "--- what?", "--sure"], Options(text="--- what?", sure=True)),
        (["--text=-x", "--count", "-1"], Options(text="-x", count=-1)),
    ],
)
def test_a_text_may_begin_with_a_dash(monkeypatch, words, found):
    got = []
    monkeypatch.setattr("sys.argv", ["emo", *words])
    flags.from_command_line(flags.command(Options, got.append))
    assert got == [found]


def test_a_flag_is_no_text_of_the_flag_before_it():
    run = flags.command(Options, print)
    for words in (["--text", "--count", "3"], ["--text", "--count=3"], ["--text", "--help"]):
        assert flags.join_texts(run, words) == words
