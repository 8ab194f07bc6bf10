"""The server with a bank: adapters are read when somebody asks for them and leave for others; no answer changes by that, and nobody else waits."""

import itertools
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
from safetensors.torch import load_file, save_file

from fastlora.adapters import AdapterError
from fastlora.bank import AdapterBank
from fastlora.serving.adapters import NoRoom
from fastlora.serving.engine import MOST_PASSED, Engine, EngineError, Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    served.save(found)
    (found / "adapters" / "cut").mkdir()
    for path in (found / "adapters" / "red").iterdir():
        shutil.copy(path, found / "adapters" / "cut")
    file = found / "adapters" / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return found


def bank_of(engine: Engine) -> AdapterBank:
    assert engine.adapters.bank is not None
    return engine.adapters.bank


@pytest.fixture(scope="module")
def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each adapter in memory."""
    with served.running(served.load(folder, max_adapter_bytes=1 << 30, max_length=64)) as engine:
        found, before = {}, 0
        for name in served.RANKS:
            served.answers(engine, [Request([5, 6], name, 2)])
            found[name] = bank_of(engine).stats.bytes - before
            before += found[name]
    return found


@pytest.fixture
def engine(folder: Path, sizes: dict[str, int]) -> Iterator[Engine]:
    """With room for the largest adapter and another."""
    budget = sizes["blue"] + sizes["green"]
    with served.running(served.load(folder, max_adapter_bytes=budget, max_rows=6, max_length=200)) as found:
        yield found


def test_answers_are_those_of_adapters_that_stay(engine: Engine, folder: Path) -> None:
    with tiny.on_cpu():
        shutil.rmtree(folder / "all", ignore_errors=True)
        (folder / "all").mkdir()
        shutil.copytree(folder / "adapters", folder / "all" / "adapters", ignore=shutil.ignore_patterns("cut"))
        (folder / "all" / served.BASE).symlink_to(folder / served.BASE)
    asked = served.requests(40, 7)
    with served.running(served.load(folder / "all", max_rows=6, max_length=200)) as peer:
        expected = served.answers(peer, asked)
    assert bank_of(engine).resident == ()
    assert served.answers(engine, asked) == expected
    stats = bank_of(engine).stats
    assert stats.evictions > 0 and stats.bytes <= (stats.budget_bytes or 0) and stats.pinned == 0
    assert [served.answers(engine, [one])[0] for one in asked[:8]] == expected[:8]


def test_nobody_hears_of_the_banks_own_adapter(folder: Path) -> None:
    """It holds the layers, and nobody asks for it: that it changes nothing is no news."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        served.load(folder, max_adapter_bytes=1 << 30, max_length=64)
    assert not [one for one in told if "fastlora" in str(one.message)]


def test_a_damaged_file_is_the_error_of_who_asked(engine: Engine) -> None:
    heard = [served.Heard() for _ in range(3)]
    for one, name in zip(heard, ("cut", "red", "cut"), strict=True):
        engine.submit(Request([5, 6], name, 4), one)
    for one in (heard[0], heard[2]):
        with pytest.raises(EngineError, match="the adapter cut cannot be used"):
            one.answer()
    assert heard[1].answer()[1] == "length"
    assert engine.counts.answers["cut", "failed"] == 2 and engine.load == (0, 0)
    assert bank_of(engine).resident == ("adapter-3",)


def test_an_adapter_larger_than_all_there_is(folder: Path, sizes: dict[str, int]) -> None:
    budget = sizes["blue"] - 1
    with served.running(served.load(folder, max_adapter_bytes=budget, max_rows=6, max_length=64)) as engine:
        heard = [served.Heard() for _ in range(4)]
        for one, name in zip(heard, ("red", "blue", "green", "blue"), strict=True):
            engine.submit(Request([5, 6], name, 6), one)
        for one in (heard[0], heard[2]):
            assert one.answer()[1] == "length"
        for one in (heard[1], heard[3]):
            with pytest.raises(EngineError, match="the adapter blue cannot be used"):
                one.answer()


@pytest.mark.parametrize("max_adapter_bytes", [None, 1 << 30], ids=["all", "bank"])
def test_an_adapter_that_changes_nothing_is_served_where_that_is_allowed(
    tmp_path: Path, max_adapter_bytes: int | None
) -> None:
    served.save(tmp_path)
    file = tmp_path / "adapters" / "red" / "adapter_model.safetensors"
    save_file({name: value * ("lora_B" not in name) for name, value in load_file(file).items()}, file)
    options = {"max_length": 64, "max_adapter_bytes": max_adapter_bytes}
    asked = [Request([5, 6], name, 4) for name in ("red", served.BASE)]
    with served.running(served.load(tmp_path, allow_noop=True, **options)) as engine:
        assert len(set(served.answers(engine, asked))) == 1
    with pytest.raises((AdapterError, EngineError), match="changes nothing|the adapter red cannot be used"):
        with served.running(served.load(tmp_path, **options)) as engine:
            served.answers(engine, asked[:1])
    with pytest.raises(ValueError, match="allow_missing=True: expected no max_adapter_bytes"):
        served.load(tmp_path, allow_missing=True, max_adapter_bytes=1 << 30)


def test_who_found_no_room_is_not_told_so_when_there_is_some_by_then(engine: Engine) -> None:
    """The others may have ended between the bank's answer and the look at it."""
    adapters = engine.adapters
    names = [str(adapters.find(name)) for name in ("blue", "red", "green")]
    for name in names:
        adapters.keep(name)
    wait_until(lambda: all(one.done() for one in adapters._coming.values()))
    for name in names[:2]:
        assert adapters.is_there(name)
        adapters.release(name)
    with pytest.raises(NoRoom):
        adapters.is_there(names[2])
    adapters.release(names[2])
    assert not adapters.keeps_any
    adapters.keep(names[2])
    wait_until(lambda: adapters.is_there(names[2]))
    adapters.release(names[2])
    assert bank_of(engine).stats.pinned == 0


def test_who_is_kept_meanwhile_may_be_in_the_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter whose file is being read finds those that were there already, and are wanted again."""
    served.answers(engine, [Request([5, 6], name, 2) for name in ("red", "green")])
    adapters, build, go_on = engine.adapters, AdapterBank._build, threading.Event()

    def waiting(self: AdapterBank, job: Any) -> Any:
        assert go_on.wait(60)
        return build(self, job)

    monkeypatch.setattr(AdapterBank, "_build", waiting)
    names = [str(adapters.find(name)) for name in ("blue", "red", "green")]
    for name in names:
        adapters.keep(name)
    go_on.set()
    for name in names[1:]:
        assert adapters.is_there(name)
    wait_until(adapters._coming[names[0]].done)
    with pytest.raises(NoRoom):
        adapters.is_there(names[0])
    for name in names:
        adapters.release(name)


def test_one_that_finds_no_room_is_not_passed_for_ever(folder: Path, sizes: dict[str, int]) -> None:
    """Of many rows whose small adapter is never let go, no more than MOST_PASSED go before the one that wants the large one's room."""
    budget = sizes["blue"] + sizes["red"] - 1
    with served.running(
        served.load(folder, max_adapter_bytes=budget, max_rows=3, max_length=64, max_queue=300)
    ) as engine:
        ended: list[str] = []
        heard = [served.Heard() for _ in range(4 * MOST_PASSED)]
        names = ["red", "red", "blue", *["red", served.BASE] * (2 * MOST_PASSED - 1)][: len(heard)]

        def noted(listener: served.Heard, name: str) -> Any:
            def hear(news: Any) -> None:
                if getattr(news, "finish", None) is not None:
                    ended.append(name)
                listener(news)

            return hear

        for i, (one, name) in enumerate(zip(heard, names, strict=True)):
            engine.submit(Request([5, 6], name, 3 + i % 4), noted(one, name))
        assert {one.answer()[1] for one in heard} == {"length"}
    place = ended.index("blue")
    assert ended[:place].count("red") <= 2 + MOST_PASSED + 3 and len(ended) == len(names)
    assert place < len(ended) - MOST_PASSED, "many reds are left"


def negated(adapter: Path, to: Path) -> Path:
    """A copy whose update is the opposite."""
    shutil.copytree(adapter, to)
    file = to / "adapter_model.safetensors"
    save_file({name: value * (-1 if "lora_B" in name else 1) for name, value in load_file(file).items()}, file)
    return to


def wait_until(is_so: Any) -> None:
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.05)
    pytest.fail("it never came")


def test_nobody_else_waits_for_a_file(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    served.answers(engine, [Request([5, 6], "red", 2)])
    build = AdapterBank._build

    def slow(self: AdapterBank, job: Any) -> Any:
        time.sleep(0.5)
        return build(self, job)

    monkeypatch.setattr(AdapterBank, "_build", slow)
    late, soon = served.Heard(), served.Heard()
    engine.submit(Request([5, 6], "green", 4), late)
    engine.submit(Request([5, 6], "red", 4), soon)
    assert soon.answer()[1] == "length"
    assert late.news.empty()
    row = engine.submit(Request([5, 6], "blue", 4), served.Heard())
    engine.cancel(row)  # while its file is awaited
    assert late.answer()[1] == "length"
    assert served.answers(engine, [Request([5, 6], "blue", 4)])[0][1] == "length"
    assert bank_of(engine).stats.pinned == 0


def test_adapters_come_and_go_and_are_swapped_under_a_mixture(
    folder: Path, sizes: dict[str, int], tmp_path: Path
) -> None:
    """SOAK: seconds of it. No answer is lost, or another adapter's, or of two versions of one."""
    sources = folder / "adapters" / "red", negated(folder / "adapters" / "red", tmp_path / "red")
    engine = served.load(folder, max_adapter_bytes=sizes["blue"] + sizes["green"], max_rows=6, max_length=200)
    bank, ended = bank_of(engine), threading.Event()
    swaps: list[Any] = []

    def swap() -> None:
        for source in itertools.cycle(sources):
            if ended.wait(0.3):
                return
            swaps.append(bank.swap("adapter-3", source))

    swapping = threading.Thread(target=swap)
    versions = [lambda source=one: bank.swap("adapter-3", source).result(60) for one in sources]
    names, seconds = [served.BASE, *served.RANKS], float(os.environ.get("SOAK", 4))
    with served.listening(engine) as port:
        try:
            wrong = served.mixture(port, names, seconds, versions, swapping.start, damaged=["cut"])
        finally:
            ended.set()
            if swapping.ident is not None:
                swapping.join()
    assert wrong == []
    assert bank.stats.evictions > 0 and bank.stats.swaps > 0 and bank.stats.pinned == 0
    assert engine.load == (0, 0)


def test_an_answer_is_of_one_version_of_its_adapter(folder: Path, tmp_path: Path) -> None:
    """A swap waits for those who have begun with the old weights, and who comes after it waits for the swap."""
    other = negated(folder / "adapters" / "red", tmp_path / "red")
    asked = [Request([5, 6 + i], "red", 40) for i in range(6)]
    with served.running(served.load(folder, max_adapter_bytes=1 << 30, max_rows=4, max_length=64)) as engine:
        bank, versions = bank_of(engine), []
        for source in (folder / "adapters" / "red", other):
            bank.swap("adapter-3", source).result()
            versions.append(served.answers(engine, asked))
        assert all(one != two for one, two in zip(*versions, strict=True))
        seen, swaps = set(), []
        for turn in range(12):
            heard = [served.Heard() for _ in asked]
            for one, request in zip(heard, asked, strict=True):
                engine.submit(request, one)
            first = heard[0].news.get(timeout=60)  # it is under way
            swaps.append(bank.swap("adapter-3", (folder / "adapters" / "red", other)[turn % 2]))
            texts = [one.answer() for one in heard]
            for i, (text, finish) in enumerate(texts):
                whole = (first.text if i == 0 else "") + text, finish
                of = [number for number, version in enumerate(versions) if version[i] == whole]
                assert len(of) == 1, f"turn {turn}, answer {i}: of neither version"
                seen.add((turn % 2, of[0]))
        assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}, "each turn's first rows have the old weights, its last the new"
        for one in swaps:
            one.result(60)
        assert bank.stats.swaps == 14 and bank.stats.pinned == 0
        assert all(entry.holds == 0 for entry in bank._entries.values())
