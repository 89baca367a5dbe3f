"""Numbers in eight or four bits each, by groups: the one format of what is kept so for backward.

What is coded lies in rows: the channels of a norm's input, or all of another tensor as one. A row,
in the order of memory, is cut into groups of `GROUP` elements, the last of which may be smaller. Of
a number h its signed root w = sign(h) * sqrt(|h|) is stored, on an even grid of its group's from
the least w to the greatest. In h, cells are then narrow about zero and wide far from it. So are
outliers kept apart: with an element of 1,000 among others of 1, these are off by a twentieth of
what they would be on an even grid in h, wherever such elements lie and however many there are, and
none of them needs a place of its own. On normal numbers the error is that of an even grid.

Where the row has a border (where ReLU starts), the grid has a place there, and that two codes, one
for either side: a code tells on which side its element was. With `first` the least code above the
border, or 0 where there is none, code q stands for

    t = q - (q >= first), w = base + t * step, h = w * |w|

Where the sum of a row is known, as that of a channel which a norm has centred, what is decoded is
shifted to have it: see `decode`. So gradients that are zero in sum remain so.

"int8" takes the nearest place of the grid. "int4" takes the one below or the one above, by chances
that make the mean of what is decoded what was kept. The number that decides is a hash of
`torch.initial_seed()`, the group's grid and the element's place in memory: it repeats under
`torch.manual_seed`, is another in the next step, since the grid is, and takes nothing from torch's
generators, so that dropout draws what it draws with exact saves.

In memory, all without gaps: float32 [groups][rows] base; float32 [groups][rows] step; uint8
[groups][rows] first; zeros up to a whole number of cache lines; the codes in the order of the
tensor's memory, a byte each, or two in a byte, the earlier in its lower half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx.tensors import layouts
from swatfx.tensors.replaceable import Replaceable

GROUP = 256  # elements; as in csrc/codes.h
BITS = {"int8": 8, "int4": 4}  # of a code
_LINE = 64
_WORD = 0xFFFFFFFF


def _in_lines(size: int) -> int:
    """`size` bytes, up to a whole number of cache lines."""
    return -(-size // _LINE) * _LINE


@dataclass(frozen=True)
class Room:
    """What coded rows take in memory.

    Attributes:
        rows: how many.
        length: elements of each.
        bits: of a code.
    """

    rows: int
    length: int
    bits: int

    @staticmethod
    def of(shape: Sequence[int], saves: str) -> Room:
        """Of (N, C, *any), a row a channel; `saves` is a name of `BITS`."""
        return Room(shape[1], torch.Size([shape[0], *shape[2:]]).numel(), BITS[saves])

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.length // GROUP)

    @property
    def floats(self) -> int:
        """Of base and step together."""
        return 2 * self.rows * self.groups

    @property
    def header(self) -> int:
        """Bytes before the codes."""
        return _in_lines(self.used)

    @property
    def used(self) -> int:
        """Those of them that are no padding."""
        return 4 * self.floats + self.rows * self.groups

    @property
    def codes(self) -> int:
        """Bytes of the codes."""
        return -(-self.rows * self.length * self.bits // 8)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.header + self.codes

    def grouped(self, x: Tensor, fill: float = 0) -> Tensor:
        """(rows, length) as (rows, groups, GROUP); what is not there is `fill`."""
        return F.pad(x, (0, self.groups * GROUP - self.length), value=fill).view(
            self.rows, self.groups, GROUP
        )

    def ungrouped(self, x: Tensor) -> Tensor:
        """Inverse of `grouped`."""
        return x.reshape(self.rows, self.groups * GROUP)[:, : self.length]


def encode(
    h: Tensor, layout: str, saves: str, tie: Tensor | None = None, above: Tensor | None = None
) -> Tensor:
    """uint8 [Room.total] for `h`, as told above.

    Args:
        h: (N, C, *any), float32 or float64.
        layout: of `swatfx.tensors.layouts`, in whose order the codes shall lie.
        saves: a name of `BITS`.
        tie: (C,), where the border of each channel is; None: there is none.
        above: of h's shape, bool: on which side of it an element counts; given if `tie` is.
    """
    room = Room.of(h.shape, saves)
    if h.numel() == 0:
        return h.new_zeros(room.total, dtype=torch.uint8)
    rows = _in_rows(h, layout)
    w = _root(rows)
    low = room.grouped(w, torch.inf).amin(-1)
    high = room.grouped(w, -torch.inf).amax(-1)
    base, step, below = _grid(low, high, tie, 2**room.bits - 1)
    over = None if above is None else room.grouped(_in_rows(above, layout).to(w.dtype)) > 0
    at = layouts.from_flat(torch.arange(h.numel(), device=h.device), h.shape, layout)
    numbers = room.grouped(rows), room.grouped(w), room.grouped(_in_rows(at, layout))
    grid = tuple(v.unsqueeze(-1) for v in (base, step, below))
    t = _places(numbers, grid, over, saves)
    q = room.ungrouped(t + (1 if over is None else over.to(t.dtype)))
    codes = _from_rows(q.nan_to_num().to(torch.uint8), h.shape, layout)
    flat = layouts.flat_view(codes, layout)
    floats = torch.cat([base.T.reshape(-1), step.T.reshape(-1)]).view(torch.uint8)
    first = (below + 1).nan_to_num().to(torch.uint8).T.reshape(-1)
    head = torch.cat([floats, first])
    head = F.pad(head, (0, room.header - head.numel()))
    return torch.cat([head, _halved(flat) if room.bits == 4 else flat])


def decode(
    code: Tensor, shape: Sequence[int], layout: str, saves: str, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """(h in float32, whether above the border), both of `shape`, from what `encode` made.

    `centred`: what was coded has the sum 0 over each row, and so shall h.
    """
    room = Room.of(shape, saves)
    elements = torch.Size(shape).numel()
    if elements == 0:
        return code.new_zeros(shape, dtype=torch.float32), code.new_zeros(shape, dtype=torch.bool)
    floats = code[: 4 * room.floats].view(torch.float32)
    base, step = floats.chunk(2)
    first = code[4 * room.floats :][: room.rows * room.groups]
    base, step, first = (
        v.view(room.groups, room.rows).T.unsqueeze(-1) for v in (base, step, first)
    )
    flat = code[room.header : room.total]
    flat = _doubled(flat)[:elements] if room.bits == 4 else flat
    q = room.grouped(_in_rows(layouts.from_flat(flat, shape, layout), layout))
    above = q >= first
    h = room.ungrouped(_value(base, step, q.float() - above.float()))
    h = h - h.double().mean(1, keepdim=True).float() if centred else h
    return _from_rows(h, shape, layout), _from_rows(room.ungrouped(above), shape, layout)


def flat_bytes(elements: int, saves: str) -> int:
    """Bytes of `encode_flat`."""
    return Room(1, elements, BITS[saves]).total


def line_bytes(elements: int, saves: str) -> int:
    """Bytes of `encode_lines`: those of `encode_flat`, up to a whole number of cache lines."""
    return _in_lines(flat_bytes(elements, saves))


def encode_lines(x: Tensor, saves: str) -> Tensor:
    """As `encode_flat`, in whole cache lines: what is joined behind it is aligned."""
    code = encode_flat(x, saves)
    return F.pad(code, (0, line_bytes(x.numel(), saves) - code.numel()))


@Replaceable
def encode_flat(x: Tensor, saves: str) -> Tensor:
    """uint8 [flat_bytes] for a vector, as one row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return encode(wide.view(1, 1, -1), layouts.ROW_MAJOR, saves)


@Replaceable
def decode_flat(code: Tensor, elements: int, saves: str, dtype: torch.dtype) -> Tensor:
    """What `encode_flat` coded, (elements,) in `dtype`."""
    return decode(code, (1, 1, elements), layouts.ROW_MAJOR, saves)[0].view(-1).to(dtype)


def _in_rows(x: Tensor, layout: str) -> Tensor:
    """(N, C, *any) as (C, elements of a channel), these in the order of `layout`."""
    x = x.movedim(1, 0)
    x = x.movedim(1, -1) if layout == layouts.BATCH_INNERMOST else x
    return x.reshape(x.shape[0], -1)


def _from_rows(rows: Tensor, shape: Sequence[int], layout: str) -> Tensor:
    """Inverse of `_in_rows`, dense in `layout`."""
    batch, channels, *rest = shape
    if layout == layouts.BATCH_INNERMOST:
        return layouts.as_layout(rows.reshape(channels, *rest, batch).movedim(-1, 0), layout)
    return layouts.as_layout(rows.reshape(channels, batch, *rest).movedim(0, 1), layout)


def _grid(low: Tensor, high: Tensor, tie: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(base, step, places below the border or -1) of groups: float32 (rows, groups) all."""
    if tie is None:
        step = (high - low) / top
        return (low + step).float(), step.float(), torch.full_like(low, -1)
    border = _root(tie.to(low.dtype)).unsqueeze(1).maximum(low).minimum(high)
    # Of `top - 1` steps, so many that either side has enough of equal width.
    coarse = (high - low) / (top - 2)
    below = torch.where(coarse > 0, ((border - low) / coarse).ceil(), 0)
    down = (border - low) / below.clamp(min=1)
    step = down.maximum((high - border) / (top - 1 - below).clamp(min=1))
    return (border - below * step).float(), step.float(), below


def _places(
    numbers: tuple[Tensor, ...], grid: tuple[Tensor, ...], above: Tensor | None, saves: str
) -> Tensor:
    """Places t on the grids, of (h, its root, its place in memory), all grouped."""
    (h, w, at), (base, step, below) = numbers, grid
    most = 2 ** BITS[saves] - 2
    t = (w - base) * torch.where(step > 0, 1 / step, 0)
    if saves == "int8":
        t = (t + 0.5).floor()
    else:
        t = t.floor()
        under, over = _value(base, step, t), _value(base, step, t + 1)
        t = t + (h - under > _noise(base, step, at) * (over - under)).to(t.dtype)
    up = t.maximum(below).clamp(max=most)
    return up if above is None else torch.where(above, up, t.minimum(below).clamp(min=0))


def _root(h: Tensor) -> Tensor:
    return h.sign() * h.abs().sqrt()


def _value(base: Tensor, step: Tensor, t: Tensor) -> Tensor:
    w = base + t * step
    return w * w.abs()


def _noise(base: Tensor, step: Tensor, at: Tensor) -> Tensor:
    """From 0 to 1, without 1, by the hash told above: float32 of the shape of `at`."""
    words = [v.contiguous().view(torch.int32).to(torch.int64) & _WORD for v in (base, step)]
    key = _mixed(_mixed(words[0] ^ seed()) ^ words[1])
    return (_mixed((at * 0x9E3779B9 + key) & _WORD) >> 8).float() * 2.0**-24


def seed() -> int:
    """What of torch's seed the hash sees: 32 bits."""
    return torch.initial_seed() & _WORD


def _mixed(word: Tensor) -> Tensor:
    """A permutation of 32-bit words, held in int64, whose upper bits depend on all."""
    return ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD


def _halved(codes: Tensor) -> Tensor:
    """Codes below 16, two in a byte."""
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _doubled(packed: Tensor) -> Tensor:
    """Inverse of `_halved`."""
    return torch.stack([packed & 15, packed >> 4], -1).view(-1)
