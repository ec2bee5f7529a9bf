"""Tests how a command ends."""

import signal

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
