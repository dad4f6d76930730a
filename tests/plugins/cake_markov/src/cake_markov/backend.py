"""A model of fading memory: a layer's state is decay * state + input, its output tanh(state)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.model import BACKEND_API, Layer, LoadOptions, ModelInfo, Progress
from cake_core.testing.toys import ToyTokenizer
from cake_markov.stage import MarkovStage

WIDTH = 4


class MarkovBackend:
    api: ClassVar[int] = BACKEND_API
    name = "markov"
    model_type: Literal["text", "image"] = "text"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "markov"

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        count = int(checkpoint.config["num_hidden_layers"])
        names = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(count)), "model.norm", "lm_head"]
        layers = []
        for name in names:
            tensor = checkpoint.tensors[f"{name}.weight"]
            layers.append(Layer(name, tensor.nbytes, (tensor.name,), file_nbytes=tensor.nbytes))
        return ModelInfo(
            backend=self.name,
            model_type="text",
            name=checkpoint.name,
            architecture="Markov",
            layers=tuple(layers),
            hidden_bytes_per_token=4 * WIDTH,
            vocab_size=ToyTokenizer.vocab_size,
            context_length=options.context or 4096,
        )

    def load(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        layers: Sequence[str],
        options: LoadOptions,
        progress: Progress | None = None,
    ) -> MarkovStage:
        return MarkovStage({name: read(checkpoint, f"{name}.weight") for name in layers})

    def tokenizer(self, checkpoint: Checkpoint) -> ToyTokenizer:
        return ToyTokenizer()


def read(checkpoint: Checkpoint, name: str) -> list[list[float]]:
    """An F32 tensor as rows of WIDTH."""
    tensor, values = checkpoint.tensors[name], array("f")
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        values.frombytes(file.read(tensor.nbytes))
    return [values[start : start + WIDTH].tolist() for start in range(0, len(values), WIDTH)]
