"""Tests SIGTERM and SIGINT, one and several, before and during training."""

import signal

import pytest

from stanford_alpaca.run import signals
from stanford_alpaca.run.signals import StopRequest


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_it_ends_at_once(stop, number, capfd):
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(number)
    assert end.value.code == 75 and capfd.readouterr().err == f"stopped by {number.name}\n"


def test_in_training_it_is_remembered_and_echoes_count_for_nothing(stop, capfd, monkeypatch):
    stop.training = True
    assert not stop
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # from the launcher, for the same Ctrl-C
    signal.raise_signal(signal.SIGTERM)
    assert stop and stop.name == "SIGINT"
    assert capfd.readouterr().out.count("stopping after this step") == 1
    monkeypatch.setattr(signals, "A_HUMAN", 0)
    signal.raise_signal(signal.SIGTERM)  # a cluster may repeat it any number of times
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGINT)
    assert end.value.code == 75


def test_it_speaks_in_the_middle_of_a_line_that_is_written(stop, capfd, monkeypatch):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    stop.training = True
    monkeypatch.setattr("sys.stdout", Busy())
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().out.startswith("\nSIGTERM: stopping after this step")


def test_a_data_loaders_process_leaves_it_to_its_parent(stop):
    stop.training, stop._process = True, -1
    signal.raise_signal(signal.SIGTERM)
    assert not stop
