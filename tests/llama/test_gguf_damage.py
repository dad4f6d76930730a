"""Whatever a GGUF file says, describing it, loading its weights and its tokenizer ends well or in a CakeError."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cake_core.errors import CakeError
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import LoadOptions
from cake_core.testing.toy_gguf import write_toy_gguf
from cake_llama.backend import LlamaBackend
from cake_llama.tokenizer import load_tokenizer
from cake_llama.weights import weight_source

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "<|end|>"]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 32,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 4,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 4,
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 2.0,
    "llama.rope.scaling.original_context_length": 16,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [0.0 - i for i in range(len(TOKENS))],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5, 3],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    "general.sampling.temp": 0.5,
}


def f32(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    count = 1
    for n in shape:
        count *= n
    return ("F32", shape, bytes(4 * count))


TENSORS = {
    "token_embd.weight": f32(len(TOKENS), 8), "output_norm.weight": f32(8), "blk.0.attn_norm.weight": f32(8),
    "blk.0.attn_q.weight": f32(8, 8), "blk.0.attn_k.weight": f32(4, 8), "blk.0.attn_v.weight": f32(4, 8),
    "blk.0.attn_output.weight": f32(8, 8), "blk.0.ffn_norm.weight": f32(8), "blk.0.ffn_gate.weight": f32(4, 8),
    "blk.0.ffn_up.weight": f32(4, 8), "blk.0.ffn_down.weight": f32(8, 4),
}  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 40), 1 << 40), st.integers(-2, 9), st.floats(width=32), st.text(max_size=5),
    st.lists(st.text(max_size=4), max_size=4), st.lists(st.integers(-3, 9), max_size=4),
)  # fmt: skip
QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def use(path: Path) -> None:
    """All that is done with a file before a stage computes."""
    checkpoint = GgufCheckpoint(path)
    backend = LlamaBackend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random bytes as floats overflow
        backend.accepts(checkpoint)
        backend.describe(checkpoint, LoadOptions())
        weights = weight_source(checkpoint, torch.device("cpu"))
        for name in weights.names():
            weights.load(name, torch.float32)
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.decode(tokenizer.encode("ab a<s>"))
        tokenizer.render_chat([{"role": "user", "content": "a"}])
        tokenizer.describe()


def test_the_file_is_good_before_it_is_damaged(tmp_path: Path) -> None:
    use(write_toy_gguf(tmp_path / "m.gguf", METADATA, TENSORS))


@QUIET
@given(key=st.sampled_from(sorted(METADATA)), value=VALUES)
@example("llama.attention.head_count", 3)
@example("tokenizer.ggml.tokens", ["a"] * len(TOKENS))
@example("tokenizer.ggml.token_type", [4] * len(TOKENS))
def test_metadata_of_any_type_and_value(tmp_path: Path, key: str, value: Any) -> None:
    metadata = {**METADATA, key: value}
    if value is None:
        del metadata[key]
    try:
        use(write_toy_gguf(tmp_path / "m.gguf", metadata, TENSORS))
    except CakeError as error:
        text = str(error)
        assert text


@QUIET
@given(name=st.sampled_from(sorted(TENSORS)), shape=st.lists(st.integers(0, 9), max_size=4), drop=st.booleans())
def test_tensors_of_any_shape(tmp_path: Path, name: str, shape: list[int], drop: bool) -> None:
    tensors = {key: value for key, value in TENSORS.items() if key != name}
    if not drop:
        tensors[name] = f32(*shape)
    try:
        use(write_toy_gguf(tmp_path / "m.gguf", METADATA, tensors))
    except CakeError as error:
        text = str(error)
        assert text


@QUIET
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8))
def test_random_damage(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(write_toy_gguf(tmp_path / "m.gguf", METADATA, TENSORS).read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    (tmp_path / "m.gguf").write_bytes(data)
    try:
        use(tmp_path / "m.gguf")
    except CakeError as error:
        text = str(error)
        assert text
