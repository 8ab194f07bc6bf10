"""AdapterBank among threads: nobody waits for a file but who asked for it, nothing changes within a forward, and no row gets another's adapter."""

import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from adapter_folders import save
from bank_folders import alone, answer, own_model, save_several

from fastlora import AdapterBank, adapters

TASKS = Path("/proc/self/task")
PATIENCE = 120.0  # seconds until a test that hangs fails


@pytest.fixture(name="bank")
def a_bank(tmp_path):
    with AdapterBank(own_model(tmp_path)) as bank:
        for name, folder in save_several(tmp_path, 4).items():
            bank.register(name, folder)
        yield bank


@pytest.fixture(name="gate")
def a_gate(monkeypatch):
    """Files are read once it is set."""
    gate, read = threading.Event(), adapters.read

    def wait(folder):
        assert gate.wait(PATIENCE)
        return read(folder)

    monkeypatch.setattr(adapters, "read", wait)
    yield gate
    gate.set()


@pytest.fixture(name="threads")
def some_threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(bank, names):
    with bank.use(names) as adapter_names:
        return answer(bank.model, adapter_names)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def until(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE
        time.sleep(0.001)


def test_others_go_on_while_a_file_is_read(bank, gate, threads, tmp_path):
    gate.set()
    bank.load("a0").result()
    gate.clear()
    waiting = threads.submit(ask, bank, ["a1", "a0"])
    future = bank.load("a1")
    for _ in range(5):
        close(ask(bank, ["a0"])[0], alone(tmp_path / "a0"))
    assert not waiting.done() and not future.done() and bank.resident == ("a0",)
    gate.set()
    close(waiting.result(PATIENCE)[0], alone(tmp_path / "a1"))
    assert future.result(PATIENCE) is None and bank.stats.loads == 2


def test_what_is_ready_goes_before_the_next_forward_and_not_into_one(bank, threads):
    """A model that is never idle, as one forward begins before another ends, gets its adapters still."""
    bank.load("a0").result()
    with bank.use(["a0"]):
        future = bank.load("a1")
        until(lambda: bank._ready)
        keys = [name for name, _ in bank.model.named_parameters()]
        late = threads.submit(ask, bank, ["own"])
        time.sleep(0.05)
        assert not future.done() and not late.done(), "who comes now waits for this forward alone"
        assert [name for name, _ in bank.model.named_parameters()] == keys
    late.result(PATIENCE)
    assert future.done() and {*bank.resident} == {"a0", "a1"}


def test_nothing_is_evicted_under_a_forward(bank, threads, tmp_path):
    bank.load("a2").result()
    bank.budget_bytes = bank.stats.bytes
    with bank.use(["a2"]) as names:
        waiting = threads.submit(ask, bank, ["a1"])
        until(lambda: bank._ready)
        close(answer(bank.model, names)[0], alone(tmp_path / "a2"))
        assert bank.resident == ("a2",) and not waiting.done()
    close(waiting.result(PATIENCE)[0], alone(tmp_path / "a1"))
    assert bank.resident == ("a1",)


def test_a_large_one_does_not_wait_for_ever_behind_small_ones(bank, threads, tmp_path):
    """A model that is never idle, whose forwards all need what would have to go: who comes now waits until it has gone."""
    for name in ("a2", "a0"):  # ranks 4 and 2
        bank.load(name).result()
        if name == "a2":
            bank.budget_bytes = bank.stats.bytes
    with bank.use(["a0"]) as names:
        large = threads.submit(ask, bank, ["a2"])
        until(lambda: bank._ready)
        late = threads.submit(ask, bank, ["a0"])
        time.sleep(0.05)
        assert not late.done() and bank.resident == ("a0",)
        close(answer(bank.model, names)[0], alone(tmp_path / "a0"))
    for name, found in (("a2", large), ("a0", late)):
        close(found.result(PATIENCE)[0], alone(tmp_path / name))
    assert bank.stats.evictions == 3 and bank.stats.bytes <= bank.budget_bytes


def test_two_that_fill_the_budget_take_turns(bank, threads, tmp_path):
    for name in ("a1", "a2"):
        bank.load(name).result()
    bank.budget_bytes = bank.stats.bytes
    expected = {name: alone(tmp_path / name) for name in bank.registered}  # which draws from torch's one generator

    def run(names):
        for _ in range(8):
            for row, name in zip(ask(bank, names), names, strict=True):
                close(row, expected[name])

    for done in [threads.submit(run, names) for names in (["a0", "a3"], ["a1", "a2"], ["a2", "a0"], ["a3"])]:
        done.result(PATIENCE)
    assert bank.stats.bytes <= bank.budget_bytes


def test_new_layers_wait_for_the_forwards_that_run(bank, threads, tmp_path):
    folder = save(tmp_path / "wide", target_modules=["o_proj"])
    with bank.use(["a0"]) as names:
        registering = threads.submit(bank.register, "wide", folder)
        until(lambda: bank._exclusive)
        close(answer(bank.model, names)[0], alone(tmp_path / "a0"))
        assert not registering.done() and "wide" not in bank.registered
    registering.result(PATIENCE)
    close(ask(bank, ["wide"])[0], alone(folder))


def test_inside_a_use_the_model_stays(bank, tmp_path):
    bank.load("a1").result()
    with bank.use(["a0"]):
        with bank.use(["a1", "__base__"]):
            pass
        with pytest.raises(RuntimeError, match="a2, a3 are not all resident"), bank.use(["a2", "a3"]):
            pass
        with pytest.raises(RuntimeError, match="outside of `use`"):
            bank.unregister("a1")
        with pytest.raises(RuntimeError, match="outside of `use`"):
            bank.register("wide", save(tmp_path / "wide", target_modules=["o_proj"]))
    with pytest.raises(KeyError), bank.use(["a0"]):
        raise KeyError
    bank.unregister("a1")
    assert bank.resident == ("a0",) and bank._running == 0


def test_what_is_forgotten_or_closed_while_it_is_read_never_comes(bank, gate, threads, tmp_path):
    future = bank.load("a0")
    bank.unregister("a0")
    again = bank.load("a1")
    assert again.cancel()  # by who asked: it comes all the same
    closing = bank.load("a2")
    gate.set()
    until(lambda: "a1" in bank.resident)
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    closing.result(PATIENCE)
    bank.register("a0", tmp_path / "a0")
    gate.clear()
    last = bank.load("a3")
    ending = threads.submit(bank.close)
    time.sleep(0.05)
    gate.set()
    ending.result(PATIENCE)
    assert last.cancelled() or last.result(0) is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        bank.load("a0")
    close(ask(bank, ["a1"])[0], alone(tmp_path / "a1"))


def test_a_load_behind_a_swap_does_not_bring_the_old_files_back(bank, gate, tmp_path):
    swapped = bank.swap("a0", tmp_path / "a3")
    loaded = bank.load("a0")
    gate.set()
    swapped.result(PATIENCE), loaded.result(PATIENCE)
    close(ask(bank, ["a0"])[0], alone(tmp_path / "a3"))


@pytest.mark.skipif(not TASKS.is_dir(), reason="the system does not list a process's threads")
def test_the_reading_thread_has_no_helpers(tmp_path):
    """With helpers of its own, everyone's would be more than there are cores, and OpenMP would let them doze."""
    few = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        model = own_model(tmp_path, dtype=torch.bfloat16)
        folder = save(tmp_path / "large", lambda: tiny.llama().bfloat16(), target_modules=["q_proj"], r=2100)
        with AdapterBank(model) as bank:
            bank.register("large", folder)
            bank.register("small", save(tmp_path / "small", target_modules=["q_proj"], r=2))
            torch.ones(1 << 20).sum()  # this thread has its helpers by now
            bank.load("small").result()  # and the reading thread is there
            before = len([*TASKS.iterdir()])
            bank.load("large").result()
            assert len([*TASKS.iterdir()]) == before
    finally:
        torch.set_num_threads(few)


def test_every_row_of_many_threads_gets_its_own_adapter(tmp_path):
    """Loads, evictions, swaps and bad files under a mixed load: each answer is that of the same row alone."""
    model = own_model(tmp_path)
    folders = save_several(tmp_path, 9)
    swapped = [folders.pop("a7"), folders.pop("a8")]
    bad = tmp_path / "bad"
    save(bad, target_modules=["q_proj", "v_proj"], r=2)
    expected = {name: alone(folder) for name, folder in folders.items()}
    expected |= {"own": alone(tmp_path / "own"), "__base__": alone(None)}
    either = [alone(folder) for folder in swapped]
    with AdapterBank(model, budget_bytes=12_000) as bank:
        for name, folder in {**folders, "swapped": swapped[0], "bad": bad}.items():
            bank.register(name, folder)
        (bad / "adapter_model.safetensors").write_bytes(b"\x08")
        end = threading.Event()

        def serve(seed):
            draw = random.Random(seed)
            for _ in range(20):
                names = draw.choices([*expected, "swapped"], k=draw.randint(1, 3))
                if draw.random() < 0.2:
                    bank.load(draw.choice([*folders, "bad"]))
                for row, name in zip(ask(bank, names), names, strict=True):
                    if name == "swapped":
                        assert any(torch.allclose(row, one, rtol=1e-4, atol=1e-4) for one in either)
                    else:
                        close(row, expected[name])

        def exchange():
            number = 0
            while not end.is_set():
                number += 1
                bank.swap("swapped", swapped[number % 2]).result(PATIENCE)
                with pytest.raises(adapters.AdapterError):
                    bank.load("bad").result(PATIENCE)

        with ThreadPoolExecutor(5) as pool:
            exchanging = pool.submit(exchange)
            try:
                for one in [pool.submit(serve, seed) for seed in range(4)]:
                    one.result(PATIENCE)
            finally:
                end.set()
            exchanging.result(PATIENCE)
        assert bank.stats.bytes <= 12_000 and bank.stats.evictions and bank.stats.swaps and bank._running == 0
