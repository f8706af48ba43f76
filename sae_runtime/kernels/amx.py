"""Pre-activations in bytes on a CPU's matrix tiles (AMX), compared with bounds where they are made.

Neither torch nor Numba makes a product with two-byte numbers of one-byte weights, and a product that is stored before
it is looked at costs as much again. Here it is one function of a few instructions that Numba compiles: LLVM's own names
of them are in `_screen_block`. It runs on torch's threads, so that none is woken and none competes with them.

Importing this takes as long as importing Numba, half a second; byte_encoder does when it is first needed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sae_runtime.kernels.byte_encoder import BLOCK, LANES, STEP

_CHUNK = 16  # blocks that a thread takes at once

ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            "counters",  # int64 [2]: the next block, and how many were appended to near
            "end",  # latent
            "steps",
            "weight",  # int8 [blocks, steps, BLOCK, STEP]
            "per_latent",  # float32 [blocks, 4, BLOCK]: -128 times the sum of its bytes (int32), scale, bias, residual
            "n_groups",
            "digits",  # uint8 [groups, steps, 2, STEP // 4, LANES, 4]: high and low bytes
            "per_row",  # float32 [groups, 4, LANES]: scale, norm, low, high
            "n_rows",
            "rows",  # int64 [n_rows]: of each lane; those below are by row
            "k",
            "n",
            "latents",  # int64 [n]: the own latent
            "n_above",  # int64 [n]
            "n_near",  # int64 [n]
            "near",  # int64 [most_near, 2]: rows and latents
            "most_near",
            "layout",  # uint8 [64]: of tiles
        )
    ]
)
"""Of `scan`: numbers and addresses."""

LAYOUT = np.zeros(64, np.uint8)
"""Of all eight tiles: 16 rows of 64 bytes."""
LAYOUT[0] = 1
LAYOUT[16:32:2] = 64
LAYOUT[48:56] = 16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_Ints = ir.VectorType(_I32, LANES)
_Floats = ir.VectorType(ir.FloatType(), LANES)


def is_supported() -> bool:
    """Whether this CPU has what `scan` is compiled to, and the system lets this process use it."""
    features = llvmlite.binding.get_host_cpu_features()
    can_start = getattr(torch.cpu, "_init_amx", None)
    wanted = ("avx512f", "amx-tile", "amx-int8")
    return all(features.get(name) for name in wanted) and can_start is not None and bool(can_start())


def scan(arguments: np.ndarray[Any, Any], *, on_all_threads: bool) -> None:
    """Counts, from block counters[0] to latent `end`, what is above and near rows' bounds, but for own latents.

    A pre-activation v of a latent with residual s, of a row with norm x, is above if v - x * s > high, else near if
    v + x * s >= low (or not a number). It adds to n_above and n_near, and appends the near ones to `near` while it has
    room. Rows of which k are above are done: what else is counted of them may be any part.

    arguments: [1] of ARGUMENTS.
    """
    code, on_threads = _compiled_scan(), _on_threads() if on_all_threads else None
    if on_threads is None:
        code.ctypes(arguments.ctypes.data)
    else:
        on_threads(code.address, arguments.ctypes.data, torch.get_num_threads(), 0)


@functools.cache
def _on_threads() -> Callable[[int, int, int, int], None] | None:
    """libgomp's entry to a parallel region, of the copy that torch uses: of another one the threads would be others."""
    try:
        found: Any = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found  # type: ignore[no-any-return]


def _at(builder: Any, address: Any, offset: int, kind: Any, align: int = 4) -> Any:
    loaded = builder.load(_pointer(builder, address, offset, kind))
    loaded.align = align
    return loaded


def _pointer(builder: Any, address: Any, offset: int, kind: Any = _I8) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), ir.PointerType(kind))


def _in_all_lanes(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_Ints, [0] * LANES))


def _instruction(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@intrinsic  # type: ignore[untyped-decorator]
def _screen_block(_context: Any, weight: Any, digits: Any, steps: Any, latents: Any, rows: Any, found: Any):  # type: ignore[no-untyped-def]
    """One block of latents and one group of rows, all as addresses.

    Writes to `found`, uint32 [BLOCK], which rows are near or above (the lower 16 bits, one a lane) and which are above
    (the upper 16), and returns 0 if it wrote zeros.
    """

    def code(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weight, digits, steps, latents, rows, found = arguments
        tile, width = functools.partial(ir.Constant, _I8), ir.Constant(_I64, 64)
        memory = cgutils.alloca_once(builder, ir.ArrayType(_I8, 4096))
        memory.align = 64
        sums = builder.ptrtoint(memory, _I64)
        for number in range(4):
            _instruction(builder, "tilezero", tile(number))
        before = builder.block
        loop, done = builder.append_basic_block("step"), builder.append_basic_block("steps_done")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), before)
        offset = builder.shl(step, ir.Constant(_I64, 11))  # 2 KiB a step, of weights as of digits
        for number, (base, half) in enumerate(((weight, 0), (weight, 1024), (digits, 0), (digits, 1024)), start=4):
            pointer = _pointer(builder, builder.add(base, offset), half)
            _instruction(builder, "tileloadd64", tile(number), pointer, width)
        for number, (signed, unsigned) in enumerate(((4, 6), (4, 7), (5, 6), (5, 7))):
            _instruction(builder, "tdpbsud", tile(number), tile(signed), tile(unsigned))
        following = builder.add(step, ir.Constant(_I64, 1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
        builder.position_at_end(done)
        for number in range(4):
            _instruction(builder, "tilestored64", tile(number), _pointer(builder, sums, 1024 * number), width)
        row_scale, norm, low, high = (_at(builder, rows, 64 * i, _Floats) for i in range(4))
        any_found = ir.Constant(_I32, 0)
        for latent in range(BLOCK):
            start, scale, bias, residual = (
                _in_all_lanes(builder, _at(builder, latents, 4 * (BLOCK * i + latent), kind))
                for i, kind in enumerate((_I32, ir.FloatType(), ir.FloatType(), ir.FloatType()))
            )
            at = 2048 * (latent // 16) + 64 * (latent % 16)
            high_digits = builder.add(_at(builder, sums, at, _Ints, 64), start)
            whole = builder.fmul(builder.sitofp(high_digits, _Floats), ir.Constant(_Floats, [256.0] * LANES))
            whole = builder.fadd(whole, builder.sitofp(_at(builder, sums, at + 1024, _Ints, 64), _Floats))
            value = builder.fadd(builder.fmul(whole, builder.fmul(row_scale, scale)), bias)
            error = builder.fmul(norm, residual)
            near = builder.fcmp_unordered(">=", builder.fadd(value, error), low)
            above = builder.fcmp_ordered(">", builder.fsub(value, error), high)
            above_bits = builder.shl(builder.zext(builder.bitcast(above, _I16), _I32), ir.Constant(_I32, 16))
            bits = builder.or_(builder.zext(builder.bitcast(near, _I16), _I32), above_bits)
            any_found = builder.or_(any_found, bits)
            builder.store(bits, _pointer(builder, found, 4 * latent, _I32))
        return any_found

    return types.int32(*[types.int64] * 6), code


@intrinsic  # type: ignore[untyped-decorator]
def _start_tiles(_context: Any, layout: Any):  # type: ignore[no-untyped-def]
    def code(target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _instruction(builder, "ldtilecfg", _pointer(builder, arguments[0], 0))
        return target.get_dummy_value()

    return types.void(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def _end_tiles(_context: Any):  # type: ignore[no-untyped-def]
    def code(target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _instruction(builder, "tilerelease")
        return target.get_dummy_value()

    return types.void(), code


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_add(_context: Any, address: Any, more: Any):  # type: ignore[no-untyped-def]
    """Adds to an int64 that other threads add to, and returns what it was."""

    def code(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], 0, _I64), arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def _from_address(_context: Any, address: Any):  # type: ignore[no-untyped-def]
    def code(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


def _scan(data: Any) -> None:
    """`scan` on one of any number of threads."""
    own = numba.carray(data, 1, ARGUMENTS)[0]
    rows = numba.carray(_from_address(own.rows), own.n_rows, np.int64)
    own_latent = numba.carray(_from_address(own.latents), own.n, np.int64)
    n_above = numba.carray(_from_address(own.n_above), own.n, np.int64)
    near = numba.carray(_from_address(own.near), (own.most_near, 2), np.int64)
    end = (own.end + BLOCK - 1) // BLOCK
    open_lanes = np.empty(own.n_groups, np.uint32)
    found = np.empty(BLOCK, np.uint32)
    _start_tiles(own.layout)
    while True:
        first = _fetch_add(own.counters, _CHUNK)
        any_open = False
        for group in range(own.n_groups):
            open_lanes[group] = 0
            for lane in range(min(LANES, own.n_rows - LANES * group)):
                if n_above[rows[LANES * group + lane]] < own.k:
                    open_lanes[group] |= np.uint32(1 << lane)
                    any_open = True
        if first >= end or not any_open:
            break
        for block in range(first, min(first + _CHUNK, end)):
            weight = own.weight + block * own.steps * (BLOCK * STEP)
            of_latents = own.per_latent + block * (16 * BLOCK)
            for group in range(own.n_groups):
                if open_lanes[group] == 0:
                    continue
                digits = own.digits + group * own.steps * (2 * STEP * LANES)
                of_rows = own.per_row + group * (16 * LANES)
                if not _screen_block(weight, digits, own.steps, of_latents, of_rows, found.ctypes.data):
                    continue
                for i in range(min(BLOCK, own.end - block * BLOCK)):
                    bits = found[i]
                    if (bits | bits >> 16) & open_lanes[group] == 0:
                        continue
                    latent = block * BLOCK + i
                    for lane in range(LANES):
                        is_above = (bits >> (16 + lane)) & 1
                        if not (is_above or (bits >> lane) & 1) or not (open_lanes[group] >> lane) & 1:
                            continue
                        row = rows[LANES * group + lane]
                        if latent == own_latent[row]:
                            continue
                        if is_above:
                            if _fetch_add(own.n_above + 8 * row, 1) + 1 >= own.k:
                                open_lanes[group] &= ~np.uint32(1 << lane)
                            continue
                        _fetch_add(own.n_near + 8 * row, 1)
                        place = _fetch_add(own.counters + 8, 1)
                        if place < own.most_near:
                            near[place, 0] = row
                            near[place, 1] = latent
    _end_tiles()


@functools.cache
def _compiled_scan() -> Any:
    if not is_supported():  # the process would be killed
        raise RuntimeError("this CPU, or what it is used through, has no matrix tiles (AMX)")
    declared = functools.partial(numba.cfunc, types.void(types.voidptr), error_model="numpy")
    try:
        return declared(cache=True)(_scan)
    except RuntimeError:  # no folder for the cache
        return declared()(_scan)
