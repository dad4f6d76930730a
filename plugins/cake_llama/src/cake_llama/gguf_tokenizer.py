"""The tokenizer inside a GGUF file: `tokenizer.ggml.*`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.requests import SamplingDefaults
from cake_llama.build_tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary, build_bpe, build_sentencepiece
from cake_llama.tokenizer import TokenizerParts, byte_level_bytes, sampling_defaults, sentencepiece_bytes

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint

T = TypeVar("T", str, int, float)

_PREFIX = "tokenizer.ggml."
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STOP_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>",
    "<EOT>", "_<EOT>", "<end_of_utterance>",
})  # fmt: skip
"""Files name one end token or two; a model may emit any of these that its vocabulary marks as control."""

_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")


def read_gguf_tokenizer(checkpoint: Checkpoint) -> TokenizerParts:
    """Raises CheckpointError for a file without tokenizer or with a damaged one, UnsupportedModel for a kind not served."""
    data = {key.removeprefix(_PREFIX): value for key, value in checkpoint.config.items() if key.startswith(_PREFIX)}
    kind = data.get("model")
    if kind is None or not data.get("tokens"):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer; use a GGUF file with one")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{checkpoint.path} has a tokenizer of kind {kind!r}; served are gpt2 (BPE) and llama (SentencePiece)"
        )
    vocabulary = _vocabulary(checkpoint, data)
    bpe = kind == "gpt2"
    pre = str(data.get("pre", "default"))
    bos, eos = _id(data, "bos_token_id", vocabulary), _id(data, "eos_token_id", vocabulary)
    add_bos = data.get("add_bos_token", not bpe or pre in _BOS_BY_DEFAULT)
    prefix_space = bool(data.get("add_space_prefix", True))
    engine = (
        build_bpe(vocabulary, _values(checkpoint, data, "merges", str), pre)
        if bpe
        else build_sentencepiece(vocabulary, prefix_space=prefix_space, byte_fallback="<0x0A>" in vocabulary.tokens)
    )
    vocabulary.add_ends(engine, bos if add_bos else None, eos if data.get("add_eos_token", False) else None)
    return TokenizerParts(
        engine=engine,
        piece_bytes=byte_level_bytes if bpe else sentencepiece_bytes,
        strip_space=not bpe and prefix_space,
        vocab_size=len(vocabulary.tokens),
        bos_id=bos,
        stop_ids=_stop_ids(data, vocabulary),
        defaults=_defaults(checkpoint.config),
        templates=_templates(checkpoint.config),
        info=_info(checkpoint.config, data, vocabulary, add_bos=bool(add_bos)),
    )


def _vocabulary(checkpoint: Checkpoint, data: Mapping[str, Any]) -> Vocabulary:
    tokens = _values(checkpoint, data, "tokens", str)
    types, scores = _values(checkpoint, data, "token_type", int), _values(checkpoint, data, "scores", float)
    if (types and len(types) != len(tokens)) or (scores and len(scores) != len(tokens)):
        raise CheckpointError(f"{checkpoint.path} has a tokenizer whose lists differ in length; download it again")
    phi3 = checkpoint.config.get("general.architecture") == "phi3" and data["model"] == "llama"
    return Vocabulary(tokens, types or [NORMAL] * len(tokens), scores, swallows_space=phi3)


def _values(checkpoint: Checkpoint, data: Mapping[str, Any], key: str, kind: type[T]) -> list[T]:
    """A list of the metadata, empty where there is none."""
    found = data.get(key, ())
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(value, kind) for value in found):
        raise CheckpointError(f"{checkpoint.path}: {_PREFIX}{key} is not a list of {kind.__name__}; download the file again")
    return list(found)


def _id(data: Mapping[str, Any], key: str, vocabulary: Vocabulary) -> int | None:
    value = data.get(key)
    return value if type(value) is int and 0 <= value < len(vocabulary.tokens) else None


def _stop_ids(data: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    named = {found for key in _STOP_KEYS if (found := _id(data, key, vocabulary)) is not None}
    marked = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return frozenset(named | {i for i, (token, kind) in enumerate(marked) if kind == CONTROL and token in _STOP_NAMES})


def _defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    prefix = "general.sampling."
    found = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    return sampling_defaults({**found, "temperature": found.get("temp"), "repeat_penalty": found.get("penalty_repeat")})


def _templates(config: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template`, and `tokenizer.chat_template.tool_use` and its like."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(key + "."): value for name, value in config.items() if name.startswith(key + ".")}
    return {name: text for name, text in {**found, "default": config.get(key)}.items() if isinstance(text, str)}


def _info(config: Mapping[str, Any], data: Mapping[str, Any], vocabulary: Vocabulary, *, add_bos: bool) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    specials = {
        name: vocabulary.tokens[found]
        for name, key in names.items()
        if (found := _id(data, f"{key}_token_id", vocabulary)) is not None
    }
    architecture = config.get("general.architecture")
    added = {
        str(i): {"content": token, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    }
    return {
        **specials,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "added_tokens_decoder": added,
        "model_max_length": config.get(f"{architecture}.context_length"),
        "chat_template": config.get("tokenizer.chat_template"),
    }
