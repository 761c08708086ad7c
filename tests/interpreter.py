"""Triton's interpreter in tests: the right arithmetic of bfloat16, and no work that is done again at every call.

3.6 to 3.9 compute on the bit patterns of bfloat16; they replace the functions of triton.language for each call of a
helper inside a kernel, although the kernel's own start has done it: a third of the time of a test. They also describe
every type anew, and build a check for overflow, of eight tensors, that is never made: half of what is left.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as the hardware does; the interpreter truncates."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair_bfloat16() -> None:
    """Replace the interpreter's matrix product and casts where a bfloat16 takes part."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def float32(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_to_float32(handle.data), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, float32(a), float32(b), d, *rest)

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == tl.bfloat16:
            source = float32(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si"):
        setattr(InterpreterBuilder, name, cast_impl)


def patch_once() -> None:
    """Leave triton.language as the start of the kernel made it; its own library sees triton.language.core, once."""
    patch = interpreter._patch_lang
    seen_core = False

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen_core
        if not seen_core and any(value is tl.core for value in self.fn.__globals__.values()):
            seen_core = True
            patch(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call
    np_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(np_dtype)
    interpreter._get_np_dtype = lambda ty: of_scalar(ty) if type(ty) is tl.dtype else np_dtype(ty)


def check_overflow_at_once() -> None:
    """Raise where 32-bit integers overflow, which wraps around on a GPU, and unseen in Triton's own interpreter."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        result = operations[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if result.size and not (kind.get_int_min_value() <= result.min() and result.max() <= kind.get_int_max_value()):
            raise OverflowError(f"int{kind.int_bitwidth} {binary_op.__name__}: {result.min()} to {result.max()}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def describe_types_once() -> None:
    """A block's type by its element and shape, and a tensor's shape by its type, from a table."""
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    describe = tl.block_type.__init__
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:
            describe(self, element_ty, shape)
            return
        key = (element_ty, *[size.value if type(size) is tl.constexpr else size for size in shape])
        if key not in described:
            describe(self, element_ty, shape)
            described[key] = dict(self.__dict__)
        self.__dict__.update(described[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()  # not yet triton's own kind of tuple
        if shape not in shapes:
            shapes[shape] = (tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape]))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[shape]

    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor


def keep_frames_together() -> None:
    """Run a kernel from a frame so large that Python gives it, and all that it calls, one piece of memory of 1 MiB.

    Python 3.11 keeps frames in pieces of 16 KiB, and gives a piece back as soon as it is empty: where the end of one
    falls into a kernel's innermost loop, each call maps and unmaps memory, which took up to half of a test's time.
    """
    run = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=80_000)
    GridExecutor.__call__ = call
