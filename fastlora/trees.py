"""A batch whose rows begin alike as one row of tokens, in which what they share stands once: a tree of segments (operators/attention.py).

    [prompt; a template; the rest of row 1; the rest of row 2; row 3]        parents  [-1, 0, 1, 1, 0]

A token sees the segments above its own in full, and its own up to itself: what it would see in its row alone. So its keys, values and logits are
those of its row alone, and what is shared is computed once, forward and backward. The positions are each row's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # cross entropy's ignore_index
LEAST_SHARED = 8  # tokens that are worth a segment
KEY = "_fastlora_shared"
"""Under which a model's `__dict__` has what sharing.py knows of it, where its rows share what they begin with."""


class Tree(NamedTuple):
    """Segments one after the other, a segment's parent before it. B T: the batch's rows and columns."""

    source: Tensor  # [n] int64: which of the batch's B T tokens; -1 - j: row j of the prompts, which lie one after the other
    position_ids: Tensor  # [n] int64
    places: Tensor  # [B, T] int64: where each token lies among the n, 0 for padding
    starts: Tensor  # [segments + 1] int64 on the CPU: where each begins
    key_starts: Tensor  # the same of the keys: a prompt that is given as keys and values has no tokens
    parents: Tensor  # [segments] int64 on the CPU: an earlier segment, or -1

    @property
    def keys_before(self) -> int:
        """Keys of prompts that are given as keys and values: the first."""
        return int(self.key_starts[-1] - self.starts[-1])

    def gather(self, values: Tensor, virtual: Any) -> Tensor:
        """values [B, T, ...] as [1, n, ...], with `virtual` at a prompt's rows."""
        found = values.flatten(0, 1)[self.source.clamp(min=0)]
        hidden = (self.source < 0).view(-1, *(1,) * (found.dim() - 1))
        return found.masked_fill(hidden, virtual)[None]

    def labels(self, labels: Tensor) -> Tensor:
        """[1, n], of [B, T]: a segment's first token, which no token before it predicts, has none."""
        found = self.gather(labels, IGNORE)
        first = self.starts[:-1][self.starts.diff() > 0]
        found[0, first.to(found.device)] = IGNORE
        return found

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, n, keys]: 0 where a token sees a key, and the least number of the dtype elsewhere."""
        count = len(self.parents)
        above = torch.zeros(count, count, dtype=torch.bool)
        for segment, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                above[segment] = above[parent]
                above[segment, parent] = True
        device = self.source.device
        (asking, query), (there, key) = (_numbered(one, device) for one in (self.starts, self.key_starts))
        own = (asking[:, None] == there) & (query[:, None] >= key)
        seen = own | above.to(device)[asking][:, there]
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[
            None, None
        ]


def _numbered(starts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token its segment, and its place there."""
    lengths = starts.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(int(starts[-1])) - starts[segment]
    return segment.to(device), place.to(device)


@dataclass
class LaidOut:
    """Where a batch's tokens stand while a model runs them otherwise than they were given."""

    places: Tensor  # [B, T] int64: among the tokens that the model's head is given
    taken: bool = False  # whether somebody has looked them up, and the head's output is theirs


_laid_out: ContextVar[LaidOut | None] = ContextVar("fastlora_laid_out", default=None)


@contextmanager
def laying_out(places: Tensor) -> Iterator[LaidOut]:
    """Let whoever hooks the head find a batch's tokens."""
    laid = LaidOut(places)
    token = _laid_out.set(laid)
    try:
        yield laid
    finally:
        _laid_out.reset(token)


def look_up(counted: Tensor) -> Tensor | None:
    """Where those of a batch's tokens stand that count, bool [B, T]; None where they stand as they were given."""
    laid = _laid_out.get()
    if laid is None or laid.places.shape != counted.shape:
        return None
    laid.taken = True
    return laid.places[counted]


class Rows(NamedTuple):
    """The tokens of a batch that are there, those that see one another together: a row, or each of those that were packed in it."""

    tokens: Tensor  # [N] int64 on the CPU: b T + t
    positions: Tensor  # [N] int64 on the CPU, each row's from its own first
    bounds: list[int]  # [rows + 1]: where each begins

    @property
    def texts(self) -> int:
        return len(self.bounds) - 1

    def batch_rows(self, T: int) -> list[int]:
        """Of each row the batch's that it lies in."""
        first: list[int] = (self.tokens[self.bounds[:-1]] // T).tolist()
        return first


def find_rows(real: Tensor, position_ids: Tensor | None) -> Rows:
    """Of a batch whose tokens are where `real`, bool [B, T], says. A position that is no higher than the one before begins a row."""
    real = real.cpu()
    tokens = real.flatten().nonzero().flatten()
    row = tokens // real.shape[1]
    begins = torch.ones(len(tokens), dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    if position_ids is None:
        positions = (real.cumsum(1) - 1).flatten()[tokens]
    else:
        positions = position_ids.cpu().expand(real.shape).flatten()[tokens]
        begins[1:] |= positions[1:] <= positions[:-1]
    return Rows(tokens, positions, [*begins.nonzero().flatten().tolist(), len(tokens)])


class Root(NamedTuple):
    """A prompt before some of the rows."""

    length: int
    first: int  # row of the prompts that lie one after the other


def grow(
    rows: Rows,
    shape: Sequence[int],
    roots: Sequence[Root] = (),
    root_of: Sequence[int] | None = None,
    *,
    keys_only: bool = False,
    last_apart: bool = False,
    ids: Tensor | None = None,
    targets: Tensor | None = None,
    device: torch.device | None = None,
) -> Tree:
    """The tree of a batch of that shape, [B, T].

    roots, root_of: the prompts, and for each of `rows` the number of its own, or -1.
    keys_only: the prompts are given as keys and values, and have no tokens here.
    last_apart: a prompt's last row stands before each row's own tokens, where it has that row's first token to predict.
    ids: [B, T]; rows with the same prompt that begin with the same tokens at the same positions share them; None: none do.
    targets: [B, T], the token that each is to predict, or -100; what predicts is not shared, since each row's counts.
    """
    root_of = [-1] * rows.texts if root_of is None else root_of
    kept = [root.length - last_apart for root in roots]
    segments: list[_Segment] = [_Segment(-1 - root.first, length, -1) for root, length in zip(roots, kept, strict=True)]
    own = [
        _Own(number, root, start, end)
        for number, (root, start, end) in enumerate(zip(root_of, rows.bounds, rows.bounds[1:], strict=False))
    ]
    spelt = None if ids is None else _spell(rows, ids, targets)
    for root in sorted({one.root for one in own}):
        group = [one for one in own if one.root == root]
        begins = last_apart and root >= 0
        if spelt is None or begins or len(group) == 1:
            segments += (_Segment(one.start, one.end - one.start, root, (one,), begins) for one in group)
        else:
            _share(segments, group, root, spelt)
    return _lay_out(segments, rows, shape, roots, keys_only, device)


class _Own(NamedTuple):
    """A row: `Rows.tokens[start:end]`."""

    number: int
    root: int
    start: int
    end: int


class _Segment(NamedTuple):
    start: int  # in Rows.tokens; of a prompt -1 - its first row
    length: int
    parent: int
    of: tuple[_Own, ...] = ()  # the rows that have it, all at one place in each
    begins: bool = False  # with its prompt's last row


class _Spelt(NamedTuple):
    """What the rows say, to be compared."""

    words: Tensor  # [N, 2] int64: token and position
    limits: Tensor  # [rows]: how many of a row's first tokens predict nothing


def _spell(rows: Rows, ids: Tensor, targets: Tensor | None) -> _Spelt:
    words = torch.stack((ids.cpu().flatten()[rows.tokens].long(), rows.positions), 1)
    bounds = torch.tensor(rows.bounds)
    if targets is None:
        return _Spelt(words, bounds.diff())
    predicts = (targets.cpu().flatten()[rows.tokens] != IGNORE).nonzero().flatten()
    next_one = torch.cat((predicts, bounds[-1:]))[torch.searchsorted(predicts, bounds[:-1])]
    return _Spelt(words, torch.minimum(next_one, bounds[1:]) - bounds[:-1])


def _share(segments: list[_Segment], group: Sequence[_Own], root: int, spelt: _Spelt) -> None:
    """Add the segments of rows with one root, as a tree of what they begin with."""
    # Whatever order keeps rows that begin alike together would do; that of their bytes is at hand.
    ordered = sorted(group, key=lambda one: spelt.words[one.start : one.end].numpy().tobytes())
    limits = [int(spelt.limits[one.number]) for one in ordered]
    common = [
        min(_alike(spelt.words[a.start : a.end], spelt.words[b.start : b.end]), limit, other)
        for a, b, limit, other in zip(ordered, ordered[1:], limits, limits[1:], strict=False)
    ]
    waiting = [
        (0, len(ordered), 0, root)
    ]  # rows from .. to .., so many of whose tokens have a segment, and the last of these
    while waiting:
        low, high, depth, parent = waiting.pop()
        shared = min(common[low : high - 1], default=0)  # of a row alone nothing
        if shared >= depth + LEAST_SHARED:
            segments.append(_Segment(ordered[low].start + depth, shared - depth, parent, tuple(ordered[low:high])))
            depth, parent = shared, len(segments) - 1
        if high - low == 1:
            one = ordered[low]
            segments.append(_Segment(one.start + depth, one.end - one.start - depth, parent, (one,)))
            continue
        cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] < depth + LEAST_SHARED), high]
        waiting += ((a, b, depth, parent) for a, b in zip(cuts, cuts[1:], strict=False))


def _alike(a: Tensor, b: Tensor) -> int:
    """With how many of the same words two rows begin."""
    least = min(len(a), len(b))
    same = (a[:least] == b[:least]).all(1)
    return least if bool(same.all()) else int(same.int().argmin())


def _lay_out(
    segments: Sequence[_Segment],
    rows: Rows,
    shape: Sequence[int],
    roots: Sequence[Root],
    keys_only: bool,
    device: torch.device | None,
) -> Tree:
    source, positions = [], []
    places = torch.zeros(shape[0] * shape[1], dtype=torch.int64)
    starts, key_starts = [0], [0]
    for segment in segments:
        is_root = segment.start < 0
        if is_root and not keys_only:
            source.append(segment.start - torch.arange(segment.length))
            positions.append(torch.arange(segment.length))
        if not is_root:
            root = segment.of[0].root
            before = roots[root].length if root >= 0 else 0
            if segment.begins:
                source.append(torch.tensor([-1 - (roots[root].first + before - 1)]))
                positions.append(torch.tensor([before - 1]))
            span = slice(segment.start, segment.start + segment.length)
            source.append(rows.tokens[span])
            positions.append(rows.positions[span] + before)
            here = starts[-1] + segment.begins
            offset = segment.start - segment.of[0].start
            for one in segment.of:
                tokens = rows.tokens[one.start + offset : one.start + offset + segment.length]
                places[tokens] = torch.arange(here, here + segment.length)
        length = segment.length + segment.begins
        starts.append(starts[-1] + (0 if is_root and keys_only else length))
        key_starts.append(key_starts[-1] + length)
    return Tree(
        torch.cat(source).to(device),
        torch.cat(positions).to(device),
        places.view(*shape).to(device),
        torch.tensor(starts),
        torch.tensor(key_starts),
        torch.tensor([segment.parent for segment in segments]),
    )


def shares(tree: Tree, rows: Rows) -> bool:
    """Whether fewer tokens run than the rows have."""
    return len(tree.source) < len(rows.tokens)
