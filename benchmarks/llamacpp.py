"""Decode and prefill beside llama.cpp (llama-cpp-python) on the same GGUF file with the same threads, taking turns.

`python benchmarks/llamacpp.py model.gguf --peer /path/to/python [--threads 2] [--prompt 256] [--tokens 64] [--rounds 5]`
`python benchmarks/llamacpp.py --shape llama-3.2-1b --type Q4_0 --peer ...` writes a file of random weights first.

`--peer` is a Python that has llama-cpp-python (its wheels pin other versions of what we use). Medians over the rounds;
`--cpu-time` reports processor time, which a busy machine disturbs less (meaningful with one thread).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

PEER = """
import json, sys, time
from llama_cpp import Llama
path, threads, prompt, tokens, cpu = sys.argv[1], *map(int, sys.argv[2:6])
clock = time.process_time if cpu else time.perf_counter
llama = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=prompt + tokens + 8, n_batch=512, verbose=False)
print("ready", flush=True)
for _ in sys.stdin:
    llama.reset()
    began = clock()
    llama.eval([(i * 37) % 400 + 100 for i in range(prompt)])
    middle = clock()
    for _ in range(tokens):
        llama.eval([llama.sample(temp=0.0)])
    print(json.dumps([prompt / (middle - began), tokens / (clock() - middle)]), flush=True)
"""


def random_file(folder: Path, shape: str, kind: str) -> Path:
    """A GGUF file of a known shape; weights are zero bytes with a small scale, which cost what any others do."""
    import gguf
    import numpy as np

    from cake_llama.random_model import SHAPES, tensor_shapes

    config: dict[str, Any] = dict(SHAPES[shape])
    path = folder / f"{shape}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    words = ["a", "b", "ab", *(f"<{index}>" for index in range(3, config["vocab_size"]))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(words))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    quantisation = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[quantisation]
    rng = np.random.default_rng(0)
    for name, size in tensor_shapes(config).items():
        known = names.get_name(name, (".weight",))
        if len(size) == 1:
            writer.add_tensor(known, np.ones(size, np.float32))
        elif kind in ("BF16", "F16", "F32"):
            data = rng.standard_normal(size, dtype=np.float32) * np.float32(size[1] ** -0.5)
            writer.add_tensor(known, gguf.quants.quantize(data, quantisation), raw_dtype=quantisation)
        else:
            blocks = np.zeros((size[0], size[1] // values, nbytes), np.uint8)
            at = 208 if kind == "Q6_K" else 0
            blocks[:, :, at : at + 2] = np.array([0.001], np.float16).view(np.uint8)
            writer.add_tensor(known, blocks.reshape(size[0], -1), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Ours:
    """A stage with the whole model, as a worker holds it."""

    def __init__(self, path: Path, threads: int, prompt: int, tokens: int, cpu_time: bool) -> None:
        from cake_core.formats.gguf import GgufCheckpoint
        from cake_core.model import LoadOptions
        from cake_llama.backend import LlamaBackend

        options = LoadOptions(device="cpu", threads=threads, kv_tokens=prompt + tokens + 16)
        checkpoint, backend = GgufCheckpoint(path), LlamaBackend()
        info = backend.describe(checkpoint, options)
        self.stage = backend.load(checkpoint, info, [layer.name for layer in info.layers], options)
        self._prompt, self._tokens = prompt, tokens
        self._clock = time.process_time if cpu_time else time.perf_counter

    def round(self) -> list[float]:
        """Tokens a second of prefill and of decoding."""
        from cake_core.model import SAMPLE, SAMPLED, Batch, Row, SessionSpec, int32_tensor
        from cake_core.requests import SamplingParams

        self.stage.open(1, SessionSpec(SamplingParams(temperature=0), self._prompt))
        given = int32_tensor([(i * 37) % 400 + 100 for i in range(self._prompt)])
        began = self._clock()
        self.stage.submit(Batch((Row(1, 0, self._prompt, SAMPLE),), {"tokens": given})).result()
        middle = self._clock()
        for index in range(self._tokens):
            row = Row(1, self._prompt + index, 1, SAMPLE)
            self.stage.submit(Batch((row,), {"tokens": int32_tensor([SAMPLED])})).result()
        end = self._clock()
        self.stage.close(1)
        return [self._prompt / (middle - began), self._tokens / (end - middle)]


def compare(path: Path, given: argparse.Namespace) -> None:
    numbers = [str(int(n)) for n in (given.threads, given.prompt, given.tokens, given.cpu_time)]
    command = [given.peer, "-c", PEER, str(path), *numbers]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        if peer.stdout.readline() != "ready\n":
            sys.exit("llama-cpp-python did not start; see above")
        ours = Ours(path, given.threads, given.prompt, given.tokens, given.cpu_time)
        found: dict[str, list[list[float]]] = {"cake": [], "llama.cpp": []}
        for _ in range(given.rounds + 1):
            found["cake"].append(ours.round())
            peer.stdin.write("go\n")
            peer.stdin.flush()
            found["llama.cpp"].append(json.loads(peer.stdout.readline()))
        peer.stdin.close()
    rates = {name: [median(r[i] for r in rounds[1:]) for i in (0, 1)] for name, rounds in found.items()}
    ratio = [a / b for a, b in zip(rates["cake"], rates["llama.cpp"], strict=True)]
    print(f"{path.name}, {given.threads} threads, prompt {given.prompt}, {'cpu' if given.cpu_time else 'wall'} time: tokens/s")
    for name, (prefill, decode) in rates.items():
        print(f"  {name:10} prefill {prefill:8.1f}  decode {decode:7.1f}")
    print(f"  ratio      prefill {ratio[0]:8.2f}  decode {ratio[1]:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    if given.file is not None:
        compare(given.file, given)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(random_file(Path(folder), given.shape, given.type), given)


if __name__ == "__main__":
    main()
