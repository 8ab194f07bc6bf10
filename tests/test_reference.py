"""The law itself: the equations against plain loops, and the dropout's bits against the published generator."""

import numpy as np
import pytest
import torch
from bounds import flip_unread, make_layer

from fastlora import reference

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 of Salmon et al., SC 2011, in Python's own integers: four 32-bit words from four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((WORD,) * 4, (WORD, WORD), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_is_the_published_one(counter: tuple[int, ...], key: tuple[int, int], words: list[int]) -> None:
    """The test vectors that Random123 ships (kat_vectors, philox 4x32 10)."""
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("K", [1, 8, 13, 24])
def test_keep_mask_draws_from_philox(seed: int, K: int) -> None:
    """Element (row, column) is half-word column % 8 of the call numbered row * ceil(K / 8) + column // 8, also beyond 2**32 calls."""
    rows, groups, threshold = [0, 1, 7, 2**32 // 3 + 1, 2**40 + 3], (K + 7) // 8, round(65536 * 0.37)
    expected = np.zeros((len(rows), K), dtype=bool)
    for i, row in enumerate(rows):
        for column in range(K):
            call = row * groups + column // 8
            words = philox((call & WORD, call >> 32, 0, 0), (seed & WORD, (seed >> 32) & WORD))
            word = words[column % 8 // 2]
            half = word >> 16 if column % 2 else word & 0xFFFF
            expected[i, column] = half >= threshold
    mask = reference.keep_mask(torch.tensor(seed), torch.tensor(rows), K, 0.37)
    assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("K", [0, 1, 8, 13, 64, 100])
def test_keep_is_the_mask_as_bits(K: int) -> None:
    """The lowest bit of a row's first byte is its first column, as numpy packs bits; a row is whole words of 64 bits."""
    x, seed, rows = torch.ones(2, K), torch.tensor(99), torch.tensor([0, 3, 2**40 + 3])
    mask = reference.keep_mask(seed, rows, K, 0.37)
    keep = reference.draw_keep(x, 0.37, seed, rows)
    assert keep.dtype == torch.uint8 and keep.shape == (3, 8 * -(-K // 64))
    bits = np.unpackbits(keep.numpy(), axis=1, bitorder="little")
    assert np.array_equal(bits[:, :K], mask.numpy())
    assert torch.equal(reference.read_keep(flip_unread(keep, torch.ones_like(mask)), K), mask)
    for p, none in ((0.37, None), (1e-7, seed)):
        assert reference.draw_keep(x, p, none).shape == (0,)


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_expectation(dropout_p: float) -> None:
    """Of 2**20 elements the kept share is within five standard deviations of 1 - p; so is d(1)'s mean of 1."""
    mask = reference.keep_mask(torch.tensor(1234567), torch.arange(1024), 1024, dropout_p)
    deviation = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    rate = mask.double().mean().item()
    assert abs(rate - (1 - dropout_p)) <= 5 * deviation + 2**-17  # p is rounded to a multiple of 2**-16
    assert abs(rate * reference.keep_scale(dropout_p) - 1) <= 5 * deviation / (1 - dropout_p) + 1e-9
    columns, rows = mask.double().mean(0), mask.double().mean(1)
    for share in (columns, rows):  # no column and no row is special: 1024 draws each, six standard deviations
        assert (share - (1 - dropout_p)).abs().max() <= 6 * (dropout_p * (1 - dropout_p) / 1024) ** 0.5


def test_factor_makes_the_expectation_exact() -> None:
    for dropout_p in (0.0, 1e-6, 0.05, 0.1, 1 / 3, 0.5, 0.9):
        kept = (65536 - reference.drop_threshold(dropout_p)) / 65536
        assert reference.keep_scale(dropout_p) * kept == pytest.approx(1, abs=1e-15)
        assert abs(1 - dropout_p - kept) <= 2**-17
    assert reference.keep_scale(1.0) == 0.0


def test_seeds_and_rows_draw_apart() -> None:
    rows = torch.arange(64)
    masks = [reference.keep_mask(torch.tensor(seed), rows, 64, 0.5) for seed in (0, 1, 2**32, 2**62)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first == second).double().mean().item() - 0.5) <= 0.05
    assert torch.equal(reference.keep_mask(torch.tensor(1), rows[10:20], 64, 0.5), masks[1][10:20])


def test_dropout_leaves_no_nan_behind() -> None:
    """A dropped element is 0 whatever it was: inf * 0 would be NaN."""
    x = torch.full((4, 32), torch.inf)
    dropped = reference.dropout(x, 0.5, reference.draw_keep(x, 0.5, torch.tensor(0)))
    assert set(dropped.unique().tolist()) == {0.0, torch.inf}


def test_lora_linear_by_hand() -> None:
    x, weight, bias = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]]),
        torch.tensor([0.5, 0.0, -1.0]),
    )
    lora_a, lora_b = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    y, xa, _ = reference.lora_linear(x, weight, bias, torch.tensor([[2.0, 1.0]]), lora_b, 10.0, 0.0, None)
    assert xa.tolist() == [[4.0]] and y.tolist() == [[51.5, 97.0, 1.0]]
    y, xa, _ = reference.lora_linear(x, weight, bias, lora_a, lora_b, 10.0, 0.0, None)
    assert xa.tolist() == [[0.0]] and y.tolist() == [[11.5, 17.0, 1.0]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_lora_linear_backward_is_the_gradient(dropout_p: float) -> None:
    """The written backward against autograd through the written forward, in float64."""
    layer = make_layer(7, 11, 5, 3, torch.float64)
    seed = torch.tensor(99)
    dropped = reference.dropout(layer.x, dropout_p, reference.draw_keep(layer.x, dropout_p, seed))
    y = layer.x @ layer.weight.T + layer.bias + 1.7 * (dropped @ layer.lora_a.T) @ layer.lora_b.T
    expected = torch.autograd.grad(y, (layer.x, layer.lora_a, layer.lora_b), layer.dy)
    x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    forward, xa, keep = reference.lora_linear(x, weight, bias, lora_a, lora_b, 1.7, dropout_p, seed)
    torch.testing.assert_close(forward, y.detach())
    grads = reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, xa, keep, 1.7, dropout_p, True, True, True)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_multi_lora_is_lora_linear_row_by_row() -> None:
    """Each row's output is the one that its adapter alone gives it, the mask drawn for the row's own number."""
    M, K, N, ranks = 9, 12, 6, (1, 4, 3)
    layers = [make_layer(M, K, N, rank, torch.float64) for rank in ranks]
    x, weight, bias = layers[0].x.detach(), layers[0].weight, layers[0].bias
    index, seed = torch.tensor([2, -1, 0, 0, 2, 1, -1, 2, 0]), torch.tensor(5)
    scales, probabilities = [0.5, 2.0, -1.0], [0.5, 0.0, 0.3]
    order = torch.argsort(index, stable=True)
    offsets = torch.searchsorted(index[order], torch.arange(-1, 5))
    lora_a, lora_b = [layer.lora_a.detach() for layer in layers], [layer.lora_b.detach() for layer in layers]
    y, xa, keep = reference.multi_lora(x, weight, bias, lora_a, lora_b, scales, probabilities, seed, order, offsets)
    for row, i in enumerate(index.tolist()):
        if i == -1:
            torch.testing.assert_close(y[row], x[row] @ weight.T + bias)
            assert not xa[row].any()
            continue
        alone, alone_xa, alone_keep = reference.lora_linear(
            x, weight, bias, lora_a[i], lora_b[i], scales[i], probabilities[i], seed
        )
        torch.testing.assert_close(y[row], alone[row])
        torch.testing.assert_close(xa[row, : ranks[i]], alone_xa[row])
        assert not xa[row, ranks[i] :].any()
        assert not probabilities[i] or torch.equal(keep[row], alone_keep[row])
