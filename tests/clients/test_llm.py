"""Simon Willison's `llm`, pointed here by its own configuration file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]
pytest.importorskip("llm", reason="needs llm")


def test_a_prompt_in_a_shell(tmp_path: Path, base_url: str, model: str) -> None:
    entry = f"- model_id: cake\n  model_name: {model}\n  api_base: {base_url}\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "cake", "-o", "max_tokens", "8", "-o", "seed", "3", "hi"]
    streamed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert streamed.returncode == 0, streamed.stderr
    whole = subprocess.run([*command, "--no-stream"], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert whole.returncode == 0, whole.stderr
    assert streamed.stdout.strip() == whole.stdout.strip() != ""
