"""lm-eval scores a task through the API, with the server's tokenizer, as it does through transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.clients.cluster_rig import Cluster, cluster
from tests.clients.environments import Environment

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

FACTS = Path(__file__).parent / "facts"
TRANSFORMERS, PLACEMENT = 1e-4, 1e-5
"""How far a log-likelihood may be from the one that transformers gives, and from that of another placement, both in f32."""
QUESTIONS = 24

Scores = list[tuple[float, str]]


def evaluate(lm_eval: Environment, name: str, *model: str) -> tuple[float, Scores]:
    """Accuracy, and (log-likelihood, whether it is the greedy answer) of every answer to every question."""
    output = lm_eval.folder / name
    command = [str(lm_eval.scripts / "lm_eval"), *model, "--tasks", "facts", "--include_path", "facts"]
    lm_eval.run([*command, "--log_samples", "--output_path", str(output)], {"OMP_NUM_THREADS": "1"}, timeout=180)
    results = json.loads(next(output.rglob("results_*.json")).read_text("utf-8"))["results"]["facts"]
    samples = [json.loads(line) for line in next(output.rglob("samples_*.jsonl")).read_text("utf-8").splitlines()]
    assert len(samples) == QUESTIONS
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return results["acc,none"], [(float(score[0]), score[1]) for sample in ordered for [score] in sample["resps"]]


def through_api(lm_eval: Environment, name: str, served: Cluster) -> tuple[float, Scores]:
    # One request at a time: which rows share a product decides its last digits, and here only the placement may.
    options = f"base_url={served.url}/v1/completions,model=smol,tokenizer_backend=remote"
    return evaluate(lm_eval, name, "--model", "local-completions", "--model_args", options)


def farthest(one: Scores, other: Scores) -> float:
    assert len(one) == len(other) > 3 * QUESTIONS
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    return max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True))


def test_scores_are_those_of_transformers_and_of_any_placement(
    environment: Callable[..., Environment], served: Cluster, tmp_path: Path
) -> None:
    from cake_core.models import packaged_default

    lm_eval, model = environment("lm-eval[api]==0.4.13", borrow=True), packaged_default()
    assert model is not None
    shutil.copytree(FACTS, lm_eval.folder / "facts")  # the task names its data as seen from where the command runs
    accuracy, scores = through_api(lm_eval, "three", served)
    with cluster(tmp_path / "alone", "--dtype", "f32", "--", "--name", "smol") as alone:
        accuracy_alone, scores_alone = through_api(lm_eval, "one", alone)
    options = f"pretrained={model.parent},gguf_file={model.name},dtype=float32"
    expected_accuracy, expected = evaluate(lm_eval, "transformers", "--model", "hf", "--model_args", options, "--device", "cpu")
    assert accuracy == accuracy_alone == expected_accuracy > 0.5
    assert farthest(scores, scores_alone) <= PLACEMENT
    assert farthest(scores, expected) <= TRANSFORMERS
