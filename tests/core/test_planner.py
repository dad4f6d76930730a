"""What a plan says: who is left out and why, when one machine is better, what is fixed stays, what does not fit is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.core.planner_rig import random_cluster, random_model

from cake_core.errors import CapacityError, ConfigError, TopologyError
from cake_core.model import Layer, ModelInfo
from cake_core.placement import check_placement, place
from cake_core.planners import Plan, PlanRequest, plan, predict
from cake_core.planners.costs import by_width, model_costs
from cake_core.profiles import ClusterProfile, DeviceProfile, LinkProfile, NodeProfile
from cake_core.topology import Node, Topology

GB = 1_000_000_000
MODEL = random_model(random.Random(1), 10, even=True)
LAN = LinkProfile(3e-4, 1.17e8)


def node(name: str, gb: float, gb_a_second: float, *more: DeviceProfile, overhead: float = 1e-4) -> NodeProfile:
    first = DeviceProfile("dev", int(gb * GB), gb_a_second * GB, overhead=overhead, flops={"bf16": 1e13})
    return NodeProfile(name, (first, *more))


def cluster(*nodes: NodeProfile, link: LinkProfile = LAN, **links: LinkProfile) -> ClusterProfile:
    master, *workers = nodes
    return ClusterProfile(master, tuple(workers), {("master", w.name): links.get(w.name, link) for w in workers})


def planned(whole: ClusterProfile, **ask: object) -> Plan:
    request = PlanRequest(**{"context": 1024, **ask})  # type: ignore[arg-type]
    found = plan(MODEL, whole, request)
    check_placement(MODEL, found.placement, found.topology)
    assert place(MODEL, found.topology) == found.placement
    assert found.prediction == predict(MODEL, found.placement, whole, request)
    return found


def test_one_machine_with_room_is_left_alone():
    found = planned(cluster(node("master", 8, 50), node("a", 8, 50)))
    assert found.placement.nodes == ("master",)
    assert "would slow it down" in found.left_out["a"]
    assert any("alone is fastest" in text for text in found.advice)


def test_a_fast_worker_takes_everything_head_included():
    found = planned(cluster(node("master", 8, 20), node("a", 8, 900)))
    assert found.placement.nodes == ("a",)
    assert found.alone is not None
    assert found.alone.node == "a"
    assert found.prediction.seconds_per_token == found.alone.prediction.seconds_per_token


def test_machines_that_are_each_too_small_share():
    found = planned(cluster(node("master", 2, 50), node("a", 2, 50), node("b", 2, 5)))
    assert set(found.placement.nodes) == {"master", "a"}
    assert found.alone is None
    assert any("takes the cluster" in text for text in found.advice)


def test_no_room_for_a_layer_is_the_reason():
    found = planned(cluster(node("master", 8, 50), node("a", 0.1, 50)))
    assert found.left_out["a"].startswith("no room")


def test_a_far_node_is_left_out_where_a_near_one_suffices():
    found = planned(cluster(node("master", 1.6, 50), node("near", 2, 50), node("far", 2, 60), far=LinkProfile(0.05, 1e7)))
    assert "near" in found.placement.nodes
    assert "0.05" not in found.left_out["far"]
    assert "would slow it down" in found.left_out["far"]


def test_throughput_uses_machines_that_latency_leaves_out():
    whole = cluster(node("master", 8, 50), node("a", 8, 50), node("b", 8, 50))
    fast, wide = planned(whole), planned(whole, objective="throughput")
    assert len(wide.placement.nodes) == 3
    assert wide.prediction.tokens_per_second > 2 * fast.prediction.tokens_per_second
    assert wide.prediction.seconds_per_token > fast.prediction.seconds_per_token
    assert any("one machine alone would be faster" in text for text in wide.advice)


def test_devices_of_a_worker_are_filled_fastest_first_and_cost_no_link():
    slow = DeviceProfile("cpu", 8 * GB, 20 * GB, overhead=1e-4)
    found = planned(cluster(node("master", 0.7, 30), node("a", 1.2, 900, slow)))
    stages = [stage for stage in found.stages if stage.node == "a"]
    assert [stage.device for stage in stages] == ["dev", "cpu"]
    assert stages[0].weights + stages[0].kv + 0.21 * GB > stages[0].room
    assert len([span for span in found.placement.spans if span.node == "a"]) == 1


def test_devices_go_in_the_order_in_which_their_node_fills_them():
    fast, slow = DeviceProfile("gpu", 2 * GB, 900 * GB), DeviceProfile("cpu", int(1.2 * GB), 20 * GB)
    found = planned(cluster(node("master", 0.7, 30), NodeProfile("a", (slow, fast))))
    assert [stage.device for stage in found.stages if stage.node == "a"] == ["cpu", "gpu"]


def test_kv_cache_of_the_context_counts():
    whole = cluster(node("master", 3.1, 50), node("a", 8, 20))
    assert planned(whole, context=16).placement.nodes == ("master",)
    assert planned(whole, context=4096, streams=60).placement.nodes != ("master",)


def test_given_layers_stay_and_the_rest_is_filled():
    fixed = Topology((Node("a", None, ("model.layers.2", "model.layers.3"), "old"), Node("b", None, ())), "t.yml")
    whole = cluster(node("master", 1, 50), node("a", 8, 900), node("b", 8, 500))
    found = planned(whole, topology=fixed)
    assert found.placement.layers_of("a") == ("model.layers.2", "model.layers.3")
    assert "model.layers.4" in found.placement.layers_of("b")
    assert found.topology.node("a").description == "old"


def test_runs_of_the_master_between_given_layers_fit_it_together():
    fixed = Topology((Node("a", None, ("model.layers.4", "model.layers.5")), Node("b", None, ())))
    small = cluster(node("master", 1.4, 900), node("a", 8, 900), node("b", 8, 50))
    found = planned(small, topology=fixed)
    held = sum(stage.weights + stage.kv for stage in found.stages if stage.node == "master")
    assert held <= 1.4 * GB
    assert found.placement.layers_of("a") == ("model.layers.4", "model.layers.5")


def test_a_topology_that_says_everything_is_only_predicted():
    names = [layer.name for layer in MODEL.layers]
    fixed = Topology((Node("a", None, tuple(names[1:7])),))
    found = planned(cluster(node("master", 8, 50), node("a", 8, 50)), topology=fixed)
    assert found.placement == place(MODEL, fixed)
    assert any("one machine alone would be faster" in text for text in found.advice)


def test_given_layers_beyond_memory_are_kept_and_told():
    fixed = Topology((Node("a", None, ("model.layers.2", "model.layers.3")),))
    found = planned(cluster(node("master", 8, 50), node("a", 0.2, 50)), topology=fixed)
    assert found.placement.layers_of("a") == ("model.layers.2", "model.layers.3")
    assert any("a needs" in text for text in found.advice)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(CapacityError, match="add a machine"):
        planned(cluster(node("master", 0.5, 50), node("a", 0.5, 50)))
    with pytest.raises(TopologyError, match="nothing is known"):
        planned(cluster(node("master", 8, 50)), topology=Topology((Node("z", None, ("model.layers.2",)),)))
    with pytest.raises(ConfigError, match="latency or throughput"):
        PlanRequest(objective="beauty")  # type: ignore[arg-type]


def test_a_chain_costs_fewer_hops():
    whole = cluster(node("master", 0.9, 50), *(node(name, 0.95, 50) for name in "abc"), link=LinkProfile(4e-3, 1e8))
    star, chain = planned(whole), planned(whole, chain=True)
    workers = len(set(star.placement.nodes) - {"master"})
    saved = star.prediction.seconds_per_token - chain.prediction.seconds_per_token
    assert saved == pytest.approx((workers - 1) * LinkProfile(4e-3, 1e8).one_way(16384), rel=0.05)


def test_the_rate_is_that_of_the_width_of_the_weights():
    four = Layer("x", 4_750, weights_read_per_token=4_750, flops_per_token=16_000)
    rates = {"f32": 1.0, "bf16": 2.0, "f16": 3.0, "int8": 4.0, "int4": 5.0, "strange": 6.0}
    assert by_width(rates, four, "bf16", 9.0) == 5.0
    assert by_width(rates, replace(four, nbytes=16_000), "bf16", 9.0) == 2.0
    assert by_width(rates, replace(four, nbytes=16_000), "f16", 9.0) == 3.0
    assert by_width({}, four, "bf16", 9.0) == 9.0


def test_prompt_chunks_overlap_over_stages():
    whole = cluster(node("master", 1.5, 50), node("a", 8, 50))
    one, four = (planned(whole, prompt=512 * count).prediction.seconds_to_first for count in (1, 4))
    assert one is not None
    assert four is not None
    assert one < four < 4 * one


def test_an_unknown_arithmetic_gives_no_time_to_first_token():
    bare = ClusterProfile(NodeProfile("master", (DeviceProfile("cpu", 8 * GB, 50e9),)))
    assert plan(MODEL, bare, PlanRequest(1024)).prediction.seconds_to_first is None


IMAGES = ModelInfo(
    "any", "image", "picture", "Any",
    tuple(Layer(name, int(gb * GB), stateless=True) for name, gb in (("clip", 0.5), ("unet", 5), ("vae", 0.3))),
)  # fmt: skip


def test_components_go_where_they_are_soonest_done():
    found = plan(IMAGES, cluster(node("master", 4, 50), node("a", 6, 900)), PlanRequest())
    assert found.placement.layers_of("a")[-1] == "unet"
    check_placement(IMAGES, found.placement, found.topology)


def test_throughput_of_images_replicates_the_heaviest():
    whole = cluster(node("master", 1, 50), node("a", 6, 900), node("b", 6, 900))
    found = plan(IMAGES, whole, PlanRequest(objective="throughput"))
    assert next(span.nodes for span in found.placement.spans if span.layers == ("unet",)) == ("a", "b")
    with pytest.raises(CapacityError, match="unet"):
        plan(IMAGES, cluster(node("master", 4, 50)), PlanRequest())


def test_seconds_are_the_sum_of_stages_and_hops():
    rng = random.Random(7)
    whole = random_cluster(rng, MODEL, 3, small=0.2)
    found = plan(MODEL, whole, PlanRequest(1024))
    costs = model_costs(MODEL, whole, PlanRequest(1024))
    stages = sum(stage.seconds for stage in found.stages)
    hops = found.prediction.seconds_per_token - stages
    workers = [name for name in found.placement.nodes if name != "master"]
    most = sum(costs.hop[0][i] + costs.hop[i][0] for i, n in enumerate(costs.nodes) if n.name in workers)
    assert 0 <= hops <= most + 1e-9
