"""Guesses never change a text: whatever is guessed, right or wrong, anywhere, the ids are those of the plain loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.core.test_engine import CUTS, Cut, plain_loop, prompt_of

from cake_core.checkpoint import Checkpoint
from cake_core.engine.scheduler import Limits
from cake_core.engine.sequence import Sequence as Running
from cake_core.engine.speculation import Crowd, Guessing, Lookup, Pace, Speculation, Trust, best_length
from cake_core.engine.speculator import Speculator
from cake_core.engine.text import TextEngine
from cake_core.errors import ConfigError
from cake_core.events import Finished, TokenEvent
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import Topology

ALWAYS = Speculation(8, everywhere=True)
Truth = Mapping[tuple[int, ...], Sequence[int]]


class Seer(Speculator):
    """Knows every answer, and is wrong as often as it is told to be."""

    def __init__(self, truth: Truth, wrong: float, most: int = 6) -> None:
        super().__init__(Speculation(most))
        self._truth = truth
        self._wrong = wrong
        self._random = random.Random(7)

    def guess(self, sequences: Sequence[Running]) -> list[list[int]]:
        found = []
        for sequence in sequences:
            count = 0 if self.off else max(0, min(self._random.randint(0, self.speculation.most), sequence.room))
            answer = self._truth[sequence.request.prompt][sequence.generated : sequence.generated + count]
            guesses = [(token + 1) % 250 if self._random.random() < self._wrong else token for token in answer]
            sequence.guessing = sequence.guessing or Guessing(self.tally)
            sequence.guessing.guesses = list(guesses)
            found.append(guesses)
        return found


def seen_through(runtime: TextRuntime, speculator: Speculator, limits: Limits) -> TextEngine:
    """A second engine over a runtime's stages, with another who guesses."""
    return TextEngine(runtime.info, runtime.tokenizer, runtime.pipeline, limits, speculator=speculator)


def ids(engine: TextEngine, request: TextRequest) -> list[int]:
    return [event.token for event in engine.generate(request) if isinstance(event, TokenEvent)]


def request_for(i: int) -> TextRequest:
    sampling = (
        SamplingParams(temperature=0.0),
        SamplingParams(seed=i, temperature=0.9, top_k=40, repeat_penalty=1.2, repeat_last_n=-1),
        SamplingParams(seed=i, temperature=1.5, frequency_penalty=0.7, min_tokens=10, banned_until=(3, 5)),
    )[i % 3]
    return TextRequest(prompt_of(5 + 11 * i, i), sampling, max_tokens=20 + i, ignore_eos=True)


REQUESTS = [request_for(i) for i in range(12)]


@pytest.fixture
def plugins() -> Plugins:
    return Plugins(entries=())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "toy")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    checkpoint = write_toy_checkpoint(tmp_path_factory.mktemp("truth") / "toy")
    return {r.prompt: plain_loop(checkpoint, r.prompt, r.sampling, r.max_tokens or 0) for r in REQUESTS}


@pytest.fixture
def cluster_of(plugins: Plugins, checkpoint: Checkpoint) -> Iterator[Callable[[Cut], LocalCluster]]:
    made: list[LocalCluster] = []

    def make(cut: Cut) -> LocalCluster:
        made.append(LocalCluster(plugins, checkpoint, MemoryTransport(), cut))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[3], CUTS[4]], ids=["local", "three", "alternating"])
def test_guesses_do_not_change_the_text(
    cut: Cut, wrong: float, truth: Truth, cluster_of: Callable[[Cut], LocalCluster]
) -> None:
    seer = Seer(truth, wrong)
    engine = seen_through(cluster_of(cut).open_text(), seer, Limits(chunk=16, depth=3))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda request: ids(engine, request), REQUESTS))
    stats = engine.stats()
    engine.close()
    assert found == [truth[request.prompt] for request in REQUESTS]
    assert stats.proposed > 200
    assert stats.accepted == {0.0: stats.proposed, 1.0: 0}.get(wrong, stats.accepted)
    assert 0.0 in (wrong, stats.kv_tokens - stats.kv_tokens_used) or stats.accepted < stats.proposed


def test_work_is_what_it_was_and_the_guesses_that_were_wrong(plugins: Plugins, checkpoint: Checkpoint, truth: Truth) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    engine = seen_through(runtime, Seer(truth, 0.3), Limits(prefixes=0))
    request = REQUESTS[4]
    events = list(engine.generate(request))
    stats = engine.stats()
    engine.close()
    runtime.close()
    usage = events[-1].usage  # type: ignore[union-attr]
    assert isinstance(events[-1], Finished)
    assert usage is not None
    assert (usage.proposed, usage.accepted) == (stats.proposed, stats.accepted)
    assert stats.positions == len(request.prompt) + usage.completion_tokens - 1 + stats.proposed - stats.accepted
    assert stats.batches == 1 + usage.completion_tokens - 1 - stats.accepted
    assert stats.kv_tokens_used == 0


def test_right_guesses_save_round_trips(truth: Truth, cluster_of: Callable[[Cut], LocalCluster]) -> None:
    runtime = cluster_of(CUTS[1]).open_text()
    engine = seen_through(runtime, Seer(truth, 0.0), Limits())
    count = runtime.nodes()[0].count
    assert count is not None
    before = count.received
    assert ids(engine, REQUESTS[11]) == truth[REQUESTS[11].prompt]
    steps = engine.stats().batches
    engine.close()
    assert steps <= 16  # for 31 tokens
    assert count.received - before <= steps + 3


def test_a_full_cache_leaves_no_room_for_guesses(plugins: Plugins, checkpoint: Checkpoint, truth: Truth) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), LoadOptions(kv_tokens=256)))
    engine = seen_through(runtime, Seer(truth, 0.5), Limits(chunk=32))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda request: ids(engine, request), REQUESTS))
    stats = engine.stats()
    engine.close()
    runtime.close()
    assert found == [truth[request.prompt] for request in REQUESTS]
    assert stats.preemptions > 0
    assert stats.proposed > 0


def test_a_model_that_cannot_go_back_is_not_guessed_for(plugins: Plugins, tmp_path: Path, truth: Truth) -> None:
    checkpoint = write_toy_checkpoint(tmp_path / "recurrent", recurrent=True)
    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    seer = Seer(truth, 0.5)
    engine = seen_through(runtime, seer, Limits())
    assert ids(engine, REQUESTS[5]) == truth[REQUESTS[5].prompt]
    engine.close()
    runtime.close()
    assert seer.off
    assert seer.tally.proposed > seer.tally.accepted


@pytest.mark.parametrize("token_index", [0, 5, 20])
def test_a_worker_lost_under_guesses(token_index: int, truth: Truth, cluster_of: Callable[[Cut], LocalCluster]) -> None:
    cluster = cluster_of(CUTS[2])
    runtime = cluster.open_text(rejoin=20.0, speculation=ALWAYS, draft=cluster.checkpoint)
    tokens: list[int] = []
    for event in runtime.engine.generate(REQUESTS[7]):
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
            if len(tokens) == token_index + 1:
                cluster.stop("w1")
                cluster.start("w1")
    assert tokens == truth[REQUESTS[7].prompt]


def test_a_draft_model_of_the_same_mind_is_always_right(truth: Truth, cluster_of: Callable[[Cut], LocalCluster]) -> None:
    """It draws with the request's seed, penalties and temperature, so its drafts are what the model will say."""
    cluster = cluster_of(CUTS[2])
    runtime = cluster.open_text(speculation=ALWAYS, draft=cluster.checkpoint)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda request: ids(runtime.engine, request), REQUESTS))
    stats = runtime.engine.stats()
    assert found == [truth[request.prompt] for request in REQUESTS]
    assert stats.proposed > 0
    assert stats.accepted == stats.proposed


def test_a_draft_model_with_another_mind_changes_nothing(
    tmp_path: Path, truth: Truth, cluster_of: Callable[[Cut], LocalCluster]
) -> None:
    other = write_toy_checkpoint(tmp_path / "other", seed=5)
    runtime = cluster_of(CUTS[1]).open_text(speculation=ALWAYS, draft=other)
    for request in REQUESTS[:6]:
        assert ids(runtime.engine, request) == truth[request.prompt]
    assert runtime.engine.stats().accepted < runtime.engine.stats().proposed


def test_logprobs_and_stops_fall_where_they_would(plugins: Plugins, checkpoint: Checkpoint, truth: Truth) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    answer = truth[REQUESTS[9].prompt]
    request = TextRequest(
        REQUESTS[9].prompt, REQUESTS[9].sampling, max_tokens=29, logprobs=2, stop_ids=frozenset({answer[17]})
    )  # fmt: skip
    plain = list(runtime.engine.generate(request))
    engine = seen_through(runtime, Seer(truth, 0.1), Limits())
    guessed = list(engine.generate(request))
    engine.close()
    runtime.close()
    assert [e for e in guessed if isinstance(e, TokenEvent)] == [e for e in plain if isinstance(e, TokenEvent)]
    ends = [events[-1] for events in (plain, guessed)]
    assert all(isinstance(end, Finished) and end.reason == "stop" and end.stop == answer[17] for end in ends)


def test_another_vocabulary_is_refused(plugins: Plugins, checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Other:
        vocab_size = 300

        def token_bytes(self, token: int) -> bytes:
            return b"%d" % token

    from cake_core.engine.drafter import check_same_tokens

    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    check_same_tokens(runtime.tokenizer, runtime.tokenizer)
    with pytest.raises(ConfigError, match="--draft"):
        check_same_tokens(Other(), runtime.tokenizer)  # type: ignore[arg-type]
    runtime.close()


# What is decided, as tables


def test_the_text_itself_is_the_guess() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4]
    assert lookup.guess(text, 4) == ([5, 6, 7, 8], 2)
    assert lookup.guess([*text, 5], 4) == ([6, 7, 8, 9], 3)
    assert lookup.guess([*text, 5, 99], 4) == ([], 0)
    assert Lookup().guess([7], 4) == ([], 0)


def test_the_place_that_agrees_longest_wins_and_then_the_latest() -> None:
    assert Lookup().guess([9, 1, 2, 50, 8, 1, 2, 60, 9, 1, 2], 1) == ([50], 3)
    assert Lookup().guess([9, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2], 1) == ([60], 2)


def test_a_repetition_goes_on() -> None:
    assert Lookup().guess([5, 1, 2, 3, 1, 2, 3], 8)[0] == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("right", "fixed", "each", "crowd", "least", "most"),
    [
        (0.9, 0.040, 0.0005, Crowd(), 8, 24),  # a slow link: many
        (0.3, 0.040, 0.0005, Crowd(), 1, 4),  # seldom right, but almost free
        (0.3, 0.0, 0.005, Crowd(), 0, 0),  # a guess costs what a token costs
        (0.9, 0.005, 0.005, Crowd(), 1, 6),
        (0.9, 0.010, 0.010, Crowd(31, 31), 0, 2),  # a full batch, bound by compute
        (1.0, 0.040, 0.0, Crowd(), 48, 48),
    ],
)
def test_as_many_guesses_as_pay(right: float, fixed: float, each: float, crowd: Crowd, least: int, most: int) -> None:
    assert least <= best_length(right, 48, crowd, lambda n: fixed + each * n) <= most


def test_a_draft_that_takes_longer_than_the_step_is_not_made() -> None:
    assert best_length(0.8, 16, Crowd(), lambda _: 0.01, each=0.02) == 0
    assert best_length(0.8, 16, Crowd(), lambda _: 0.10, each=0.002) >= 4


def test_the_pace_of_steps() -> None:
    pace = Pace()
    assert pace.seconds(1) == 0
    pace.observe(512, 0.512)
    pace.observe(1, 0.010)
    assert pace.seconds(1) == pytest.approx(0.010)
    assert pace.seconds(11) == pytest.approx(0.020)  # beyond what was seen: as dear as a prompt's
    pace.observe(21, 0.014)
    assert pace.seconds(11) == pytest.approx(0.012)
    for _ in range(300):
        pace.observe(1, 0.010)
    assert pace.seconds(21) == pytest.approx(0.030)  # long ago: to be tried again


def test_trust_follows_the_draws() -> None:
    trust = Trust()
    before = trust.of(4)
    trust.learn(4, [1, 2, 3], [1, 2, 9])
    after_two_right_one_wrong = trust.of(4)
    for _ in range(100):
        trust.learn(4, [1], [2])
    assert trust.of(4) < 0.01 < after_two_right_one_wrong
    assert before != after_two_right_one_wrong
    assert trust.of(40) > 0.9
