"""llama.cpp in one process and over its RPC servers, for `cluster_cpu.py`: the same file, threads, prompt and tokens.

What is needed: a Python with llama-cpp-python, llama.cpp's `ggml-rpc-server` built from the same sources (GGML_RPC=ON), and a
folder with libllama and that build's libggml*, the RPC one among them. Their RPC is neither encrypted nor authenticated.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection

from cold_join import free_port

CLIENT = """
import ctypes, json, os, sys, time
from llama_cpp import Llama
path, prompt, tokens, *servers = sys.argv[1:]
prompt, tokens, extra = int(prompt), int(tokens), {}
if servers:
    folder = os.environ["LLAMA_CPP_LIB_PATH"]
    rpc, ggml = ctypes.CDLL(folder + "/libggml-rpc.so"), ctypes.CDLL(folder + "/libggml.so")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for server in servers:
        ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(server.encode()))
    extra = {"n_gpu_layers": -1, "tensor_split": [1.0] * len(servers)}
llama = Llama(path, n_threads=1, n_threads_batch=1, n_ctx=prompt + tokens + 8, n_batch=512, verbose=False, **extra)
print("ready", flush=True)
for salt in sys.stdin:
    llama.reset()
    began = time.perf_counter()
    llama.eval([(37 * i + 101 * int(salt)) % 400 + 100 for i in range(prompt)])
    drawn = [llama.sample(temp=0.0)]
    first = time.perf_counter()
    while len(drawn) < tokens:
        llama.eval(drawn[-1:])
        drawn.append(llama.sample(temp=0.0))
    print(json.dumps([first - began, (time.perf_counter() - first) / (tokens - 1)]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """Where llama.cpp is: see the module."""

    python: str
    server: Path
    libraries: Path

    @property
    def env(self) -> dict[str, str]:
        folder = str(self.libraries)
        return {**os.environ, "LLAMA_CPP_LIB_PATH": folder, "LD_LIBRARY_PATH": folder}


class Client:
    """One program of theirs that answers the same request as often as it is asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._asked, self._said = process.stdin, process.stdout
        if self._said.readline() != "ready\n":
            raise RuntimeError("llama.cpp did not start")

    def turn(self, salt: int) -> tuple[float, float]:
        """Seconds to the first token, and a token after it."""
        print(salt, file=self._asked, flush=True)
        first, token = json.loads(self._said.readline())
        return first, token


@contextmanager
def clients(peer: Peer, model: Path, nodes: int, prompt: int, tokens: int) -> Iterator[tuple[Client, Client]]:
    """One that computes alone with one thread, and one whose layers are all on servers with one thread each."""
    with ExitStack() as stack:

        def client(*servers: str) -> Client:
            command = [peer.python, "-c", CLIENT, str(model), str(prompt), str(tokens), *servers]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=peer.env, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            stack.enter_context(process)
            stack.callback(process.terminate)
            return Client(process)

        ports = [free_port() for _ in range(nodes)]
        for port in ports:
            command = [str(peer.server), "--threads", "1", "--host", "127.0.0.1", "--port", str(port)]
            process = subprocess.Popen(command, env=peer.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.enter_context(process)
            stack.callback(process.terminate)
            _await(port)
        yield client(), client(*(f"127.0.0.1:{port}" for port in ports))


def _await(port: int) -> None:
    until = time.monotonic() + 10.0
    while True:
        try:
            create_connection(("127.0.0.1", port), 1.0).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
