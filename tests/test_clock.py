"""What is timed in turn: whose turn it is, how often, and what is made of the samples."""

from itertools import islice

import pytest
import torch

from fastlora.choice import clock


class FakeClock:
    """Every run costs what `costs` says, times a factor that grows from call to call; notes who ran and with which
    turns.
    """

    def __init__(self, drift: float = 1.0) -> None:
        self.factor, self.drift = 1.0, drift
        self.order: list[str] = []
        self.turns: list[int] = []

    def __call__(self, run: clock.Run, first: int, calls: int) -> float:
        self.factor *= self.drift
        self.turns += range(first, first + calls)
        name, cost = run(first)  # type: ignore[misc]
        self.order.append(name)
        return cost * self.factor


def fake_runs(**costs: float) -> dict[str, clock.Run]:
    def make(name: str, cost: float) -> clock.Run:
        return lambda turn: (name, cost)

    return {name: make(name, cost) for name, cost in costs.items()}


def test_clock_gives_medians_over_the_baseline() -> None:
    times = clock.time_in_turn(fake_runs(base=0.01, double=0.02), FakeClock(), 0.59)
    assert times["base"] == clock.Timing(0.01, 0.01, 1.0, 20)
    assert times["double"] == clock.Timing(0.02, 0.02, 2.0, 20)


def test_clock_begins_every_round_with_another_and_never_repeats_a_turn() -> None:
    fake = FakeClock()
    clock.time_in_turn(fake_runs(a=1.0, b=1.0, c=1.0), fake, 1.0)
    assert "".join(fake.order[3:]) == "abc" + "bca" + "cab" + "abc" + "bca"  # a warm-up each, then the fewest rounds
    assert fake.turns == list(range(len(fake.turns)))


def test_clock_ratio_survives_a_machine_that_slows_down() -> None:
    times = clock.time_in_turn(fake_runs(base=0.01, same=0.01), FakeClock(drift=1.01), 2.0)
    assert times["base"].rounds > 20
    assert abs(times["same"].ratio - 1) <= 0.011


def test_clock_repeats_short_calls_within_a_sample() -> None:
    fake = FakeClock()
    times = clock.time_in_turn(fake_runs(short=3e-6), fake, 1.0)
    assert times["short"].rounds == clock.MOST_ROUNDS
    assert len(fake.turns) == 2 * clock.WARM_UP_CALLS + 67 * clock.MOST_ROUNDS


def test_clock_refuses_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="runs"):
        clock.time_in_turn({}, FakeClock(), 1.0)
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            clock.time_in_turn(fake_runs(base=1.0), FakeClock(), budget)


def test_clock_warms_up_as_it_is_told() -> None:
    fake = FakeClock()
    times = clock.time_in_turn(fake_runs(a=0.001, b=0.1), fake, 0.01, warm_up=(2, 4), fewest=3)
    assert "".join(fake.order) == "aab" + "ab" + "ba" + "ab"  # b is slow: once is enough
    assert fake.turns == list(range(2 + 4 + 2 + 3 * 2)) and times["b"].rounds == 3


def test_rounds_go_on_for_as_long_as_they_are_taken() -> None:
    asked: list[str] = []

    def sample(name: str) -> int:
        asked.append(name)
        return len(asked)

    assert list(islice(clock.rounds_in_turn("ab", sample), 3)) == [{"a": 1, "b": 2}, {"b": 3, "a": 4}, {"a": 5, "b": 6}]
    assert "".join(asked) == "abbaab"


def test_the_hosts_clock_waits_for_a_card_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card had to do before is not in the time, what these calls have launched is; a CPU is not waited for."""
    now, done = [0.0], []

    def synchronize(device: torch.device) -> None:
        done.append(device)
        now[0] += 5.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    for device, seconds in (("cuda", (5.0 + 2 * 1.5) / 2), ("cpu", 1.5)):
        run = clock.HostClock(torch.device(device))
        assert run(lambda turn: now.__setitem__(0, now[0] + 1.5), 0, 2) == seconds
    assert done == [torch.device("cuda")] * 2


def test_the_hosts_clock_gives_the_mean_over_calls() -> None:
    turns: list[int] = []
    assert 0 < clock.HostClock(torch.device("cpu"))(turns.append, 7, 3) < 1
    assert turns == [7, 8, 9]
