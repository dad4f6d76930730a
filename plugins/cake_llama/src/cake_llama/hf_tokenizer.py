"""The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model (SentencePiece)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.requests import SamplingDefaults
from cake_llama.build_tokenizer import build_sentencepiece
from cake_llama.sentencepiece import read_sentencepiece
from cake_llama.tokenizer import TokenizerParts, byte_level_bytes, sampling_defaults, sentencepiece_bytes

if TYPE_CHECKING:
    import tokenizers

    from cake_core.checkpoint import Checkpoint


def read_hf_tokenizer(checkpoint: Checkpoint) -> TokenizerParts:
    """Raises CheckpointError for a missing or damaged tokenizer, UnsupportedModel for a kind that is not served."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = checkpoint.json("tokenizer_config.json") or {}
    generation = checkpoint.json("generation_config.json") or {}
    engine = _engine(folder, config)
    steps = {str(step.get("type")): step for step in _steps(json.loads(engine.to_str()).get("decoder"))}
    kinds = steps.keys()
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise UnsupportedModel(f"{folder} has a tokenizer that is neither byte-level nor SentencePiece; Cake serves these two")
    info = {**config, **{name: text for name, text in _special_names(checkpoint).items() if name not in config}}
    templates = _templates(folder, checkpoint, config)
    if "default" in templates:
        info["chat_template"] = templates["default"]
    stops = (generation.get("eos_token_id"), checkpoint.config.get("eos_token_id"), _token_id(engine, info.get("eos_token")))
    return TokenizerParts(
        engine=engine,
        piece_bytes=byte_level_bytes if "ByteLevel" in kinds else sentencepiece_bytes,
        strip_space="Strip" in kinds or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never",
        vocab_size=max(engine.get_vocab_size(), _number(checkpoint.config.get("vocab_size"))),
        bos_id=_token_id(engine, info.get("bos_token")),
        stop_ids=frozenset(i for source in stops for i in _ids(source)),
        defaults=_defaults(generation),
        templates=templates,
        info=info,
    )


def _engine(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            engine = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
        engine.no_truncation()
        engine.no_padding()
        return engine
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model", config)
    raise CheckpointError(f"{folder} has no tokenizer.json; copy it from the model's repository")


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """As GGUF files do it: a space before the text, `<s>` in front and nothing behind unless the config says so."""
    model = read_sentencepiece(path)
    engine = build_sentencepiece(model.vocabulary, prefix_space=model.prefix_space, byte_fallback=model.byte_fallback)
    bos = _token_id(engine, config.get("bos_token", "<s>")) if config.get("add_bos_token", True) else None
    eos = _token_id(engine, config.get("eos_token", "</s>")) if config.get("add_eos_token", False) else None
    model.vocabulary.add_ends(engine, bos, eos)
    return engine


def _steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder: itself, or those inside a sequence."""
    if isinstance(decoder, Mapping):
        inner = decoder.get("decoders")
        if decoder.get("type") != "Sequence" or not isinstance(inner, list):
            yield decoder
            return
        for step in inner:
            yield from _steps(step)


def _special_names(checkpoint: Checkpoint) -> Mapping[str, Any]:
    named = checkpoint.json("special_tokens_map.json") or {}
    return {key: value for key, value in named.items() if key.endswith("_token")}


def _templates(folder: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json, where it may be a list of named ones."""
    path = folder / "chat_template.jinja"
    try:
        found: Any = path.read_text("utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if found is None:
        found = (checkpoint.json("chat_template.json") or config).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    entries: Iterable[Any] = found if isinstance(found, list) else ()
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, Mapping)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """A model that says `do_sample: false` means the most likely token, whatever temperature stands beside it."""
    greedy = {"temperature": 0.0} if generation.get("do_sample") is False else {}
    return sampling_defaults({**generation, "repeat_penalty": generation.get("repetition_penalty"), **greedy})


def _token_id(engine: tokenizers.Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return engine.token_to_id(text) if isinstance(text, str) else None


def _ids(value: Any) -> list[int]:
    """An id, a list of ids, or nothing."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _number(value: Any) -> int:
    return value if type(value) is int else 0
