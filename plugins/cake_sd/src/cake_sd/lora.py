"""LoRA files, loaded into the one component a node holds."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from cake_core.errors import CheckpointError, ConfigError, UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_sd.layout import FOLDERS, pipeline_class
from cake_sd.options import Lora


def load_loras(checkpoint: DiffusersCheckpoint, layer: str, module: Any, loras: Sequence[Lora]) -> tuple[str, ...]:
    """Loads what each file has for this component; returns `digest*scale` of every file, also of one that has nothing for it.

    Raises ConfigError without peft, UnsupportedModel for a pipeline without LoRA loading, CheckpointError for a bad file.
    """
    import diffusers

    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--sd-lora needs peft; `pip install 'cake-sd[lora]'`")
    pipeline: Any = getattr(diffusers, pipeline_class(checkpoint))
    if not hasattr(pipeline, "lora_state_dict"):
        raise UnsupportedModel(f"{pipeline.__name__} takes no LoRA; leave --sd-lora out")
    names = [f"cake{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            _load(pipeline, layer, module, lora, name)
        except (ValueError, LookupError, RuntimeError, OSError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{lora.path} cannot be loaded into {layer}: {reason}; it may have been made for another model"
            ) from error
    _activate(module, names, loras)
    return tuple(f"{_digest(lora)}*{lora.scale:g}" for lora in loras)


def _load(pipeline: Any, layer: str, module: Any, lora: Lora, name: str) -> None:
    found = pipeline.lora_state_dict(str(lora.path), local_files_only=True)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    folder = FOLDERS[layer]
    if not any(key.startswith(f"{folder}.") for key in state):
        if layer in ("unet", "transformer"):
            raise ValueError(f"it has nothing for {folder}")
        return
    if layer == "unet":
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=module, adapter_name=name)
    elif layer == "transformer":
        pipeline.load_lora_into_transformer(state, transformer=module, adapter_name=name)
    else:
        pipeline.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=module, prefix=folder, adapter_name=name
        )
    if name not in getattr(module, "peft_config", {}):
        raise ValueError("none of it fits")


def _activate(module: Any, names: list[str], loras: Sequence[Lora]) -> None:
    loaded = set(getattr(module, "peft_config", {}))
    chosen = [(name, lora.scale) for name, lora in zip(names, loras, strict=True) if name in loaded]
    if not chosen:
        return
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    set_weights_and_activate_adapters(module, [name for name, _ in chosen], [scale for _, scale in chosen])


def _digest(lora: Lora) -> str:
    with lora.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
