"""A stop request is noted, once, while the block lasts, and agreed on by all processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import OneOfMany

from accel_trainer import signals
from accel_trainer.errors import Interrupted
from accel_trainer.signals import StopRequest, StopSignal, interrupted_by_signals

ALONE: Any = OneOfMany(0, 1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match="honoured"), StopRequest() as stop:
        assert not stop.agreed(ALONE)
        os.kill(os.getpid(), number)
        assert stop.agreed(ALONE)
        assert stop.agreed(ALONE)
        raise Interrupted("honoured")


def test_a_request_that_no_step_heard_is_not_lost() -> None:
    with pytest.raises(Interrupted, match="after the last step"), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_steps_interrupts_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="--resume"), interrupted_by_signals():
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_library_takes_it_for_its_own_failure(number: signal.Signals) -> None:
    """A Hub client, for one, meets a failed download by trying again."""
    attempts = 0

    def persistent() -> None:
        nonlocal attempts
        while attempts < 5:
            attempts += 1
            try:
                os.kill(os.getpid(), number)
            except Exception:
                continue

    with pytest.raises(Interrupted), interrupted_by_signals():
        persistent()
    assert attempts == 1


def test_the_stop_signal_is_a_keyboard_interrupt_inside() -> None:
    def inside() -> None:
        with pytest.raises(StopSignal) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(caught.value, KeyboardInterrupt)
        raise caught.value

    with pytest.raises(Interrupted) as told, interrupted_by_signals():
        inside()
    assert isinstance(told.value.__cause__, StopSignal)
    assert told.value.exit_code == 75


class Time:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    own = Time()
    monkeypatch.setattr(signals, "time", own)
    return own


def test_a_storm_is_one_request(clock: Time) -> None:
    """A scheduler repeats SIGTERM for as long as it likes; a launcher and a terminal both send the first SIGINT."""
    with pytest.raises(Interrupted, match="honoured"), interrupted_by_signals(), StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            clock.now += signals.IMPATIENCE / 4
        for _ in range(20):
            clock.now += 10
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(ALONE)
        raise Interrupted("honoured")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_an_impatient_ctrl_c_does_not_wait_for_the_step(clock: Time, first: signal.Signals) -> None:
    with pytest.raises(Interrupted, match="interrupted; run"), interrupted_by_signals(), StopRequest():
        os.kill(os.getpid(), first)
        clock.now += signals.IMPATIENCE
        os.kill(os.getpid(), signal.SIGINT)
        clock.now += 0.01
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")


def test_handlers_are_given_back() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with StopRequest():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    with pytest.raises(ValueError, match="inside"), StopRequest():
        raise ValueError("inside")
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(seen) == 2


class Together:
    """Two processes, of which the other one was asked, or not."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, others: float) -> None:
        self.others, self.calls = others, 0

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.calls += 1
        return tensor + self.others


@pytest.mark.parametrize(("mine", "others"), [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_one_request_stops_all(mine: bool, others: float) -> None:
    group: Any = Together(others)
    with pytest.raises(Interrupted, match="honoured"), StopRequest() as stop:
        if mine:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(group) == (mine or bool(others))
        raise Interrupted("honoured")
    assert group.calls == 1  # asked or not, everyone takes part
