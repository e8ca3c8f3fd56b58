"""The kernels of qk_write and kv_store: a program has some heads of one token, in float32 between load and store.

A head is read as its first P numbers, the P that they are paired with, and what is not rotated.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(data, at, inside, part_step, COUNT: tl.constexpr, UNIT: tl.constexpr):
    """The numbers at `at`, or the sum of COUNT parts of them, in float32."""
    total = tl.load(data + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, COUNT):
        total += tl.load(data + part_step.to(tl.int64) * (UNIT * part) + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _weights(q_weight, k_weight, is_q, column, inside):
    """What each number is multiplied by after normalisation, by the kind of its head."""
    of_q = tl.load(q_weight + column, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q[:, None], of_q[None, :], of_k[None, :])


@triton.jit
def _write(x, out, k, v, at_out, place, column, inside, kinds, KEEP: tl.constexpr, CHECK: tl.constexpr):
    """Store numbers of heads; how many keys and values among them are not finite, as they are stored."""
    is_q, is_k, is_v = kinds
    kept = is_q | is_k if KEEP else is_q
    here = column[None, :]
    tl.store(out + at_out[:, None] + here, x.to(out.dtype.element_ty), mask=kept[:, None] & inside[None, :])
    stored = x.to(k.dtype.element_ty)
    tl.store(k + place[:, None] + here, stored, mask=is_k[:, None] & inside[None, :])
    tl.store(v + place[:, None] + here, stored, mask=is_v[:, None] & inside[None, :])
    bad = 0
    if CHECK:
        sound = (tl.abs(stored.to(tl.float32)) <= 3.4028234663852886e38) | is_q[:, None] | ~inside[None, :]
        bad = tl.sum(tl.where(sound, 0, 1))
    return bad


@triton.jit(do_not_specialize=["part_step", "eps"])
def qk_write_heads(
    qkv, out, k, v, cos, sin, q_weight, k_weight, positions, slots, rows, flags,
    part_step,  # between parts, in UNIT numbers: the compiler sees a multiple, and reads 16 bytes at once
    eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr,  # P
    PAIRS_WIDE: tl.constexpr, REST_WIDE: tl.constexpr,  # P or more, D - 2 P or more: powers of 2; 0: no rest
    ROW: tl.constexpr, OUT_ROW: tl.constexpr,  # numbers between tokens of qkv, and of out
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    COUNT: tl.constexpr,  # parts to be added up
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,  # keys go to `out`, too
    CHECK: tl.constexpr,
    FLAG: tl.constexpr,  # set for the row of a token with a key or value that is not finite
):  # fmt: skip
    """Some heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real, is_q = head < H + 2 * G, head < H
    is_k, is_v = (head >= H) & (head < H + G), (head >= H + G) & real
    kinds = (is_q, is_k, is_v)
    slot = tl.load(slots + token)
    kv_head = tl.where(is_k, head - H, head - H - G)
    place = ((slot // PAGE * G + kv_head) * PAGE + slot % PAGE) * D
    pair = tl.arange(0, PAIRS_WIDE)
    inside = pair < PAIRS
    read = real[:, None] & inside[None, :]
    at, at_out = token * ROW + head * D, token * OUT_ROW + head * D
    one = _read(qkv, at[:, None] + pair[None, :], read, part_step, COUNT, UNIT)
    two = _read(qkv, at[:, None] + (pair + PAIRS)[None, :], read, part_step, COUNT, UNIT)
    if REST_WIDE > 0:
        last = 2 * PAIRS + tl.arange(0, REST_WIDE)
        in_rest = last < D
        rest = _read(qkv, at[:, None] + last[None, :], real[:, None] & in_rest[None, :], part_step, COUNT, UNIT)
    if NORM:
        square = tl.sum(one * one, 1) + tl.sum(two * two, 1)
        if REST_WIDE > 0:
            square += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        plain = is_v[:, None]
        one = tl.where(plain, one, one * scale * _weights(q_weight, k_weight, is_q, pair, inside))
        two = tl.where(plain, two, two * scale * _weights(q_weight, k_weight, is_q, pair + PAIRS, inside))
        if REST_WIDE > 0:
            rest = tl.where(plain, rest, rest * scale * _weights(q_weight, k_weight, is_q, last, in_rest))
    at_angle = tl.load(positions + token).to(tl.int64) * PAIRS + pair
    c = tl.load(cos + at_angle, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + at_angle, mask=inside, other=0.0)[None, :]
    turned_one = tl.where(is_v[:, None], one, one * c - two * s)
    turned_two = tl.where(is_v[:, None], two, two * c + one * s)
    bad = _write(turned_one, out, k, v, at_out, place, pair, inside, kinds, KEEP, CHECK)
    bad += _write(turned_two, out, k, v, at_out, place, pair + PAIRS, inside, kinds, KEEP, CHECK)
    if REST_WIDE > 0:
        bad += _write(rest, out, k, v, at_out, place, last, in_rest, kinds, KEEP, CHECK)
    if CHECK:  # noqa: SIM102 (decided when compiled)
        if bad > 0:
            tl.atomic_or(flags + tl.load(rows + token), FLAG)


@triton.jit
def kv_store_heads(
    k_new, v_new, k, v, slots, rows, flags,
    K_ROW: tl.constexpr, K_HEAD: tl.constexpr,  # numbers between tokens, and between heads
    V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr,  # D or more, a power of 2
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    CHECK: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """Keys and values of some KV heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDE)
    inside = (head < G)[:, None] & (column < D)[None, :]
    slot = tl.load(slots + token)
    place = (((slot // PAGE * G + head) * PAGE + slot % PAGE) * D)[:, None] + column[None, :]
    at_k = token * K_ROW + (head * K_HEAD)[:, None] + column[None, :]
    at_v = token * V_ROW + (head * V_HEAD)[:, None] + column[None, :]
    keys = tl.load(k_new + at_k, mask=inside, other=0.0).to(k.dtype.element_ty)
    values = tl.load(v_new + at_v, mask=inside, other=0.0).to(v.dtype.element_ty)
    tl.store(k + place, keys, mask=inside)
    tl.store(v + place, values, mask=inside)
    if CHECK:
        most = 3.4028234663852886e38
        sound = (tl.abs(keys.to(tl.float32)) <= most) & (tl.abs(values.to(tl.float32)) <= most)
        if tl.sum(tl.where(sound, 0, 1)) > 0:
            tl.atomic_or(flags + tl.load(rows + token), FLAG)
