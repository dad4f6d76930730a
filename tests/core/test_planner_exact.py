"""The planner finds what trying everything finds."""

from __future__ import annotations

import math
import random

import pytest
from tests.core.planner_rig import BruteForce, random_cluster, random_model

from cake_core.errors import CapacityError
from cake_core.planners import PlanRequest, plan

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
