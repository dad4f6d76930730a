"""The GPU's kernels against PyTorch: on a GPU, or on the CPU in Triton's interpreter (`TRITON_INTERPRET=1 pytest ...`, with
a NumPy that it runs with)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from cake_llama.model import Linear, Norm
from cake_llama.narrow_matrix import Coded, Narrow, NarrowLinear, pack
from cake_llama.rotary import rotate_

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # of the interpreter
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a CUDA device or TRITON_INTERPRET=1"),
]

FORMS = [(4, False), (4, True), (5, False), (5, True), (6, True), (8, False), (8, True)]


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    difference, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
    assert difference <= bound * size, f"{difference / size:.2e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def narrow(rows: int, cols: int, form: tuple[int, bool], seed: int = 0) -> Narrow:
    bits, symmetric = form
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, cols // (16 if symmetric else 32), generator=generator) * 2.0**-bits + 0.001
    least = None if symmetric else -scales * (1 << bits) * torch.rand(scales.shape, generator=generator)
    found = pack(Coded(bits, codes.to(DEVICE), scales.to(DEVICE), None if least is None else least.to(DEVICE)))
    wide = found.dequantized()
    expected = codes.float().view(rows, -1, 32).to(DEVICE)
    if least is None:
        expected = (expected - (1 << (bits - 1))) * scales.to(DEVICE).repeat_interleave(16, -1).view(expected.shape)
    else:
        expected = expected * scales[..., None].to(DEVICE) + least[..., None].to(DEVICE)
    close(wide, expected.view(rows, cols), 1e-3)
    return found


@pytest.mark.parametrize("cols", [576, 256, 4096 + 512])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_weights_unpacked(form: tuple[int, bool], cols: int) -> None:
    from cake_llama.cuda.narrow_ops import unpack

    w = narrow(40, cols, form)
    close(unpack(w, torch.float32), w.dequantized(), 1e-6)
    some = torch.tensor([3, 39, 0], device=DEVICE)
    close(unpack(w, torch.float32, some), w.dequantized()[some], 1e-6)


@pytest.mark.parametrize("cols", [576, 256, 4096 + 512])
@pytest.mark.parametrize("form", FORMS)
def test_one_row_of_narrow_weights(form: tuple[int, bool], cols: int) -> None:
    from cake_llama.cuda.ops import gated_one, product_one

    parts = (narrow(44, cols, form), narrow(20, cols, (8, True), 1))
    bias, residual, norm = normal(64, seed=2), normal(1, 64, seed=3), Norm(normal(cols, seed=4), 1e-5)
    x = normal(1, cols, seed=5)
    wide = torch.cat([part.dequantized() for part in parts])
    layer = NarrowLinear(parts, bias)
    bound = 1e-2  # activations have 8 bits: half a step of the largest of 32 is 0.4 %
    expected = rms_norm(x, (cols,), norm.weight, norm.eps) @ wide.t() + bias + residual
    close(product_one(x, layer, norm, residual), expected, bound)
    close(product_one(x, NarrowLinear(parts, None)), x @ wide.t(), bound)
    gate_up = rms_norm(x, (cols,), norm.weight, norm.eps) @ parts[0].dequantized().t()
    found = gated_one(x, NarrowLinear(parts[:1], None), norm)
    close(found, silu(gate_up[:, :22]) * gate_up[:, 22:], 5 * bound if form[0] in (4, 8) else 1e-5)
    # With activations that 8 bits hold exactly, nothing but the order of sums is left.
    whole = torch.randint(-126, 127, (1, cols), generator=torch.Generator().manual_seed(7)).float().to(DEVICE)
    whole.view(-1, 32)[:, 5] = 127.0
    close(product_one(whole, NarrowLinear(parts, None)), whole @ wide.t())


@pytest.mark.parametrize("batch", [2, 9, 33])
@pytest.mark.parametrize("form", FORMS)
def test_small_batches_of_narrow_weights(form: tuple[int, bool], batch: int) -> None:
    from cake_llama.cuda.narrow_ops import CudaLinear
    from cake_llama.cuda.ops import add_norm, product_many, silu_mul

    cols = 576
    parts = (narrow(80, cols, form), narrow(16, cols, (8, True), 1))
    layer = NarrowLinear(parts, normal(96, seed=2))
    x, norm = normal(batch, cols, seed=5), Norm(normal(96, seed=4), 1e-5)
    expected = layer(x)
    delta = product_many(x, layer)
    close(delta.sum(0), expected)
    close(CudaLinear(parts, layer.bias)(x), expected)
    stream = normal(batch, 96, seed=6)
    kept = stream.clone()
    close(add_norm(stream, delta, norm), rms_norm(kept + expected, (96,), norm.weight, norm.eps))
    close(stream, kept + expected)
    close(silu_mul(delta, torch.float32), silu(expected[:, :48]) * expected[:, 48:])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no cuBLAS; the rest of the way is the same as for few rows")
@pytest.mark.parametrize("form", FORMS)
def test_prompt_chunks_of_narrow_weights(form: tuple[int, bool]) -> None:
    from cake_llama.cuda.narrow_ops import CudaLinear

    parts = (narrow(80, 576, form), narrow(16, 576, (8, True), 1))
    layer = NarrowLinear(parts, normal(96, seed=2))
    x = normal(200, 576)
    close(CudaLinear(parts, layer.bias)(x), layer(x), 1e-3)


@pytest.mark.parametrize("rows", [48, 70])
def test_one_row_of_plain_weights(rows: int) -> None:
    from cake_llama.cuda.ops import gated_one, product_one

    w, bias, residual, norm = normal(rows, 320), normal(rows, seed=2), normal(1, rows, seed=3), Norm(normal(320, seed=4), 1e-5)
    x = normal(1, 320, seed=5)
    normed = rms_norm(x, (320,), norm.weight, norm.eps)
    close(product_one(x, Linear(w, bias), norm, residual), normed @ w.t() + bias + residual)
    both = normed @ w.t()
    close(gated_one(x, Linear(w), norm), silu(both[:, : rows // 2]) * both[:, rows // 2 :])


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"positions": [37, 0, 90], "parts": 3},
        {"dim": 80, "half": 20, "heads": 6, "kv_heads": 2},
        {"window": 24, "positions": [70]},
        {"norms": True, "positions": [5, 64]},
        {"positions": [40] * 40},
    ],
    ids=str,
)
def test_attention(case: dict[str, Any]) -> None:
    from cake_llama.cache import BLOCK
    from cake_llama.cuda.ops import Places, Scratch, attend

    positions = case.get("positions", [50])
    heads, kv_heads, dim, half = case.get("heads", 8), case.get("kv_heads", 2), case.get("dim", 64), case.get("half", 32)
    batch, width, parts, eps = len(positions), 8, case.get("parts", 1), 1e-5
    qkv = normal(parts, batch, (heads + 2 * kv_heads) * dim)
    blocks = torch.randperm(batch * width, generator=torch.Generator().manual_seed(1)).to(torch.int32).view(batch, width)
    keys, values = normal(batch * width * BLOCK, kv_heads, dim, seed=2), normal(batch * width * BLOCK, kv_heads, dim, seed=3)
    angles = normal(512, half, seed=4)
    norms = (Norm(normal(dim, seed=5), eps), Norm(normal(dim, seed=6), eps)) if case.get("norms") else None
    inputs = torch.tensor(
        [[0, position, batch - 1 - row] for row, position in enumerate(positions)], dtype=torch.int32, device=DEVICE
    )
    places = Places(inputs, blocks.flip(0).to(DEVICE), angles.cos(), angles.sin())
    scratch = Scratch.make(batch, heads, kv_heads, dim, qkv[0])
    before = keys.clone(), values.clone()
    for _ in range(2):  # the counters have to be as they were
        found = attend(qkv, (keys, values), places, scratch, norms, case.get("window")).clone()
    for row, position in enumerate(positions):
        all_heads = qkv.sum(0)[row].view(-1, dim).clone()
        q, k, v = all_heads[:heads], all_heads[heads : heads + kv_heads], all_heads[heads + kv_heads :]
        if norms is not None:
            q, k = rms_norm(q, (dim,), norms[0].weight, eps), rms_norm(k, (dim,), norms[1].weight, eps)
        turned = torch.cat((q, k))[None]
        cos, sin = angles[position].cos(), angles[position].sin()
        rotate_(turned, torch.cat((cos, cos))[None, None], torch.cat((-sin, sin))[None, None])
        q, k = turned[0, :heads], turned[0, heads:]
        slots = [int(blocks[row, p // BLOCK]) * BLOCK + p % BLOCK for p in range(position + 1)]
        close(keys[slots[-1]], k)
        close(values[slots[-1]], v, 1e-6)
        first = max(0, position + 1 - case.get("window", 1 << 30))
        all_k = torch.cat((before[0][slots[first:-1]], k[None])).repeat_interleave(heads // kv_heads, 1)
        all_v = torch.cat((before[1][slots[first:-1]], v[None])).repeat_interleave(heads // kv_heads, 1)
        weights = (torch.einsum("hd,phd->hp", q, all_k) * dim**-0.5).softmax(-1)
        close(found[row].view(heads, dim), torch.einsum("hp,phd->hd", weights, all_v))


@pytest.mark.parametrize("name", ["plain", "norms on queries and keys, partly turned", "a window"])
def test_prompt_rows(name: str) -> None:
    """Rows of several positions, one of them behind a cache that is not in one piece, layer by layer as in PyTorch."""
    from cake_llama.attention import RowPlan, StepPlan
    from cake_llama.cache import KvCache, Table
    from cake_llama.config import ModelConfig
    from cake_llama.cuda.prompts import Prompts
    from cake_llama.model import Block, Parts
    from cake_llama.random_model import RandomCheckpoint
    from cake_llama.rotary import for_rotation

    config = ModelConfig.from_checkpoint(RandomCheckpoint("tiny"))
    heads, kv_heads, dim, size = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    qk = Norm(1 + normal(dim, seed=3) / 8, 1e-5) if name.startswith("norms") else None
    half = dim // 4 if name.startswith("norms") else dim // 2
    blocks = []
    for index in range(2):
        norms = [Norm(1 + normal(size, seed=10 * index + i) / 8, 1e-5) for i in (1, 2)]
        shapes = ((heads + 2 * kv_heads) * dim, size), (size, heads * dim), (256, size), (size, 128)
        qkv, output, gate_up, down = (Linear(normal(*s, seed=10 * index + i) / s[1] ** 0.5) for i, s in enumerate(shapes, 3))
        window = 9 if name == "a window" else None
        blocks.append(Block(config, index, window, norms[0], qkv, qk, qk, output, norms[1], gate_up, down))
    parts = Parts(None, blocks, Norm(1 + normal(size, seed=40) / 8, 1e-5), None)
    rows = [(0, 7, 0), (7, 12, 21)]  # start, length, position
    angles = normal(64, half, seed=4)
    found = []
    for fast in (True, False):
        cache = KvCache(2, (kv_heads, dim), 16, DEVICE, torch.float32)
        for pool in (*cache.keys, *cache.values):
            pool.copy_(normal(*pool.shape, seed=5))
        apart = Table(), Table()
        for length in (8, 20, 33):  # one after another, so that their blocks alternate
            for table in apart:
                cache.extend(table, length)
        plans = [RowPlan(start, length, position, t) for (start, length, position), t in zip(rows, apart, strict=True)]
        hidden = normal(19, size, seed=6)
        if fast:
            found.append(Prompts(config, parts, cache, (angles.cos(), angles.sin()), torch.float32).run(plans, (), hidden))
            continue
        at = torch.cat([torch.arange(p.position, p.position + p.length) for p in plans]).to(DEVICE)
        slots = [slot for p in plans for slot in _listed(p.table.slots(p.position, p.position + p.length))]
        turns = for_rotation(angles[at].cos(), angles[at].sin(), torch.float32)
        found.append(parts.hidden(None, hidden, StepPlan(plans, torch.tensor(slots, device=DEVICE), *turns), cache))
    close(*found, 1e-4)


def _listed(slots: slice | list[int]) -> list[int]:
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots
