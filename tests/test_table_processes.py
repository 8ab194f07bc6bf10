"""choice/table.py between processes: what one measured while another waited, and where the cache lies."""

import datetime
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout
from measurements import a_machine, choose, entry, half_times, hold, needs_native, small_weights  # noqa: F401  (fixtures)

import fastlora
from fastlora import environment
from fastlora.choice import table, trial


def test_what_another_process_kept_meanwhile_is_known(machine: Path) -> None:
    assert table.entries("cpu") == []
    table.write(machine, "cpu", [entry(0.5)], "another process")
    assert '"way"' not in machine.read_text() and '"origin"' not in machine.read_text()
    assert table.entries("cpu") == []
    with table.alone("cpu"):
        [found] = table.entries("cpu")
        assert found.ratio == 0.5 and table.has("cpu", "lora_linear", torch.float32, 64, "small", False)
        assert not table.has("cpu", "lora_linear", torch.float32, 64, "small", True)
        assert not table.has("cpu", "lora_linear", torch.float32, 8, "small", False)
        table.keep("cpu", [entry(0.7, rows=8)], "this one")
    table.load_state(None)
    assert {one.ratio for one in table.entries("cpu")} == {0.5, 0.7}  # nothing of the other's was lost


def test_what_another_process_keeps_between_two_measurements_is_not_lost(machine: Path) -> None:
    table.keep("cpu", [entry(0.5)], "this one")
    table.write(machine, "cpu", [entry(0.5), entry(0.6, rows=1)], "another process")
    table.keep("cpu", [entry(0.7, rows=8)], "this one")
    table.load_state(None)
    assert {one.ratio for one in table.entries("cpu")} == {0.5, 0.6, 0.7}


@needs_native
def test_what_was_chosen_before_another_process_measured_is_chosen_again(machine: Path) -> None:
    assert choose() == "cpu"
    table.write(machine, "cpu", [entry(2.0)], "another process")
    with table.alone("cpu"):
        assert choose() == "reference"


def test_one_process_at_a_time(machine: Path) -> None:
    """Until the one before ends, or fails, whoever still looks at why."""

    def another() -> FileLock:
        return FileLock(machine.with_suffix(".lock"))

    with table.alone("cpu"), pytest.raises(Timeout):
        another().acquire(timeout=0)
    with another().acquire(timeout=0):
        pass
    with pytest.raises(ValueError) as failure, table.alone("cpu"):
        raise ValueError("inside")
    with another().acquire(timeout=0):
        assert str(failure.value) == "inside"


def test_the_caches_folder_is_made(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "not" / "there"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with table.alone("cpu"):
                pass
        monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "neither" / "there"))
        for _ in range(2):
            assert table.keep("cpu", [entry(0.5)], "a test") == table.cache_path("cpu")
    assert table.cache_path("cpu").parent == tmp_path / "neither" / "there"


def test_the_caches_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert table.cache_path("cpu").parent == Path("/one")
    monkeypatch.delenv("FASTLORA_CACHE")
    assert table.cache_path("cpu").parent == Path("/two/fastlora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert table.cache_path("cpu").parent == Path("/home/one/.cache/fastlora")
    assert f"-threads{torch.get_num_threads()}.json" in table.cache_path("cpu").name
    monkeypatch.setattr(table, "kind_of", lambda device_type: f"a-{device_type}")
    assert table.cache_path("cuda").name.startswith("a-cuda-torch") and "threads" not in table.cache_path("cuda").name


def test_a_user_without_a_home_has_no_cache(
    machine: Path, timed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container under a number that has no name: a folder called ~ would lie wherever one works."""
    monkeypatch.chdir(tmp_path)
    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as where there is none
    with pytest.warns(UserWarning, match="measurements of this machine cannot be kept: the user has no home") as told:
        trial.try_out(small_weights())
    assert len(told) == 1 and len(table.entries("cpu")) == len(timed)
    assert table.keep("cpu", [], "a test") is None
    assert list(tmp_path.iterdir()) == []
    assert "no folder (the user has no home folder" in environment._measurements()[-1].detail
    table.load_state(None)
    assert table.entries("cpu") == []


def test_each_instruction_set_has_a_cache_of_its_own(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial under FASTLORA_ISA=portable says nothing of what the machine does without."""
    table.keep("cpu", [entry(0.5)], "a test")
    with monkeypatch.context() as patch:
        patch.setattr(table, "instruction_set", lambda: "another")
        table.load_state(None)
        assert table.entries("cpu") == [] and "-isaanother-" in table.cache_path("cpu").name
        table.keep("cpu", [entry(7.0)], "a test")
    table.load_state(None)
    assert [one.ratio for one in table.entries("cpu")] == [0.5]


def test_an_instruction_set_that_there_is_not_is_told_before_anything_is_measured(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise RuntimeError("FASTLORA_ISA=avx1024: expected portable")

    monkeypatch.setattr(table, "instruction_set", refuse)
    with pytest.raises(RuntimeError, match="FASTLORA_ISA=avx1024"):
        trial.try_out(small_weights())
    assert timed == [] and not machine.parent.exists()


@needs_native
def test_the_instruction_set_is_native_cpps() -> None:
    assert table.instruction_set() == fastlora._C.isa()


def test_what_a_machine_calls_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(table, "cpu_facts", lambda: {"model name": "a processor"})
    assert (table.machine_name("cuda"), table.machine_name("cpu")) == ("a card", "a processor")
    monkeypatch.setattr(table, "cpu_facts", dict)
    assert table.machine_name("cpu") == f"{table.platform.system()} {table.platform.machine()}"


def test_the_kind_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: card}.__getitem__)
    assert table.kind_of("cuda") == "nvidia-h100-80gb-hbm3-sm90"


@pytest.mark.parametrize(
    ("vendor", "family", "kind"), [("AuthenticAMD", 0x18, "amd-24-7-avx2"), ("GenuineIntel", 0x19, "intel-25-7-avx2")]
)
def test_only_amds_families_have_names(vendor: str, family: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"vendor_id": vendor, "cpu family": str(family), "model": "7"}
    monkeypatch.setattr(table, "cpu_facts", lambda: facts)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert table.kind_of("cpu") == kind


def test_what_was_measured_says_by_whom_and_when() -> None:
    before = datetime.date.today()
    case = "lora_linear", torch.float32, 64, "small", True, "cpu"
    found, failed, quick = (table.record(*case, ratio, "fused") for ratio in (0.12345, None, 1e-9))
    assert found[:9] == ("lora_linear", "float32", 64, "small", True, "cpu", True, 0.123, found.origin)
    assert found.way == "fused" and (failed.checked, failed.ratio) == (False, None) and quick.ratio == 0.001
    days = (before, datetime.date.today())
    assert found.origin in [f"measured on this machine, {day.isoformat()}" for day in days]


def test_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(table, "open", refuse, raising=False)
    assert table.cpu_facts() == {}
    assert table.machine_name("cpu") == f"{table.platform.system()} {table.platform.machine()}"


def test_the_faster_way_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "cpu", "frozen_linear", "cpu", torch.float16, 64, 100, False
    assert table.way(*case) == ""
    measured = entry(0.5, op="frozen_linear", dtype="float16")._replace(way="packed", without_copy="few_rows")
    table.load_state({"cpu": [measured]})
    assert table.way(*case) == "packed" and table.way("triton", *case[1:]) == ""
    assert table.way(*case, without_copy=True) == "few_rows"
    with monkeypatch.context() as patch:
        patch.setattr(table, "lookup", None)
        assert table.way(*case) == "packed" and table.way(*case, without_copy=True) == "few_rows"
        patch.setattr(table, "forced_way", "plain")
        assert table.way(*case) == "plain" and table.way(*case, without_copy=True) == ""


def test_a_state_is_of_the_card_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = entry(0.5, implementation="triton")
    hold(measured, device_type="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert table.state() == {"cpu": []}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert table.state() == {"cpu": [], "cuda": [list(measured)]}


def test_nothing_is_added_to_a_state_or_to_a_named_table(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not table.is_fixed()
    table.load_state({"cpu": []})
    assert table.is_fixed() and table.entries("cpu") == []
    table.load_state(None)
    assert not table.is_fixed()
    monkeypatch.setenv("FASTLORA_TABLE", "somewhere.json")
    assert table.is_fixed()
