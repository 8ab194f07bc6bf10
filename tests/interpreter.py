"""Repairs to Triton's CPU interpreter (TRITON_INTERPRET=1), so that kernels compute in it what a GPU computes. For tests only.

What the interpreter of Triton 3.6 to 3.9 gets wrong, and what `install` puts in its place:

    bfloat16      held as uint16 and computed on as integers     decoded to float32, computed, rounded to nearest even
    casts to it   cut off; no constants                          rounded to nearest even, as a GPU does; constants too
    tf32          `input_precision` is ignored                   operands rounded to 10 bits of mantissa where tf32 is asked for
    range(0, n)   3.6 with numpy >= 2.4: TypeError               the scalar is taken out of its array
    autotune      asks for a GPU to time on                      the first configuration is taken

Still missing afterwards: libdevice, inline assembly and atomics in bfloat16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits held as uint16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of the bfloat16 nearest to each float32, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def float32_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 bits of mantissa that a tensor core reads in tf32 mode; infinities and NaN stay."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _decode(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bfloat16_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _encode(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


def _through_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """`method` of the builder, computed in float32 and rounded where its last operand is bfloat16."""

    def repaired(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        operands = [arg for arg in args if isinstance(arg, TensorHandle)]
        if not _is_bfloat16(operands[-1]):
            return method(self, *args)
        return _encode(method(self, *(_decode(arg) if isinstance(arg, TensorHandle) else arg for arg in args)))

    return repaired


def _repair_arithmetic() -> None:
    binary, ternary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.ternary_op, InterpreterBuilder.unary_op

    def binary_op(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if not _is_bfloat16(left) or op in BITWISE:
            return binary(self, left, right, op)
        result = binary(self, _decode(left), _decode(right), op)
        return TensorHandle(result.data, tl.int1) if op in COMPARISONS else _encode(result)

    def ternary_op(
        self: InterpreterBuilder, first: TensorHandle, second: TensorHandle, third: TensorHandle, op: Any
    ) -> TensorHandle:
        repaired = ternary if op is np.where else _through_float32(ternary)
        return repaired(self, first, second, third, op)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.ternary_op = ternary_op
    InterpreterBuilder.unary_op = _through_float32(unary)
    for name in ("create_fma", "create_rsqrt", "create_erf"):
        setattr(InterpreterBuilder, name, _through_float32(getattr(InterpreterBuilder, name)))


def _get_bfloat16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(float32_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)


def _repair_casts() -> None:
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        wide = _decode(source)
        if target.scalar != tl.bfloat16:
            return cast(self, wide, target)
        if _is_bfloat16(source):
            return source
        return TensorHandle(float32_to_bfloat16(wide.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(
        self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any
    ) -> TensorHandle:
        rounds_to_nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and rounds_to_nearest:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.get_bf16 = _get_bfloat16


def _repair_dot() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, *rest: Any
    ) -> TensorHandle:
        if getattr(precision, "name", str(precision)).upper() == "TF32" and a.dtype.scalar == tl.float32:
            a, b = (TensorHandle(float32_to_tf32(handle.data), tl.float32) for handle in (a, b))
        result = dot(self, _decode(a), _decode(b), _decode(c), precision, *rest)
        return _encode(result) if _is_bfloat16(c) else result

    InterpreterBuilder.create_dot = create_dot


def _repair_range() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # The scope, where there is one, remembers the original already: it was given one by `patch`.
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_autotune() -> None:
    run = Autotuner.run

    def run_first(self: Autotuner, *args: Any, **options: Any) -> Any:
        self.configs = self.configs[:1]
        return run(self, *args, **options)

    Autotuner.run = run_first


_installed = False


def install() -> None:
    """Repair the interpreter; call it before kernels are imported. A second call does nothing.

    Raises:
        RuntimeError: triton was imported without TRITON_INTERPRET=1, so that its own functions are compiled ones.
    """
    global _installed
    if not isinstance(tl.zeros, InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET: expected 1 in the environment before triton is first imported")
    if _installed:
        return
    _repair_arithmetic()
    _repair_casts()
    _repair_dot()
    _repair_range()
    _repair_autotune()
    _installed = True
