"""The C interface (`csrc/cake_kernels.h`) as ctypes sees it.

Calls release the GIL. Memory is passed by address and belongs to the caller, who keeps it alive and its shapes right: nothing
is checked on the other side.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

ABI = 4
LIBRARY = Path(__file__).with_name("cake_kernels.dll" if os.name == "nt" else "libcake_kernels.so")


class Matrix(ctypes.Structure):
    """W[rows, cols] of a type number (see `TYPES`) at an address. f32, f16 and bf16 lie row after row, others are packed."""

    _fields_ = (("data", c_void_p), ("type", c_int32), ("rows", c_int32), ("cols", c_int32), ("group", c_int32))


class Shape(ctypes.Structure):
    """What all layers of a model share; fields as in the header."""

    _fields_ = (
        ("hidden", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("inner", c_int32),
        ("rotary_dim", c_int32), ("activation", c_int32), ("kv_type", c_int32), ("kv_block", c_int32),
        ("norm_eps", c_float), ("scale", c_float),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """One layer: seven matrices, then addresses of f32 vectors (None: absent) and of its KV cache."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in (
            "attention_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias",
            "down_bias",
            "keys", "values", "key_scale", "value_scale",
        )),
        ("window", c_int32),
    )  # fmt: skip


class Step(ctypes.Structure):
    """Runs of successive positions, each of a sequence of its own: addresses of i32 `positions` [rows], `lengths` [runs] and KV
    block `tables` [runs, table_stride], and of f32 `cosines` and `sines` [rows, rotary_dim / 2]."""

    _fields_ = (
        ("rows", c_int32), ("runs", c_int32), ("table_stride", c_int32), ("positions", c_void_p), ("lengths", c_void_p),
        ("tables", c_void_p), ("cosines", c_void_p), ("sines", c_void_p),
    )  # fmt: skip


def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library with its signatures declared.

    Raises ImportError when it is missing or of another version: whoever imports cake_kernels falls back on PyTorch.
    """
    if not path.is_file():
        raise _unusable(f"cake-kernels was installed without its library {path.name}; reinstall it, or run its hatch_build.py")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _unusable(f"cannot load {path}: {error}; reinstall cake-kernels for this machine") from error
    if library.cake_abi() != ABI:
        raise _unusable(f"{path} is of another version than cake-kernels' Python part; build or install it again")
    _declare(library)
    return library


def _unusable(message: str) -> ImportError:
    return ImportError(message, name="cake_kernels")


def _declare(library: ctypes.CDLL) -> None:
    signatures = {
        "cake_isa": (c_char_p,),
        "cake_use_isa": (c_int32, c_char_p),
        "cake_pool_new": (c_void_p, c_int32),
        "cake_pool_free": (None, c_void_p),
        "cake_use_large_pages": (None, c_void_p, c_int64),
        "cake_packed_bytes": (c_int64, c_int32, c_int32, c_int32, c_int32),
        "cake_pack": (c_int32, c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p),
        "cake_pack_groups": (c_int32, c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_void_p, c_void_p),
        "cake_rows": (c_int32, POINTER(Matrix), c_void_p, c_int32, c_void_p),
        "cake_matmul": (c_int32, c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int32),
        "cake_decode": (c_int32, c_void_p, POINTER(Shape), POINTER(Layer), c_int32, POINTER(Step), c_void_p),
        "cake_rms_norm": (None, c_void_p, c_void_p, c_float, c_int32, c_int32, c_void_p),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
