"""Tiny random checkpoints of every family, their logits by transformers, and the same by our stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.model import LoadOptions, Row, SessionSpec, Want, int32_values
from cake_core.testing.contracts.text_rig import GREEDY, Chain, rows_of
from cake_llama.backend import LlamaBackend

VOCABULARY = 97
LAYERS = 4
WINDOW = 12
TRAINED = 32
"""Positions the scaled models were trained for; the sequences of the tests are longer."""

F32 = LoadOptions(dtype="f32", device="cpu")
BACKEND = LlamaBackend()

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: a family and what its config says beyond the sizes they all have."""

    family: str
    switches: Mapping[str, Any] = field(default_factory=dict)
    length: int = 48


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED}
_YARN = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
_LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
_PHI_LONG = {"short_factor": _LONG["short_factor"][:6], "long_factor": _LONG["long_factor"][:6]}

CASES: Mapping[str, Case] = {
    "llama": Case("llama"),
    "llama-mha": Case("llama", {"num_key_value_heads": 4}),
    "llama-mqa": Case("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": Case("llama", {"head_dim": 32}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-eps": Case("llama", {"rms_norm_eps": 0.3}),
    "llama-theta": Case("llama", _rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "llama-linear": Case("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": Case("llama", _rope("dynamic", factor=4.0) | {"max_position_embeddings": TRAINED}),
    "llama3": Case("llama", _rope("llama3", **_LLAMA3)),
    "llama-yarn": Case("llama", _rope("yarn", **_YARN)),
    "llama-yarn-all": Case(
        "llama", _rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=1.0, beta_fast=2.0, beta_slow=0.1, truncate=False)
    ),
    "llama-yarn-factor": Case("llama", _rope("yarn", **_YARN, attention_factor=0.8)),
    "llama-longrope": Case("llama", _rope("longrope", **_LONG, original_max_position_embeddings=TRAINED)),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral-window": Case("mistral", {"sliding_window": WINDOW}),
    "qwen2": Case("qwen2"),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen2-layer-types": Case(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3-window": Case(
        "qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "phi3": Case("phi3", {"sliding_window": None}),
    "phi3-window": Case("phi3", {"sliding_window": WINDOW}),
    "phi3-longrope": Case(
        "phi3",
        {
            "original_max_position_embeddings": TRAINED,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **_PHI_LONG},
        },
    ),
}  # fmt: skip


def write_checkpoint(folder: Path, case: Case, dtype: torch.dtype = torch.float32, gain: float = 2.0) -> Path:
    """Weights of a size at which attention looks around, biases and norms matter, and logits spread.

    `gain` of the attention's projections: at 1 it is as calm as in trained models, at 2 it magnifies whatever is wrong.
    """
    config = CONFIG_MAPPING[case.family](**{**_SIZES, **copy.deepcopy(dict(case.switches))})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.7)
            elif weight.dim() == 1:
                weight.normal_(1.0, 0.3)
            elif "embed" in name:
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, (gain if "self_attn" in name else 1.2) * weight.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


class Oracle:
    """transformers over one checkpoint. Every question gets a fresh copy: scaled positions leave traces in the model."""

    def __init__(self, folder: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self._model: PreTrainedModel = loaded.eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], prompt: int | None = None) -> torch.Tensor:
        """[tokens, vocabulary]: the first `prompt` tokens (all of them) at once, the others one by one over the cache."""
        model, ids = copy.deepcopy(self._model), torch.tensor([list(tokens)])
        split = len(tokens) if prompt is None else prompt
        answer = model(ids[:, :split], use_cache=True)
        found = [answer.logits[0]]
        for at in range(split, len(tokens)):
            answer = model(ids[:, at : at + 1], past_key_values=answer.past_key_values, use_cache=True)
            found.append(answer.logits[0])
        return torch.cat(found).float()


def sequence(length: int) -> list[int]:
    return [(7 + 31 * i + 5 * i * i) % VOCABULARY for i in range(length)]


def load_chain(folder: Path, cut: Sequence[Sequence[str]] | None = None, options: Sequence[LoadOptions] = (F32,)) -> Chain:
    """Stages of a checkpoint: one for each run of layers in `cut`, with its own options if there are several."""
    checkpoint = SafetensorsCheckpoint(folder)
    names = [layer.name for layer in BACKEND.describe(checkpoint, options[0]).layers]
    runs = cut or [names]
    each = options if len(options) == len(runs) else [options[0]] * len(runs)
    return Chain(
        [BACKEND.load(checkpoint, BACKEND.describe(checkpoint, own), run, own) for run, own in zip(runs, each, strict=True)]
    )


def stage_logits(chain: Chain, tokens: Sequence[int], pieces: Sequence[int], prompt: int | None = None) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of a session that gets its tokens in pieces of these lengths."""
    chain.open(1, SessionSpec(GREEDY, len(tokens) if prompt is None else prompt))
    found, at = [], 0
    for size in pieces:
        row = Row(1, at, size, Want(score=True, score_top=VOCABULARY))
        batch = chain.forward([row], [tokens[at : at + size]], [-1] * size)
        values = torch.tensor(rows_of(batch, "score_top_logprobs"))
        ids = torch.tensor(int32_values(batch.tensors["score_top_ids"])).view(size, VOCABULARY)
        found.append(torch.empty_like(values).scatter_(1, ids, values))
        at += size
    chain.close(1)
    assert at == len(tokens)
    return torch.cat(found)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest logit. Rows are compared about their means: a stage gives
    log-probabilities, which are logits less a number a row."""
    largest = expected.abs().max().item()
    centred = [values - values.mean(-1, keepdim=True) for values in (found, expected)]
    return (centred[0] - centred[1]).abs().max().item() / largest
