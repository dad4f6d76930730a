"""The toys as products: the packaged ones are what the writer writes, and each option does what it says."""

from __future__ import annotations

import pytest

from cake_core.errors import CapacityError, CheckpointError, ConfigError, RequestError, StageError
from cake_core.model import SAMPLE, SAMPLED, Batch, LoadOptions, Row, SessionSpec, Want, int32_tensor, int32_values
from cake_core.requests import SamplingParams, chat
from cake_core.testing.toy_answers import float32_rows
from cake_core.testing.toys import (
    ToyImageBackend,
    ToyTextBackend,
    ToyTokenizer,
    toy_checkpoint,
    toy_image_checkpoint,
    write_toy_checkpoint,
    write_toy_image_checkpoint,
)

GREEDY = SessionSpec(SamplingParams(temperature=0))


def load(checkpoint=None, options=None):
    checkpoint, options, backend = checkpoint or toy_checkpoint(), options or LoadOptions(), ToyTextBackend()
    info = backend.describe(checkpoint, options)
    return backend.load(checkpoint, info, [layer.name for layer in info.layers], options)


def forward(stage, session, position, tokens, want=SAMPLE):
    batch = Batch((Row(session, position, len(tokens), want),), {"tokens": int32_tensor(tokens)})
    return stage.submit(batch).result(5)


def generate(stage, prompt, count, session=1):
    stage.open(session, GREEDY)
    answer = int32_values(forward(stage, session, 0, prompt).tensors["tokens"])
    while len(answer) < count:
        position = len(prompt) + len(answer) - 1
        answer += int32_values(forward(stage, session, position, [SAMPLED]).tensors["tokens"])
    stage.close(session)
    return answer


def test_packaged_toys_are_what_the_writers_write(tmp_path):
    for packaged, written in (
        (toy_checkpoint(), write_toy_checkpoint(tmp_path / "text")),
        (toy_image_checkpoint(), write_toy_image_checkpoint(tmp_path / "image")),
    ):
        assert packaged.fingerprint(packaged.tensors) == written.fingerprint(written.tensors)
        assert packaged.config == written.config


def test_every_prompt_token_and_every_weight_seed_changes_the_text(tmp_path):
    prompt = list(b"the quick brown fox")
    texts = [generate(load(), prompt, 12)]
    for index in range(len(prompt)):
        changed = [*prompt[:index], prompt[index] ^ 1, *prompt[index + 1 :]]
        texts.append(generate(load(), changed, 12))
        texts.append(generate(load(), prompt[:index] + prompt[index + 1 :], 12))
    texts.append(generate(load(write_toy_checkpoint(tmp_path, seed=1)), prompt, 12))
    assert len({tuple(text) for text in texts}) == len(texts)


def test_order_of_layers_matters(tmp_path):
    """Swapping two layers' weights gives another model."""
    checkpoint = write_toy_checkpoint(tmp_path, layers=2)
    before = generate(load(checkpoint), [1, 2, 3], 12)
    file = checkpoint.tensors["model.layers.0.weight"].file
    data = bytearray(file.read_bytes())
    first, second = (slice(t.offset, t.offset + t.nbytes) for t in map(checkpoint.tensors.get, LAYERS))
    data[first], data[second] = data[second], data[first]
    file.write_bytes(data)
    assert generate(load(checkpoint), [1, 2, 3], 12) != before


LAYERS = ("model.layers.0.weight", "model.layers.1.weight")


def test_sampled_stands_for_the_token_just_drawn():
    stage = load()
    ahead = generate(stage, [1, 2, 3], 8)
    stage.open(2, GREEDY)
    given = int32_values(forward(stage, 2, 0, [1, 2, 3]).tensors["tokens"])
    while len(given) < 8:
        given += int32_values(forward(stage, 2, 2 + len(given), given[-1:]).tensors["tokens"])
    assert ahead == given


def test_sampled_without_a_draw_is_an_error_and_changes_nothing():
    stage = load()
    stage.open(1, GREEDY)
    with pytest.raises(StageError, match="sampled no token"):
        forward(stage, 1, 0, [SAMPLED])
    forward(stage, 1, 0, [1, 2])
    stage.truncate(1, 1)
    with pytest.raises(StageError, match="sampled no token"):
        forward(stage, 1, 1, [SAMPLED])
    assert forward(stage, 1, 1, [2]).tensors["tokens"].shape == (1,)


def test_recurrent_toy_keeps_nothing(tmp_path):
    stage = load(write_toy_checkpoint(tmp_path, recurrent=True))
    stage.open(1, GREEDY)
    forward(stage, 1, 0, [1, 2, 3])
    assert stage.open(2, GREEDY, parent=1, length=2) == 0
    assert stage.open(3, GREEDY, parent=1, length=3) == 3
    assert stage.truncate(1, 3) == 3
    assert stage.truncate(1, 2) == 0


def test_slow_toy_takes_its_time(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    stage = load(options=LoadOptions(extra={"seconds_per_position": 0.25, "seconds_per_batch": 1}))
    stage.open(1, GREEDY)
    forward(stage, 1, 0, [1, 2])
    assert slept == [1.5]


def test_too_little_memory_is_named_before_loading():
    with pytest.raises(CapacityError, match=r"7 layers need \d+ bytes, there are 3000; 6 of them would fit"):
        load(options=LoadOptions(kv_tokens=16, extra={"memory": 3000}))


@pytest.mark.parametrize("config", [{"num_hidden_layers": "4"}, {"num_hidden_layers": 0}, {"context_length": None}])
def test_bad_config_is_named(tmp_path, config):
    with pytest.raises(CheckpointError, match=next(iter(config))):
        load(write_toy_checkpoint(tmp_path, **config))


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.2\.weight"):
        load(write_toy_checkpoint(tmp_path, layers=2, num_hidden_layers=3))
    with pytest.raises(ConfigError, match="quantised"):
        load(options=LoadOptions(quantize="int8"))


def test_layers_that_do_not_follow_one_another_are_refused():
    backend, checkpoint = ToyTextBackend(), toy_checkpoint()
    info = backend.describe(checkpoint, LoadOptions())
    for layers in ([], ["model.norm", "model.layers.0"], ["model.layers.0", "model.layers.2"], ["model.layers.9"]):
        with pytest.raises(ConfigError, match="no contiguous run"):
            backend.load(checkpoint, info, layers, LoadOptions())


def test_damaged_hidden_states_are_noticed():
    backend, checkpoint = ToyTextBackend(), toy_checkpoint()
    stage = backend.load(checkpoint, backend.describe(checkpoint, LoadOptions()), ["model.layers.1"], LoadOptions())
    stage.open(1, GREEDY)
    for values in ([0.5] * 8, [float("nan")] * 8):
        pending = stage.submit(Batch((Row(1, 0, 1),), {"hidden": float32_rows([values], 8)}))
        with pytest.raises(StageError, match="damaged"):
            pending.result(5)


def test_tokenizer_goes_there_and_back():
    tokenizer = ToyTokenizer()
    text = "Grüße, 世界 🎂<|end|>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] in tokenizer.stop_ids
    assert tokenizer.decode(ids) == "Grüße, 世界 🎂"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin|>" + text
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(plain) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "<|begin|>" + text


def test_stream_never_gives_half_a_character():
    tokenizer = ToyTokenizer()
    cake = list("🎂".encode())
    stream = tokenizer.stream()
    assert [stream.step(token) for token in cake] == ["", "", "", "🎂"]
    assert [stream.step(cake[0]), stream.step(ord("a"))] == ["", "�a"]
    assert [stream.step(cake[0]), stream.flush()] == ["", "�"]
    assert tokenizer.stream(cake[:2]).step(cake[2]) == ""
    begun = tokenizer.stream([*b"abc", *cake[:3]])
    assert begun.step(cake[3]) == "🎂"


def test_chat_template():
    tokenizer = ToyTokenizer()
    prompt = tokenizer.render_chat(chat(("system", "Be kind."), ("user", "Hi")))
    assert prompt == "<|begin|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert tokenizer.render_chat(parts, add_generation_prompt=False) == "<|begin|><|user|>ab<|end|>"


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "pirate", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
)
def test_conversations_the_template_refuses(messages):
    with pytest.raises(RequestError) as info:
        ToyTokenizer().render_chat(messages)
    assert info.value.param.startswith("messages")


def test_the_toy_has_no_grammar():
    with pytest.raises(RequestError, match="grammar"):
        load().open(1, SessionSpec(SamplingParams(), grammar='root ::= "a"'))


def test_want_of_a_row_that_samples_more_than_it_has_is_refused():
    stage = load()
    stage.open(1, GREEDY)
    with pytest.raises(StageError, match="cannot sample 2 of 1"):
        forward(stage, 1, 0, [1], Want(sample=2))


def test_image_toy_refuses_what_it_cannot_do():
    backend, checkpoint = ToyImageBackend(), toy_image_checkpoint()
    info = backend.describe(checkpoint, LoadOptions())
    with pytest.raises(ConfigError, match="no layer 'clip2'"):
        backend.load(checkpoint, info, "clip2", LoadOptions())
    with pytest.raises(ConfigError, match="lacks unet, vae"):
        backend.assemble(checkpoint, info, {"clip": [backend.load(checkpoint, info, "clip", LoadOptions())]}, LoadOptions())
    with pytest.raises(StageError, match="no method 'decode'"):
        backend.load(checkpoint, info, "clip", LoadOptions()).call("decode", 1, {}, {}, {})
