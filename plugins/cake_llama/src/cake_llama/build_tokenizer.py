"""Builds `tokenizers` objects from a bare vocabulary, as GGUF and SentencePiece files hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cake_core.errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types, the same numbers in GGUF and SentencePiece."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_SLASH}"
)

PATTERNS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo", "jais", "mpt"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "pixtral", "falcon3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo"), (_QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
}
"""How text is cut before BPE, by `tokenizer.ggml.pre`: each pattern cuts what the one before left."""

_WHOLE_PIECES_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Vocabularies where a piece that is an entry is taken whole, whatever its merges say."""

_COMPOSED = ("qwen2", "deepseek-r1-qwen", "kormo")
"""Vocabularies made of text in Unicode's composed form (NFC)."""

_PLAIN_SPECIALS = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Entries by id, their types, and for SentencePiece their scores.

    `swallows_space`: white space after a special token belongs to it (Phi-3).
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    swallows_space: bool = False

    def ids(self) -> dict[str, int]:
        """Ids by entry; of entries that are there twice, the first."""
        return {token: i for i, token in reversed(list(enumerate(self.tokens)))}

    def add_specials(self, engine: tokenizers.Tokenizer) -> None:
        """Control and user-defined tokens are found in text before anything else; control ones are not shown."""
        from tokenizers import AddedToken

        marked = list(zip(self.tokens, self.types, strict=True))
        special = [
            AddedToken(token, special=True, normalized=False, rstrip=self.swallows_space and token not in _PLAIN_SPECIALS)
            for token, kind in marked
            if kind in (CONTROL, UNKNOWN) and token
        ]
        shown = [AddedToken(token, special=False, normalized=False) for token, t in marked if t == USER_DEFINED and token]
        engine.add_special_tokens(special)
        engine.add_tokens(shown)

    def add_ends(self, engine: tokenizers.Tokenizer, bos: int | None, eos: int | None) -> None:
        """What `encode(add_special=True)` puts around a text."""
        from tokenizers import processors

        if bos is None and eos is None:
            return
        before, after = ([] if i is None else [self.tokens[i]] for i in (bos, eos))
        specials = [(self.tokens[i], i) for i in {bos, eos} if i is not None]
        ends = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=specials
        )
        current = engine.post_processor
        engine.post_processor = ends if current is None else processors.Sequence([current, ends])


def build_bpe(vocabulary: Vocabulary, merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE. Raises UnsupportedModel, naming it, for a way of cutting text that is not known here."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if pre not in PATTERNS:
        raise UnsupportedModel(
            f"this GGUF cuts text by the rules {pre!r}, which Cake does not know; use the model's safetensors"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    ids = vocabulary.ids()
    try:
        engine = Tokenizer(models.BPE(ids, pairs, ignore_merges=pre in _WHOLE_PIECES_FIRST))
    except Exception as error:  # the library raises bare Exception for a merge of unknown entries
        raise CheckpointError(f"the GGUF's tokenizer is damaged: {error}; download the file again") from error
    if pre in _COMPOSED:
        engine.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    engine.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    vocabulary.add_specials(engine)
    return engine


def build_sentencepiece(vocabulary: Vocabulary, *, prefix_space: bool, byte_fallback: bool) -> tokenizers.Tokenizer:
    """SentencePiece BPE as Llama 2 has it: the merge of two entries into a third is as good as the third's score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise CheckpointError("the model's SentencePiece vocabulary has no scores; use another file of this model")
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN), None)
    ids = vocabulary.ids()
    engine = Tokenizer(models.BPE(ids, _merges(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback))
    spaces = [normalizers.Prepend("\u2581")] if prefix_space else []
    engine.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    engine.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    vocabulary.add_specials(engine)
    return engine


def _merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to cut an entry into two entries, best score first."""
    found = []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True):
        if kind not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        found += [(-score, ids[token], ids[left], ids[right], left, right) for left, right in cuts]
    found.sort()
    return [(left, right) for *_, left, right in found]
