"""A stop request is noted, once, while the block lasts, and agreed on by all processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from harness import OneOfMany
from simulated import Rank, run_ranks

from accel_trainer import signals
from accel_trainer.errors import Interrupted, UserError
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


@pytest.mark.parametrize("asked", [True, False])
def test_between_micro_batches_a_request_is_heard(asked: bool) -> None:
    with StopRequest() as stop:
        between = stop.between(ALONE)
        between()
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted, match="while evaluating"):
                between()
        else:
            between()


def test_an_evaluation_has_a_pace_of_its_own(clock: Time) -> None:
    """Fast steps make the processes agree every hundredth; slow micro-batches must not wait for a hundred of them."""
    group: Any = Together()
    with StopRequest() as stop:
        for _ in range(300):
            assert not stop.agreed(group)
        before = group.calls
        between = stop.between(group)
        for _ in range(6):
            between()
            clock.now += 2.0
        assert group.calls == before + 5  # but for the second: the first call, before anything was done, told nothing


def test_what_is_asked_after_a_quick_save_tells_nothing_of_the_pace(clock: Time) -> None:
    group: Any = Together()
    with StopRequest() as stop:
        for _ in range(10):
            clock.now += 5.0
            before = group.calls
            assert not stop.agreed(group)
            assert group.calls == before + 1
            clock.now += 0.05
            assert not stop.agreed(group, now=True)


def test_the_interval_grows_step_by_step(clock: Time) -> None:
    assert agreements(clock, Together(), [1e-4] * 500) == [1, 3, 7, 15, 31, 63, 127, 227, 327, 427]


def test_a_closed_terminal_stops_unless_nohup_said_otherwise() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signals.stop_signals.cache_clear()
        with pytest.raises(Interrupted), interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.stop_signals.cache_clear()
        with interrupted_by_signals(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed(ALONE)
    finally:
        signal.signal(signal.SIGHUP, before)
        signals.stop_signals.cache_clear()


def test_other_threads_leave_signals_alone() -> None:
    seen: list[Any] = []

    def work() -> None:
        with interrupted_by_signals(), StopRequest() as stop:
            seen.append(stop.agreed(ALONE))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


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
    """Two processes, of which the other one was asked, or not; its steps take as long, or some given seconds."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, others: float = 0.0, seconds: float | None = None) -> None:
        self.others, self.seconds, self.calls = others, seconds, 0

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.calls += 1
        return tensor + torch.tensor([self.others, tensor[1] if self.seconds is None else self.seconds])


@pytest.mark.parametrize(("mine", "others"), [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_one_request_stops_all(mine: bool, others: float) -> None:
    group: Any = Together(others)
    with pytest.raises(Interrupted, match="honoured"), StopRequest() as stop:
        if mine:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(group) == (mine or bool(others))
        raise Interrupted("honoured")
    assert group.calls == 1  # asked or not, everyone takes part


def agreements(clock: Time, group: Any, seconds: list[float]) -> list[int]:
    """The steps, counted from 1, after which several processes agree, if steps take these seconds."""
    found = []
    with StopRequest() as stop:
        for step, duration in enumerate(seconds, start=1):
            clock.now += duration
            before = group.calls
            assert not stop.agreed(group)
            if group.calls > before:
                found.append(step)
    return found


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (30.0, 1),
        (1.0, 1),
        (0.25, 4),
        (0.125, 8),
        (0.011, 90),
        (0.0, 100),  # a clock that stands still
        (1e-5, 100),
    ],
)
def test_several_processes_agree_after_the_first_step_and_then_once_a_second(
    clock: Time, seconds: float, steps: int
) -> None:
    """And a hundred steps apart at most."""
    assert agreements(clock, Together(), [seconds] * 400) == growing(steps, 400)


def growing(most: int, until: int) -> list[int]:
    """Steps whose distance grows from one to two, four and so on, up to `most`."""
    found, distance = [1], 1
    while found[-1] + (distance := min(2 * distance, most)) <= until:
        found.append(found[-1] + distance)
    return found


def test_a_moment_that_all_know_of_does_not_wait(clock: Time) -> None:
    group: Any = Together()
    with StopRequest() as stop:
        for _ in range(4):
            assert not stop.agreed(group)
            clock.now += 0.01
        assert group.calls == 2  # after the first and the third step
        assert not stop.agreed(group, now=True)
        assert group.calls == 3


def test_one_process_alone_knows_at_every_step(clock: Time) -> None:
    with pytest.raises(Interrupted, match="honoured"), StopRequest() as stop:
        for _ in range(5):
            assert not stop.agreed(ALONE)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(ALONE)
        raise Interrupted("honoured")


def test_the_interval_follows_the_pace(clock: Time) -> None:
    """A first step that compiles, fast ones, and slow ones: what was measured since the last time counts."""
    found = agreements(clock, Together(), [20.0] + [0.125] * 22 + [0.5] * 12)
    # At 20 s a step: after every one. At 8 a second: every 2, 4, 8. Of the last 8 all but one were fast: 5; then they are slow.
    assert found == [1, 2, 4, 8, 16, 24, 29, 31, 33, 35]


@pytest.mark.parametrize(("own", "steps"), [(0.03125, 8), (0.28125, 4), (3.0, 1)])
def test_the_interval_is_that_of_the_mean_pace_of_all(clock: Time, own: float, steps: int) -> None:
    """Each process measures its own seconds; what all of them make of these is one number, never their own."""
    assert agreements(clock, Together(seconds=0.21875), [own] * 50) == growing(steps, 50)


@pytest.mark.parametrize("count", [2, 3])
def test_clocks_that_differ_make_no_process_agree_alone(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Who takes part in a collective step that others do not would wait for ever."""
    times = threading.local()

    class Uneven:
        """Each process's own clock: of another pace, which changes as it runs."""

        @staticmethod
        def monotonic() -> float:
            return getattr(times, "now", 0.0)

    monkeypatch.setattr(signals, "time", Uneven)
    taken: list[list[int]] = [[] for _ in range(count)]
    told: list[list[int]] = [[] for _ in range(count)]

    def work(rank: Rank) -> None:
        draw = np.random.default_rng(rank.process_index)
        stop = StopRequest()
        reduce = rank.reduce

        def counted(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            taken[rank.process_index].append(step)
            return reduce(tensor, reduction)

        rank.reduce = counted  # type: ignore[method-assign]
        for step in range(1, 501):
            times.now = getattr(times, "now", 0.0) + draw.exponential(10.0 ** -(step // 100))
            if step == 330 and rank.process_index == count - 1:
                stop._note(signal.SIGTERM, None)
            if stop.agreed(rank):  # type: ignore[arg-type]
                told[rank.process_index].append(step)
                break

    run_ranks(count, work)
    assert all(steps == taken[0] for steps in taken)
    assert all(steps == told[0] for steps in told)
    assert taken[0][0] == 1
    assert np.diff(taken[0]).min() == 1
    assert 1 < np.diff(taken[0]).max() <= 100
    (stopped,) = told[0]
    assert taken[0][-1] == stopped
    assert 330 <= stopped < 430


def test_an_error_on_its_way_is_not_lost_to_a_signal() -> None:
    """As on the first process, whose launcher stops it while it tidies up, because another one has ended already."""

    @contextmanager
    def tidying() -> Iterator[None]:
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def block(error: Exception | None) -> None:
        with interrupted_by_signals(), tidying():
            if error is not None:
                raise error

    with pytest.raises(UserError, match="no space"):
        block(UserError("no space"))
    for other in (None, ValueError("of a library, which may be handled")):
        with pytest.raises(Interrupted):
            block(other)
