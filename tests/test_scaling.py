"""What a step sends and how long it takes, against numbers that were worked out by hand."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from finetrainers.scaling import ENGINES, Cluster, Work, predict

# 1e9 trained parameters: 4 GB of weights and of gradients, 2 GB when gathered; a forward pass of 0.2 s, a backward pass
# of 0.4 s, both twice a step.
WORK = Work(
    forward_tflop=1,
    training_tflop=3,
    passes=2,
    batch_size=1,
    trained_parameters=10**9,
    weight_bytes=4 * 10**9,
    gathered_bytes=2 * 10**9,
    num_blocks=10,
)
# 8 GPUs; a ring over all of them is bound by four cards of 10 GB/s.
CLUSTER = Cluster(
    nodes=2,
    gpus_per_node=4,
    tflops=10,
    utilization=0.5,
    node_gb=100,
    network_gb=10,
    host_gb=5,
    call_us=1000,
    node_hop_us=100,
    network_hop_us=1000,
)
# GB a step: sent by each GPU, of it by each card to other nodes, to and from the host, held.
VOLUMES = {
    # Gradients once, all-reduced: 2 * 7/8 * 4.
    "ddp": (7.0, 7.0 / 4, 0, 4 + 4 + 8),
    # Two passes of two gathers of 2 GB and a reduction of 4, each 7/8 of it.
    "fsdp": (14.0, 14.0 / 4, 0, 16 / 8),
    # In the node 3/4 of the same 8 GB; between nodes 2 * 1/2 of a quarter of the gradients. Both twice.
    "fsdp hybrid": (2 * (6 + 1), 2 * 1, 0, 16 / 4),
    # Gradients once and the weights that moved: 7/8 * 4 each.
    "deepspeed 1": (7.0, 7.0 / 4, 0, 4 + 4 + 8 / 8),
    # Gradients twice.
    "deepspeed 2": (10.5, 10.5 / 4, 0, 4 + 4 / 8 + 8 / 8),
    # An eighth of the gradients down twice, an eighth of the weights up once.
    "deepspeed 2 offload": (10.5, 10.5 / 4, 0.5 * 3, 4),
    "deepspeed 3": (14.0, 14.0 / 4, 0, 16 / 8),
    # An eighth of the gradients down twice, an eighth of the gathered weights up four times.
    "deepspeed 3 offload": (14.0, 14.0 / 4, 0.5 * 2 + 0.25 * 4, 0),
    "fsdp offload": (14.0, 14.0 / 4, 0.5 * 2 + 0.25 * 4, 0),
}
# Seconds that no computing hides, of a step that computes 1.2 s. A call takes 3.6 ms around the tree of all, 2.6 ms
# along the ring of all, 1.3 ms along that of a node, 3 ms around the tree of two nodes.
EXPOSED = {
    # 7 GB at 40 GB/s in 153 buckets of 25 MiB, behind the last backward pass alone.
    "ddp": 7 / 40 + 153 * 0.0036 - 0.4,
    # A tenth of 2 * (two gathers of 1.75 GB at 40 GB/s in 10 calls, and a reduction of 3.5 GB): the rest is hidden.
    "fsdp": 0.1 * 2 * (2 * (1.75 / 40 + 10 * 0.0026) + 3.5 / 40 + 10 * 0.0026),
    # Likewise in the node, at 100 GB/s; and 1 GB at 10 GB/s between the nodes.
    "fsdp hybrid": 0.1 * 2 * (2 * (1.5 / 100 + 0.013) + 3 / 100 + 0.013 + 1 / 10 + 10 * 0.003),
    # The second of two buckets of gradients, and all of the weights.
    "deepspeed 1": 1.5 * (3.5 / 40 + 2 * 0.0026),
    # The second bucket of each pass, and the weights.
    "deepspeed 2": 2 * (3.5 / 40 + 2 * 0.0026),
    # Also the last tenth of 0.5 GB at 5 GB/s in each pass, and as much again with the new weights.
    "deepspeed 2 offload": 2 * (3.5 / 40 + 2 * 0.0026) + 2 * 0.01 + 0.1,
    "deepspeed 3": 0.1 * 2 * (2 * (1.75 / 40 + 10 * 0.0026) + 3.5 / 40 + 10 * 0.0026),
    # Also a tenth of 0.5 GB of gradients and of twice 0.25 GB of weights, at 5 GB/s in each pass.
    "deepspeed 3 offload": 0.1 * 2 * (2 * (1.75 / 40 + 10 * 0.0026) + 3.5 / 40 + 10 * 0.0026 + 1 / 5),
}
EXPOSED["fsdp offload"] = EXPOSED["deepspeed 3 offload"]
WITHOUT_HOST = [name for name in ENGINES if "offload" not in name]


@pytest.mark.parametrize("engine", ENGINES)
def test_volumes_by_hand(engine):
    made = predict(engine, WORK, CLUSTER)
    volumes = (made.sent_bytes, made.sent_between_nodes_bytes, made.host_bytes, made.state_bytes)
    assert [each / 1e9 for each in volumes] == pytest.approx(VOLUMES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_times_by_hand(engine):
    made = predict(engine, WORK, CLUSTER)
    assert made.compute_seconds == pytest.approx(1.2)
    assert made.exposed_seconds == pytest.approx(EXPOSED[engine])
    assert made.step_seconds == pytest.approx(1.2 + EXPOSED[engine])
    assert made.efficiency == pytest.approx(1.2 / (1.2 + EXPOSED[engine]))
    assert made.samples_per_second == pytest.approx(8 * 2 / (1.2 + EXPOSED[engine]))


def test_gathers_that_outlast_the_forward_pass_wait_for_nobody_else():
    """What is left over of one phase does not hide in the other, however long that is."""
    short, slow = replace(WORK, forward_tflop=0.001), replace(CLUSTER, call_us=0, node_hop_us=0, network_hop_us=0)
    made = predict("fsdp", short, slow)
    gathers = 2 * 1.75 / 40
    last_reduction_and_gather = 0.1 * 2 * (1.75 + 3.5) / 40
    assert made.exposed_seconds == pytest.approx(gathers - 2 * 0.0002 + last_reduction_and_gather)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_gpu_sends_nothing(engine):
    made = predict(engine, WORK, replace(CLUSTER, nodes=1, gpus_per_node=1))
    assert made.sent_bytes == made.sent_between_nodes_bytes == 0
    if engine in WITHOUT_HOST:
        assert (made.exposed_seconds, made.efficiency) == (0, 1)


@pytest.mark.parametrize("engine", WITHOUT_HOST)
def test_efficiency_falls_with_nodes_and_throughput_does_not(engine):
    made = [predict(engine, replace(WORK, passes=1), Cluster(nodes)) for nodes in (1, 2, 4, 8, 16, 32, 64)]
    efficiencies = [each.efficiency for each in made]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] > efficiencies[-1]
    assert [each.samples_per_second for each in made] == sorted(each.samples_per_second for each in made)
    assert all(each.sent_bytes < later.sent_bytes for each, later in pairwise(made))


@pytest.mark.parametrize("trained", [10**7, 10**9])
def test_hybrid_sharding_sends_less_between_nodes(trained):
    work = replace(WORK, trained_parameters=trained)
    for nodes in (2, 8, 64):
        full, hybrid = (predict(engine, work, Cluster(nodes)) for engine in ("fsdp", "fsdp hybrid"))
        assert 0 < hybrid.sent_between_nodes_bytes < full.sent_between_nodes_bytes
    full, hybrid = (predict(engine, work, Cluster(1)) for engine in ("fsdp", "fsdp hybrid"))
    assert replace(hybrid, engine="fsdp") == full, "in one node they are the same"


def test_accumulation_sends_whole_gradients_once_and_shards_every_time():
    """arXiv 1910.02054, section 7: stages 1 and 2 send as much as data parallelism, stage 3 half as much again."""
    once = replace(WORK, passes=1, gathered_bytes=4 * 10**9)
    sent = {engine: predict(engine, once, CLUSTER).sent_bytes for engine in ENGINES}
    assert sent["deepspeed 1"] == sent["deepspeed 2"] == sent["ddp"]
    assert sent["deepspeed 3"] == sent["fsdp"] == 1.5 * sent["ddp"]
    more = {engine: predict(engine, replace(once, passes=4), CLUSTER).sent_bytes for engine in ENGINES}
    assert more["ddp"] == sent["ddp"] and more["deepspeed 1"] == sent["deepspeed 1"]
    assert more["fsdp"] == 4 * sent["fsdp"] and more["deepspeed 2"] == 2.5 * sent["deepspeed 2"]


def test_it_is_reckoned_without_torch():
    code = "import sys, finetrainers.scaling; assert not {'torch', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
