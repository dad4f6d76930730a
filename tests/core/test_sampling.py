"""The reference sampler against published vectors and a slow, literal restatement of its definition."""

from __future__ import annotations

import math
import random

import pytest

from cake_core.errors import RequestError, StageError
from cake_core.requests import SamplingParams
from cake_core.sampling import argmax, log_softmax, philox4x32, process, sample, top_logprobs, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    """Random123's known-answer tests for philox4x32 with 10 rounds."""
    assert philox4x32(counter, key) == words


def test_uniform_maps_seed_choice_and_position_as_documented():
    seed, choice, position = 0x0123456789ABCDEF, 7, 2**32 + 5
    w0, w1, _, _ = philox4x32((5, 1, 7, 0), (0x89ABCDEF, 0x01234567))
    assert uniform(seed, choice, position) == ((w0 << 32 | w1) >> 11) / 2**53


def test_uniform_is_uniform_and_different_everywhere():
    draws = [uniform(seed, choice, position) for seed in range(10) for choice in range(10) for position in range(100)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    counts = [0] * 20
    for u in draws:
        counts[int(u * 20)] += 1
    # Chi-square with 19 degrees of freedom: 43.8 is passed once in 1000 sets; the draws are fixed, so this is a fact.
    assert sum((n - 500) ** 2 / 500 for n in counts) < 43.8


def test_temperature_zero_takes_the_lowest_of_equals_and_ignores_the_rest():
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    assert sample([1.0, 3.0, 3.0], params, [], 0, 0, 0) == 1
    assert process([1.0, 3.0, 3.0], params, [], 0) == [(1, 1.0)]
    assert argmax([1.0, 3.0, 3.0]) == 1


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), [0, 2]),
        (SamplingParams(top_k=3), [0, 1, 2]),
        (SamplingParams(top_p=0.0), [2]),
        (SamplingParams(top_p=0.5), [2]),
        (SamplingParams(top_p=0.51), [0, 2]),
        (SamplingParams(top_p=0.75), [0, 2]),
        (SamplingParams(min_p=0.5), [0, 1, 2]),
        (SamplingParams(min_p=0.51), [2]),
        (SamplingParams(top_k=2, top_p=0.6), [2]),
        (SamplingParams(logit_bias=((3, 100.0),)), [3]),
        (SamplingParams(banned_until=(2,), min_tokens=2, top_k=1), [0]),
        (SamplingParams(banned_until=(2,), min_tokens=1, top_k=1), [2]),
    ],
)
def test_filters_keep_what_they_say(params, kept):
    """Probabilities 1/4, 1/4, 1/2 and almost nothing; the history is a prompt of one token and an answer of one."""
    logits = [math.log(1), math.log(1), math.log(2), -50.0]
    found = [token for token, weight in process(logits, params, [3, 3], 1) if weight > 1e-9]
    assert found == kept


def test_penalties_count_what_they_say():
    logits, history = [2.0, -2.0, 1.0, 1.0], [0, 1, 2, 2]

    def weights(**options: float) -> list[float]:
        kept = process(logits, SamplingParams(**options), history, 2)
        return [math.log(weight) - math.log(kept[3][1]) for _, weight in kept]

    assert weights() == pytest.approx([1, -3, 0, 0])
    assert weights(repeat_penalty=2.0) == pytest.approx([0, -5, -0.5, 0])
    assert weights(repeat_penalty=2.0, repeat_last_n=-1) == pytest.approx([0, -5, -0.5, 0])
    assert weights(repeat_penalty=2.0, repeat_last_n=3) == pytest.approx([1, -5, -0.5, 0])
    assert weights(repeat_penalty=2.0, repeat_last_n=0) == pytest.approx([1, -3, 0, 0])
    assert weights(frequency_penalty=0.5) == pytest.approx([1, -3, -1, 0])
    assert weights(presence_penalty=0.5) == pytest.approx([1, -3, -0.5, 0])


def _literal(logits: list[float], params: SamplingParams, u: float) -> int:
    """The definition once more, one step a line, with the probabilities normalised after each."""
    best = max(logits)
    p = {i: math.exp((x - best) / params.temperature) for i, x in enumerate(logits)}
    order = sorted(p, key=lambda i: (-p[i], i))
    if params.top_k:
        order = order[: params.top_k]
    total = sum(p[i] for i in order)
    nucleus: list[int] = []
    for i in order:
        if sum(p[j] for j in nucleus) / total >= params.top_p and nucleus:
            break
        nucleus.append(i)
    nucleus = sorted(i for i in nucleus if p[i] >= params.min_p * max(p.values()))
    total = sum(p[i] for i in nucleus)
    reached = 0.0
    for i in nucleus:
        reached += p[i]
        if reached / total > u:
            return i
    return nucleus[-1]


def test_sampling_equals_its_definition():
    random_ = random.Random(1)
    for case in range(500):
        logits = [random_.gauss(0, 3) for _ in range(random_.randrange(1, 40))]
        params = SamplingParams(
            temperature=random_.choice([0.3, 1.0, 2.0]),
            top_k=random_.choice([0, 1, 3, 10]),
            top_p=random_.choice([1.0, 0.9, 0.3]),
            min_p=random_.choice([0.0, 0.1, 0.5]),
            seed=random_.getrandbits(64),
        )
        expected = _literal(logits, params, uniform(params.seed, 3, case))
        assert sample(logits, params, [], 0, case, 3) == expected


def test_draws_follow_the_distribution():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    counts = [0] * 4
    for position in range(4000):
        counts[sample(logits, SamplingParams(seed=11), [], 0, position, 0)] += 1
    expected = [2000, 1200, 600, 200]
    assert sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True)) < 16.3


def test_log_softmax_and_top():
    logprobs = log_softmax([1000.0, 1000.0, 999.0, -math.inf])
    assert math.fsum(math.exp(x) for x in logprobs) == pytest.approx(1)
    assert logprobs[2] - logprobs[0] == pytest.approx(-1)
    assert [token for token, _ in top_logprobs(logprobs, 3)] == [0, 1, 2]
    assert len(top_logprobs(logprobs, 9)) == 4


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers_are_a_stage_error(logits):
    with pytest.raises(StageError, match="not numbers"):
        sample(logits, SamplingParams(), [], 0, 0, 0)


@pytest.mark.parametrize("params", [SamplingParams(logit_bias=((2, 1.0),)), SamplingParams(banned_until=(-1,), min_tokens=1)])
def test_ids_the_model_does_not_have_are_refused(params):
    with pytest.raises(RequestError, match="ids end at 1"):
        sample([0.0, 1.0], params, [], 0, 0, 0)
