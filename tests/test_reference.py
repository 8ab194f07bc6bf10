"""The law itself: the equations against plain loops, and the dropout's bits against the published generator."""

import math

import numpy as np
import pytest
import torch
from bounds import flip_unread, make_layer
from lora_arguments import Arguments, one_layer

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
    arguments = Arguments(x, [weight], [bias], [torch.tensor([[2.0, 1.0]])], [lora_b], [10.0], [0.0])
    [y], xa, _ = reference.lora_linear(*arguments)
    assert xa.tolist() == [[[4.0]]] and y.tolist() == [[51.5, 97.0, 1.0]]
    [y], xa, _ = reference.lora_linear(*arguments._replace(lora_a=[lora_a]))
    assert xa.tolist() == [[[0.0]]] and y.tolist() == [[11.5, 17.0, 1.0]]
    # Both at once: layers that share x, the second without a bias.
    both = Arguments(
        x, [weight] * 2, [bias, None], [torch.tensor([[2.0, 1.0]]), lora_a], [lora_b] * 2, [10.0] * 2, [0.0] * 2
    )
    ys, xa, _ = reference.lora_linear(*both)
    assert xa.tolist() == [[[4.0]], [[0.0]]] and [y.tolist() for y in ys] == [[[51.5, 97.0, 1.0]], [[11.0, 17.0, 2.0]]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_lora_linear_backward_is_the_gradient(dropout_p: float) -> None:
    """The written backward against autograd through the written forward, in float64."""
    layer = make_layer(7, 11, 5, 3, torch.float64)
    seed = torch.tensor([99])
    dropped = reference.dropout(layer.x, dropout_p, reference.draw_keep(layer.x, dropout_p, seed))
    y = layer.x @ layer.weight.T + layer.bias + 1.7 * (dropped @ layer.lora_a.T) @ layer.lora_b.T
    expected = torch.autograd.grad(y, (layer.x, layer.lora_a, layer.lora_b), layer.dy)
    forward, _, *grads = one_layer(layer, 1.7, dropout_p, seed).both("reference", [layer.dy])
    torch.testing.assert_close(forward, y.detach())
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_layers_that_share_x_are_lora_linear_layer_by_layer() -> None:
    """Each layer's part of the state and of the gradients is its own; dx is the sum; of ranks that differ the widest counts."""
    layers = [make_layer(7, 11, N, R, torch.float64, bias=N != 4) for N, R in ((5, 3), (4, 1), (6, 2))]
    layers = [layer._replace(x=layers[0].x) for layer in layers]
    numbers, seed = ([0.5, 2.0, -1.0], [0.5, 0.0, 0.3]), torch.tensor([5, 6, 2**40])
    alone = [one_layer(*one, seed[g : g + 1]) for g, one in enumerate(zip(layers, *numbers, strict=True))]
    columns = ([own[0] for own in column] for column in zip(*(one[1:5] for one in alone), strict=True))
    together = Arguments(alone[0].x, *columns, *numbers, seed)
    dy = [layer.dy for layer in layers]
    *ys, xa, dx, a0, a1, a2, b0, b1, b2 = together.both("reference", dy)
    _, _, keep = reference.lora_linear(*together)
    sum_of_dx = torch.zeros_like(dx)
    for g, (y, grads) in enumerate(zip(ys, ((a0, b0), (a1, b1), (a2, b2)), strict=True)):
        own_y, own_xa, own_dx, *own_grads = alone[g].both("reference", [dy[g]])
        rank, sum_of_dx = own_xa.shape[2], sum_of_dx + own_dx
        torch.testing.assert_close([y, xa[g, :, :rank], *grads], [own_y, own_xa[0], *own_grads])
        assert not xa[g, :, rank:].any()
        own_keep = reference.lora_linear(*alone[g])[2]
        assert torch.equal(keep[g], own_keep[0]) if numbers[1][g] else own_keep.numel() == 0
    torch.testing.assert_close(dx, sum_of_dx)


def test_multi_lora_is_lora_linear_row_by_row() -> None:
    """Each row's output is the one that its adapter alone gives it, the mask drawn for the row's own number."""
    M, K, N, ranks = 9, 12, 6, (1, 4, 3)
    layers = [make_layer(M, K, N, rank, torch.float64) for rank in ranks]
    x, weight, bias = layers[0].x.detach(), layers[0].weight, layers[0].bias
    index, seed = torch.tensor([2, -1, 0, 0, 2, 1, -1, 2, 0]), torch.tensor([5])
    scales, probabilities = [0.5, 2.0, -1.0], [0.5, 0.0, 0.3]
    order = torch.argsort(index, stable=True)
    offsets = torch.searchsorted(index[order], torch.arange(-1, 5))
    lora_a, lora_b = [layer.lora_a.detach() for layer in layers], [layer.lora_b.detach() for layer in layers]
    numbers = scales, probabilities, seed, order, offsets
    [y], xa, keep = reference.lora_linear(x, [weight], [bias], lora_a, lora_b, *numbers)
    for row, i in enumerate(index.tolist()):
        if i == -1:
            torch.testing.assert_close(y[row], x[row] @ weight.T + bias)
            assert not xa[0, row].any()
            continue
        [alone], alone_xa, alone_keep = reference.lora_linear(
            *Arguments(x, [weight], [bias], [lora_a[i]], [lora_b[i]], [scales[i]], [probabilities[i]], seed)
        )
        torch.testing.assert_close(y[row], alone[row])
        torch.testing.assert_close(xa[0, row, : ranks[i]], alone_xa[0, row])
        assert not xa[0, row, ranks[i] :].any()
        assert not probabilities[i] or torch.equal(keep[0, row], alone_keep[0, row])


@pytest.mark.parametrize("shared", [False, True], ids=["one layer", "two layers"])
def test_the_backward_of_mixed_rows_is_the_gradient(shared: bool) -> None:
    """Against autograd through each row's own equation, in float64; an adapter without rows gets zeros."""
    made = [make_layer(6, 7, 5, rank, torch.float64) for rank in (1, 3, 2, 2, 1, 4)][: 6 if shared else 3]
    G, index = 2 if shared else 1, torch.tensor([2, -1, 0, 2, 0, -1])  # nobody has adapter 1
    x, seed = made[0].x, torch.tensor([5, 2**40])[:G]
    scales, p = [0.5, 2.0, -1.0] * G, [0.5, 0.0, 0.3] * G
    ys = []
    for g in range(G):
        rows = []
        for row, i in enumerate(index.tolist()):
            y = x[row] @ made[g].weight.T
            if i >= 0:
                j, number = g * 3 + i, torch.tensor([row])
                kept = reference.draw_keep(x, p[j], seed[g], number)
                y = y + scales[j] * reference.dropout(x[row][None], p[j], kept)[0] @ made[j].lora_a.T @ made[j].lora_b.T
            rows.append(y)
        ys.append(torch.stack(rows))
    leaves = [x, *(one.lora_a for one in made), *(one.lora_b for one in made)]
    dy = [made[g].dy for g in range(G)]
    expected = torch.autograd.grad(ys, leaves, dy, materialize_grads=True)
    order = torch.argsort(index, stable=True)
    sorting = order, torch.searchsorted(index[order], torch.arange(-1, 5))
    frozen = [one.weight for one in made[:G]], [None] * G
    adapters = [one.lora_a.detach() for one in made], [one.lora_b.detach() for one in made]
    arguments = Arguments(x.detach(), *frozen, *adapters, scales, p, seed, *sorting)
    *forward, _, dx, _ = arguments.both("reference", dy)[: G + 3]
    torch.testing.assert_close([*forward, dx], [*(y.detach() for y in ys), expected[0]])
    for grad, want in zip(arguments.both("reference", dy)[G + 2 :], expected[1:], strict=True):
        torch.testing.assert_close(grad, want)


def test_the_loss_of_labels_by_hand() -> None:
    """Two words whose logits differ by log 3: probabilities of 3/4 and 1/4."""
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[math.log(3)], [0.0]])
    labels = torch.tensor([0, 1])
    loss, highest, total, dhidden = reference.linear_cross_entropy(hidden, weight, None, labels, True)
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(4) - math.log(3)))
    torch.testing.assert_close(highest, torch.full((2, 1), math.log(3)))
    torch.testing.assert_close(total, torch.full((2, 1), 4 / 3))
    torch.testing.assert_close(dhidden, torch.tensor([[-0.25], [0.75]]) * math.log(3))
    dweight, dbias = reference.linear_cross_entropy_backward(
        torch.tensor(2.0), hidden, weight, torch.zeros(2), labels, highest, total
    )
    torch.testing.assert_close(dbias, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(dweight, torch.tensor([[1.0], [-1.0]]))


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradients_of_the_loss_are_autograds(with_bias: bool) -> None:
    """Through torch's own cross_entropy, in float64."""
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((6, 4), (9, 4), (9,))
    )
    labels = torch.tensor([0, 8, 3, 3, 5, 1])
    logits = torch.nn.functional.linear(hidden, weight, bias if with_bias else None)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    dloss = torch.tensor(0.37, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, dloss)
    h, w, b = (one.detach() for one in (hidden, weight, bias))
    given = h, w, b if with_bias else None, labels
    loss, highest, total, dhidden = reference.linear_cross_entropy(*given, True)
    torch.testing.assert_close(loss, expected.detach())
    found = [dhidden * dloss, *reference.linear_cross_entropy_backward(dloss, *given, highest, total)]
    for one, want in zip(found, wanted, strict=False):
        torch.testing.assert_close(one, want)
    assert with_bias or found[2].numel() == 0
    assert reference.linear_cross_entropy(*given, False)[3].numel() == 0
