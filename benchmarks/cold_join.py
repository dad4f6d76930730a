"""A worker that never saw the model: time from the question to the first token, against the time its weights take on the wire.

    python benchmarks/cold_join.py [--rate 125e6] [--layers 16] [--plain] [--idle 0]

Two processes of the command line with homes of their own, and a relay between them that carries `rate` bytes a second. The
model has random weights in bf16, 122 MB a layer, all layers on the worker. Asked twice: the second time nothing is sent.
`--idle` seconds pass between the worker's start and the question. `--plain` hides zstandard from both, so that pieces travel as
they are.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from relay import relay_shaped

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32_000
CAKE = [sys.executable, "-m", "cake_core"]


def write_model(folder: Path, layers: int) -> None:
    """A Llama of this shape with a tokenizer of bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (width, HIDDEN), "self_attn.v_proj": (width, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    ends = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    save_file({**ends, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}, folder / "ends.safetensors")
    for index in range(layers):
        tensors = {f"model.layers.{index}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        save_file(tensors, folder / f"layer-{index}.safetensors")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def await_listener(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


def ask(work: Path, env: dict[str, str]) -> float:
    """Seconds from the start of the command to the line that says how long its one token took."""
    command = [*CAKE, "run", "--model", "model", "--topology", "topology.yml", "--wait", "60", "--raw", "--dtype", "bf16"]
    command += ["--max-tokens", "1", "--seed", "1", "hello"]
    began, seconds = time.monotonic(), 0.0
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env, cwd=work) as run:
        for line in run.stderr or ():
            if "time to first token" in line:
                seconds = time.monotonic() - began
            elif os.environ.get("VERBOSE"):
                print(line, end="")
    if not seconds:
        sys.exit("the master gave no answer; VERBOSE=1 shows why")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=125e6, help="bytes a second of the wire")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--idle", type=float, default=0.0, help="seconds that the worker waits for its master")
    parser.add_argument("--plain", action="store_true", help="without zstd")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        write_model(work / "model", given.layers)
        port = free_port()
        front, out, _ = relay_shaped(port, given.rate)
        layers = f"[model.layers.0-{given.layers - 1}]"
        (work / "topology.yml").write_text(f"far:\n  host: 127.0.0.1:{front}\n  layers: {layers}\n")
        homes = [{**os.environ, "HOME": str(work / n), "CAKE_CLUSTER_KEY": "ab" * 32, "CAKE_WORKERS": "none"} for n in "ab"]
        if given.plain:
            (work / "hidden").mkdir()
            (work / "hidden" / "zstandard.py").write_text("raise ImportError")
        for home in homes:
            home["PYTHONPATH"] = str(work / "hidden")
            home.pop("CAKE_CACHE_DIR", None)
            home.pop("XDG_CACHE_HOME", None)
        worker = subprocess.Popen([*CAKE, "worker", "--name", "far", "--address", f"127.0.0.1:{port}"], env=homes[1], cwd=work)
        try:
            await_listener(port)
            time.sleep(given.idle)
            for asked in ("cold", "warm"):
                before = out.total
                seconds = ask(work, homes[0])
                sent = out.total - before
                floor = sent / given.rate
                ratio = f", {seconds / floor:.2f} x the {floor:.1f} s that this takes" if asked == "cold" else ""
                print(f"{asked}: first token after {seconds:.1f} s, {sent / 1e6:.1f} MB sent{ratio}", flush=True)
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)


if __name__ == "__main__":
    main()
