"""Triton's interpreter, set up for the tests: import this before anything of kernels.triton_*.

Where there is a GPU the kernels are compiled and run on it; elsewhere they are interpreted on the CPU, with the machine's
arithmetic instead of NumPy's where the two differ: fp32 is narrowed to bf16 to nearest even (the interpreter cuts bits off), a
fused multiply-add rounds once, a maximum drops NaN unless it is told to keep it, 2^x is 0 where the result would be denormal,
and exp(x) is 2^(x · log2 e) with the product rounded, which costs |x| · 6e-8 of relative accuracy. Barriers, the order of a tree
of sums and the approximate division stay unseen.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import numpy as np
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/kernels/triton_interpreter.py could have it interpret")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_rounding(array, from_type, to_type, rounding_mode):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            bits = torch.from_numpy(array.copy()).bfloat16().view(torch.uint16)
            return bits.numpy()
        return _convert(array, from_type, to_type, rounding_mode)

    def _fma(builder, x, y, z):
        # fp64 holds a product of two fp32 numbers exactly.
        with np.errstate(all="ignore"):
            wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def _exp2(x):
        with np.errstate(all="ignore"):
            power = np.exp2(x)
            return np.where(power < np.finfo(np.float32).tiny, np.float32(0), power)

    def _exp(x):
        with np.errstate(all="ignore"):
            return _exp2(x * np.float32(1.4426950408889634))

    _min_max = interpreter.ReduceOps.min_max

    def _min_max_without_nan(reduction, values, val_reduce_op, idx_reduce_op=None):
        dropping = {np.min: np.fmin.reduce, np.max: np.fmax.reduce}
        return _min_max(reduction, values, dropping.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    interpreter._convert_float = _convert_rounding
    interpreter.ReduceOps.min_max = _min_max_without_nan
    interpreter.InterpreterBuilder.create_maxnumf = lambda builder, x, y: builder.binary_op(x, y, np.fmax)
    interpreter.InterpreterBuilder.create_minnumf = lambda builder, x, y: builder.binary_op(x, y, np.fmin)
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter.InterpreterBuilder.create_exp2 = lambda builder, x: builder.unary_op(x, _exp2)
    interpreter.InterpreterBuilder.create_exp = lambda builder, x: builder.unary_op(x, _exp)
    # `launch` asks for the kernels' assertions; the interpreter takes its options from here alone.
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False
    )
