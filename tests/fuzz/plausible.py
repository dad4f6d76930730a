"""The fields of every control message as a node of ours would send them, here and there with another number or name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from cake_core.assignment import Assignment
from cake_core.model import LoadOptions, SessionSpec
from cake_core.profiles import DeviceProfile, NodeProfile
from cake_core.requests import SamplingParams
from cake_core.transport import Address
from cake_core.weights.manifest import FileSpec
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import Type

Fields = dict[str, Any]


def _layers(rng: random.Random) -> list[str]:
    return ["model.embed_tokens", *(f"model.layers.{n}" for n in range(rng.randrange(1, 5)))]


def _name(rng: random.Random) -> str:
    return rng.randbytes(32).hex()


def _tensors(rng: random.Random, *names: str) -> list[Any]:
    return [[name, rng.choice(("f32", "bf16", "u8")), [rng.randrange(4), rng.randrange(9)]] for name in names]


def _report(rng: random.Random) -> Fields:
    return {
        "name": "node", "identity": {"hidden_size": 64}, "fingerprints": {"lm_head": _name(rng)},
        "memory": [{"device": "cpu", "dtype": "f32", "weights": rng.randrange(1 << 40)}], "platform": {"device": "cpu"},
        "work": [{"batches": 3, "positions": 7, "seconds": rng.random()}], "bare": rng.random() < 0.5,
    }  # fmt: skip


def _attach(rng: random.Random) -> Fields:
    live = [[rng.randrange(9)], [rng.randrange(9)]]
    return {"model_type": "text", "stages": [_layers(rng)], "token": rng.randbytes(16), "keep": 0.1, "live": live}


def _open(rng: random.Random) -> Fields:
    sampling = SamplingParams(
        rng.random(), rng.randrange(9), logit_bias=((5, -1.0),), seed=rng.randrange(1 << 63), banned_until=(2,)
    )
    return {"session": rng.randrange(9), "spec": spec_to_fields(SessionSpec(sampling, 4)), "parent": None, "length": 0}


def _call(rng: random.Random) -> Fields:
    ids = {"prompt": rng.randbytes(16)}
    return {
        "layer": "unet", "method": "step", "image": rng.randrange(9), "scalars": {"t": rng.random()}, "ids": ids,
        "tensors": _tensors(rng, "latents"), "constants": _tensors(rng, "prompt"),
    }  # fmt: skip


def _assign(rng: random.Random) -> Fields:
    sizes = {"config.json": 700, "unet/x.safetensors": rng.randrange(1 << 10, 1 << 30)}
    files = tuple(FileSpec(path, _name(rng), nbytes, rng.randrange(700)) for path, nbytes in sizes.items())
    options = LoadOptions(context=rng.choice((None, 512)), extra={"sd_tiling": True})
    sources = (Address.parse("quic://10.0.0.2:10128"),)
    stages = (tuple(_layers(rng)), ("lm_head",))
    return Assignment("desk", "model", "text", stages, options, files, sources, rng.randrange(1 << 62)).as_fields()


def _profile(rng: random.Random) -> Fields:
    device = DeviceProfile("cpu", rng.randrange(1, 1 << 40), 1e9 + rng.random(), flops={"f32": 1e10}, rates={"q4": 2e9})
    return {"profile": NodeProfile("node", (device,), measured_at=1.5, host="tcp://10.0.0.2:10128").as_fields()}


def _hand_over(rng: random.Random) -> Fields:
    return {"ticket": rng.randbytes(16)}


def _nothing(_rng: random.Random) -> Fields:
    return {}


FIELDS: Mapping[Type, Callable[[random.Random], Fields]] = {
    Type.ATTACH: _attach,
    Type.ATTACHED: _report,
    Type.OPEN: _open,
    Type.TRUNCATE: lambda rng: {"session": rng.randrange(9), "length": rng.randrange(99)},
    Type.LENGTH: lambda rng: {"length": rng.randrange(99)},
    Type.CLOSE: lambda rng: {"session": rng.randrange(9)},
    Type.CALL: _call,
    Type.RESULT: lambda rng: {"tensors": _tensors(rng, "sample"), "seconds": rng.random()},
    Type.RELEASE: lambda rng: {"layer": "unet", "image": rng.randrange(9)},
    Type.ALIVE: _nothing,
    Type.ERROR: lambda rng: {"kind": rng.choice(("StageError", "SystemExit")), "message": "broken"},
    Type.DRAINING: _nothing,
    Type.STATUS: _nothing,
    Type.REPORT: lambda rng: {"report": _report(rng)},
    Type.EXPECT: _hand_over,
    Type.NEXT: lambda rng: {**_hand_over(rng), "host": "tcp://10.0.0.2:10128", "stage": rng.randrange(3)},
    Type.PEER: _hand_over,
    Type.READY: _nothing,
    Type.PARTED: lambda rng: {**_hand_over(rng), "message": "gone"},
    Type.PROFILE: lambda rng: {"backend": rng.choice(("", "llama"))},
    Type.PROFILED: _profile,
    Type.ASSIGN: _assign,
    Type.ASSIGNED: _nothing,
    Type.PROGRESS: lambda rng: {"what": rng.choice(("fetching", "loading")), "done": rng.randrange(99), "total": 99},
    Type.LOADED: lambda rng: {"received": rng.randrange(99), "error": rng.choice(({}, {"kind": "NodeBusy", "message": "no"}))},
    Type.LEND: lambda rng: {"ticket": rng.randrange(1 << 62)},
    Type.FETCH: lambda rng: {"file": _name(rng), "piece": rng.randrange(9), "zstd": rng.random() < 0.5},
    Type.PIECE: lambda rng: {"digest": rng.randbytes(32), "zstd": False, "tensors": [["data", "u8", [rng.randrange(99)]]]},
    Type.HOLDS: lambda rng: {"files": [_name(rng), _name(rng)]},
    Type.HELD: lambda rng: {"files": [_name(rng)]},
    Type.PROBE: lambda rng: {"tensors": [["data", "u8", [rng.randrange(99)]]], "sweep": rng.random() < 0.5},
    Type.PROBED: _nothing,
    Type.JOIN: _hand_over,
}
"""FORWARD and OUTPUT have rows instead."""
