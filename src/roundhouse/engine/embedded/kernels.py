"""What all numba kernels here share: compile options, number formats, exp; and the small kernels of a decoder layer.

Arrays of activations are float32, or bfloat16 seen as uint16; numba knows no bfloat16.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.extending import overload
from numpy.typing import NDArray


def _cache_folder() -> str:
    """Where numba keeps compiled kernels: one folder for each state of this package's source.

    On its own numba would look at the file of a kernel only, and miss changes in the functions that it is made of.
    """
    here = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(here.glob("*.py")))
    return str(here / "__pycache__" / f"numba-{hashlib.sha256(source).hexdigest()[:16]}")


numba.config.CACHE_DIR = numba.config.CACHE_DIR or _cache_folder()  # type: ignore[attr-defined]

Array = NDArray[Any]
f32 = np.float32
i32 = np.int32
u16 = np.uint16
u32 = np.uint32

JIT: dict[str, Any] = {"fastmath": True, "error_model": "numpy", "boundscheck": False, "nogil": True, "cache": True}
# Sums run in the order written, whatever else LLVM does to the code, so that equal rows get equal bits: no "reassoc",
# and no "nsz", which would drop the 0 that a sum starts from and leave open which of the first two products is rounded.
ORDERED: dict[str, Any] = {**JIT, "fastmath": {"contract", "nnan", "ninf"}}
PARALLEL_FROM = 16_384  # numbers; below it, waking the other threads costs more than they save

# exp(x) = 2**k * e**r with k = round(x / ln 2); ln 2 in two parts keeps r exact; e**r by its series
_LOG2E, _LN2_HIGH, _LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
_C6, _C5, _C4, _C3, _C2, _ONE = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(0.5), f32(1)


@numba.njit(inline="always", **JIT)  # type: ignore[untyped-decorator]
def exp_negative(x: Any) -> Any:
    """exp(x) for x <= 0 in float32, relative error under 5e-7; a form that LLVM turns into vector code."""
    x = max(x, f32(-87.0))
    k = i32(x * _LOG2E - f32(0.5))
    z = f32(k)
    r = x - z * _LN2_HIGH - z * _LN2_LOW
    p = _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _ONE
    p = p * r + _ONE
    return p * i32(i32(k + i32(127)) << i32(23)).view(f32)


def widen(x: Any) -> Any:
    """A stored number as float32. Inside kernels only."""
    raise NotImplementedError


def narrow(x: Any, like: Any) -> Any:
    """A float32 in the format that `like` is stored in, rounded to nearest even. Inside kernels only."""
    raise NotImplementedError


@overload(widen, inline="always", jit_options={"fastmath": ORDERED["fastmath"]})
def _widen(x):  # type: ignore[no-untyped-def]  # numba compares its signature with the lambdas'
    if x == types.uint16:
        return lambda x: u32(u32(x) << u32(16)).view(f32)
    return lambda x: x


@overload(narrow, inline="always", jit_options={"fastmath": ORDERED["fastmath"]})
def _narrow(x, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda x, like: u16(
            (f32(x).view(u32) + u32(0x7FFF) + ((f32(x).view(u32) >> u32(16)) & u32(1))) >> u32(16)
        )
    return lambda x, like: x


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def sum_squares(row: Any) -> Any:
    """The sum of the squares of `row`, in eight lanes, which LLVM turns into one vector."""
    size = row.shape[0]
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = f32(0)
    for d in range(0, size // 8 * 8, 8):
        s0 += row[d] * row[d]
        s1 += row[d + 1] * row[d + 1]
        s2 += row[d + 2] * row[d + 2]
        s3 += row[d + 3] * row[d + 3]
        s4 += row[d + 4] * row[d + 4]
        s5 += row[d + 5] * row[d + 5]
        s6 += row[d + 6] * row[d + 6]
        s7 += row[d + 7] * row[d + 7]
    for d in range(size // 8 * 8, size):
        s0 += row[d] * row[d]
    return ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7))


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _norm_row(hidden: Any, weight: Any, epsilon: Any, out: Any) -> None:
    factor = f32(1) / np.sqrt(sum_squares(hidden) / f32(hidden.shape[0]) + epsilon)
    for d in range(hidden.shape[0]):
        out[d] = narrow(hidden[d] * factor * weight[d], out[d])


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _add_norm_row(hidden: Any, delta: Any, weight: Any, epsilon: Any, out: Any) -> None:
    for d in range(hidden.shape[0]):
        hidden[d] += widen(delta[d])
    _norm_row(hidden, weight, epsilon, out)


@numba.njit(parallel=True, **JIT)
def embed_norm(tokens, table, hidden, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """hidden [tokens, size] = table[tokens]; out = RMSNorm(hidden) * weight."""
    for t in prange(tokens.shape[0]):
        for d in range(hidden.shape[1]):
            hidden[t, d] = widen(table[tokens[t], d])
        _norm_row(hidden[t], weight, epsilon, out[t])


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def add_norm(hidden: Any, delta: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """hidden [tokens, size] += delta; out = RMSNorm(hidden) * weight."""
    for t in range(hidden.shape[0]):
        _add_norm_row(hidden[t], delta[t], weight, epsilon, out[t])


@numba.njit(parallel=True, **JIT)
def add_norm_parallel(hidden, delta, weight, epsilon, out):  # type: ignore[no-untyped-def]
    for t in prange(hidden.shape[0]):
        _add_norm_row(hidden[t], delta[t], weight, epsilon, out[t])


@numba.njit(forceinline=True, **ORDERED)  # type: ignore[untyped-decorator]
def _silu_mul_row(gate_up: Any, out: Any) -> None:
    size = out.shape[0]
    for d in range(size):
        gate = widen(gate_up[d])
        e = exp_negative(-abs(gate))
        sigmoid = f32(1) / (f32(1) + e)
        if gate < 0:
            sigmoid = e * sigmoid
        out[d] = narrow(gate * sigmoid * widen(gate_up[size + d]), out[d])


@numba.njit(**JIT)  # type: ignore[untyped-decorator]
def silu_mul(gate_up: Any, out: Any) -> None:
    """gate_up [tokens, 2 * size], the gate first; out [tokens, size] = silu(gate) * up."""
    for t in range(out.shape[0]):
        _silu_mul_row(gate_up[t], out[t])


@numba.njit(parallel=True, **JIT)
def silu_mul_parallel(gate_up, out):  # type: ignore[no-untyped-def]
    for t in prange(out.shape[0]):
        _silu_mul_row(gate_up[t], out[t])
