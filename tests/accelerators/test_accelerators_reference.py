"""Slow, literal references of the cycle models, and every fast kernel against them."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from swatfx.accelerators import (
    SCNN,
    Accelerator,
    BitTactical,
    CambriconX,
    Cnvlutin,
    DenseTile,
    Ideal,
    Systolic,
    TensorDash,
)


def ceil(a, b):
    return math.ceil(a / b)


def cases(number, seed):
    """Random small layers: odd sizes, strides, sided padding, dilation, all densities."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        while True:
            K, C = (int(n) for n in rng.integers(1, 40, 2))
            R, S = (int(n) for n in rng.integers(1, 6, 2))
            H, W = (int(n) for n in rng.integers(1, 13, 2))
            C = 3 if rng.random() < 0.2 else C
            stride = int(rng.integers(1, 4))
            padding = tuple(int(n) for n in rng.integers(0, 4, 4))
            dilation = int(rng.choice([1, 1, 1, 2, 3]))
            if rng.random() < 0.5:
                padding = (padding[0],) * 4
            extent = dilation * (R - 1) + 1, dilation * (S - 1) + 1
            if H + sum(padding[:2]) >= extent[0] and W + sum(padding[2:]) >= extent[1]:
                break
        densities = rng.choice([0.02, 0.1, 0.3, 0.6, 1.0], 2)
        weights = rng.random((K, C, R, S)) < densities[0]
        activations = rng.random((C, H, W)) < densities[1]
        yield weights, activations, stride, padding, dilation


def sizes(weights, shape, stride, padding, dilation):
    R, S = (dilation * (n - 1) + 1 for n in weights.shape[2:])
    X, Y = shape[1] + sum(padding[:2]), shape[2] + sum(padding[2:])
    return X, Y, (X - R) // stride + 1, (Y - S) // stride + 1


def padded(activations, padding):
    return np.pad(activations, ((0, 0), padding[:2], padding[2:]))


def dilated(weights, dilation):
    K, C, R, S = weights.shape
    out = np.zeros((K, C, dilation * (R - 1) + 1, dilation * (S - 1) + 1), bool)
    out[:, :, ::dilation, ::dilation] = weights
    return out


# -- references ------------------------------------------------------------------------------------


def fold(weights, stride):
    K, C, R, S = weights.shape
    if C != 3 or stride == 1:
        return weights
    out = np.zeros((K, C * stride**2, ceil(R, stride), ceil(S, stride)), bool)
    for k, c, r, s in np.argwhere(weights):
        channel = (s % stride) * stride * 3 + (r % stride) * 3 + c
        out[k, channel, r // stride, s // stride] = True
    return out


def dense_tile(weights, outputs, stride, columns=1):
    K, C, R, S = fold(weights, stride).shape
    return ceil(outputs, columns) * ceil(K, 256) * ceil(C, 16) * R * S


T25 = sorted([(1, 0), (2, 0), (1, 1), (1, -1), (2, 2), (2, -2), (1, 3)])


def l_shape(h, d):
    return sorted([(t, 0) for t in range(1, h + 1)] + [(1, -i) for i in range(1, d + 1)])


def schedule(tile, offsets, h):
    """Issued rows of a tile [filter, time, lane], by two passes as the definition has them."""
    tile = tile.copy()
    filters, times, lanes = tile.shape
    skipped = 0
    for time in range(times):
        if not tile[:, time].any() and skipped < h:
            skipped += 1
            continue
        skipped = 0
        for rows in tile:
            while True:
                options = {}
                for lane in range(lanes):
                    if not rows[time, lane]:
                        options[lane] = [
                            (time + dt, (lane + dl) % lanes)
                            for dt, dl in offsets
                            if time + dt < times and rows[time + dt, (lane + dl) % lanes]
                        ]
                best = max(options, key=lambda lane: (len(options[lane]), -lane), default=None)
                if best is None or not options[best]:
                    break
                rows[time, best] = True
                rows[options[best][0]] = False
    issued = skipped = 0
    for time in range(times):
        if not tile[:, time].any() and skipped < h:
            skipped += 1
        else:
            skipped = 0
            issued += 1
    return issued


def rows_in_time(weights):
    """[K, C, R, S] -> [K up to a multiple of 16, time, 16]: S, R, channel block."""
    K, C, R, S = weights.shape
    full = np.zeros((ceil(K, 16) * 16, ceil(C, 16) * 16, R, S), bool)
    full[:K, :C] = weights
    return full.transpose(0, 3, 2, 1).reshape(len(full), -1, 16)


def bit_tactical(weights, outputs, stride, offsets, h, columns=1):
    rows = rows_in_time(fold(weights, stride))
    issued = [schedule(rows[i : i + 16], offsets, h) for i in range(0, len(rows), 16)]
    groups = [max(issued[i : i + 16]) for i in range(0, len(issued), 16)]
    return ceil(outputs, columns) * sum(groups)


def scnn(weights, activations, stride, p, out_hw, conflicts=True, accumulators=6144):
    """Section 3; `activations` are padded, `p` is the larger padding by axis."""
    K, C, R, S = weights.shape
    X, Y = activations.shape[1:]
    OX, OY = out_hw
    Kc = accumulators // (ceil(OX, 8) * ceil(OY, 8))
    th, tw = ceil(X, 8), ceil(Y, 8)
    full = np.zeros((C, 8 * th, 8 * tw), bool)
    full[:, :X, :Y] = activations
    cycles = 0
    for kc in range(0, K, Kc):
        for c in range(C):
            costs = []
            for ex, ey in itertools.product(range(8), range(8)):
                cost = 0
                for a, b in itertools.product(range(stride), range(stride)):
                    acts = [
                        (x, y)
                        for x in range(ex * th, (ex + 1) * th)
                        for y in range(ey * tw, (ey + 1) * tw)
                        if full[c, x, y] and x % stride == a and y % stride == b
                    ]
                    wgts = [
                        (r, s, k)
                        for r in range(a, R, stride)
                        for s in range(b, S, stride)
                        for k in range(kc, min(kc + Kc, K))
                        if weights[k, c, r, s]
                    ]
                    for i in range(0, len(acts), 4):
                        for f in range(0, len(wgts), 4):
                            hits = Counter(
                                bank((x - r) // stride, (y - s) // stride, k)
                                for x, y in acts[i : i + 4]
                                for r, s, k in wgts[f : f + 4]
                                if 0 <= (x - r) // stride < OX and 0 <= (y - s) // stride < OY
                            )
                            most = max(hits.values(), default=0)
                            cost += max(1, most) if conflicts else 1
                costs.append(cost)
            cycles += max(costs)
        xs, ys = (R - 1 - p[0], th, p[0]), (S - 1 - p[1], tw, p[1])
        pairs = [xs[i] * ys[j] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        cycles += min(Kc, K - kc) * max(pairs)
    return cycles


def bank(x, y, k):
    high = ((k & 4) << 2) ^ ((x & 2) << 3) ^ ((y & 2) << 3)
    return (high + ((x & 1) << 3) + ((y & 1) << 2) + (k & 3)) % 32


def products(weights, activations, stride, padding, dilation):
    """Pairs of nonzeros that reach the output."""
    full = padded(activations, padding)
    _, _, OX, OY = sizes(weights, activations.shape, stride, padding, dilation)
    count = 0
    for r, s in itertools.product(*map(range, weights.shape[2:])):
        x, y = r * dilation, s * dilation
        met = full[:, x : x + stride * OX : stride, y : y + stride * OY : stride]
        count += int(weights[:, :, r, s].sum(0) @ met.sum((1, 2)))
    return count


def cambricon_x(weights, outputs):
    steps = []
    for w in weights:
        flat = w.transpose(2, 1, 0).ravel()  # S, R, C
        blocks = [flat[i : i + 256].sum() for i in range(0, len(flat), 256)]
        steps.append(sum(ceil(int(n), 16) for n in blocks))
    return outputs * sum(max(steps[i : i + 16]) for i in range(0, len(steps), 16))


def cnvlutin(filters, activations, stride, padding, dilation, kernel, out_hw):
    full = padded(activations, padding)
    total = 0
    for ox, oy in itertools.product(*map(range, out_hw)):
        bricks = [
            max(1, full[c : c + 16, ox * stride + r * dilation, oy * stride + s * dilation].sum())
            for s in range(kernel[1])
            for r in range(kernel[0])
            for c in range(0, len(full), 16)
        ]
        total += max(sum(bricks[lane::16]) for lane in range(16))
    return int(total) * ceil(filters, 256)


def tensordash_gradient(filters, activations, stride, padding, dilation, kernel, out_hw):
    full = padded(activations, padding)
    OX, OY = out_hw
    issued = 0
    for r, s in itertools.product(*map(range, kernel)):
        x, y = r * dilation, s * dilation
        met = full[:, x : x + stride * OX : stride, y : y + stride * OY : stride]
        flat = met.reshape(len(full), -1)
        rows = np.zeros((ceil(len(full), 16) * 16, ceil(OX * OY, 16) * 16), bool)
        rows[: len(full), : OX * OY] = flat
        rows = rows.reshape(len(rows), -1, 16)
        issued += sum(schedule(rows[i : i + 16], T25, 2) for i in range(0, len(rows), 16))
    return issued * ceil(filters, 16)


def turned(weights, gradients, hw, stride, padding):
    """The input gradient as weights, padded activations of a stride-1 convolution (dilation 1)."""
    K, C, R, S = weights.shape
    _, OX, OY = gradients.shape
    H, W = hw
    # Each gradient goes where its window began; the rotated kernel reaches R - 1 back from there.
    full = np.zeros((K, H + padding[0] + padding[1] + R, W + padding[2] + padding[3] + S), bool)
    full[:, : stride * OX : stride, : stride * OY : stride] = gradients
    full = np.pad(full, ((0, 0), (R - 1, 0), (S - 1, 0)))
    full = full[:, padding[0] :, padding[2] :][:, : H + R - 1, : W + S - 1]
    return weights[:, :, ::-1, ::-1].swapaxes(0, 1), full


# -- fast against slow -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_weight_side_models(seed: int) -> None:
    for weights, activations, stride, padding, dilation in cases(12, seed):
        hw = activations.shape[1:]
        geometry = dict(input_hw=hw, stride=stride, padding=padding, dilation=dilation)
        _, _, OX, OY = sizes(weights, activations.shape, stride, padding, dilation)
        outputs = OX * OY
        plain = dilated(weights, dilation) if weights.shape[1] == 3 and stride > 1 else weights
        ones = np.ones_like(weights)
        tile = dense_tile(plain, outputs, stride)
        pairs = products(weights, activations, stride, padding, dilation)
        dense_pairs = products(ones, np.ones_like(activations), stride, padding, dilation)

        def check(design: Accelerator, cycles: int, own: int | None = None) -> None:
            got = design.conv_cycles(weights, activations, **geometry)  # noqa: B023
            assert got.cycles == cycles, (design, geometry, weights.shape)  # noqa: B023
            assert got.multiplications == pairs  # noqa: B023
            if own is not None:
                assert got.own_dense_cycles == own
            if getattr(design, "columns", 1) == 1:
                assert got.dense_cycles == tile  # noqa: B023

        check(DenseTile(), tile, tile)
        check(DenseTile(columns=16), dense_tile(plain, outputs, stride, 16))
        # structural zeros between dilated taps of a folded kernel are zeros in the dense run too
        full = dilated(ones, dilation) if plain is not weights else ones
        own = bit_tactical(full, outputs, stride, T25, 2)
        check(BitTactical(), bit_tactical(plain, outputs, stride, T25, 2), own)
        check(TensorDash(), bit_tactical(plain, outputs, stride, T25, 2), own)
        for h, d, columns in ((1, 1, 1), (2, 5, 3), (4, 6, 1)):
            expected = bit_tactical(plain, outputs, stride, l_shape(h, d), h, columns)
            check(BitTactical(h, d, "L", columns), expected)
        check(CambriconX(), cambricon_x(weights, outputs), cambricon_x(ones, outputs))
        check(Ideal(64), ceil(pairs, 64), ceil(dense_pairs, 64))
        P, K, depth = outputs, weights.shape[0], weights[0].size
        check(Systolic(5, 7, "os"), ceil(P, 5) * ceil(K, 7) * (depth + 10) - 1)
        check(Systolic(5, 7, "ws"), ceil(depth, 5) * ceil(K, 7) * (P + 15) - 1)


@pytest.mark.parametrize("seed", range(10))
def test_scnn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for weights, activations, stride, padding, dilation in cases(12, 100 + seed):
        weights, activations = weights[:, :7], activations[:7]
        hw = activations.shape[1:]
        _, _, OX, OY = sizes(weights, activations.shape, stride, padding, dilation)
        conflicts, accumulators = bool(rng.random() < 0.8), int(rng.choice([40, 150, 6144]))
        design = SCNN(conflicts, accumulators)
        got = design.conv_cycles(
            weights, activations, input_hw=hw, stride=stride, padding=padding, dilation=dilation
        )
        p = max(padding[:2]), max(padding[2:])
        rest = (stride, p, (OX, OY), conflicts, accumulators)
        full = padded(activations, padding)
        assert got.cycles == scnn(dilated(weights, dilation), full, *rest)
        # channels of a dense run are alike: the reference runs two
        ones = dilated(np.ones_like(weights), dilation)
        full = padded(np.ones_like(activations), padding)
        if seed < 3 and ones.size < 2000:
            assert got.own_dense_cycles == scnn(ones, full, *rest)


@pytest.mark.parametrize("seed", range(6))
def test_activation_side_models(seed: int) -> None:
    for weights, activations, stride, padding, dilation in cases(10, 200 + seed):
        K, _, R, S = weights.shape
        hw = activations.shape[1:]
        _, _, OX, OY = sizes(weights, activations.shape, stride, padding, dilation)
        geometry = dict(input_hw=hw, stride=stride, padding=padding, dilation=dilation)
        rest = (stride, padding, dilation, (R, S), (OX, OY))
        ones = np.ones_like(activations)
        got = Cnvlutin().conv_cycles(weights, activations, **geometry)
        assert got.cycles == cnvlutin(K, activations, *rest)
        assert got.own_dense_cycles == cnvlutin(K, ones, *rest)
        got = TensorDash().backward_weight(activations, filters=K, kernel=(R, S), **geometry)
        assert got.cycles == tensordash_gradient(K, activations, *rest)
        assert got.own_dense_cycles == tensordash_gradient(K, ones, *rest)
        P, C = OX * OY, len(activations)
        assert got.dense_cycles == ceil(P, 16) * ceil(C, 16) * R * S * ceil(K, 16)
        got = Ideal(8).backward_weight(activations, filters=K, kernel=(R, S), **geometry)
        full = np.ones_like(weights)
        assert got.multiplications == products(full, activations, stride, padding, dilation)
        assert got.cycles == ceil(got.multiplications, 8)


@pytest.mark.parametrize("seed", range(6))
def test_scnn_weight_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for weights, activations, stride, padding, _ in cases(6, 300 + seed):
        K, _, R, S = weights.shape
        K = min(K, 9)
        activations = activations[:3]
        hw = activations.shape[1:]
        _, _, OX, OY = sizes(weights, activations.shape, stride, padding, 1)
        conflicts, accumulators = bool(rng.random() < 0.8), int(rng.choice([3, 6144]))
        design = SCNN(conflicts, accumulators)
        got = design.backward_weight(
            activations, filters=K, kernel=(R, S), input_hw=hw, stride=stride, padding=padding
        )
        kernel = dilated(np.ones((K, 1, OX, OY), bool), stride)
        p = max(padding[:2]), max(padding[2:])
        full = padded(activations, padding)
        expected = sum(
            scnn(kernel, full[c : c + 1], 1, p, (R, S), conflicts, accumulators)
            for c in range(len(full))
        )
        assert got.cycles == expected
        one = padded(np.ones_like(activations[:1]), padding)
        own = scnn(kernel, one, 1, p, (R, S), conflicts, accumulators)
        assert got.own_dense_cycles == own * len(full)


@pytest.mark.parametrize("seed", range(6))
def test_input_gradient(seed: int) -> None:
    """Every design's input gradient is its convolution of the explicit problem."""
    rng = np.random.default_rng(seed)
    for weights, activations, stride, padding, _ in cases(8, 400 + seed):
        weights, hw = weights[:, :9], activations.shape[1:]
        K = len(weights)
        _, _, OX, OY = sizes(weights, activations.shape, stride, padding, 1)
        gradients = rng.random((K, OX, OY)) < rng.choice([0.3, 1.0])
        given = None if gradients.all() else gradients
        back, full = turned(weights, gradients, hw, stride, padding)
        for design in (SCNN(), Cnvlutin(), Ideal(8), CambriconX(), BitTactical(), DenseTile()):
            got = design.backward_input(weights, given, input_hw=hw, stride=stride, padding=padding)
            explicit = design.conv_cycles(back, full, input_hw=full.shape[1:])
            assert got.multiplications == explicit.multiplications
            assert got.dense_cycles == explicit.dense_cycles
            halos = got.limits.get("halo", 0), explicit.limits.get("halo", 0)  # padding's own
            assert got.cycles - halos[0] == explicit.cycles - halos[1]
