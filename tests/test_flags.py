"""Tests how a command ends."""

import pytest

from stanford_alpaca import flags
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error


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
