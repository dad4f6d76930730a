"""The planner finds what trying everything finds."""

from __future__ import annotations

import math
import random

import pytest
from tests.core.planner_rig import BruteForce, random_cluster, random_model

from cake_core.errors import CapacityError
from cake_core.planners import PlanRequest, plan, ways
from cake_core.planners.costs import model_costs
from cake_core.planners.fronts import steps
from cake_core.planners.orders import climb
from cake_core.planners.report import step_seconds
from cake_core.planners.search import Rules, Search, every_order, one_order

CONTEXT = 2048


def compare(seed: int, blocks: int, workers: int, objective: str = "latency", chain: bool = False) -> bool:
    """Whether any way fits; the plan is as good as the best of all ways, or refused where there is none."""
    rng = random.Random(seed)
    info = random_model(rng, blocks)
    cluster = random_cluster(rng, info, workers, small=rng.choice([0.05, 0.2, 0.5]))
    brute = BruteForce(info, cluster, CONTEXT, chain)
    ask = PlanRequest(CONTEXT, objective=objective, chain=chain)
    period, seconds = brute.busiest() if objective == "throughput" else (0.0, brute.fastest())
    if seconds == math.inf:
        with pytest.raises(CapacityError):
            plan(info, cluster, ask)
        return False
    found = plan(info, cluster, ask)
    assert found.prediction.seconds_per_token == pytest.approx(seconds, rel=1e-6)
    if objective == "throughput":
        assert 1 / found.prediction.tokens_per_second == pytest.approx(period, rel=1e-6)
    return True


@pytest.mark.parametrize("chain", [False, True], ids=["star", "chain"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_as_good_as_trying_everything(objective, chain):
    fitting = 0
    for seed in range(40):
        rng = random.Random(1000 + seed)
        fitting += compare(seed, rng.randint(1, 7), rng.randint(0, 4), objective, chain)
    assert fitting > 20


@pytest.mark.parametrize("chain", [False, True], ids=["star", "chain"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_six_nodes_and_twelve_layers(objective, chain):
    assert compare(5, 9, 5, objective, chain)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chain", [False, True], ids=["star", "chain"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_eight_nodes(objective, chain, seed):
    assert compare(20 + seed, 4, 7, objective, chain)


def test_orders_of_a_chain_are_climbed_to_the_best():
    """From the first order that has room at all to what trying every set finds."""
    for seed in range(8):
        rng = random.Random(100 + seed)
        info = random_model(rng, 12, even=True)
        costs = model_costs(info, random_cluster(rng, info, 7, small=0.2), PlanRequest(CONTEXT, chain=True))
        search = Search(costs, Rules())
        workers = list(range(1, 8))
        first = one_order(search, workers)
        best = every_order(search, workers)
        found = climb(search, workers, first)
        assert found == climb(search, workers, first)
        assert best[0] == pytest.approx(found[0]) if first[1] else first[0] == math.inf
        assert found[1] is None or step_seconds(costs, steps(found[1])) == pytest.approx(found[0])


@pytest.mark.parametrize("chain", [False, True], ids=["star", "chain"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_the_bounded_search_stays_near_the_exact_one(monkeypatch, objective, chain):
    for seed in range(6):
        rng = random.Random(seed)
        info = random_model(rng, 10, even=True)
        cluster = random_cluster(rng, info, 7, small=0.1)
        ask = PlanRequest(CONTEXT, objective=objective, chain=chain)
        monkeypatch.setattr(ways, "EXACT_WORKERS", 8)
        exact = plan(info, cluster, ask).prediction
        monkeypatch.setattr(ways, "EXACT_WORKERS", 0)
        monkeypatch.setattr(ways, "FOLLOWED", 14 * 7 * 13)
        bounded = plan(info, cluster, ask).prediction
        if objective == "latency":
            assert bounded.seconds_per_token <= 1.02 * exact.seconds_per_token
        assert bounded.tokens_per_second >= (0 if objective == "latency" else exact.tokens_per_second / 1.02)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_sixteen_nodes_and_many_layers_are_planned(objective):
    rng = random.Random(3)
    info = random_model(rng, 128, even=True)
    cluster = random_cluster(rng, info, 16, small=0.03)
    found = plan(info, cluster, PlanRequest(CONTEXT, objective=objective))
    assert sum(len(stage.layers) for stage in found.stages) == len(info.layers)
    assert all(stage.weights + stage.kv <= stage.room for stage in found.stages)
