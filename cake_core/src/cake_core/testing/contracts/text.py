"""`TextBackendContract`: what every text backend must do. Draws and log-probabilities are in `text_sampling`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CapacityError, StageError
from cake_core.model import BACKEND_API, SAMPLE, SAMPLED, Batch, LoadOptions, ModelInfo, Row, SessionSpec, TextBackend, Want
from cake_core.model import int32_tensor as ids
from cake_core.requests import SamplingParams
from cake_core.testing.contracts.text_rig import (
    GREEDY,
    SEEDED,
    Chain,
    Load,
    assert_close,
    cuts_of,
    drawn,
    rows_of,
)
from cake_core.testing.contracts.text_sampling import TextSampling
from cake_core.testing.contracts.threads import PATIENCE

DESCRIBE = """
import importlib, pathlib, sys
backend, checkpoint = (getattr(importlib.import_module(m), n) for m, n in (sys.argv[1:3], sys.argv[3:5]))
from cake_core.model import LoadOptions
assert backend().accepts(opened := checkpoint(pathlib.Path(sys.argv[5])))
assert backend().describe(opened, LoadOptions()).layers
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[6].split(","))))
"""


class TextBackendContract(TextSampling):
    """Every test on a small checkpoint on the CPU.

    Fixtures to give: `backend` and `checkpoint`; `options` where the backend needs some.

    Attributes:
        tolerance: largest difference of hidden states and log-probabilities, as a share of the largest, that another cut,
            chunking or batching may make. Tokens must be equal throughout.
        prompt_length, answer_length: tokens of the sequences that are tried.
        heavy: modules that `describe` must not import.
    """

    heavy: ClassVar[tuple[str, ...]] = ("torch", "numpy", "transformers", "diffusers", "asyncio")

    def test_describes_itself(self, backend: TextBackend, checkpoint: Checkpoint, info: ModelInfo) -> None:
        assert isinstance(backend, TextBackend)
        assert (backend.api, backend.model_type, info.model_type) == (BACKEND_API, "text", "text")
        assert info.backend == backend.name
        names = [layer.name for layer in info.layers]
        assert (names[0], names[-2:]) == ("model.embed_tokens", ["model.norm", "lm_head"])
        assert names[1:-2] == [f"model.layers.{index}" for index in range(len(names) - 3)]
        assert min(info.vocab_size, info.context_length, info.kv_block, info.hidden_bytes_per_token) > 0
        for layer in info.layers:
            assert layer.nbytes > 0
            assert set(layer.tensors) <= set(checkpoint.tensors)
            assert layer.kv_bytes_per_token == 0 or layer.name.startswith("model.layers.")

    def test_describing_imports_nothing_heavy(self, backend: TextBackend, checkpoint: Checkpoint) -> None:
        arguments = [type(backend).__module__, type(backend).__qualname__, type(checkpoint).__module__]
        arguments += [type(checkpoint).__qualname__, str(checkpoint.path), ",".join(self.heavy)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", DESCRIBE, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        assert (done.returncode, done.stdout.split()) == (0, []), done.stderr

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
    def test_any_cut_gives_the_text_of_the_whole(
        self, load: Load, info: ModelInfo, prompt: list[int], sampling: SamplingParams
    ) -> None:
        expected = load().generate(prompt, sampling, self.answer_length)
        for cut in cuts_of([layer.name for layer in info.layers]):
            assert load(cut).generate(prompt, sampling, self.answer_length) == expected, f"cut {cut}"

    def test_any_cut_gives_the_hidden_states_of_the_whole(self, load: Load, info: ModelInfo, prompt: list[int]) -> None:
        def final(chain: Chain) -> list[list[float]]:
            chain.open(1, SessionSpec(GREEDY, len(prompt)))
            return rows_of(chain.feed(1, 0, prompt, Want(hidden=True)), "final")

        expected = final(load())
        assert len(expected) == len(prompt)
        for cut in cuts_of([layer.name for layer in info.layers]):
            assert_close(final(load(cut)), expected, self.tolerance)

    @pytest.mark.parametrize("chunk", [1, 2, 5, 16])
    def test_a_prompt_in_chunks_is_the_prompt_at_once(self, load: Load, prompt: list[int], chunk: int) -> None:
        chain = load()
        for session, size in ((1, len(prompt)), (2, chunk)):
            chain.open(session, SessionSpec(GREEDY, len(prompt)))
            chain.prefill(session, prompt[:-3], chunk=size)
        whole, chunked = (chain.feed(session, len(prompt) - 3, prompt[-3:], Want(3, hidden=True)) for session in (1, 2))
        assert drawn(whole) == drawn(chunked)
        assert_close(rows_of(chunked, "final"), rows_of(whole, "final"), self.tolerance)

    def test_rows_together_are_rows_alone(self, load: Load, info: ModelInfo) -> None:
        """Sessions of different lengths, some in their prompt and some decoding, in one batch."""
        chain = load()
        prompts = [self.some_tokens(info, which, 3 + 5 * which) for which in range(4)]
        alone = [chain.generate(prompt, SEEDED, self.answer_length) for prompt in prompts]
        sequences = [list(prompt) for prompt in prompts]
        for session, prompt in enumerate(prompts):
            chain.open(session, SessionSpec(SEEDED, len(prompt)))
        seen = [0] * len(prompts)
        while min(len(s) - len(p) for s, p in zip(sequences, prompts, strict=True)) < self.answer_length:
            # A different chunk for each, so that prompts end in different steps.
            stops = [min(len(s), at + 2 + 3 * i) for i, (s, at) in enumerate(zip(sequences, seen, strict=True))]
            wants = [Want(int(stop == len(s))) for s, stop in zip(sequences, stops, strict=True)]
            rows = [Row(i, seen[i], stop - seen[i], wants[i]) for i, stop in enumerate(stops)]
            batch = chain.forward(rows, [s[at:stop] for s, at, stop in zip(sequences, seen, stops, strict=True)])
            answers = iter(drawn(batch) if any(want.sample for want in wants) else [])
            for index, want in enumerate(wants):
                sequences[index] += [next(answers) for _ in range(want.sample)]
            seen = stops
        found = [s[len(p) :][: self.answer_length] for s, p in zip(sequences, prompts, strict=True)]
        assert found == alone

    @pytest.mark.parametrize("back", [0, 1, 5, 16, 10_000])
    def test_truncating_is_recomputing(self, load: Load, prompt: list[int], back: int) -> None:
        chain = load()
        expected = chain.generate(prompt, SEEDED, self.answer_length + 2)
        chain.open(2, SessionSpec(SEEDED, len(prompt)))
        sequence = chain.extend(2, [*prompt, chain.prefill(2, prompt)], self.answer_length - 1)
        asked = max(len(sequence) - 1 - back, 0)
        kept = chain.truncate(2, asked)
        assert 0 <= kept <= asked
        if kept < len(sequence) - 1:
            assert chain.prefill(2, sequence[:-1], start=kept) == sequence[-1]
        assert chain.extend(2, sequence, 2) == [*prompt, *expected]

    def test_sessions_are_apart_from_their_parents(self, load: Load, info: ModelInfo, prompt: list[int]) -> None:
        other = self.some_tokens(info, 5)
        chain = load()
        branch = [*prompt[:9], *other]
        expected = [chain.generate(tokens, SEEDED, self.answer_length) for tokens in (prompt, branch)]
        chain.open(1, SessionSpec(SEEDED, len(prompt)))
        parent = [*prompt, chain.prefill(1, prompt)]
        kept = chain.open(2, SessionSpec(SEEDED, len(branch)), parent=1, length=9)
        assert 0 <= kept <= 9
        child = [*branch, chain.prefill(2, branch, start=kept)]
        parent = chain.extend(1, parent, 3)
        chain.close(1)
        child = chain.extend(2, child, self.answer_length - 1)
        assert parent[len(prompt) :] == expected[0][:4]
        assert child[len(branch) :] == expected[1]

    def test_a_row_that_does_not_continue_changes_nothing(self, load: Load, prompt: list[int]) -> None:
        chain = load()
        expected = chain.generate(prompt, SEEDED, 3)
        for session in (1, 2):
            chain.open(session, SessionSpec(SEEDED, len(prompt)))
        chain.feed(1, 0, prompt[:-1])
        first = Row(1, len(prompt) - 1, 1, SAMPLE), prompt[-1:]
        second = Row(2, 0, 1), prompt[:1]
        wrong = [(second, 1, 0), (second, 1, len(prompt) - 2), (second, 1, len(prompt)), (first, 2, 1), (first, 77, 0)]
        for (row, tokens), session, position in wrong:
            # A good row stands before the bad one: it must not have been forwarded either.
            with pytest.raises(StageError, match=str(session)):
                chain.forward([row, Row(session, position, 1)], [tokens, prompt[:1]])
        sequence = [*prompt, drawn(chain.feed(1, len(prompt) - 1, prompt[-1:], SAMPLE))[0]]
        assert chain.extend(1, sequence, 2)[len(prompt) :] == expected
        assert [*prompt, chain.prefill(2, prompt)][len(prompt) :] == expected[:1]

    def test_sessions_open_once_and_close_freely(self, load: Load) -> None:
        (stage,) = load().stages
        assert stage.open(1, SessionSpec(GREEDY)) == 0
        with pytest.raises(StageError, match="1"):
            stage.open(1, SessionSpec(GREEDY))
        with pytest.raises(StageError, match="9"):
            stage.open(2, SessionSpec(GREEDY), parent=9, length=1)
        assert stage.open(2, SessionSpec(GREEDY)) == 0
        for session in (1, 1, 2, 12345):
            stage.close(session)
        assert stage.open(1, SessionSpec(GREEDY)) == 0

    def test_kv_memory_is_taken_as_positions_come(self, load: Load, info: ModelInfo, options: LoadOptions) -> None:
        block = info.kv_block
        chain = load(options=replace(options, kv_tokens=4 * block))
        (stage,) = chain.stages
        total = stage.memory().kv_tokens
        if total == 0:
            pytest.skip("the backend keeps no KV cache")
        assert total >= 4 * block
        assert stage.memory().kv_tokens_free == total
        tokens = self.some_tokens(info, 0, total + 1)
        for session in (1, 2):
            chain.open(session, SessionSpec(GREEDY, 1))
        assert stage.memory().kv_tokens_free == total
        chain.feed(1, 0, tokens[: total - block])
        assert 0 < stage.memory().kv_tokens_free <= block
        with pytest.raises(CapacityError):
            chain.feed(2, 0, tokens[: 2 * block])
        assert drawn(chain.feed(1, total - block, tokens[:1], SAMPLE))
        chain.close(1)
        assert stage.memory().kv_tokens_free == total
        assert drawn(chain.feed(2, 0, tokens[: 2 * block], SAMPLE))

    def test_a_stage_runs_ahead_of_its_caller(self, load: Load, prompt: list[int]) -> None:
        """Steps are submitted before the tokens they continue with are known, and one past the end is taken back."""
        chain = load()
        expected = chain.generate(prompt, SEEDED, 6)
        (stage,) = chain.stages
        stage.open(1, SessionSpec(SEEDED, len(prompt)))
        found, ahead = [chain.prefill(1, prompt)], []
        for position in range(len(prompt), len(prompt) + 5):
            row = Row(1, position, 1, SAMPLE)
            ahead.append(stage.submit(Batch((row,), {"tokens": ids([SAMPLED])})))
            if len(ahead) == 2:
                found += drawn(ahead.pop(0).result(PATIENCE))
        found += drawn(ahead.pop().result(PATIENCE))
        assert found == expected
        asked = len(prompt) + 2
        kept = stage.truncate(1, asked)
        sequence = [*prompt, *found]
        assert chain.prefill(1, sequence[: asked + 1], start=kept) == found[3]
