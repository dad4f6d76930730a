"""Structure-aware fuzzing, the same bytes in every run: a seed that failed is a test from then on.

The default run is short; `CAKE_FUZZ_FRAMES=1000000` (the full run) is long. Inputs in `corpus/` are always tried.
"""

from __future__ import annotations

import contextlib
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from tests.fuzz import frames, plausible, targets

from cake_core.errors import CheckpointError, NodeMismatch
from cake_core.wire.messages import SCHEMAS
from cake_core.wire.protocol import encode

CORPUS = Path(__file__).parent / "corpus"
FRAMES = int(os.environ.get("CAKE_FUZZ_FRAMES", "6000"))
MAKERS = {
    "handshake": frames.handshake_frame,
    "stream": frames.stream_bytes,
    "protocol": frames.protocol_header,
    "hello": lambda rng: frames.protocol_header(rng)[16:],
}


def run(name: str, data: bytes, where: str) -> None:
    try:
        targets.TARGETS[name](data)
    except Exception as error:
        error.add_note(f"{name}, {where}: {data[:200].hex()}")
        raise


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MAKERS)
def test_damaged_frames_end_in_a_protocol_error_or_in_nothing(name):
    for seed in range(FRAMES // len(MAKERS)):
        run(name, MAKERS[name](random.Random(seed)), f"seed {seed}")


@pytest.mark.parametrize("name", MAKERS)
def test_memory_is_bounded_by_the_declared_limits(name):
    inputs = [MAKERS[name](random.Random(seed)) for seed in range(300)]
    tracemalloc.start()
    try:
        for seed, data in enumerate(inputs):
            run(name, data, f"seed {seed}")
        assert tracemalloc.get_traced_memory()[1] < 8 * targets.LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_the_corpus(path):
    """Named for its target: `handshake-short.bin`."""
    run(path.stem.partition("-")[0], path.read_bytes(), path.name)


CONTROL = [kind for kind in targets.Type if kind not in (targets.Type.FORWARD, targets.Type.OUTPUT)]


@pytest.mark.parametrize("kind", CONTROL, ids=lambda kind: kind.name)
def test_every_message_is_read_as_it_is_sent_and_damaged_fields_do_no_harm(kind):
    fields = plausible.FIELDS[kind](random.Random(0))
    assert set(SCHEMAS[kind]) <= set(fields)
    message = targets.decode(encode(kind, 7, fields))
    assert message.fields == fields
    if kind in targets.READERS:
        with contextlib.suppress(CheckpointError, NodeMismatch):  # what was asked for is not here
            targets.READERS[kind](message.fields)
    for seed in range(FRAMES // 100):
        run("protocol", frames.control(kind, random.Random(seed)), f"{kind.name}, seed {seed}")


def test_the_fuzzer_reaches_what_it_should():
    """A generator whose frames are all refused at the first byte would find nothing."""
    good = 0
    for seed in range(300):
        try:
            targets.decode(frames.protocol_header(random.Random(seed)))
        except targets.ProtocolError:
            continue
        good += 1
    assert 20 < good < 280
