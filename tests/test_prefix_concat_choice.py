"""What runs prefix_concat and its backward: as they were measured, by tokens and by what these move."""

import pytest
import torch
from measurements import entry, hold

from fastlora import ops
from fastlora.operators import prefix_concat


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {("prefix_concat", "cpu"): lambda *_: "forward", ("prefix_concat_backward", "cpu"): lambda *_: "backward"}
    monkeypatch.setattr(ops, "implementations", ops.implementations | ours)
    monkeypatch.setattr(ops, "forced", None)


def test_what_a_batch_moves_decides() -> None:
    hold(entry(2.0, "prefix_concat", 512, "small"), entry(0.5, "prefix_concat", 512, "large"))
    for width, expected in ((8, "reference"), (4096, "cpu")):
        assert prefix_concat.choose(torch.empty(1).expand(4, 128, width), 512).implementation == expected


def test_the_backward_is_measured_apart() -> None:
    hold(entry(2.0, "prefix_concat", 512), entry(0.5, "prefix_concat_backward", 512))
    like = torch.empty(1).expand(2, 256, 4)
    assert [prefix_concat.choose(like, 512, backward).implementation for backward in (False, True)] == [
        "reference",
        "cpu",
    ]
    assert prefix_concat.run_backward(like) == "backward"


@pytest.mark.parametrize("rows", [1, 8, 64, 512, 4096])
def test_all_tokens_of_the_batch_count(rows: int) -> None:
    """Of the mask, and in the backward of dout: two rows of 256 are of the class of 512."""
    hold(
        *(
            entry(0.5 if one == rows else 2.0, op, one)
            for op in ("prefix_concat", "prefix_concat_backward")
            for one in (1, 8, 64, 512, 4096)
        )
    )
    prompts, starts, mask = torch.ones(1, 4), torch.tensor([0, 1]), torch.ones(2, 256)
    arguments = (
        prompts,
        starts,
        1,
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, 256, 4),
        None,
        None,
        mask,
        None,
        None,
    )
    assert (prefix_concat.run(*arguments) == "forward") is (rows == 512)
    if rows == 512:
        assert prefix_concat.run_backward(torch.ones(2, 256, 4)) == "backward"
    else:
        with pytest.raises(TypeError):  # plain PyTorch's, which wants all arguments
            prefix_concat.run_backward(torch.ones(2, 256, 4))
