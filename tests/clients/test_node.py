"""OpenAI's SDK for Node. `CAKE_TEST_NODE_MODULES` is the folder with its `node_modules` (`npm install openai` there)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = os.environ.get("CAKE_TEST_NODE_MODULES", "")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("node") is None or not FOLDER, reason="needs node and CAKE_TEST_NODE_MODULES"),
]

SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const body = { model: process.env.MODEL, messages: [{ role: "user", content: "hi" }], max_tokens: 8, seed: 3 };
const whole = await client.chat.completions.create(body);
let text = "";
let usage = null;
const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const vectors = await client.embeddings.create({ model: body.model, input: ["one", "two"] });
let error = null;
try {
  await client.chat.completions.create({ ...body, temperature: -1 });
} catch (caught) {
  error = { status: caught.status, param: caught.param, name: caught.constructor.name };
}
const aborted = await client.chat.completions.create({ ...body, max_tokens: 500, ignore_eos: true, stream: true });
for await (const _ of aborted) aborted.controller.abort();
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text, usage, vectors: vectors.data.length, error }));
"""


def test_everything_once(base_url: str, model: str) -> None:
    script = Path(FOLDER) / "cake-test.mjs"
    script.write_text(SCRIPT)
    try:
        environment = {**os.environ, "BASE_URL": base_url, "MODEL": model}
        done = subprocess.run(["node", str(script)], capture_output=True, text=True, env=environment, timeout=90, check=False)
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"] == found["whole"]
    assert found["usage"]["completion_tokens"] <= 8
    assert found["vectors"] == 2
    assert found["error"] == {"status": 400, "param": "temperature", "name": "BadRequestError"}
