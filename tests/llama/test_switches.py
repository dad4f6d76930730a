"""Every switch of the configuration matters: turned off in our model alone, the comparison with the oracle fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.llama.oracle_rig import CASES, LAYERS, TRAINED, WINDOW, Oracle, difference, load_chain, sequence, stage_logits

from cake_llama.config import ModelConfig, RopeConfig

VISIBLE = 1e-2

Change = Callable[[ModelConfig], ModelConfig]


def fields(**values: Any) -> Change:
    return lambda config: replace(config, **values)


def rope(**values: Any) -> Change:
    return lambda config: replace(config, rope=replace(config.rope, **values))


def parameter(name: str, value: object) -> Change:
    def change(config: ModelConfig) -> ModelConfig:
        scaling: RopeConfig = config.rope
        return replace(config, rope=replace(scaling, parameters={**scaling.parameters, name: value}))

    return change


NO_WINDOW = fields(windows=(None,) * LAYERS)
UNSCALED = rope(kind="default")

SWITCHES: Mapping[str, tuple[str, Change]] = {
    "tied embeddings": ("llama", fields(tied=True)),
    "biases of q, k and v": ("llama-biases", fields(qkv_bias=False)),
    "bias of the attention's output": ("llama-biases", fields(output_bias=False)),
    "biases of the feed-forward": ("llama-biases", fields(mlp_bias=False)),
    "biases of the family": ("qwen2", fields(qkv_bias=False)),
    "q and k norms": ("qwen3", fields(qk_norm=False)),
    "epsilon of the norms": ("llama-eps", fields(norm_eps=1e-5)),
    "base of the rotation": ("llama-theta", rope(theta=10000.0)),
    "dimensions that turn": ("phi3-longrope", lambda config: replace(config, rope=_all_dimensions(config))),
    "window of all layers": ("mistral-window", NO_WINDOW),
    "window of Phi-3": ("phi3-window", NO_WINDOW),
    "window of late layers": ("qwen2-window", NO_WINDOW),
    "first layer with a window": ("qwen2-window", fields(windows=(WINDOW,) * LAYERS)),
    "windows by layer types": ("qwen2-layer-types", fields(windows=(None, None, WINDOW, WINDOW))),
    "width of the window": ("mistral-window", fields(windows=(WINDOW + 1,) * LAYERS)),
    "linear": ("llama-linear", UNSCALED),
    "linear's factor": ("llama-linear", parameter("factor", 2.0)),
    "dynamic": ("llama-dynamic", UNSCALED),
    "dynamic's factor": ("llama-dynamic", parameter("factor", 2.0)),
    "llama3": ("llama3", UNSCALED),
    "llama3's factor": ("llama3", parameter("factor", 2.0)),
    "llama3's low factor": ("llama3", parameter("low_freq_factor", 0.25)),
    "llama3's high factor": ("llama3", parameter("high_freq_factor", 16.0)),
    "llama3's trained length": ("llama3", parameter("original_max_position_embeddings", 4 * TRAINED)),
    "yarn": ("llama-yarn", UNSCALED),
    "yarn's factor": ("llama-yarn", parameter("factor", 2.0)),
    "yarn's trained length": ("llama-yarn", parameter("original_max_position_embeddings", 4 * TRAINED)),
    "yarn's attention factor": ("llama-yarn-factor", parameter("attention_factor", None)),
    "yarn's mscale": ("llama-yarn-all", parameter("mscale", None)),
    "yarn's fast end": ("llama-yarn-all", parameter("beta_fast", 0.5)),
    "yarn's slow end": ("llama-yarn-all", parameter("beta_slow", 1.0)),
    "yarn's whole bounds": ("llama-yarn-all", parameter("truncate", True)),
    "longrope": ("llama-longrope", UNSCALED),
    "longrope's long factors": ("llama-longrope", parameter("long_factor", [1.0 + 0.1 * i for i in range(8)])),
    "longrope's trained length": ("llama-longrope", parameter("original_max_position_embeddings", 128)),
    "longrope's attention factor": ("phi3-longrope", parameter("attention_factor", 1.0)),
}


def _all_dimensions(config: ModelConfig) -> RopeConfig:
    factors = {name: [*config.rope.parameters[name], 2.0, 3.0] for name in ("short_factor", "long_factor")}
    return replace(config.rope, dim=config.head_dim, parameters={**config.rope.parameters, **factors})


def _differs(model: tuple[Path, Oracle], length: int) -> float:
    folder, oracle = model
    tokens = sequence(length)
    return difference(stage_logits(load_chain(folder), tokens, [length]), oracle.logits(tokens))


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_turned_off_is_seen(
    model_of: Callable[[str], tuple[Path, Oracle]], monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    name, change = SWITCHES[switch]
    read = ModelConfig.from_checkpoint
    monkeypatch.setattr(ModelConfig, "from_checkpoint", lambda checkpoint: change(read(checkpoint)))
    assert _differs(model_of(name), CASES[name].length) > VISIBLE


def test_short_factors_matter_within_the_trained_length(
    model_of: Callable[[str], tuple[Path, Oracle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _differs(model_of("llama-longrope"), TRAINED) < 1e-4
    read, change = ModelConfig.from_checkpoint, parameter("short_factor", [1.0] * 8)
    monkeypatch.setattr(ModelConfig, "from_checkpoint", lambda checkpoint: change(read(checkpoint)))
    assert _differs(model_of("llama-longrope"), TRAINED) > VISIBLE


@pytest.mark.usefixtures("block_by_block")
def test_heads_share_keys_in_groups(model_of: Callable[[str], tuple[Path, Oracle]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads to one pair of keys and values; with one pair for all, or one of each head's own, shapes do not fit."""
    from cake_llama import model

    attend = model.attend

    def other_groups(plan: Any, cache: Any, layer: int, qkv: Any, window: int | None) -> Any:
        swapped = qkv[:, [0, 2, 1, 3, 4, 5, 6, 7]]  # four heads of queries, two of keys, two of values
        return attend(plan, cache, layer, swapped, window)

    monkeypatch.setattr(model, "attend", other_groups)
    assert _differs(model_of("llama"), 20) > VISIBLE
