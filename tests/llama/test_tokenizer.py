"""Tokenizers of GGUF files and folders, against transformers, tokenizers and sentencepiece; streams against decode."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.requests import SamplingDefaults
from cake_llama.build_tokenizer import PATTERNS, Vocabulary, build_bpe
from cake_llama.tokenizer import ModelTokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; isn't it? I'LL say 12345 times, they've 7.5 % and 1,000.",
    "def f(x):\n    return x**2  # 42\r\n\tprint('hello world')\n\n\n",
    "Größe, naïve café, ñandú, Ελληνικά, русский, 日本語のテキスト, 한국어, عربى, עברית, 🙂🏳️‍🌈👨‍👩‍👧",
    "  leading and   inner spaces  \u00a0\u2003 and /slashes//\n\n/ CamelCaseWords HTTPServer e\u0301",
] * 3  # fmt: skip
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "\n",
    "  x",
    "a  b",
    "it's 'S 'll'LL",
    "\uff11\uff12\uff13 ² ½ 1234567",
    "\u0000\u200b\ufeff x",
    "ǅ ʰ ª aA Aa",
]


def control_last(tokens: list[str]) -> list[int]:
    return [3 if token.startswith("<|") and token.endswith("|>") else 1 for token in tokens]


@pytest.fixture(scope="module")
def bpe() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>", "<|bos|>"]
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def write_gguf(path: Path, kind: str, tokens: list[str], **more: Any) -> GgufCheckpoint:
    """By the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, more.pop("arch", "llama"))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(more.pop("types", control_last(tokens)))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path)


@pytest.mark.parametrize("pre", sorted(set(PATTERNS) & set(GGUF_PRE_TOKENIZER_SPLITS)))
def test_ids_equal_transformers_for_every_way_of_cutting(bpe: tuple[list[str], list[str]], pre: str, tmp_path: Path) -> None:
    tokens, merges = bpe
    found = load_tokenizer(write_gguf(tmp_path / "t.gguf", "gpt2", tokens, token_merges=merges, tokenizer_pre=pre))
    parts = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "tokens": tokens, "merges": merges}
    oracle, _ = convert_gguf_tokenizer("llama", {**parts, "token_type": control_last(tokens)})
    for text in TEXTS:
        if "e\u0301" not in text:  # composed by some, see below
            assert found.encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False).ids, text
            assert found.decode(found.encode(text, add_special=False)) == text


def test_qwen_composes_its_text(bpe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    tokens, merges = bpe
    found = load_tokenizer(write_gguf(tmp_path / "t.gguf", "gpt2", tokens, token_merges=merges, tokenizer_pre="qwen2"))
    vocab = {token: i for i, token in enumerate(tokens)}
    oracle = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges], unk_token="<|end|>")
    for text in TEXTS:
        assert found.encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False)


def test_digits_of_smollm_stand_alone(bpe: tuple[list[str], list[str]]) -> None:
    tokens, merges = bpe
    oracle = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    oracle.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    engine = build_bpe(Vocabulary(tokens, [1] * len(tokens), []), merges, "smollm")
    for text in TEXTS[:4]:
        assert engine.encode(text).ids == oracle.encode(text).ids


def test_an_unknown_way_of_cutting_is_named(bpe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    checkpoint = write_gguf(tmp_path / "t.gguf", "gpt2", bpe[0], token_merges=bpe[1], tokenizer_pre="new-fashion")
    with pytest.raises(UnsupportedModel, match="'new-fashion'"):
        load_tokenizer(checkpoint)


def test_special_tokens_ends_and_stops_of_a_gguf(bpe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    tokens = [*bpe[0], "<|eot_id|>", "<think>"]
    types = [*control_last(bpe[0]), 3, 4]
    checkpoint = write_gguf(
        tmp_path / "t.gguf", "gpt2", tokens, token_merges=bpe[1], types=types, tokenizer_pre="llama-bpe",
        bos_token_id=1, eos_token_id=0, add_bos_token=True, add_eos_token=True, chat_template="{{ bos_token }}hi",
    )  # fmt: skip
    found = load_tokenizer(checkpoint)
    eot, think = len(tokens) - 2, len(tokens) - 1
    assert (found.vocab_size, found.bos_id, found.stop_ids) == (len(tokens), 1, frozenset({0, eot}))
    assert found.encode("")[:1] == [1]
    assert found.encode("a<|eot_id|><think>") == [1, *found.encode("a", add_special=False), eot, think, 0]
    plain = found.encode("<|eot_id|>", add_special=False, parse_special=False)
    assert len(plain) > 3
    assert eot not in plain
    assert found.decode(plain) == "<|eot_id|>"
    assert found.decode([1, eot, think]) == "<think>"
    assert found.decode([1, eot], skip_special=False) == "<|bos|><|eot_id|>"
    assert found.token_bytes(eot) == b"<|eot_id|>"
    assert found.render_chat([]) == "<|bos|>hi"
    info = found.describe()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<|bos|>", "<|end|>", "{{ bos_token }}hi")
    assert info["added_tokens_decoder"][str(think)] == {"content": "<think>", "special": False}


def test_sampling_defaults_of_a_gguf(bpe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    checkpoint = write_gguf(
        tmp_path / "t.gguf", "gpt2", bpe[0], token_merges=bpe[1], tokenizer_pre="gpt-2", sampling_top_k=20, sampling_temp=0.5
    )
    assert load_tokenizer(checkpoint).defaults == SamplingDefaults(temperature=0.5, top_k=20)


@pytest.fixture(scope="module")
def spm() -> bytes:
    """A SentencePiece model as Llama 2 was made."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS * 5 for line in text.split("\n")), model_writer=target, model_type="bpe",
        vocab_size=420, byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return target.getvalue()


SPM_TEXTS = [text for text in TEXTS if text and "\u0000" not in text]


def spm_folder(folder: Path, spm: bytes) -> SafetensorsCheckpoint:
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 420}')
    (folder / "tokenizer.model").write_bytes(spm)
    return SafetensorsCheckpoint(folder)


def spm_gguf(path: Path, spm: bytes, **more: Any) -> GgufCheckpoint:
    model = sentencepiece.SentencePieceProcessor(model_proto=spm)
    ids = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    pieces, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    return write_gguf(path, "llama", pieces, types=types, token_scores=scores, bos_token_id=1, eos_token_id=2, **more)


@pytest.mark.parametrize("form", ["tokenizer.model", "gguf"])
def test_sentencepiece_ids_equal_the_original(spm: bytes, form: str, tmp_path: Path) -> None:
    checkpoint = spm_folder(tmp_path / "m", spm) if form == "tokenizer.model" else spm_gguf(tmp_path / "m.gguf", spm)
    found, oracle = load_tokenizer(checkpoint), sentencepiece.SentencePieceProcessor(model_proto=spm)
    for text in SPM_TEXTS:
        ids = oracle.encode(text)
        assert found.encode(text, add_special=False) == ids, text
        assert found.encode(text) == [1, *ids]
        assert found.decode(ids) == oracle.decode(ids) == text
    assert found.stop_ids == ({2} if form == "gguf" else frozenset())


def test_without_a_prefix_space(spm: bytes, tmp_path: Path) -> None:
    found = load_tokenizer(spm_gguf(tmp_path / "m.gguf", spm, add_space_prefix=False))
    ids = found.encode("fox", add_special=False)
    assert ids != load_tokenizer(spm_gguf(tmp_path / "n.gguf", spm)).encode("fox", add_special=False)
    assert found.decode(ids) == "fox"


def test_phi3_swallows_space_after_special_tokens(spm: bytes, tmp_path: Path) -> None:
    plain = load_tokenizer(spm_gguf(tmp_path / "a.gguf", spm))
    phi3 = load_tokenizer(spm_gguf(tmp_path / "b.gguf", spm, arch="phi3"))
    assert phi3.encode("</s>\n fox", add_special=False) == plain.encode("</s>fox", add_special=False)
    assert phi3.encode("<s> fox", add_special=False) == plain.encode("<s> fox", add_special=False)


def test_a_continued_sentencepiece_text_keeps_its_space(spm: bytes, tmp_path: Path) -> None:
    found = load_tokenizer(spm_gguf(tmp_path / "m.gguf", spm))
    ids = found.encode("the fox jumps", add_special=False)
    assert found.decode(ids).startswith("the")
    for cut in range(1, len(ids)):
        stream = found.stream(ids[:cut])
        text = "".join([*map(stream.step, ids[cut:]), stream.flush()])
        assert found.decode(ids[:cut]) + text == "the fox jumps"


@pytest.mark.parametrize("damage", [b"", b"\x00" * 50, b"\xff" * 50, b"\x0a\x7f"])
def test_a_damaged_sentencepiece_model(tmp_path: Path, damage: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model (is damaged|has no vocabulary)"):
        load_tokenizer(spm_folder(tmp_path / "m", damage))


def test_a_unigram_model_is_refused_by_name(tmp_path: Path) -> None:
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=target,
        model_type="unigram",
        vocab_size=150,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(UnsupportedModel, match="not BPE"):
        load_tokenizer(spm_folder(tmp_path / "m", target.getvalue()))


@pytest.fixture
def folder(bpe: tuple[list[str], list[str]], tmp_path: Path) -> Path:
    """A folder as Llama 3's: byte-level, `<|bos|>` in front by the post-processor."""
    tokens, merges = bpe
    engine = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens(["<|end|>", "<|bos|>"])
    engine.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    engine.enable_truncation(5)
    engine.enable_padding(length=9)
    engine.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"vocab_size": 512, "eos_token_id": 7})
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|end|>"})
    write(tmp_path, "generation_config.json", {"eos_token_id": [3, 4], "temperature": 0.6, "top_p": 0.9, "do_sample": True})
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def test_a_folder(folder: Path) -> None:
    found = load_tokenizer(SafetensorsCheckpoint(folder))
    assert (found.vocab_size, found.bos_id, found.stop_ids) == (512, 1, frozenset({0, 3, 4, 7}))
    assert found.defaults == SamplingDefaults(temperature=0.6, top_p=0.9)
    assert found.encode("the lazy dog")[0] == 1
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text
    assert not found.has_chat_template
    assert found.token_bytes(511) == b""
    assert found.decode([511, 10_000, -1]) == ""


def test_a_model_that_does_not_sample_is_greedy(folder: Path) -> None:
    write(folder, "generation_config.json", {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2})
    assert load_tokenizer(SafetensorsCheckpoint(folder)).defaults == SamplingDefaults(temperature=0.0, repeat_penalty=1.2)


def test_where_a_folder_keeps_its_chat_template(folder: Path) -> None:
    checkpoint = SafetensorsCheckpoint(folder)
    config: dict[str, Any] = {"bos_token": "<|bos|>", "chat_template": "C{{ bos_token }}"}
    write(folder, "tokenizer_config.json", config)
    assert load_tokenizer(checkpoint).render_chat([]) == "C<|bos|>"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(folder, "tokenizer_config.json", {**config, "chat_template": named})
    assert load_tokenizer(checkpoint).render_chat([]) == "D"
    assert load_tokenizer(checkpoint).render_chat([], tools=[{"type": "function"}]) == "T"
    write(folder, "chat_template.json", {"chat_template": "J"})
    assert load_tokenizer(checkpoint).render_chat([]) == "J"
    (folder / "chat_template.jinja").write_text("X")
    found = load_tokenizer(checkpoint)
    assert found.render_chat([]) == "X"
    assert found.has_chat_template
    assert found.describe()["chat_template"] == "X"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b"{", "cannot be read"),
        ("tokenizer_config.json", b"[1]", "does not hold a JSON object"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_folder_with_a_damaged_file(folder: Path, name: str, data: bytes | None, message: str) -> None:
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(SafetensorsCheckpoint(folder))


def test_a_tokenizer_of_another_kind_is_refused(folder: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="neither byte-level nor SentencePiece"):
        load_tokenizer(SafetensorsCheckpoint(folder))


def test_a_gguf_without_a_tokenizer(bpe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="kind 'bert'"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf", "bert", bpe[0]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges is not a list of str"):
        load_tokenizer(write_gguf(tmp_path / "c.gguf", "gpt2", bpe[0], token_merges=[1, 2]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(write_gguf(tmp_path / "d.gguf", "gpt2", bpe[0], token_merges=["zz qq"]))
    with pytest.raises(CheckpointError, match="differ in length"):
        load_tokenizer(write_gguf(tmp_path / "e.gguf", "gpt2", bpe[0], types=[1], token_merges=bpe[1]))
    with pytest.raises(CheckpointError, match="no scores"):
        load_tokenizer(write_gguf(tmp_path / "f.gguf", "llama", bpe[0]))


@pytest.fixture(scope="module")
def both(bpe: tuple[list[str], list[str]], spm: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelTokenizer]:
    folder = tmp_path_factory.mktemp("both")
    return {
        "bpe": load_tokenizer(write_gguf(folder / "b.gguf", "gpt2", bpe[0], token_merges=bpe[1], tokenizer_pre="gpt-2")),
        "spm": load_tokenizer(spm_gguf(folder / "s.gguf", spm)),
    }


@given(kind=st.sampled_from(["bpe", "spm"]), ids=st.lists(st.integers(0, 419), max_size=30), skip=st.booleans())
def test_a_stream_adds_up_to_decode_and_never_shows_half_a_character(
    both: dict[str, ModelTokenizer], kind: str, ids: list[int], skip: bool
) -> None:
    tokenizer = both[kind]
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.step(token) for token in ids]
    text = "".join(pieces) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip)
    shown = [token for token in ids if not (skip and token in tokenizer.special_ids)]
    data = b"".join(map(tokenizer.token_bytes, shown))
    if kind == "bpe":
        assert text == data.decode("utf-8", "replace")
    for count in range(len(pieces) + 1):
        so_far = "".join(pieces[:count])
        assert text.startswith(so_far)


@given(
    text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40),
    kind=st.sampled_from(["bpe", "spm"]),
)
def test_any_text_survives(both: dict[str, ModelTokenizer], kind: str, text: str) -> None:
    assert both[kind].decode(both[kind].encode(text, add_special=False, parse_special=False), skip_special=False) == text


def test_invalid_bytes_come_at_once(both: dict[str, ModelTokenizer]) -> None:
    tokenizer = both["spm"]
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    stream = tokenizer.stream()
    assert [stream.step(byte[b"\x80"]) for _ in range(3)] == ["\ufffd"] * 3
    assert [stream.step(byte[part]) for part in (b"\xf0", b"\x9f", b"\x99", b"\x82")] == ["", "", "", "🙂"]
    assert stream.step(byte[b"\xf0"]) == ""
    assert stream.flush() == "\ufffd"
