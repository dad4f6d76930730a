"""What the toy's layers compute: whole numbers modulo a prime, so that nothing ever rounds away.

A layer's state after a position depends on every position before it, and invertibly so: a token that was lost, doubled or
swapped, or a layer applied twice, changes every later state and with it the text. Values stay below 251, which every float
dtype of the wire carries exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from cake_core.checkpoint import Checkpoint
from cake_core.testing.toy_checkpoint import HIDDEN, LOGIT_PRIME, PRIME, read_tensor

Vector = tuple[int, ...]

START: Vector = (0,) * HIDDEN


@dataclass(frozen=True, slots=True)
class Mixer:
    """`model.layers.N`: state' = decay * state + gain * x + 1; out = x + gate * state' + mix * rotated state' * rotated x."""

    decay: Vector
    gain: Vector
    gate: Vector
    mix: Vector

    def run(self, inputs: list[Vector], states: list[Vector]) -> list[Vector]:
        """Outputs for `inputs`; appends to `states` the state after each of them."""
        state = states[-1] if states else START
        outputs = []
        for x in inputs:
            state = tuple([(a * s + g * v + 1) % PRIME for a, s, g, v in zip(self.decay, state, self.gain, x, strict=True)])
            states.append(state)
            turned = zip(x, state, self.gate, self.mix, state[1:] + state[:1], x[1:] + x[:1], strict=True)
            outputs.append(tuple([(v + g * s + m * s1 * v1) % PRIME for v, s, g, m, s1, v1 in turned]))
        return outputs


@dataclass(frozen=True, slots=True)
class Norm:
    """`model.norm`: out = gain * x + shift * rotated x."""

    gain: Vector
    shift: Vector

    def run(self, x: Vector) -> Vector:
        return tuple([(g * v + s * w) % PRIME for g, v, s, w in zip(self.gain, x, self.shift, x[1:] + x[:1], strict=True)])


@dataclass(frozen=True, slots=True)
class Head:
    """`lm_head`: x becomes two whole numbers p, q below 65521; logit = (a * p + b * q mod 65521) / 4096 + bias."""

    weights: tuple[tuple[int, int, float], ...]

    def run(self, x: Vector) -> list[float]:
        p = q = 1
        for v in x:
            p, q = (p * 257 + v + 1) % LOGIT_PRIME, (q * 4099 + v + 1) % LOGIT_PRIME
        return [(a * p + b * q) % LOGIT_PRIME / 4096 + bias for a, b, bias in self.weights]


def load_embedding(checkpoint: Checkpoint) -> list[Vector]:
    return _vectors(checkpoint, "model.embed_tokens.weight")


def load_mixer(checkpoint: Checkpoint, layer: str) -> Mixer:
    return Mixer(*_vectors(checkpoint, f"{layer}.weight"))


def load_norm(checkpoint: Checkpoint) -> Norm:
    return Norm(*_vectors(checkpoint, "model.norm.weight"))


def load_head(checkpoint: Checkpoint) -> Head:
    biases = read_tensor(checkpoint, "lm_head.bias")[0]
    rows = _vectors(checkpoint, "lm_head.weight")
    return Head(tuple((a, b, bias) for (a, b), bias in zip(rows, biases, strict=True)))


def _vectors(checkpoint: Checkpoint, name: str) -> list[Vector]:
    return [tuple(map(int, row)) for row in read_tensor(checkpoint, name)]
