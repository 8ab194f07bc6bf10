"""serving/picking.py draws as it is told, serving/words.py hands out what stays, and serving/server.py loads what can be served."""

import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.serving import picking, server
from fastlora.serving.engine import Request
from fastlora.serving.picking import Picker, pick
from fastlora.serving.words import Words

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05]))


def shares(picker: Picker, logits: torch.Tensor = LOGITS, draws: int = 4000) -> list[float]:
    found = torch.tensor([picker.draw(logits) for _ in range(draws)])
    return (torch.bincount(found, minlength=len(logits)) / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.05, 0.4, 0.3, 0.2, 0.05]),
        (0.5, 1.0, [0.0085, 0.5424, 0.3051, 0.1356, 0.0085]),
        (1.0, 0.7, [0, 4 / 7, 3 / 7, 0, 0]),
        (1.0, 0.71, [0, 4 / 9, 3 / 9, 2 / 9, 0]),
        (1.0, 1e-9, [0, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("first_look", [1, 64])
def test_tokens_are_drawn_by_their_chances(
    temperature: float, top_p: float, expected: list[float], first_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more of them have to be sorted than the first few; three standard deviations of 4,000 draws are 0.024."""
    monkeypatch.setattr(picking, "FIRST_LOOK", first_look)
    found = shares(Picker(temperature, top_p, 1))
    assert found == pytest.approx(expected, abs=0.024)
    assert all(share == 0 for share, wanted in zip(found, expected, strict=True) if wanted == 0)


def test_seeds_and_rows() -> None:
    one, same, other = (Picker(1.0, 0.9, seed) for seed in (3, 3, 4))
    assert (drawn := [one.draw(LOGITS) for _ in range(20)]) == [same.draw(LOGITS) for _ in range(20)]
    assert drawn != [other.draw(LOGITS) for _ in range(20)]
    assert Picker(1.0, 1.0, None).generator.initial_seed() != Picker(1.0, 1.0, None).generator.initial_seed()
    logits = torch.stack([LOGITS, torch.full((5,), float("nan")), LOGITS.flip(0), torch.full((5,), float("inf"))])
    assert pick(logits, [Picker(0.0, 1.0, 0)] * 4) == [1, None, 3, None]
    spiked = torch.full((1, 5), -float("inf")).index_fill_(1, torch.tensor([2]), 0.0)
    assert pick(spiked, [Picker(1.0, 1.0, 0)]) == [2]


def test_a_number_at_the_end_falls_on_no_weight_of_zero() -> None:
    weights = torch.tensor([0.5, 0.5, 0.0])
    assert [picking._at(number, weights) for number in (0.0, 0.4999, 0.5, 1.0)] == [0, 0, 1, 1]
    assert picking._at(0.0, torch.tensor([0.0, 1.0])) == 1


def handed_out(tokenizer: Any, text: str, *stops: str) -> tuple[list[str], bool]:
    words = Words(tokenizer, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(words.push(token))
        if words.stopped:
            break
    return [*pieces, words.close()], words.stopped


@pytest.mark.parametrize("text", ["The cat sleeps.", "naïve 😀 日本 café", " two  spaces ", "a</s>b", "é" * 40])
def test_pieces_are_the_text(text: str) -> None:
    tokenizer = tiny.tokenizer()
    pieces, stopped = handed_out(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and not stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    tokenizer = tiny.tokenizer()
    continuation = tokenizer("é", add_special_tokens=False)["input_ids"][-1]
    words = Words(tokenizer, ())
    pieces = [words.push(continuation) for _ in range(10)]
    assert pieces[:3] == [""] * 3 and all(pieces[3:])
    assert "".join(pieces) + words.close() == "\N{REPLACEMENT CHARACTER}" * 10


def test_a_stop_string_is_held_back_until_it_is_none() -> None:
    tokenizer = tiny.tokenizer()
    pieces, stopped = handed_out(tokenizer, "one STOP two", "STOP", "two")
    assert "".join(pieces) == "one " and stopped
    pieces, stopped = handed_out(tokenizer, "one STO two", "STOP")
    assert "".join(pieces) == "one STO two" and not stopped
    pieces, stopped = handed_out(tokenizer, "it ends in STO", "STOP")
    assert "".join(pieces) == "it ends in STO" and not stopped
    pieces, stopped = handed_out(tokenizer, "ababac", "abac", "bab")
    assert "".join(pieces) == "a" and stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    served.save(found)
    return found


def test_names_and_lengths(folder: Path, tmp_path: Path) -> None:
    (tmp_path / served.BASE).symlink_to(folder / "adapters" / "red")
    with pytest.raises(ValueError, match="its name is the base model's"):
        server.load_engine(str(folder / served.BASE), tmp_path)
    (tmp_path / served.BASE).rename(tmp_path / "__base__")
    with pytest.raises(ValueError, match="its name is the base model's"):
        server.load_engine(str(folder / served.BASE), tmp_path)
    (tmp_path / "__base__").rename(tmp_path / "keys.v1")  # which PEFT could not have for a name
    with tiny.on_cpu():
        engine = server.load_engine(str(folder / served.BASE), tmp_path)
        assert engine.adapters.names == [served.BASE, "keys.v1"] and engine.max_length == 256
        assert server.load_engine(str(folder / served.BASE)).adapters.names == [served.BASE]
        with pytest.raises(ValueError, match="max_length=300: the model has positions for 256"):
            server.load_engine(str(folder / served.BASE), max_length=300)


def test_the_command_says_what_it_needs_and_which_port_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["serve", "--model", str(folder / served.BASE), "--adapters", str(folder / "adapters")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, [*arguments, "--port", str(port)])
    assert done.exit_code == 2 and f"fastlora serve: --port {port}: " in done.output
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.output == "fastlora serve: it needs uvicorn: pip install 'fastlora-kernels[serve]'\n"


def test_an_engine_is_loaded_by_its_own_thread(folder: Path, tmp_path: Path) -> None:
    with tiny.on_cpu():
        engine = server.start_engine(str(folder / served.BASE), folder / "adapters", max_length=64)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            server.start_engine(str(folder / served.BASE), tmp_path / "nowhere")
    assert engine.is_alive
    assert gc.get_freeze_count() > 100_000  # a full collection would let all rows wait for it
    assert served.answers(engine, [Request([5, 6], "red", 4)])[0][1] == "length"
    engine.close()
    assert not engine.is_alive and gc.get_freeze_count() == 0


def test_sigterm_lets_an_answer_end(folder: Path) -> None:
    command = [sys.executable, "-m", "fastlora", "serve", "--model", str(folder / served.BASE)]
    command += ["--adapters", str(folder / "adapters"), "--port", "0", "--max-adapter-bytes", "1000000"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"http://127.0.0.1:(\d+)/v1 answers as base, blue, green, red; Ctrl-C ends it\n", line)
            assert found, line
            body = {"model": "red", "prompt": "The cat", "max_tokens": 200, "temperature": 0, "stream": True}
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.readline()
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
