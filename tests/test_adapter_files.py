"""Adapter files that PEFT does not write: each is an error that names file and key."""

import json
import struct
from pathlib import Path

import pytest
import tiny
import torch
from adapter_folders import A, B, a_folder, change, tensors  # noqa: F401  (a fixture)

from fastlora import adapters
from fastlora.adapters import AdapterError


def write(text: str):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def config(**values):
    return lambda folder: change(folder, **values)


def header(edit, data: bytes | None = None):
    """An edit of the header's text; and other bytes of tensors."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text = edit(content[8 : 8 + length].decode()).encode()
        rest = content[8 + length :] if data is None else data
        file.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return apply


def entries(edit):
    """An edit of the header's entries by key."""

    def apply(text: str) -> str:
        found = json.loads(text)
        edit(found)
        return json.dumps(found)

    return header(apply)


def content(edit):
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return apply


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
DAMAGED_CONFIGS = {
    "null": (write("null"), None, "expected a JSON object, got None"),
    "a list": (write('[{"peft_type": "LORA"}]'), None, "expected a JSON object"),
    "empty": (write(""), None, "not JSON"),
    "no text": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{"), None, "not UTF-8"),
    "cut off": (write('{"peft_type": "LORA", "r": 4'), None, "not JSON"),
    "deep": (write("[" * 100_000), None, "not JSON"),
    "a little too deep": (
        write('{"peft_type": "LORA", "auto_mapping": {"a": ' + "[" * 500 + "]" * 500 + "}}"),
        None,
        "nested deeper than",
    ),
    "5,000 digits": (write('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"), None, "not JSON"),
    "a key twice": (write('{"peft_type": "LORA", "r": 4, "r": 8}'), None, "'r' is there twice"),
    "NaN": (write('{"peft_type": "LORA", "lora_alpha": NaN}'), None, "NaN is no JSON"),
    "no type": (write('{"r": 4}'), "peft_type", "or another of PEFT's methods, got None"),
    "an unknown type": (config(peft_type="NOVEL"), "peft_type", "or another of PEFT's methods, got 'NOVEL'"),
    "a type that is a list": (config(peft_type=["LORA"]), "peft_type", "expected 'LORA'"),
    "another type's size": (config(peft_type="VBLORA", num_vectors=10**12), "num_vectors", "a number up to 10,000,000"),
    "another type's rank": (config(peft_type="OFT", r=-1), "r", "a rank from 1 to 65,536, got -1"),
    "r in words": (config(r="16"), "r", "expected int, got '16'"),
    "r with a fraction": (config(r=4.0), "r", "expected int, got 4.0"),
    "r is true": (config(r=True), "r", "expected int, got True"),
    "r 0": (config(r=0), "r", "expected a rank from 1"),
    "r 1e9": (config(r=10**9), "r", "expected a rank from 1 to 65,536"),
    "r by module of 1e9": (config(rank_pattern={"q_proj": 10**9}), "rank_pattern", "expected ranks"),
    "r by module in words": (config(rank_pattern={"q_proj": "4"}), "rank_pattern", "expected ranks"),
    "r by module as a list": (config(rank_pattern=[4]), "rank_pattern", "expected dict or None"),
    "alpha 1e300": (config(lora_alpha=1e300), "lora_alpha", "expected a number that float32 holds, got 1e\\+300"),
    "alpha of 400 digits": (config(lora_alpha=10**400), "lora_alpha", "expected a number that float32 holds"),
    "alpha in words": (config(lora_alpha="8"), "lora_alpha", "expected float"),
    "alpha by module 1e300": (config(alpha_pattern={"q_proj": -1e300}), "alpha_pattern", "expected numbers"),
    "dropout 2": (config(lora_dropout=2), "lora_dropout", "expected a probability"),
    "modules as a number": (config(target_modules=3), "target_modules", "a list of str"),
    "modules as numbers": (config(target_modules=[3]), "target_modules", "a list of str"),
    "an unknown bias": (config(bias="some"), "bias", "expected 'none' or 'all' or 'lora_only'"),
    "a base that is a number": (
        config(base_model_name_or_path=1),
        "base_model_name_or_path",
        "expected str or None",
    ),
    "an unknown task": (config(task_type="CHESS"), None, "CHESS"),
    "tokens below 0": (config(trainable_token_indices=[-1]), "trainable_token_indices", "expected tokens, 0 or more"),
    "a million layers": (config(layer_replication=[[0, 10**6]]), "layer_replication", "at most 4,096 layers"),
    "what PEFT refuses": (config(target_modules="q", layers_to_transform=[0]), None, "PEFT does not take it"),
}
DAMAGED_TENSORS = {
    "of another rank": (config(r=8), A, "of rank 4, adapter_config.json has 8"),
    "empty": (content(lambda data: b""), None, "no length of a header"),
    "no file of this kind": (content(lambda data: b"PK\3\4" + data), None, "with a header of"),
    "cut off in the header": (content(lambda data: data[:100]), None, "a part of one"),
    "cut off in the tensors": (content(lambda data: data[:-1]), None, "cut off, or grown"),
    "grown": (content(lambda data: data + b"\0"), None, "cut off, or grown"),
    "a header of 2**63 bytes": (
        content(lambda data: b"\xff" * 8 + data[8:]),
        None,
        "with a header of 18,446,744,073,709,551,615",
    ),
    "a header that is a list": (header(lambda text: f"[{text}]"), None, "expected a JSON object"),
    "a deep header": (header(lambda text: '{"a": ' * 50_000), None, "not JSON"),
    "a key twice": (header(lambda text: f'{{"a": {ONE}, "a": {ONE}}}', bytes(4)), None, "'a' is there twice"),
    "overlapping": (
        entries(lambda found: found[A].update(data_offsets=found[B]["data_offsets"])),
        A,
        "its bytes begin at",
    ),
    "out of range": (
        entries(lambda found: found[A].update(data_offsets=[10**12, 10**12 + 512])),
        B,
        "its bytes begin at",
    ),
    "backwards": (entries(lambda found: found[A].update(data_offsets=[512, 0])), A, "does not fill data_offsets"),
    "a shape of 2**80": (entries(lambda found: found[A].update(shape=[2**40, 2**40])), A, "does not fill"),
    "a shape of many digits": (
        entries(lambda found: found[A].update(shape=[10**4000, 10**4000])),
        A,
        "does not fill",
    ),
    "a negative shape": (entries(lambda found: found[A].update(shape=[-4, -32])), A, "expected numbers from 0"),
    "a shape in words": (entries(lambda found: found[A].update(shape="4, 32")), A, "expected numbers from 0"),
    "an entry that is a number": (
        entries(lambda found: found.update({A: 3})),
        A,
        "expected dtype, shape and data_offsets",
    ),
    "an unknown dtype": (entries(lambda found: found[A].update(dtype="F99")), A, "expected one of the dtypes"),
    "integers": (
        tensors(lambda found: found.update({A: found[A].long()})),
        A,
        "expected floating point, got torch.int64",
    ),
    "8 bits": (
        tensors(lambda found: found.update({A: found[A].to(torch.float8_e4m3fn)})),
        A,
        "expected one of the dtypes",
    ),
    "no tensors": (tensors(lambda found: found.clear()), None, "holds no tensors"),
    "no elements": (tensors(lambda found: found.update({A: torch.empty(0, 32)})), A, "has no elements"),
    "NaN": (tensors(lambda found: found[A][0, 0].fill_(torch.nan)), A, "holds NaN or infinity"),
    "infinity": (tensors(lambda found: found[B][-1, -1].fill_(-torch.inf)), B, "holds NaN or infinity"),
    "an update beyond float32": (
        tensors(lambda found: (found[A].fill_(1e20), found[B].fill_(1e20))),
        A,
        "its update is more than float32 holds",
    ),
    "a vector": (tensors(lambda found: found.update({A: found[A][0].clone()})), A, "expected a matrix"),
}
DAMAGED = {
    **{f"config: {name}": ("adapter_config.json", *case) for name, case in DAMAGED_CONFIGS.items()},
    **{f"tensors: {name}": ("adapter_model.safetensors", *case) for name, case in DAMAGED_TENSORS.items()},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_key(name, folder):
    file, damage, key, message = DAMAGED[name]
    damage(folder)
    with pytest.raises(AdapterError, match=message) as raised:
        adapters.read(folder)
    assert raised.value.file == folder / file and raised.value.key == key
    assert str(raised.value).startswith(f"adapter={folder}: {file}: ") and "--" not in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_what_is_no_adapter_folder(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        adapters.read(tmp_path / "none")
    model = tiny.save_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json; it holds a model, and is used as model="):
        adapters.read(model)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_model\.safetensors"):
        adapters.read(folder)


def test_fields_of_another_peft_are_told_and_ignored(folder, caplog):
    change(folder, use_novel=True, runtime_config={"ephemeral_gpu_offload": True})
    assert adapters.read(folder).config.r == 4
    assert "does not know and ignores use_novel" in caplog.text
