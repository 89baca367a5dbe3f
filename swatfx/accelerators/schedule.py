"""The scheduler of Bit-Tactical's front end, which TensorDash shares.

Source: Delmas Lascorz et al., Bit-Tactical, ASPLOS 2019, sections 3 and 5; Mahmoud et al.,
TensorDash, MICRO 2020, section 3. Sixteen lanes of one filter are the bits of one integer, so that
what can move where is known for all lanes at once, and how many candidates each lane has is the sum
of such masks, kept bit-sliced: `ones`, `twos`, `fours` and so on.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swatfx.accelerators.compiled import compiled
from swatfx.accelerators.geometry import Ints
from swatfx.accelerators.inputs import integer
from swatfx.errors import InputError

Rows = npt.NDArray[np.int32]  # [time, filter of the tile]: a bit for each lane

SHAPES = ("L", "T")
MOST_CANDIDATES = 31


def candidates(lookahead: int, lookaside: int, shape: str) -> Ints:
    """(delta time, delta lane) of what a slot may take its value from, ascending: [n, 2].

    L-shape: (1..h, 0) and (1, -1..-d). T-shape: (1..h, 0), and d lookasides, the first d of the row
    lane +1, -1, +2, -2, +3, -3 and so on, an odd distance from the next row, an even one from the
    row after it (from the next where h is 1): for T<2,5> (1,+1) (1,-1) (2,+2) (2,-2) (1,+3).
    """
    h, d = integer(lookahead, "lookahead"), integer(lookaside, "lookaside", 0)
    if shape not in SHAPES:
        raise InputError("unknown search shape", value=shape, remedy='Give "L" or "T"')
    if d > 15 or h + d > MOST_CANDIDATES:
        raise InputError(
            "too many candidates for 16 lanes",
            value=(h, d),
            remedy=f"lookaside up to 15, and with lookahead up to {MOST_CANDIDATES}",
        )
    found = [(time, 0) for time in range(1, h + 1)]
    for index in range(d):
        if shape == "L":
            found.append((1, -1 - index))
        else:
            distance = index // 2 + 1
            time = 1 if distance % 2 else min(2, h)
            found.append((time, -distance if index % 2 else distance))
    return np.array(sorted(found), dtype=np.int64)


@compiled
def schedule_tile(rows: Rows, offsets: Ints, lookahead: int) -> int:
    """Schedule one tile in place and count the rows that are issued.

    Moves come from later rows only, and a skipped row stays empty, so that the skip rule over the
    scheduled buffer issues exactly the rows that were not skipped while scheduling.

    Args:
        rows: [time, filters], 16 lanes a bit each; changed.
        offsets: of `candidates`.
        lookahead: most rows that are skipped in succession.
    """
    times, filters = rows.shape
    number = offsets.shape[0]
    rights = np.empty(number, dtype=np.int64)
    for j in range(number):
        rights[j] = offsets[j, 1] & 15
    issued = 0
    skipped = 0
    for time in range(times):
        if skipped < lookahead:
            anything = 0
            for f in range(filters):
                anything |= rows[time, f]
            if anything == 0:
                skipped += 1
                continue
        skipped = 0
        issued += 1
        usable = 0
        while usable < number and time + offsets[usable, 0] < times:
            usable += 1
        if usable == 0:
            continue
        for f in range(filters):
            current = np.int64(rows[time, f])
            while current != 0xFFFF:
                ones = 0
                twos = 0
                fours = 0
                eights = 0
                sixteens = 0
                for j in range(usable):
                    row = np.int64(rows[time + offsets[j, 0], f])
                    there = ((row >> rights[j]) | (row << (16 - rights[j]))) & 0xFFFF & ~current
                    carry = ones & there
                    ones ^= there
                    there = twos & carry
                    twos ^= carry
                    if number > 3:
                        carry = fours & there
                        fours ^= there
                        if number > 7:
                            there = eights & carry
                            eights ^= carry
                            sixteens ^= there
                best = ones | twos | fours | eights | sixteens
                if best == 0:
                    break
                if best & sixteens:
                    best &= sixteens
                if best & eights:
                    best &= eights
                if best & fours:
                    best &= fours
                if best & twos:
                    best &= twos
                if best & ones:
                    best &= ones
                best &= -best
                lane = 0
                while best >> lane != 1:
                    lane += 1
                for j in range(usable):
                    source = (lane + rights[j]) & 15
                    from_time = time + offsets[j, 0]
                    if (rows[from_time, f] >> source) & 1:
                        rows[from_time, f] ^= 1 << source
                        break
                current |= best
            rows[time, f] = current
    return issued
