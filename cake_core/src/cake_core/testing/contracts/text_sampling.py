"""Draws and log-probabilities of a text backend against the reference sampler, and its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.errors import RequestError
from cake_core.model import SAMPLE, Batch, ModelInfo, Row, SessionSpec, TextBackend, Want, float32_values, int32_values
from cake_core.requests import SamplingParams, chat
from cake_core.sampling import process, sample, uniform
from cake_core.testing.contracts.text_rig import GREEDY, SEEDED, Load, TextRig, drawn, rows_of

HOT = SamplingParams(temperature=2.0, seed=2**63 + 12345)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(seed=1),
    "cold": SamplingParams(temperature=0.4, seed=2),
    "top k": replace(HOT, top_k=7),
    "top p": replace(HOT, top_p=0.6),
    "min p": replace(HOT, min_p=0.2),
    "all filters": replace(HOT, top_k=20, top_p=0.9, min_p=0.05),
    "frequency": replace(HOT, frequency_penalty=1.5),
    "presence": replace(HOT, presence_penalty=-1.5),
    "bias": replace(HOT, logit_bias=((3, 4.0), (5, -100.0))),
    "bans": replace(HOT, logit_bias=((3, 100.0),), min_tokens=6, banned_until=(3,)),
}
REPEAT = {
    "greedy": SamplingParams(temperature=0, repeat_penalty=1.3),
    "last": replace(HOT, repeat_penalty=1.5, repeat_last_n=8),
    "all": replace(HOT, repeat_penalty=0.7, repeat_last_n=-1),
}
_EDGE = 1e-5
"""A draw this close to the edge of a token's share may fall to either neighbour, since log-probabilities come as f32."""


class TextSampling(TextRig):
    """Attribute `texts`: what the tokenizer is tried with; none for a checkpoint without one."""

    texts: ClassVar[tuple[str, ...]] = ("Hello, world!", "Grüße aus Köln", "世界 🎂 e\u0301", "two\n\nlines  and   spaces")

    def raw_logits(self, checkpoint: Checkpoint, tokens: Sequence[int]) -> Sequence[float] | None:
        """The model's logits after `tokens`, computed any other way. Needed to compare `repeat_penalty`, which depends on
        the sign of a logit and so cannot be checked from log-probabilities; None leaves that out."""
        return None

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
    def test_draws_like_the_reference(self, load: Load, info: ModelInfo, prompt: list[int], sampling: SamplingParams) -> None:
        chain, choice = load(), 3
        chain.open(1, SessionSpec(sampling, len(prompt), choice))
        tokens = list(prompt)
        for position in range(len(prompt), len(prompt) + self.answer_length):
            start = 0 if position == len(prompt) else position - 1
            answer = chain.feed(1, start, tokens[start:], Want(1, top=info.vocab_size))
            (token,) = drawn(answer)
            assert token in _admissible(_all_logprobs(answer)[0], sampling, tokens, len(prompt), choice)
            tokens.append(token)

    @pytest.mark.parametrize("sampling", REPEAT.values(), ids=REPEAT.keys())
    def test_repeat_penalty_is_the_reference(
        self, load: Load, checkpoint: Checkpoint, prompt: list[int], sampling: SamplingParams
    ) -> None:
        if self.raw_logits(checkpoint, prompt) is None:
            pytest.skip("the test class gives no raw_logits")
        chain = load()
        chain.open(1, SessionSpec(sampling, len(prompt)))
        tokens = [*prompt, chain.prefill(1, prompt)]
        for position in range(len(prompt), len(prompt) + self.answer_length):
            logits = self.raw_logits(checkpoint, tokens[:position])
            assert logits is not None
            assert tokens[position] in _admissible(logits, sampling, tokens[:position], len(prompt), 0)
            tokens = chain.extend(1, tokens, 1)

    def test_every_choice_and_every_seed_is_another_draw(self, load: Load, prompt: list[int]) -> None:
        chain = load()
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for seed, choice in ((1, 0), (1, 1), (2, 0), (2**32 + 1, 0), (1, 0)):
            chain.open(1, SessionSpec(SamplingParams(temperature=2.0, seed=seed), len(prompt), choice))
            text = tuple(chain.extend(1, [*prompt, chain.prefill(1, prompt)], 20))
            chain.close(1)
            assert found.setdefault((seed, choice), text) == text
        assert len(set(found.values())) == len(found) == 4

    def test_log_probabilities(self, load: Load, info: ModelInfo, prompt: list[int]) -> None:
        """Of the whole vocabulary they sum to one, best first; fewer are the first of them; unasked ones are marked so."""
        chain = load()
        sampling = SamplingParams(temperature=0, logit_bias=((3, 100.0),))
        wants = [Want(1, top=info.vocab_size), Want(1, top=3), Want(1, top=0), Want(1)]
        for session in range(len(wants)):
            chain.open(session, SessionSpec(sampling, len(prompt)))
        rows = [Row(session, 0, len(prompt), want) for session, want in enumerate(wants)]
        batch = chain.forward(rows, [prompt] * len(rows))
        tops, top_ids = rows_of(batch, "top_logprobs"), int32_values(batch.tensors["top_ids"])
        width = batch.tensors["top_ids"].shape[1]
        assert math.fsum(map(math.exp, tops[0])) == pytest.approx(1, abs=1e-3)
        assert tops[0] == sorted(tops[0], reverse=True)
        assert sorted(top_ids[:width]) == list(range(info.vocab_size))
        # Bias decides the draw but not what is reported: the model's own probabilities.
        assert drawn(batch) == [3] * 4
        reported = dict(zip(top_ids[:width], tops[0], strict=True))
        assert float32_values(batch.tensors["logprobs"])[:3] == pytest.approx([reported[3]] * 3, rel=self.tolerance)
        assert tops[1][:3] == pytest.approx(tops[0][:3], rel=self.tolerance)
        for row, asked in ((1, 3), (2, 0), (3, 0)):
            assert top_ids[row * width + asked : (row + 1) * width] == [-1] * (width - asked)
            assert tops[row][asked:] == [-math.inf] * (width - asked)

    def test_scores_are_the_log_probabilities_of_the_targets(self, load: Load, info: ModelInfo, prompt: list[int]) -> None:
        chain = load()
        for session in (1, 2):
            chain.open(session, SessionSpec(GREEDY, len(prompt)))
        targets = [*prompt[1:], -1]
        row = Row(1, 0, len(prompt), Want(score=True, score_top=2))
        batch = chain.forward([row], [prompt], targets)
        scores, tops = float32_values(batch.tensors["score_logprobs"]), rows_of(batch, "score_top_logprobs")
        assert math.isnan(scores[-1])
        for position, target in enumerate(targets[:-1]):
            answer = chain.feed(2, position, prompt[position : position + 1], Want(1, top=info.vocab_size))
            expected = _all_logprobs(answer)[0]
            assert scores[position] == pytest.approx(expected[target], rel=self.tolerance, abs=self.tolerance)
            assert tops[position] == pytest.approx(sorted(expected)[:-3:-1], rel=self.tolerance, abs=self.tolerance)

    def test_several_draws_of_a_row_are_single_draws(self, load: Load, prompt: list[int]) -> None:
        """What speculation needs: tokens given in advance, a draw after each of the last ones."""
        chain = load()
        answer = chain.generate(prompt, SEEDED, 6)
        chain.open(1, SessionSpec(SEEDED, len(prompt)))
        chain.feed(1, 0, prompt[:-1])
        given = [prompt[-1], *answer[:-1]]
        assert drawn(chain.feed(1, len(prompt) - 1, given, Want(6))) == answer

    def test_final_hidden_states_come_for_the_rows_that_want_them(self, load: Load, prompt: list[int]) -> None:
        chain = load()
        for session in range(3):
            chain.open(session, SessionSpec(GREEDY, len(prompt)))
        rows = [Row(0, 0, 4, Want(hidden=True)), Row(1, 0, len(prompt), SAMPLE), Row(2, 0, 4, Want(hidden=True))]
        batch = chain.forward(rows, [prompt[:4], prompt, prompt[:4]])
        found = rows_of(batch, "final")
        assert len(found) == 8
        assert found[:4] == [pytest.approx(row, rel=self.tolerance, abs=self.tolerance) for row in found[4:]]
        assert len(drawn(batch)) == 1

    @pytest.mark.parametrize("skip_special", [True, False])
    def test_text_streams_as_it_decodes(self, backend: TextBackend, checkpoint: Checkpoint, skip_special: bool) -> None:
        if not self.texts:
            pytest.skip("the checkpoint has no tokenizer")
        tokenizer = backend.tokenizer(checkpoint)
        for text in self.texts:
            ids = tokenizer.encode(text, add_special=False)
            assert tokenizer.decode(ids, skip_special=skip_special).strip() == text
            stream = tokenizer.stream(skip_special=skip_special)
            steps = [stream.step(token) for token in ids]
            assert not any("\ufffd" in step for step in steps)
            assert ("".join(steps) + stream.flush()).strip() == text

    def test_the_tokenizer_knows_its_ids(self, backend: TextBackend, checkpoint: Checkpoint, info: ModelInfo) -> None:
        if not self.texts:
            pytest.skip("the checkpoint has no tokenizer")
        tokenizer = backend.tokenizer(checkpoint)
        assert 0 < tokenizer.vocab_size <= info.vocab_size
        assert all(0 <= token < info.vocab_size for token in tokenizer.stop_ids)
        assert isinstance(tokenizer.token_bytes(0), bytes)
        if tokenizer.has_chat_template:
            rendered = tokenizer.render_chat(chat(("user", "Why is the sky blue?")))
            assert "Why is the sky blue?" in rendered
            assert all(0 <= token < info.vocab_size for token in tokenizer.encode(rendered, add_special=False))
        else:
            with pytest.raises(RequestError):
                tokenizer.render_chat(chat(("user", "Hi")))


def _all_logprobs(batch: Batch) -> list[list[float]]:
    """Log-probabilities in order of id, a row for each draw that asked for the whole vocabulary."""
    found = []
    width = batch.tensors["top_ids"].shape[1]
    ids = int32_values(batch.tensors["top_ids"])
    for index, values in enumerate(rows_of(batch, "top_logprobs")):
        by_id = dict(zip(ids[index * width : (index + 1) * width], values, strict=True))
        found.append([by_id[token] for token in range(width)])
    return found


def _admissible(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int], prompt_length: int, choice: int
) -> set[int]:
    """The reference's token, and the neighbour in the cumulative sum where the draw falls on the edge between them."""
    position = len(history)
    found = {sample(logits, params, history, prompt_length, position, choice)}
    kept = process(logits, params, history, prompt_length)
    total = math.fsum(weight for _, weight in kept)
    draw, reached = uniform(params.seed, choice, position), 0.0
    for (token, weight), (after, _) in pairwise(kept):
        reached += weight / total
        if abs(reached - draw) < _EDGE:
            found |= {token, after}
    return found
