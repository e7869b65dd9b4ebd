"""A step's time over many GPUs, by a formula: what each engine sends, over which wires, and what of it computing hides.

It is a model, not a measurement; docs/cluster.md has the formulas and what they leave out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

Spread = Literal["whole", "node", "world"]
"""Held by every GPU, or shared out over the GPUs of a node, or over all of them."""

TFLOPS = {"bf16": 989.0, "fp32": 67.0}
"""1e12 operations a second of an H100 SXM by `training.precision`, dense (NVIDIA's data sheet, whose bf16 figure of
1,979 is with sparsity, and twice that)."""

_FP32 = 4
_ADAM = 2 * _FP32
"""Bytes of both moments of a parameter."""
_DDP_BUCKET = 25 * 2**20
"""Bytes; `bucket_cap_mb` of torch's DistributedDataParallel."""
_ZERO_BUCKET = 500_000_000 * _FP32
"""Bytes; `reduce_bucket_size` and `allgather_bucket_size` of DeepSpeed, which count elements."""


@dataclass(frozen=True)
class Cluster:
    """Nodes and their wires. The defaults are an H100 or H200 SXM node with NVLink and a 400 Gb/s card for each GPU, at
    rates that are reached, not those on the data sheet. GB are 1e9 bytes, a second, in one direction, for each GPU."""

    nodes: int = 1
    gpus_per_node: int = 8
    tflops: float = TFLOPS["bf16"]
    utilization: float = 0.4
    """Share of `tflops` that a step reaches, recomputed activations included. An assumption: a video transformer of 7B
    was brought to 0.48 (arXiv 2503.12964, without them); small models on short clips reach far less."""
    node_gb: float = 370.0
    """Within a node: NVLink's 450, less a fifth for its protocol (NCCL's authors, NVIDIA/nccl-tests#212)."""
    network_gb: float = 46.0
    """Between nodes: of 50, a card gives 46 to 48 (NCCL's authors, NVIDIA/nccl-tests#290)."""
    host_gb: float = 55.0
    """To and from the host: of the 64 of PCIe 5.0 x16; an assumption for pinned memory."""
    call_us: float = 8.4
    """Microseconds to start a collective (`baseLat` in NCCL's src/graph/tuning.cc)."""
    node_hop_us: float = 4.0
    """Microseconds from one GPU to the next in a node (`hwLat`, the same file)."""
    network_hop_us: float = 14.0
    """Microseconds from one node to the next (`hwLat`, the same file)."""

    @property
    def num_gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Work:
    """What one optimizer step asks of each GPU."""

    forward_tflop: float
    """Of the forward pass of one batch, in 1e12 operations."""
    training_tflop: float
    """Of its forward and backward pass."""
    passes: int
    """Batches a step: `gradient_accumulation_steps`."""
    batch_size: int
    trained_parameters: int
    weight_bytes: int
    """Of all weights as they lie, trained ones in fp32."""
    gathered_bytes: int
    """Of the weights of one pass in the type of the arithmetic, as sharding engines collect them."""
    num_blocks: int
    """Blocks of the transformer; weights are collected, and their gradients reduced, block by block."""


@dataclass(frozen=True)
class Layout:
    """How an engine lays out what ZeRO calls model states (arXiv 1910.02054, section 3). What it sends follows."""

    weights: Spread
    gradients: Spread
    optimizer: Spread
    offload: Literal["nothing", "optimizer", "all"] = "nothing"
    """What of its share a GPU leaves on the host: gradients and optimizer state (ZeRO-Offload, arXiv 2101.06840), or
    the weights too (ZeRO-Infinity, arXiv 2104.07857)."""


ENGINES: dict[str, Layout] = {
    "ddp": Layout("whole", "whole", "whole"),
    "fsdp": Layout("world", "world", "world"),
    "fsdp offload": Layout("world", "world", "world", "all"),
    "fsdp hybrid": Layout("node", "node", "node"),
    "deepspeed 1": Layout("whole", "whole", "world"),
    "deepspeed 2": Layout("whole", "world", "world"),
    "deepspeed 2 offload": Layout("whole", "world", "world", "optimizer"),
    "deepspeed 3": Layout("world", "world", "world"),
    "deepspeed 3 offload": Layout("world", "world", "world", "all"),
}
"""DDP (arXiv 2006.15704), FSDP with full and with hybrid sharding (arXiv 2304.11277), stages of ZeRO (arXiv
1910.02054)."""


@dataclass(frozen=True)
class Transfer:
    """One kind of communication in a step."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "copy"]
    """`copy` is to or from the host."""
    per_node: int
    """GPUs of one node that take part."""
    nodes: int
    bytes: float
    """Of the whole tensor in one pass; of a copy, this GPU's part."""
    calls: int
    """Collectives into which a pass divides it."""
    passes: int
    """How often a step does it."""
    beside: Literal["forward", "backward", "nothing"]
    """The computing that runs meanwhile."""

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a pass. A ring of n sends each part n - 1 times, and an all-reduce is a
        reduce-scatter and an all-gather (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""
        size = self.per_node * self.nodes
        if self.kind == "copy":
            return self.bytes
        return (2 if self.kind == "all_reduce" else 1) * (size - 1) / size * self.bytes

    @property
    def sent_between_nodes(self) -> float:
        """Bytes of it for each GPU's card: a ring enters and leaves a node once, and is cut into as many rings as the
        node has cards."""
        return self.sent / self.per_node if self.nodes > 1 else 0.0

    def seconds(self, cluster: Cluster) -> float:
        """Of one pass: the volume over the narrowest wire, and the way of the last part in each call."""
        if self.kind == "copy":
            return self.sent / (cluster.host_gb * 1e9)
        if self.per_node * self.nodes == 1:
            return 0.0
        volume = max(self.sent / cluster.node_gb, self.sent_between_nodes / cluster.network_gb) / 1e9
        return volume + self.calls * self._latency_us(cluster) / 1e6

    def _latency_us(self, cluster: Cluster) -> float:
        """As NCCL reckons it (src/graph/tuning.cc): along a ring, or up and down a tree of nodes for an all-reduce."""
        near, far = cluster.node_hop_us, cluster.network_hop_us
        if self.kind == "all_reduce":
            return cluster.call_us + 2 * ((self.per_node - 1) * near + math.ceil(math.log2(self.nodes)) * far)
        return cluster.call_us + (self.per_node - 1) * self.nodes * near + (self.nodes - 1) * far


@dataclass(frozen=True)
class Prediction:
    """A step of one engine."""

    engine: str
    step_seconds: float
    compute_seconds: float
    exposed_seconds: float
    """Communication that no computing hides."""
    efficiency: float
    """Computing over the whole step."""
    samples_per_second: float
    """Of all GPUs together."""
    sent_bytes: float
    """To other GPUs, by each one, in a step."""
    sent_between_nodes_bytes: float
    """Of these through each GPU's card to other nodes."""
    host_bytes: float
    """To and from the host, by each GPU, in a step."""
    state_bytes: float
    """Weights, gradients and AdamW's moments on each GPU; activations come on top."""


def predict(engine: str, work: Work, cluster: Cluster) -> Prediction:
    """The step of one of `ENGINES`: computing, and what of the communication it does not hide.

    Of each transfer one call, the first gather or the last reduction, has nothing beside it. The rest hides behind the
    computing of its phase, as far as that lasts:
    step = sum over phases of max(computing, hidden transfers) + first and last calls + transfers beside nothing.
    """
    layout = ENGINES[engine]
    moved = transfers(layout, work, cluster)
    rate = cluster.tflops * cluster.utilization
    phases = {"forward": work.forward_tflop / rate, "backward": (work.training_tflop - work.forward_tflop) / rate}
    compute = work.passes * work.training_tflop / rate
    exposed = 0.0
    hidden: defaultdict[tuple[str, int], float] = defaultdict(float)
    for transfer in moved:
        seconds = transfer.passes * transfer.seconds(cluster)
        bare = seconds if transfer.beside == "nothing" else seconds / transfer.calls
        exposed += bare
        hidden[transfer.beside, transfer.passes] += seconds - bare
    for (phase, passes), seconds in hidden.items():
        exposed += max(0.0, seconds - passes * phases.get(phase, 0.0))
    between = [transfer for transfer in moved if transfer.kind != "copy"]
    step = compute + exposed
    return Prediction(
        engine=engine,
        step_seconds=step,
        compute_seconds=compute,
        exposed_seconds=exposed,
        efficiency=compute / step,
        samples_per_second=cluster.num_gpus * work.batch_size * work.passes / step,
        sent_bytes=sum(transfer.passes * transfer.sent for transfer in between),
        sent_between_nodes_bytes=sum(transfer.passes * transfer.sent_between_nodes for transfer in between),
        host_bytes=sum(transfer.passes * transfer.sent for transfer in moved if transfer.kind == "copy"),
        state_bytes=state_bytes(layout, work, cluster),
    )


def transfers(layout: Layout, work: Work, cluster: Cluster) -> list[Transfer]:
    """What a step sends, from how its states are laid out."""
    node, world = (cluster.gpus_per_node, 1), (cluster.gpus_per_node, cluster.nodes)
    group = node if layout.weights == "node" else world
    gradients = _FP32 * work.trained_parameters
    blocks, passes = work.num_blocks, work.passes
    moved = []
    if layout.weights != "whole":
        moved += [
            Transfer("all_gather", *group, work.gathered_bytes, blocks, passes, "forward"),
            Transfer("all_gather", *group, work.gathered_bytes, blocks, passes, "backward"),
            Transfer("reduce_scatter", *group, gradients, blocks, passes, "backward"),
        ]
        if layout.weights == "node":
            # Each GPU's shard, with its like on the other nodes.
            shard = gradients / cluster.gpus_per_node
            moved.append(Transfer("all_reduce", 1, cluster.nodes, shard, blocks, passes, "backward"))
    elif layout.optimizer == "whole":
        moved.append(Transfer("all_reduce", *world, gradients, _calls(gradients, _DDP_BUCKET), 1, "backward"))
    else:
        calls = _calls(gradients, _ZERO_BUCKET)
        # Gradients in shards are reduced in every pass, whole ones after the last.
        often = 1 if layout.gradients == "whole" else passes
        moved.append(Transfer("reduce_scatter", *world, gradients, calls, often, "backward"))
        # The weights that each GPU has moved.
        moved.append(Transfer("all_gather", *world, gradients, calls, 1, "nothing"))
    return moved + _copies(layout, work, cluster)


def _copies(layout: Layout, work: Work, cluster: Cluster) -> list[Transfer]:
    """What goes over PCIe: gradients down, and the weights up, after they moved or before each use."""
    if layout.offload == "nothing":
        return []
    share, calls, passes = 1 / cluster.num_gpus, work.num_blocks, work.passes
    gradients, weights = _FP32 * work.trained_parameters * share, work.gathered_bytes * share
    down = Transfer("copy", 1, 1, gradients, calls, passes, "backward")
    if layout.offload == "optimizer":
        return [down, Transfer("copy", 1, 1, gradients, 1, 1, "nothing")]
    return [
        down,
        Transfer("copy", 1, 1, weights, calls, passes, "forward"),
        Transfer("copy", 1, 1, weights, calls, passes, "backward"),
    ]


def _calls(size: int, bucket: int) -> int:
    return max(1, math.ceil(size / bucket))


def state_bytes(layout: Layout, work: Work, cluster: Cluster) -> float:
    """Weights, gradients and AdamW's moments that each GPU holds (ZeRO, arXiv 1910.02054, figure 1, with fp32 weights
    and gradients)."""
    parts = {"whole": 1, "node": cluster.gpus_per_node, "world": cluster.num_gpus}
    weights = work.weight_bytes / parts[layout.weights]
    gradients = _FP32 * work.trained_parameters / parts[layout.gradients]
    moments = _ADAM * work.trained_parameters / parts[layout.optimizer]
    return {"nothing": weights + gradients + moments, "optimizer": weights, "all": 0.0}[layout.offload]
