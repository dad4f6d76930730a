"""Text to ids and back, for Hugging Face folders and GGUF files.

Ids become bytes one by one and bytes become text once, in an incremental UTF-8 decoder: so a stream never holds half a
character, never waits for a byte that cannot come, and always adds up to `decode` of the whole.
"""

from __future__ import annotations

import codecs
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cake_core.requests import SamplingDefaults
from cake_llama.chat import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

    from cake_core.checkpoint import Checkpoint
    from cake_core.requests import Message


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a model's files say, whatever their format.

    Attributes:
        engine: the tokenizers library's object, with added tokens and post-processor.
        piece_bytes: the bytes a vocabulary entry (not an added token) stands for.
        strip_space: the text of a whole sequence begins with a space that is not the author's.
        info: tokenizer_config.json, or what a GGUF says in its words.
    """

    engine: tokenizers.Tokenizer
    piece_bytes: Callable[[str], bytes]
    strip_space: bool
    vocab_size: int
    bos_id: int | None
    stop_ids: frozenset[int]
    defaults: SamplingDefaults
    templates: Mapping[str, str]
    info: Mapping[str, Any] = field(default_factory=dict)


def load_tokenizer(checkpoint: Checkpoint) -> ModelTokenizer:
    """Raises CheckpointError or UnsupportedModel, naming the file, when there is no tokenizer that we read."""
    if checkpoint.format == "gguf":
        from cake_llama.gguf_tokenizer import read_gguf_tokenizer

        return ModelTokenizer(read_gguf_tokenizer(checkpoint))
    from cake_llama.hf_tokenizer import read_hf_tokenizer

    return ModelTokenizer(read_hf_tokenizer(checkpoint))


class ModelTokenizer:
    """`cake_core.model.Tokenizer` over `TokenizerParts`. Used from any thread."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.vocab_size = parts.vocab_size
        self.stop_ids = parts.stop_ids
        self.bos_id = parts.bos_id
        self.defaults = parts.defaults
        self.has_chat_template = "default" in parts.templates
        self._parts = parts
        self._engine = parts.engine
        self._added = {token_id: token.content for token_id, token in parts.engine.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, token in parts.engine.get_added_tokens_decoder().items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._template = ChatTemplate(parts.templates, _special_texts(parts.info))
        self._lock = threading.Lock()

    def serialized(self) -> str:
        """The tokenizer as the tokenizers library writes it (tokenizer.json), for other libraries."""
        return self._engine.to_str()

    @cached_property
    def _literal_engine(self) -> tokenizers.Tokenizer:
        """The engine that reads the names of special tokens as plain text. A copy: the switch is the object's."""
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        engine.encode_special_tokens = True
        return engine

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        if parse_special:
            return list(self._engine.encode(text, add_special_tokens=add_special).ids)
        with self._lock:
            engine = self._literal_engine
        return list(engine.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.step, ids), stream.flush()])

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> ByteStream:
        skip = self.special_ids if skip_special else frozenset[int]()
        continues = any(token not in skip for token in prompt)
        return ByteStream(self.token_bytes, skip, strip_space=self._parts.strip_space and not continues)

    def token_bytes(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._engine.id_to_token(token) if 0 <= token < self.vocab_size else None
        return b"" if piece is None else self._parts.piece_bytes(piece)

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        return self._template.render(messages, tools, add_generation_prompt, template_options)

    def describe(self) -> Mapping[str, Any]:
        return self._parts.info


class ByteStream:
    """One sequence's text as it grows: `cake_core.model.DecodeStream`."""

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int], strip_space: bool) -> None:
        self._token_bytes, self._skip, self._strip_space = token_bytes, skip, strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token: int) -> str:
        if token in self._skip:
            return ""
        data = self._token_bytes(token)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def sampling_defaults(values: Mapping[str, Any]) -> SamplingDefaults:
    """Takes what is a sensible number, and the rest as not said."""
    sensible = {name: value for name, value in values.items() if type(value) in (int, float) and 0 <= value < math.inf}
    floats = {name: sensible.get(name) for name in ("temperature", "top_p", "min_p", "repeat_penalty")}
    top_k = sensible.get("top_k")
    return SamplingDefaults(top_k=None if top_k is None else int(top_k), **floats)


def _special_texts(info: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as templates want them: text, also where the file has a mapping with `content`."""
    found: dict[str, str] = {}
    for key, value in info.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and not key.startswith("add_") and isinstance(text, str):
            found[key] = text
    return found


def byte_level_bytes(piece: str) -> bytes:
    """GPT-2's alphabet: each character of a piece stands for one byte. Others, which no such vocabulary has, for themselves."""
    return b"".join(bytes((_GPT2_BYTES[char],)) if char in _GPT2_BYTES else char.encode() for char in piece)


def _gpt2_alphabet() -> dict[str, int]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_GPT2_BYTES = _gpt2_alphabet()


def sentencepiece_bytes(piece: str) -> bytes:
    """A SentencePiece entry: `<0x0A>` is a byte, `▁` is a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes((int(piece[3:5], 16),))
    return piece.replace("\u2581", " ").encode()
