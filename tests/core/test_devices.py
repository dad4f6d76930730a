"""A node with several devices: how layers are shared out, and that the text is that of a single stage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.core.test_engine import plain_loop, prompt_of

from cake_core.errors import CapacityError, ConfigError, RewindError, StageError
from cake_core.events import TokenEvent
from cake_core.model import SAMPLE, Batch, Layer, LoadOptions, ModelInfo, Pending, Row, SessionSpec, int32_tensor
from cake_core.planners.costs import SPARE
from cake_core.plugins import Plugins
from cake_core.profiles import DeviceProfile
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, open_text
from cake_core.stages.devices import Room, Share, component_options, devices_of, even, filled, fitting_tokens, load_text
from cake_core.stages.relay import Relay
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.contracts.text_rig import Chain, cuts_of
from cake_core.testing.toy_stage import ToyStage
from cake_core.testing.toys import ToyTextBackend, toy_checkpoint, toy_image_checkpoint, write_toy_checkpoint
from cake_core.topology import Topology
from cake_core.worker.serving import Serving, ServingSpec

GREEDY = SessionSpec(SamplingParams(temperature=0))


class Devices(ToyTextBackend):
    """The toy on devices that have so much memory, and remembers what it loaded where."""

    def __init__(self, free: Mapping[str, int]) -> None:
        self.free = free
        self.loaded: list[tuple[str, tuple[str, ...], int | None]] = []
        self.ended: list[tuple[str, ...]] = []

    def profile(self, options: LoadOptions, known: DeviceProfile | None = None) -> DeviceProfile:
        assert known is not None, "nothing may be measured for loading"
        if options.device not in self.free:
            raise ConfigError(f"there is no {options.device}")
        name = options.device if ":" in options.device else f"{options.device}:0"
        return DeviceProfile(name, self.free[options.device], 1.0)

    def load(self, checkpoint, info, layers, options, progress=None):
        stage = super().load(checkpoint, info, layers, options, progress)
        self.loaded.append((options.device, tuple(layers), options.kv_tokens))
        shutdown = stage.shutdown
        stage.shutdown = lambda: (self.ended.append(stage.layers), shutdown())[1]
        return stage


class Silent(ToyTextBackend):
    """The toy, asked for devices it says nothing about."""


def model(sizes: Sequence[int], kv: int = 0) -> ModelInfo:
    layers = tuple(Layer(f"l{index}", size, kv_bytes_per_token=kv) for index, size in enumerate(sizes))
    return ModelInfo("toy", "text", "m", "a", layers, context_length=10)


def names(info: ModelInfo) -> tuple[str, ...]:
    return tuple(layer.name for layer in info.layers)


# Sharing out


def test_devices_are_filled_in_order_and_the_last_takes_the_rest():
    info = model([10] * 6, kv=1)
    rooms = (Room("a", 45), Room("b", 19), Room("c", 1000))
    assert filled(info, names(info), rooms, 10) == (Share("a", ("l0", "l1")), Share("c", ("l2", "l3", "l4", "l5")))
    assert filled(info, names(info), rooms, 5) == (
        Share("a", ("l0", "l1", "l2")),
        Share("b", ("l3",)),
        Share("c", ("l4", "l5")),
    )
    assert filled(info, names(info), (Room("a", 120), Room("b", 0)), 10) == (Share("a", names(info)),)


def test_what_fits_nowhere_is_told_with_the_numbers():
    info = model([int(1e9)] * 6)
    with pytest.raises(CapacityError, match=r"6 layers need 6\.00 GB .* a 2\.50 GB, b 3\.00 GB; 5 of them") as raised:
        filled(info, names(info), (Room("a", int(2.5e9)), Room("b", int(3e9))), 10)
    assert "--context" in str(raised.value)


def test_without_numbers_each_device_gets_about_as_many_bytes():
    info = model([10, 10, 10, 10, 40])
    assert even(info, names(info), ("a", "b")) == (Share("a", ("l0", "l1", "l2", "l3")), Share("b", ("l4",)))
    assert [share.device for share in even(info, names(info)[:1], ("a", "b", "c"))] == ["b"]
    for count in range(1, 6):
        shares = even(info, names(info), [str(index) for index in range(count)])
        assert tuple(name for share in shares for name in share.layers) == names(info)


def test_half_of_what_is_left_is_for_more_of_the_kv_cache():
    info = model([10] * 4, kv=1)
    shares = (Share("a", ("l0", "l1")), Share("b", ("l2", "l3")))
    assert fitting_tokens(info, shares, (Room("a", 40), Room("b", 60)), 10) == 10
    assert fitting_tokens(info, shares, (Room("a", 60), Room("b", 64)), 10) == 15
    assert fitting_tokens(info, shares, (Room("a", 10**6), Room("b", 10**6)), 10) == 40
    assert fitting_tokens(info, shares, (Room("a", 10**6), Room("b", 10**6)), 90) == 90


@pytest.mark.parametrize("device", ["cpu,cpu", "cuda:0,", "auto,cpu", ",", "a, b,a"])
def test_a_list_of_devices_names_each_once(device):
    with pytest.raises(ConfigError, match="once"):
        devices_of(LoadOptions(device=device))


def test_components_go_round_the_devices():
    options = LoadOptions(device="a, b")
    assert [component_options(options, index).device for index in range(3)] == ["a", "b", "a"]
    assert component_options(LoadOptions(), 5).device == "auto"


# Loading


@pytest.fixture
def checkpoint():
    return toy_checkpoint()


@pytest.fixture
def info(checkpoint):
    return ToyTextBackend().describe(checkpoint, LoadOptions())


def bytes_of(info: ModelInfo, count: int, tokens: int) -> int:
    """Free memory with room for the first `count` layers."""
    return int(sum(layer.nbytes + tokens * layer.kv_bytes_per_token for layer in info.layers[:count]) / SPARE) + 1


def test_a_span_is_loaded_over_the_devices(checkpoint, info):
    backend = Devices({"gpu:0": bytes_of(info, 3, 64), "gpu:1": 10**9})
    seen: list[tuple[int, int]] = []
    options = LoadOptions(device="gpu:0,gpu:1", kv_tokens=64)
    stage = load_text(backend, checkpoint, info, names(info), options, lambda done, total: seen.append((done, total)))
    assert backend.loaded == [("gpu:0", names(info)[:3], 64), ("gpu:1", names(info)[3:], 64)]
    assert stage.layers == names(info)
    weights = sum(layer.nbytes for layer in info.layers)
    assert seen[-1] == (weights, weights)
    assert seen == sorted(seen)
    assert stage.memory().weights == weights
    assert stage.memory().kv_tokens == stage.memory().kv_tokens_free == 64
    assert (
        stage.memory().kv_bytes_per_token
        == load_text(backend, checkpoint, info, names(info), LoadOptions()).memory().kv_bytes_per_token
    )
    stage.shutdown()
    assert backend.ended == [names(info)[:3], names(info)[3:]]


def test_what_fits_the_first_device_stays_there(checkpoint, info):
    backend = Devices({"gpu:0": 10**9, "gpu:1": 10**9})
    stage = load_text(backend, checkpoint, info, names(info), LoadOptions(device="gpu:0,gpu:1"))
    assert not isinstance(stage, Relay)
    assert backend.loaded == [("gpu:0", names(info), 4 * info.context_length)]


def test_nothing_is_loaded_that_does_not_fit(checkpoint, info):
    backend = Devices({"gpu:0": 100, "gpu:1": 100})
    with pytest.raises(CapacityError, match="gpu:1"):
        load_text(backend, checkpoint, info, names(info), LoadOptions(device="gpu:0,gpu:1"))
    assert backend.loaded == []


def test_two_names_of_one_device_are_refused(checkpoint, info):
    backend = Devices({"gpu": 10**9, "gpu:0": 10**9})
    with pytest.raises(ConfigError, match="twice"):
        load_text(backend, checkpoint, info, names(info), LoadOptions(device="gpu,gpu:0"))
    with pytest.raises(ConfigError, match="no gpu:7"):
        load_text(backend, checkpoint, info, names(info), LoadOptions(device="gpu,gpu:7"))


def test_what_was_loaded_is_freed_when_a_later_device_fails(checkpoint, info, monkeypatch):
    backend = Devices({"gpu:0": bytes_of(info, 3, 64), "gpu:1": 10**9})
    load = backend.load

    def failing(checkpoint, info, layers, options, progress=None):
        if options.device == "gpu:1":
            raise CapacityError("gpu:1 was taken meanwhile")
        return load(checkpoint, info, layers, options, progress)

    monkeypatch.setattr(backend, "load", failing)
    with pytest.raises(CapacityError, match="meanwhile"):
        load_text(backend, checkpoint, info, names(info), LoadOptions(device="gpu:0,gpu:1", kv_tokens=64))
    assert backend.ended == [names(info)[:3]]


# A stage in parts


def relay(info: ModelInfo, checkpoint, at: Sequence[int], options: Sequence[LoadOptions] = ()) -> Relay:
    edges = [0, *at, len(info.layers)]
    runs = [names(info)[a:b] for a, b in pairwise(edges)]
    chosen = options or [LoadOptions()] * len(runs)
    return Relay([ToyTextBackend().load(checkpoint, info, run, how) for run, how in zip(runs, chosen, strict=True)])


def forward(stage, session: int, position: int, tokens: Sequence[int]) -> Batch:
    row = Row(session, position, len(tokens), SAMPLE)
    return stage.submit(Batch((row,), {"tokens": int32_tensor(tokens)})).result(5)


def test_a_batch_that_fails_in_a_later_part_has_changed_nothing(checkpoint, info):
    small, large = LoadOptions(kv_tokens=32), LoadOptions(kv_tokens=512)
    stage = relay(info, checkpoint, [3], [large, small])
    chain = Chain([ToyTextBackend().load(checkpoint, info, names(info), large)])
    prompt = list(range(2, 22))
    for session in (1, 2):
        stage.open(session, GREEDY)
    first = Row(1, 0, 16), Row(2, 0, 17)
    with pytest.raises(CapacityError):
        stage.submit(Batch(first, {"tokens": int32_tensor([*prompt[:16], *prompt[:17]])})).result(5)
    assert stage.memory().kv_tokens_free == 32
    expected = chain.generate(prompt, GREEDY.sampling, 5)
    assert Chain([stage]).extend(1, [*prompt, Chain([stage]).prefill(1, prompt)], 4)[len(prompt) :] == expected


def test_a_part_that_cannot_go_back_leaves_all_parts_at_one_length(tmp_path):
    checkpoint = write_toy_checkpoint(tmp_path, layers=4, recurrent=True)
    info = ToyTextBackend().describe(checkpoint, LoadOptions())
    stage = relay(info, checkpoint, [3], [LoadOptions(kv_tokens=512), LoadOptions(kv_tokens=16)])
    stage.open(1, GREEDY)
    forward(stage, 1, 0, range(2, 12))
    with pytest.raises(RewindError, match="0 instead of 10"):
        forward(stage, 1, 10, range(2, 20))
    assert forward(stage, 1, 0, range(2, 12)).tensors["tokens"].shape == (1,)


@pytest.mark.parametrize("failing", [range(4, 5), range(4, 7, 2), range(4, 1000)], ids=["once", "twice", "always"])
def test_what_the_parts_lost_is_computed_again_once_a_token(tmp_path, monkeypatch, failing):
    """Without guessing: a later device fails, and those before it have no way back."""
    checkpoint = write_toy_checkpoint(tmp_path, recurrent=True)
    submit, batches = ToyStage.submit, itertools.count()

    def refuse(self: ToyStage, batch: Batch) -> Pending:
        pending = Pending()
        if "lm_head" in self.layers and next(batches) in failing:
            pending.fail(StageError("out of order"))
            return pending
        return submit(self, batch)

    request = TextRequest(prompt_of(9), SamplingParams(seed=3), max_tokens=12, ignore_eos=True)
    expected = plain_loop(checkpoint, request.prompt, request.sampling, 12)
    monkeypatch.setattr(ToyStage, "submit", refuse)
    options = LoadOptions(device="cuda:0,cpu")
    ids: list[int] = []
    always = len(failing) > 2
    ends = pytest.raises(StageError, match="out of order") if always else nullcontext()
    with closing(open_text(Plugins(entries=()), RunSpec(checkpoint, Topology(), options))) as runtime, ends:
        ids.extend(e.token for e in runtime.engine.generate(request) if isinstance(e, TokenEvent))
    assert ids == expected[: len(ids)]
    assert len(ids) == (4 if always else 12)
    assert next(batches) < 30, "not tried for ever"


def test_a_session_that_a_later_part_refuses_is_open_nowhere(checkpoint, info):
    stage = relay(info, checkpoint, [3])
    head = stage._parts[1]
    head.open(1, GREEDY)
    with pytest.raises(StageError, match="open already"):
        stage.open(1, GREEDY)
    head.close(1)
    assert stage.open(1, GREEDY) == 0


def test_every_cut_is_the_whole_also_within_a_chain(checkpoint, info):
    whole = Chain([ToyTextBackend().load(checkpoint, info, names(info), LoadOptions())])
    prompt = list(range(40, 60))
    expected = whole.generate(prompt, GREEDY.sampling, 6)
    for outer in cuts_of(names(info)):
        stages = []
        for run in outer:
            parts = [ToyTextBackend().load(checkpoint, info, (name,), LoadOptions()) for name in run]
            stages.append(Relay(parts))
        assert Chain(stages).generate(prompt, GREEDY.sampling, 6) == expected, outer


# Whole runs


def generated(options: LoadOptions, backend: ToyTextBackend, checkpoint) -> tuple[str, object]:
    plugins = Plugins(entries=())
    plugins.backends[backend.name] = backend
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), options))
    try:
        request = TextRequest(tuple(b"many devices"), sampling=SamplingParams(temperature=0), max_tokens=12)
        return "".join(event.text for event in runtime.engine.generate(request) if hasattr(event, "text")), runtime.memory()
    finally:
        runtime.close()


@pytest.mark.parametrize("silent", [False, True])
def test_a_master_gives_the_same_text_over_devices(checkpoint, info, silent):
    expected, _ = generated(LoadOptions(kv_tokens=128), ToyTextBackend(), checkpoint)
    backend = Silent() if silent else Devices({"gpu:0": bytes_of(info, 3, 128), "gpu:1": 10**9})
    found, memory = generated(LoadOptions(device="gpu:0,gpu:1", kv_tokens=128), backend, checkpoint)
    assert found == expected
    assert len(expected) > 0
    assert len(memory) == 1
    if isinstance(backend, Devices):
        assert [device for device, _, _ in backend.loaded] == ["gpu:0", "gpu:1"]


def test_a_worker_serves_a_span_on_devices_as_one_stage(checkpoint, info):
    plugins = Plugins(entries=())
    backend = plugins.backends["toy"] = Devices({"gpu:0": bytes_of(info, 3, 64), "gpu:1": 10**9})
    options = LoadOptions(device="gpu:0,gpu:1", kv_tokens=64)
    serving = Serving(plugins, ServingSpec(checkpoint, "w", (names(info),), options))
    serving.load()
    assert [stage.layers for stage in serving.stages] == [names(info)]
    assert len(backend.loaded) == 2
    assert len(serving.report()["memory"]) == 1
    serving.shutdown()


def test_to_the_master_a_worker_on_devices_is_one_stage(checkpoint, transport):
    layers = {"w0": ["model.embed_tokens", "model.layers.0-2"], "w1": ["model.layers.3", "model.norm", "lm_head"]}
    request = TextRequest(tuple(b"many devices"), sampling=SamplingParams(temperature=0), max_tokens=12)
    texts = []
    for device in ("cpu", "a,b"):
        with LocalCluster(Plugins(entries=()), checkpoint, transport, layers, LoadOptions(device=device)) as cluster:
            runtime = cluster.open_text()
            texts.append([event.token for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)])
            held = [stage for worker in cluster.workers.values() for stage in worker.serving.stages]
            assert [isinstance(stage._stage, Relay) for stage in held] == [device == "a,b"] * 2
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12


def test_a_worker_sends_components_round_the_devices(monkeypatch):
    checkpoint, plugins = toy_image_checkpoint(), Plugins(entries=())
    backend = plugins.backend_for(checkpoint, "image")
    load, used = backend.load, []

    def recorded(checkpoint, info, layer, options, progress=None):
        used.append(options.device)
        return load(checkpoint, info, layer, options, progress)

    monkeypatch.setattr(backend, "load", recorded)
    info = backend.describe(checkpoint, LoadOptions())
    spans = tuple((layer.name,) for layer in info.layers)
    serving = Serving(plugins, ServingSpec(checkpoint, "w", spans, replace(LoadOptions(), device="a,b")))
    serving.load()
    assert used == [("a", "b")[index % 2] for index in range(len(spans))]
    serving.shutdown()
