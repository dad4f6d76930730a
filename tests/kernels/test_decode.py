"""A decode step of several layers against the same in f64, from the paper's formulas."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tests.kernels.weights import Packed, Weights, address, exact
from tests.kernels.weights_table import BLOCKS, random_blocks

import cake_kernels as kernels

HIDDEN, HEADS, KV_HEADS, DIM, INNER, BLOCK, ROTARY = 256, 4, 2, 64, 512, 16, 48
BLOCKS_IN_CACHE = 24
KV = {"F32": (np.float32, 0), "F16": (np.float16, 1), "BF16": (np.uint16, 30), "I8": (np.int8, kernels.INT8)}
F64 = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Layer:
    """Weights of a layer: packed for the library, in f64 for the reference."""

    kind: str
    seed: int
    window: int = 0
    packed: dict[str, Weights] = field(default_factory=dict)
    w: dict[str, F64] = field(default_factory=dict)
    vectors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        heads, kv = HEADS * DIM, KV_HEADS * DIM
        shapes = {"q": (heads, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, heads)}
        shapes |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
        for name, (rows, cols) in shapes.items():
            if self.kind in BLOCKS:
                blocks = random_blocks(self.kind, rows, cols, rng, 0.1)
                self.packed[name], self.w[name] = Packed(self.kind, blocks, cols), exact(self.kind, blocks)
            else:
                values = (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32)
                self.packed[name], self.w[name] = Weights("F32", values, rows, cols), values.astype(np.float64)
        norms = {"attention_norm": HIDDEN, "mlp_norm": HIDDEN, "q_norm": DIM, "k_norm": DIM}
        for name, width in (norms | {"q_bias": heads, "up_bias": INNER, "down_bias": HIDDEN}).items():
            self.vectors[name] = rng.uniform(0.5, 1.5, width).astype(np.float32)

    def native(self, keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> kernels.Layer:
        return kernels.Layer(
            **{name: weights.matrix for name, weights in self.packed.items()},
            **{name: address(vector) for name, vector in self.vectors.items()},
            keys=address(keys),
            values=address(values),
            key_scale=address(scales[0]),
            value_scale=address(scales[1]),
            window=self.window,
        )


def _norm(x: F64, weight: np.ndarray[Any, Any]) -> F64:
    y: F64 = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight
    return y


def _rotate(x: F64, angles: F64) -> F64:
    half = ROTARY // 2
    a, b, rest = x[..., :half], x[..., half:ROTARY], x[..., ROTARY:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1)


def _angles(position: int) -> F64:
    return np.asarray(position * 10000.0 ** (-np.arange(ROTARY // 2) / (ROTARY // 2)), np.float64)


def _reference(layer: Layer, x: F64, position: int, past: list[tuple[F64, F64]]) -> F64:
    """One position of one sequence; `past` grows by its keys and values."""
    v, w = layer.vectors, layer.w
    normed = _norm(x, v["attention_norm"])
    q = (normed @ w["q"].T + v["q_bias"]).reshape(HEADS, DIM)
    k, value = (normed @ w["k"].T).reshape(KV_HEADS, DIM), (normed @ w["v"].T).reshape(KV_HEADS, DIM)
    q, k = _rotate(_norm(q, v["q_norm"]), _angles(position)), _rotate(_norm(k, v["k_norm"]), _angles(position))
    past.append((k, value))
    seen = past[-layer.window :] if layer.window else past
    out = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = np.array([q[head] @ k[group] for k, _ in seen]) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max())
        out.append(sum(p * values[group] for p, (_, values) in zip(weights / weights.sum(), seen, strict=True)))
    x = x + np.concatenate(out) @ w["o"].T
    normed = _norm(x, v["mlp_norm"])
    gate = normed @ w["gate"].T
    y: F64 = x + (gate / (1 + np.exp(-gate)) * (normed @ w["up"].T + v["up_bias"])) @ w["down"].T + v["down_bias"]
    return y


class Model:
    """Layers with their KV cache, decoded by the library."""

    def __init__(self, layers: list[Layer], kv: str, threads: int) -> None:
        dtype, self.kv_type = KV[kv]
        self.pool = kernels.Pool(threads)
        self.layers = layers
        self.caches = [np.zeros((2, BLOCKS_IN_CACHE, BLOCK, KV_HEADS, DIM), dtype) for _ in layers]
        self.scales = [np.zeros((2, BLOCKS_IN_CACHE, BLOCK, KV_HEADS), np.float32) for _ in layers]
        native: list[kernels.Layer] = [
            layer.native(cache[0], cache[1], scale)
            for layer, cache, scale in zip(layers, self.caches, self.scales, strict=True)
        ]
        self.native: Array[kernels.Layer] = (kernels.Layer * len(layers))(*native)
        self.shape = kernels.Shape(
            hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, inner=INNER, rotary_dim=ROTARY, activation=0,
            kv_type=self.kv_type, kv_block=BLOCK, norm_eps=1e-5, scale=DIM**-0.5,
        )  # fmt: skip

    def decode(
        self, x: np.ndarray[Any, Any], positions: list[int], tables: list[list[int]], lengths: Sequence[int] = ()
    ) -> np.ndarray[Any, Any]:
        """A table for each run; of one row each unless `lengths` says otherwise."""
        x = np.array(x, np.float32)
        at, table = np.array(positions, np.int32), np.array(tables, np.int32)
        runs = np.array(lengths or [1] * len(x), np.int32)
        angles = np.stack([_angles(p) for p in positions])
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        step = kernels.Step(
            len(x), len(runs), table.shape[1], address(at), address(runs), address(table), address(cosines), address(sines)
        )
        self.pool.decode(self.shape, self.native, step, address(x))
        return x


def _run(layers: list[Layer], kv: str, threads: int, steps: int = 20) -> float:
    """Two sequences with blocks strewn over the cache, decoded together: the largest error relative to the largest value."""
    model = Model(layers, kv, threads)
    rng = np.random.default_rng(9)
    past: list[list[list[tuple[F64, F64]]]] = [[[] for _ in layers] for _ in range(2)]
    worst = 0.0
    for position in range(steps):
        x = rng.standard_normal((2, HIDDEN)).astype(np.float32)
        found = model.decode(x, [position, position], [[5, 2], [0, 7]])
        for row in range(2):
            expected = x[row].astype(np.float64)
            for index, layer in enumerate(layers):
                expected = _reference(layer, expected, position, past[row][index])
            worst = max(worst, float(np.abs(found[row] - expected).max() / np.abs(expected).max()))
    model.pool.close()
    return worst


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_in_f32_is_the_formula(isa: str, threads: int) -> None:
    assert _run([Layer("F32", 1), Layer("F32", 2, window=7)], "F32", threads) < 1e-5


@pytest.mark.parametrize(("kv", "bound"), [("F16", 2e-3), ("BF16", 1e-2), ("I8", 2e-2)])
def test_a_narrow_cache_costs_its_rounding(isa: str, kv: str, bound: float) -> None:
    error = _run([Layer("F32", 1), Layer("F32", 2)], kv, 2)
    assert 0 < error < bound


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_decode_with_quantised_weights(isa: str, kind: str) -> None:
    """What 8-bit activations cost: about 2^-8 of a value, over four products in a row."""
    assert _run([Layer(kind, 3)], "F32", 2, steps=6) < 0.03


def test_rows_of_one_sequence_in_one_step_are_as_one_by_one(isa: str) -> None:
    layers = [Layer("Q8_0", 1), Layer("Q4_K", 2)]
    x = np.random.default_rng(2).standard_normal((5, HIDDEN)).astype(np.float32)
    together = Model(layers, "F32", 2).decode(x, list(range(5)), [[3, 1]], [5])
    single = Model(layers, "F32", 1)
    one_by_one = np.concatenate([single.decode(x[i : i + 1], [i], [[3, 1]]) for i in range(5)])
    assert np.array_equal(together, one_by_one)


@pytest.mark.parametrize("kv", KV)
def test_a_long_run_attends_as_its_positions_would_one_by_one(isa: str, kv: str) -> None:
    """Beside a run of one position, in strewn blocks, with and without a window, in two steps."""
    layers = [Layer("F32", 1, window=37), Layer("F32", 2)]
    lengths, table = (150, 135), list(range(19, 0, -1))
    x = np.random.default_rng(4).standard_normal((sum(lengths), HIDDEN)).astype(np.float32)
    together, single = Model(layers, kv, 2), Model(layers, kv, 1)
    other = np.ones((1, HIDDEN), np.float32)
    first = together.decode(np.concatenate([other, x[:150]]), [0, *range(150)], [[20] * 19, table], [1, 150])
    second = together.decode(np.concatenate([x[150:], other]), [*range(150, 285), 1], [table, [20] * 19], [135, 1])
    found = np.concatenate([first[1:], second[:-1]])
    expected = np.concatenate([single.decode(x[i : i + 1], [i], [table]) for i in range(len(x))])
    bound = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2, "I8": 2e-2}[kv]  # a value that is rounded the other way
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
