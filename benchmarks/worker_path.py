"""What a worker's whole path costs over a plain echo: receive, decode, a stage that does nothing, encode, send.

    python benchmarks/worker_path.py

A process with a worker and a raw echo server; in each round both answer one activation of 16 KiB, in random order: hot,
one right after the other, and at decode pace, after a pause of 3 to 7 ms. No TLS. Medians of paired differences.

`worker` is asked with bytes that were made before, by the same plain socket that asks the echo: what is over is the worker's.
`both ends` asks with Cake's own channel and codec, as a master does, so that its encoding and decoding are in it as well.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from sleeping import LAYERS, SleepingCheckpoint, Speed, sleeping_plugins
from transport import read_all, seconds_for, serve_socket, socket_asker, write_all

from cake_core.framing import MAGIC, PREFIX, frame
from cake_core.links.link import LinkTiming
from cake_core.model import Batch, Row, SessionSpec, Tensor, Want
from cake_core.requests import SamplingParams
from cake_core.testing.cluster import LocalCluster
from cake_core.transport import Address
from cake_core.wire.bodies import BodyReader
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import Type, decode, encode, encode_batch
from cake_transport_tcp.transport import TcpTransport

SIZE = 16384
STAGE = [f"model.layers.{i}" for i in range(LAYERS)]
ATTACH = (encode(Type.ATTACH, 1, {"model_type": "text", "stages": [STAGE]}), ())
SPEC = spec_to_fields(SessionSpec(SamplingParams()))
OPEN = (encode(Type.OPEN, 0, {"session": 1, "spec": SPEC, "parent": None, "length": 0}), ())
Ask = Callable[[bytearray, int], None]


def activation(position: int, body: bytearray) -> Batch:
    return Batch((Row(1, position, 1, Want(sample=1)),), {"hidden": Tensor("u8", (1, SIZE), body)})


def serve() -> None:
    echo = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_socket, args=(echo, "raw"), daemon=True).start()
    checkpoint = SleepingCheckpoint(Speed(0.0, 0.0, SIZE))
    quiet = LinkTiming(heartbeat=60.0, dead=300.0)
    sys.setswitchinterval(5e-4)  # as `cake worker` does
    with LocalCluster(sleeping_plugins(), checkpoint, TcpTransport(), {"w0": ["model.layers.0-31"]}, timing=quiet) as cluster:
        print(json.dumps({"raw": echo.getsockname()[1], "worker": cluster.addresses["w0"].port}), flush=True)
        sys.stdin.read()  # until the asking process is gone


def plain_asker(port: int) -> Ask:
    """Messages made in advance, over a plain socket; only the numbers in them that must change are written again."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_message() -> None:
        prefix = bytearray(PREFIX.size)
        read_all(sock, memoryview(prefix))
        _, header, body = PREFIX.unpack(prefix)
        read_all(sock, memoryview(bytearray(header + body)))

    sock.sendall(frame(*ATTACH)[0])
    read_message()
    sock.sendall(frame(*OPEN)[0])
    header, _ = encode_batch(Type.FORWARD, 0, activation(0, bytearray(SIZE)))
    output, _ = encode_batch(Type.OUTPUT, 0, Batch((), activation(0, bytearray(SIZE)).tensors))
    message = bytearray(PREFIX.pack(MAGIC, len(header), SIZE) + header)
    length = PREFIX.size + len(output) + SIZE
    position = 0

    def ask(body: bytearray, back: int) -> None:  # noqa: ARG001 - it comes back as long as it went
        nonlocal position
        struct.pack_into("<I", message, PREFIX.size + 4, position + 2)
        struct.pack_into("<I", message, PREFIX.size + 16 + 8, position)
        position += 1
        write_all(sock, message, memoryview(body))
        found = bytearray(length)
        read_all(sock, memoryview(found))
        if found[PREFIX.size] != Type.OUTPUT:
            raise RuntimeError(f"message {found[PREFIX.size]} instead of an output")

    return ask


def worker_asker(port: int) -> Ask:
    channel = TcpTransport().dial(Address("127.0.0.1", port), None, 10.0)
    reader = BodyReader(1 << 24)

    def answer(kind: Type) -> None:
        header, _ = channel.receive(reader.allocate, 30.0)
        if (found := decode(header)).type is not kind:
            raise RuntimeError(f"{found.type.name}: {found.fields}")

    channel.send(*ATTACH)
    answer(Type.ATTACHED)
    channel.send(*OPEN)
    position = 0

    def ask(body: bytearray, back: int) -> None:  # noqa: ARG001 - it comes back as long as it went
        nonlocal position
        header, buffers = encode_batch(Type.FORWARD, position + 2, activation(position, body))
        position += 1
        channel.send(header, buffers, 30.0)
        answer(Type.OUTPUT)

    return ask


def measure(asks: dict[str, Ask], rounds: int, paced: bool) -> None:
    body = bytearray(SIZE)
    times: dict[str, list[float]] = {kind: [] for kind in asks}
    for _ in range(rounds):
        for kind in random.sample(list(asks), len(asks)):
            if paced:
                time.sleep(random.uniform(0.003, 0.007))
            else:
                seconds_for(asks[kind], body, SIZE)  # warm, as the one before it in a row
            times[kind].append(1e6 * seconds_for(asks[kind], body, SIZE))
    line = f"{'paced' if paced else 'hot':8}echo {statistics.median(times['raw']):7.1f} µs"
    for kind in (kind for kind in asks if kind != "raw"):
        over = statistics.median(a - b for a, b in zip(times[kind], times["raw"], strict=True))
        line += f"   {kind} {statistics.median(times[kind]):7.1f} µs, over {over:7.1f} µs"
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ports = json.loads(server.stdout.readline())
            asks = {"raw": socket_asker("raw", ports["raw"])}
            asks |= {"worker": plain_asker(ports["worker"]), "both ends": worker_asker(ports["worker"])}
            measure(asks, 50, paced=False)  # to warm up
            print()
            for paced in (False, True):
                measure(asks, given.rounds, paced)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
