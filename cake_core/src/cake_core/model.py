"""The contract of a model plugin: the values that cross nodes and what a backend has to offer.

Nothing here knows torch, numpy, an architecture or a network. A text backend gives `TextStage`s, an image backend gives
`Component`s; the engine and the worker see only these, local or remote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast, runtime_checkable

from cake_core.errors import ConfigError, ProtocolError
from cake_core.pending import Pending as Pending

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.requests import ImageRequest, Message, SamplingDefaults, SamplingParams

BACKEND_API = 1
"""Version of this contract. A backend states the one it was written for in `Backend.api`."""

Buffer = bytes | bytearray | memoryview

DTYPE_SIZES: Mapping[str, int] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "f8e5m2": 1,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip
"""Element sizes in bytes of every dtype that may cross the wire."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense, row-major, little-endian tensor in host memory: the one value that crosses nodes.

    `data` is any contiguous byte buffer; its length is checked against `dtype` and `shape`.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        size = DTYPE_SIZES.get(self.dtype)
        if size is None:
            raise ProtocolError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPE_SIZES)}")
        if min(self.shape, default=0) < 0:
            raise ProtocolError(f"negative dimension in shape {self.shape}")
        needed = math.prod(self.shape) * size
        if needed != self.nbytes:
            raise ProtocolError(f"{self.dtype}{list(self.shape)} needs {needed} bytes, not {self.nbytes}")

    @property
    def nbytes(self) -> int:
        data = self.data
        return data.nbytes if isinstance(data, memoryview) else len(data)


def int32_tensor(values: Sequence[int]) -> Tensor:
    """A one-dimensional i32 tensor of `values`."""
    from array import array

    return Tensor("i32", (len(values),), array("i", values).tobytes())


def int32_values(tensor: Tensor) -> list[int]:
    """The values of an i32 tensor, flat."""
    if tensor.dtype != "i32":
        raise ProtocolError(f"expected i32, got {tensor.dtype}")
    return memoryview(tensor.data).cast("B").cast("i").tolist()


def float32_values(tensor: Tensor) -> list[float]:
    """The values of an f32 tensor, flat."""
    if tensor.dtype != "f32":
        raise ProtocolError(f"expected f32, got {tensor.dtype}")
    return cast("list[float]", memoryview(tensor.data).cast("B").cast("f").tolist())


@dataclass(frozen=True, slots=True)
class Layer:
    """The smallest part of a model that can be placed, as `describe` found it in the checkpoint.

    Attributes:
        name: the design's name, e.g. `model.layers.7`, `unet`.
        nbytes: bytes of its weights in memory under the load options that `describe` was given.
        tensors: names of its tensors in the checkpoint (what a worker, a bundle or a transfer needs).
        file_nbytes: bytes of those tensors in the checkpoint.
        kv_bytes_per_token: bytes of KV cache a token of a session costs here.
        weights_read_per_token: bytes of weights that decoding one token reads (0 for an embedding look-up).
        flops_per_token: floating-point operations for one token, attention over the context not counted.
        stateless: the layer keeps nothing between calls, so several nodes may hold it as replicas.
    """

    name: str
    nbytes: int
    tensors: tuple[str, ...] = ()
    file_nbytes: int = 0
    kv_bytes_per_token: int = 0
    weights_read_per_token: int = 0
    flops_per_token: int = 0
    stateless: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What placement, splitting and admission need to know of a model, read from config and tensor headers only.

    Attributes:
        layers: all layers, in the order of execution.
        hidden_bytes_per_token: bytes that cross between two neighbouring layers for one token, at the wire dtype.
        context_length: most positions a session may have, after `--context`.
        kv_block: positions per KV block; memory is taken a block at a time.
        identity: what must agree between nodes beside the tensors themselves (relevant config); compared at connect.
    """

    backend: str
    model_type: Literal["text", "image"]
    name: str
    architecture: str
    layers: tuple[Layer, ...]
    dtype: str = "f32"
    hidden_bytes_per_token: int = 0
    vocab_size: int = 0
    context_length: int = 0
    kv_block: int = 16
    identity: Mapping[str, Any] = field(default_factory=dict)

    def layer(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How weights are loaded on one node; every value may be left to the backend.

    `dtype`: auto, f32, f16, bf16. `device`: auto, cpu, cuda, cuda:1, mps, xpu; of several (`devices`) `load` is given one.
    `threads`: compute threads.
    `context`: most positions a session may have. `kv_tokens`: positions of KV cache to provide for all sessions together.
    `quantize`: none, int8, int4. `kv_dtype`: auto, f32, f16, bf16, int8. `extra`: a backend's own options.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    kv_tokens: int | None = None
    quantize: str | None = None
    kv_dtype: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "f32", "f16", "bf16"):
            raise ConfigError(f"unsupported dtype {self.dtype!r}; use auto, f32, f16 or bf16")
        for name in ("threads", "context", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a loaded stage or component takes and offers, in bytes and positions."""

    device: str
    dtype: str
    weights: int
    kv_tokens: int = 0
    kv_tokens_free: int = 0
    kv_bytes_per_token: int = 0


Progress = Callable[[int, int], None]
"""`progress(done, total)` in bytes, called from the loading thread."""


# Text


@dataclass(frozen=True, slots=True)
class Want:
    """What a row asks of the stage with `lm_head`. All zero: nothing (a prompt chunk that is not the last).

    Attributes:
        sample: draw a token after each of the last `sample` positions of the row.
        top: with each drawn token its log-probability and those of the `top` most likely ones; -1 asks for none.
        score: at every position, the log-probability of the id in `targets` there (-1: none) and of the `score_top` best.
        hidden: the final hidden state (after the last norm) of every position instead of tokens.
    """

    sample: int = 0
    top: int = -1
    score: bool = False
    score_top: int = 0
    hidden: bool = False


NOTHING = Want()
SAMPLE = Want(sample=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One session's share of a batch: positions `position` .. `position + length - 1`.

    `rewind`: the session may be further than `position`, by guesses that were wrong, and goes back there first. It is done
    by `stages.LocalStage` with the backend's `truncate`; a backend never sees it.
    """

    session: int
    position: int
    length: int
    want: Want = NOTHING
    rewind: bool = False


SAMPLED = -1
"""In `tokens`: the token this very stage sampled last for the session (only where it holds embed_tokens and lm_head)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through a stage in one call: the rows of several sessions, flat, token-major.

    Into a stage, with T = sum of row lengths:
        `tokens`   i32 [T]      where the stage holds `model.embed_tokens` or `lm_head` (penalties need the history)
        `hidden`   [T, hidden]  where it does not hold `model.embed_tokens`
        `targets`  i32 [T]      where a row wants `score`
    Out of a stage:
        `hidden`   [T, hidden]  when it does not hold `lm_head`
        and of the stage that does, with S = sum of `want.sample`, L = most `top` asked, Q = positions of the score rows:
        `tokens` i32 [S]; when asked `logprobs` f32 [S], `top_ids` i32 [S, L], `top_logprobs` f32 [S, L] (unused: -1, -inf);
        `score_logprobs` f32 [Q] (NaN where no target), `score_top_ids` i32 [Q, L'], `score_top_logprobs` f32 [Q, L'];
        `final` f32 [H, hidden], H = positions of the rows that want `hidden`.
    """

    rows: tuple[Row, ...]
    tensors: Mapping[str, Tensor]

    @property
    def positions(self) -> int:
        """T, the number of positions in the batch."""
        total = 0
        for row in self.rows:
            total += row.length
        return total

    def split(self) -> Iterator[Batch]:
        """One batch a row, for a backend that prefers to loop; inverse of `join`."""
        start = 0
        for row in self.rows:
            stop = start + row.length
            yield Batch((row,), {name: _slice(tensor, start, stop) for name, tensor in self.tensors.items()})
            start = stop

    def split_results(self) -> Iterator[Batch]:
        """One batch a row of what a stage gave: as `split` for hidden states, and each row's share of the answers."""
        if "hidden" in self.tensors:
            yield from self.split()
            return
        starts = {"sample": 0, "score": 0, "final": 0}
        for row in self.rows:
            want = row.want
            shares = {"sample": want.sample, "score": row.length * want.score, "final": row.length * want.hidden}
            tensors = {}
            for name, tensor in self.tensors.items():
                kind = _SHARES[name]
                if shares[kind]:
                    tensors[name] = _slice(tensor, starts[kind], starts[kind] + shares[kind])
            starts = {kind: start + shares[kind] for kind, start in starts.items()}
            yield Batch((row,), tensors)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """The batches one after another: rows joined, each tensor concatenated along its first dimension."""
        rows = tuple(row for batch in batches for row in batch.rows)
        names = dict.fromkeys(name for batch in batches for name in batch.tensors)
        return Batch(rows, {name: _concatenate([b.tensors[name] for b in batches if name in b.tensors]) for name in names})


_SHARES = {
    "tokens": "sample", "logprobs": "sample", "top_ids": "sample", "top_logprobs": "sample",
    "score_logprobs": "score", "score_top_ids": "score", "score_top_logprobs": "score", "final": "final",
}  # fmt: skip
"""What the first dimension of each answer counts."""


def _slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    step = math.prod(tensor.shape[1:]) * DTYPE_SIZES[tensor.dtype]
    data = memoryview(tensor.data).cast("B")[start * step : stop * step]
    return Tensor(tensor.dtype, (stop - start, *tensor.shape[1:]), data)


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors):
        raise ProtocolError("cannot join tensors of different dtype or width")
    return Tensor(first.dtype, (sum(t.shape[0] for t in tensors), *first.shape[1:]), b"".join(t.data for t in tensors))


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What never changes in a session: told to every stage at `open`.

    `prompt_length` separates prompt from generated tokens (frequency and presence penalties count only the latter).
    `grammar` is compiled where `lm_head` lives. `length_hint` is the most positions the session will have. `wire_dtype` is
    the dtype in which `hidden` leaves the stage, named by the master; empty for the stage's own.
    """

    sampling: SamplingParams
    prompt_length: int = 0
    choice: int = 0
    grammar: str | None = None
    length_hint: int = 0
    wire_dtype: str = ""


class TextStage(Protocol):
    """A contiguous run of layers, loaded. Blocking; calls come from one thread at a time, and are served in order.

    A session is an id; the stage keeps its KV cache, and where `lm_head` lives also its token history and sampler state.

    A stage that completes batches after `submit` has returned and holds both `embed_tokens` and `lm_head` may have an
    attribute `runs_ahead = True`: then the next position of a session may be submitted, with the token SAMPLED, before its
    draw has completed.
    """

    layers: tuple[str, ...]

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        """Starts a session, empty or with the first `length` positions of `parent`. Returns the positions it really has.

        Raises StageError when the id is open already or the parent is not.
        """

    def submit(self, batch: Batch) -> Pending:
        """Queues a batch; at least two may be outstanding, and they complete in order.

        The rows must continue their sessions: `row.position` equals the positions forwarded or kept so far, else the
        result is a StageError and no session of the batch has changed. CapacityError when KV memory is short, likewise.
        """

    def truncate(self, session: int, length: int) -> int:
        """Keeps the first `length` positions; returns how many were really kept (fewer, or 0, where state cannot go back)."""

    def close(self, session: int) -> None:
        """Forgets a session and frees its memory; an unknown id is not an error."""

    def memory(self) -> Memory: ...

    def shutdown(self) -> None:
        """Frees everything. Nothing may be called afterwards."""


class DecodeStream(Protocol):
    """Turns one sequence's ids into text, never half a character."""

    def step(self, token: int) -> str:
        """Text that became certain with this token, possibly empty."""

    def flush(self) -> str:
        """What is left, with undecodable bytes replaced. Ends the stream."""


class Tokenizer(Protocol):
    """Everything between text and ids, and what the model's files say of generation."""

    vocab_size: int
    stop_ids: frozenset[int]
    bos_id: int | None
    defaults: SamplingDefaults
    has_chat_template: bool

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> DecodeStream: ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for (special tokens: their name), as OpenAI's logprobs want them."""

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt of a conversation by the model's own chat template.

        Raises RequestError when the model has no template or the template refuses the conversation.
        """

    def describe(self) -> Mapping[str, Any]:
        """Contents of tokenizer_config.json or their like, for `/tokenizer_info`."""


# Images


class Component(Protocol):
    """A part of an image model, loaded: `clip`, `unet`, `vae`. Calls are blocking and come from one thread at a time."""

    name: str

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Runs `method` of the component (one of the few it offers; others are a StageError).

        `constants` are tensors that do not change within `request`: over the wire they travel once, named by content.
        """

    def close(self, request: int) -> None:
        """Drops what is kept for a request. Unknown ids are no error."""

    def memory(self) -> Memory: ...

    def shutdown(self) -> None: ...


class ImageModel(Protocol):
    """A whole image model whose components are local or remote; the backend owns the denoising loop."""

    def generate(self, request: ImageRequest, emit: Callable[[Any], None], cancelled: Callable[[], bool]) -> None:
        """Paints, handing `ImageStep`, `ImagePreview` and `ImageDone` events (cake_core.events) to `emit`.

        Raises Cancelled within one step of `cancelled()` turning true.
        """

    def shutdown(self) -> None: ...


# Backends


@runtime_checkable
class Backend(Protocol):
    """A family of models. Instances are cheap and import nothing heavy before `load`."""

    api: ClassVar[int]
    name: str
    model_type: Literal["text", "image"]

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether this backend serves the checkpoint's architecture; reads its config only."""

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        """Reads config and `checkpoint.headers`, so that a bundle of split-model is described as the whole model is.

        Raises CheckpointError or UnsupportedModel, naming what is wrong.
        """


@runtime_checkable
class TextBackend(Backend, Protocol):
    def load(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        layers: Sequence[str],
        options: LoadOptions,
        progress: Progress | None = None,
    ) -> TextStage:
        """Loads a contiguous run of layers. Raises CapacityError before loading when they do not fit, with the numbers."""

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer: ...


@runtime_checkable
class Narrowing(Backend, Protocol):
    """A backend that can write a quantised copy of a model, for `split-model --quantize`."""

    def narrow(self, checkpoint: Checkpoint, quantize: str, folder: Path, progress: Progress | None = None) -> Checkpoint:
        """Writes the whole model to an empty folder, `quantize` as in `LoadOptions`, and opens it.

        Raises ConfigError for a model that cannot be narrowed.
        """


@runtime_checkable
class ImageBackend(Backend, Protocol):
    def load(
        self, checkpoint: Checkpoint, info: ModelInfo, layer: str, options: LoadOptions, progress: Progress | None = None,
    ) -> Component:  # fmt: skip
        ...

    def assemble(
        self, checkpoint: Checkpoint, info: ModelInfo, components: Mapping[str, Sequence[Component]], options: LoadOptions,
    ) -> ImageModel:  # fmt: skip
        """The model over its components: several for one layer are replicas. A local one is what `load` returned."""
