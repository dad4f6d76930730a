"""Tiny random checkpoints as GPTQ, AWQ, FP8 and compressed-tensors write them, and what their weights are.

Codes, scales and zeros are drawn; the packing here follows each method's published layout, and the values its formula, in
plain numpy: nothing of the loader's is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

Array = NDArray[Any]
Tensors = dict[str, torch.Tensor]

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 256, 384, 2, 4, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float16",
}  # fmt: skip
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in the first, second ... nibble of a word."""


@dataclass(frozen=True)
class Form:
    """One way to store a matrix: its tensors by suffix and its values in f32, from a shape and a generator."""

    config: Mapping[str, Any]
    make: Callable[[int, int, np.random.Generator], tuple[Tensors, Array]]
    tensors: Tensors = field(default_factory=dict)


def pack(codes: Array, bits: int, axis: int) -> torch.Tensor:
    """Codes into 32-bit words along an axis, the first into the lowest bits; the last word is filled up with zeros."""
    a = np.moveaxis(codes.astype(np.uint32), axis, -1)
    each = 32 // bits
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % each)])
    a = a.reshape(*a.shape[:-1], -1, each)
    words = np.bitwise_or.reduce(a << (bits * np.arange(each, dtype=np.uint32)), axis=-1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32).copy())


def drawn(rows: int, cols: int, bits: int, group: int, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Codes [rows, cols], scales f16 and zeros [rows, groups], group of each column."""
    groups = -(-cols // group)
    codes = rng.integers(0, 1 << bits, (rows, cols))
    half = 1 << (bits - 1)
    zeros = rng.integers(half - 2, half + 3, (rows, groups))
    scales = (rng.uniform(0.5, 1.5, (rows, groups)) * 0.08 / half).astype(np.float16)
    return codes, scales, zeros, np.arange(cols) // group


def values(codes: Array, scales: Array, zeros: Array, of: Array) -> Array:
    return ((codes - zeros[:, of]) * scales.astype(np.float64)[:, of]).astype(np.float32)


def gptq(bits: int, group: int, scattered: bool = False, second: bool = False) -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes, scales, zeros, of = drawn(rows, cols, bits, group if group > 0 else cols, rng)
        of = rng.permutation(of) if scattered else of
        tensors = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(zeros.T - (0 if second else 1), bits, 1),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(of.astype(np.int32)),
        }
        return tensors, values(codes, scales, zeros, of)

    more = {"checkpoint_format": "gptq_v2"} if second else {}
    return Form({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": scattered, **more}, make)


def awq(group: int) -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes, scales, zeros, of = drawn(rows, cols, 4, group, rng)
        shuffled = [a.T.reshape(-1, rows // 8, 8)[:, :, AWQ_NIBBLES].reshape(-1, rows) for a in (codes, zeros)]
        tensors = {"qweight": pack(shuffled[0], 4, 1), "qzeros": pack(shuffled[1], 4, 1)}
        return {**tensors, "scales": torch.from_numpy(scales.T.copy())}, values(codes, scales, zeros, of)

    return Form({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, make)


def _compressed(kind: str, weights: Mapping[str, Any], make: Callable[..., tuple[Tensors, Array]]) -> Form:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}}
    return Form({"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}, make)


def packed(bits: int, group: int | None, symmetric: bool, scattered: bool = False) -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes, scales, zeros, of = drawn(rows, cols, bits, group or cols, rng)
        zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
        of = rng.permutation(of) if scattered else of
        tensors = {
            "weight_packed": pack(codes, bits, 1),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor([rows, cols]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros, bits, 0)
        if scattered:
            tensors["weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
        return tensors, values(codes, scales, zeros, of)

    strategy = "group" if group else "channel"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": symmetric}
    return _compressed("pack-quantized", weights, make)


def plain_int8() -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        codes, scales, zeros, of = drawn(rows, cols, 8, cols, rng)
        signed = (codes - 128).astype(np.int8)
        tensors = {"weight": torch.from_numpy(signed), "weight_scale": torch.from_numpy(scales).to(torch.bfloat16)}
        return tensors, values(codes, tensors["weight_scale"].float().numpy(), np.full_like(zeros, 128), of)

    return _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, make)


def floats(rows: int, cols: int, block: tuple[int, int], rng: np.random.Generator) -> tuple[torch.Tensor, Array, Array]:
    """e4m3 weights of every exponent, scales of their blocks, and values."""
    drawn_values = rng.standard_normal((rows, cols)) * 2.0 ** rng.integers(-12, 7, (rows, cols))
    weight = torch.from_numpy(drawn_values).to(torch.float8_e4m3fn)
    scales = rng.uniform(0.0003, 0.0006, (-(-rows // block[0]), -(-cols // block[1]))).astype(np.float32)
    wide = np.repeat(np.repeat(scales, block[0], 0)[:rows], block[1], 1)[:, :cols]
    return weight, scales, weight.to(torch.float64).numpy().astype(np.float32) * wide


def fp8(block: tuple[int, int] | None) -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        weight, scales, exact = floats(rows, cols, block or (rows, cols), rng)
        scale = torch.from_numpy(scales) if block else torch.tensor(scales[0, 0])
        return {"weight": weight, "weight_scale_inv": scale}, exact

    return Form({"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}, make)


def fp8_channels() -> Form:
    def make(rows: int, cols: int, rng: np.random.Generator) -> tuple[Tensors, Array]:
        weight, scales, exact = floats(rows, cols, (1, cols), rng)
        return {"weight": weight, "weight_scale": torch.from_numpy(scales), "input_scale": torch.tensor(1.0)}, exact

    return _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, make)


FORMS: Mapping[str, Form] = {
    "gptq-4": gptq(4, 128),
    "gptq-4-whole-rows": gptq(4, -1),
    "gptq-4-scattered": gptq(4, 64, scattered=True),
    "gptq-8": gptq(8, 32, second=True),
    "awq": awq(64),
    "packed-4": packed(4, 128, symmetric=True),
    "packed-4-asymmetric": packed(4, 32, symmetric=False),
    "packed-4-scattered": packed(4, 64, symmetric=True, scattered=True),
    "packed-8-channels": packed(8, None, symmetric=False),
    "int8-channels": plain_int8(),
    "fp8-tensor": fp8(None),
    "fp8-blocks": fp8((96, 128)),
    "fp8-channels": fp8_channels(),
}


def shapes() -> dict[str, tuple[int, int]]:
    kv = HIDDEN // HEADS * KV_HEADS
    of = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    of |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    of |= {"mlp.down_proj": (HIDDEN, INNER)}
    return {f"model.layers.{index}.{name}": shape for index in range(LAYERS) for name, shape in of.items()}


def write(folder: Path, form: Form) -> dict[str, torch.Tensor]:
    """Writes a checkpoint; returns its weights in f32 by name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    tensors, exact = Tensors(), dict[str, torch.Tensor]()
    for name, shape in shapes().items():
        parts, weight = form.make(*shape, rng)
        tensors |= {f"{name}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        exact[f"{name}.weight"] = torch.from_numpy(weight)
    plain = {"model.embed_tokens.weight": rng.standard_normal((VOCABULARY, HIDDEN)) * 0.5}
    plain |= {"lm_head.weight": rng.standard_normal((VOCABULARY, HIDDEN)) * 0.1, "model.norm.weight": np.ones(HIDDEN)}
    for index in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{index}.{norm}.weight"] = rng.uniform(0.5, 1.5, HIDDEN)
    halves = {name: torch.from_numpy(value).to(torch.float16) for name, value in plain.items()}
    save_file({**tensors, **halves}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": dict(form.config)}))
    return {**exact, **{name: value.to(torch.float32) for name, value in halves.items()}}
