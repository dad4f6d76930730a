"""Grammars (JSON schemas, regular expressions, Lark) enforced with llguidance, where `lm_head` lives.

A session's grammar is compiled when it opens; before each draw, what the grammar does not allow gets no chance. It follows
the generated tokens of the session's own history, so truncating or computing a session again needs nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cake_core.checkpoint import Checkpoint
from cake_core.errors import RequestError, StageError


class Grammars:
    """Compiles grammars for one model; its tokens are prepared when the first one comes (about half a second)."""

    def __init__(self, checkpoint: Checkpoint, vocab_size: int) -> None:
        self._checkpoint = checkpoint
        self._vocab_size = vocab_size

    def compile(self, text: str) -> Grammar:
        """`text` is llguidance's own form. Raises RequestError when it cannot be compiled, or not for this model."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, text)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be compiled: {matcher.get_error()}", "grammar")
        return Grammar(matcher, self._vocab_size)

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer

        from cake_llama.random_model import RandomCheckpoint
        from cake_llama.tokenizer import load_tokenizer

        if isinstance(self._checkpoint, RandomCheckpoint):
            raise RequestError("a model with random weights has no language to constrain; leave the grammar out", "grammar")
        tokenizer = load_tokenizer(self._checkpoint)
        return LLTokenizer(tokenizer.serialized(), n_vocab=self._vocab_size, eos_token=sorted(tokenizer.stop_ids))


class Grammar:
    """Where one session is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
        self._vocab_size = vocab_size
        self._taken: list[int] = []

    def allow(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        """`logits` [vocabulary] with -inf for every token that cannot follow `generated`."""
        from llguidance.numpy import fill_next_token_bitmask

        self._follow(generated)
        fill_next_token_bitmask(self._matcher, self._bits, 0)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        allowed = torch.from_numpy(bits.view(np.bool_)).to(logits.device)
        return logits.masked_fill(~allowed, -math.inf)

    def _follow(self, generated: Sequence[int]) -> None:
        """Brings the matcher to the end of `generated`: back where it had taken others, then on."""
        same = next((i for i, (a, b) in enumerate(zip(self._taken, generated, strict=False)) if a != b), None)
        keep = min(len(self._taken), len(generated)) if same is None else same
        if keep < len(self._taken):
            self._matcher.rollback(len(self._taken) - keep)
            del self._taken[keep:]
        for token in generated[keep:]:
            if not self._matcher.consume_token(token):
                raise StageError(f"token {token} does not follow from the grammar: {self._matcher.get_error()}")
            self._taken.append(token)
