"""What a GPU and a cluster can do by their data sheets, and how much of it large models reach.

Rates are bytes/s and FLOP/s of one GPU: ``flops`` the dense fp16/bf16 peak with fp32 accumulation, ``link`` one direction of the
links inside a node, ``network`` one direction of the links between nodes (a card of 200 Gbit/s a GPU for A100, 400 for H100).

Models reach a fraction of these peaks. For matrix products it is one constant per GPU generation: 0.67 for A100, which reproduces
the ten end-to-end rates of Megatron-LM from 1.7B to 1T on 32 to 3,072 GPUs (Narayanan et al., 2104.04473, table 1) to 5 %. All
others have 0.6 without such evidence: their times are estimates. Memory, links and network reach 0.8 of theirs.

Limits: one kind of GPU and network; no contention between jobs, no oversubscribed switches, no power throttling beyond what the
constants include.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from glm.errors import InputError

MIB = 2**20
GIB = 2**30
# Share of the data sheet's memory, link and network rates that large transfers reach.
TRANSFER = 0.8
# Transfers that overlap products slow both down by this share of the shorter one: chosen between two runs of ZeRO-3 (175B on 384
# GPUs, products longer, and on 768, gathers longer; 2104.04473, table 2).
CONTENTION = 0.39
# Start of a collective: kernel launch and the first hop; each doubling of its size adds a hop.
LATENCY = 10e-6
HOP = 5e-6
# Start of a ring and each of its steps, inside a node and between two (NCCL's model, src/graph/tuning.cc: ring, LL128). All-gathers
# and reduce-scatters have no other shape, so their start grows with the ranks.
RING_START = 14e-6
RING_STEP = 1.9e-6
RING_STEP_NETWORK = 4e-6


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device.

    Attributes:
        name: as ``--gpus`` has it.
        memory: bytes that the driver reports.
        flops: dense half-precision peak, FLOP/s.
        bandwidth: of its memory, bytes/s.
        link: to its neighbours in the node, bytes/s one way.
        network: to other nodes, bytes/s one way.
        products: share of ``flops`` that matrix products reach.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    products: float = 0.6


def _gpu(
    name: str,
    mib: int,
    tera: float,
    giga: float,
    link: float,
    network: float = 25,
    products: float = 0.6,
) -> Gpu:
    return Gpu(
        name=name,
        memory=mib * MIB,
        flops=tera * 1e12,
        bandwidth=giga * 1e9,
        link=link * 1e9,
        network=network * 1e9,
        products=products,
    )


# Name, MiB, TFLOP/s, memory GB/s, link GB/s one way, network GB/s one way.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16G", 16_384, 125, 900, 150, 12.5),
        _gpu("V100-32G", 32_768, 125, 900, 150, 12.5),
        _gpu("A100-40G", 40_960, 312, 1_555, 300, 25, 0.67),
        _gpu("A100-80G", 81_920, 312, 2_039, 300, 25, 0.67),
        _gpu("H100-80G", 81_559, 989, 3_350, 450, 50),
        _gpu("H200-141G", 143_771, 989, 4_800, 450, 50),
        _gpu("B200-180G", 183_359, 2_250, 8_000, 900, 50),
        _gpu("L40S-48G", 46_068, 362, 864, 32, 25),
        _gpu("RTX2080Ti-11G", 11_264, 54, 616, 16, 12.5),
        _gpu("RTX3090-24G", 24_576, 71, 936, 32, 12.5),
        _gpu("RTX4090-24G", 24_564, 165, 1_008, 32, 12.5),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``nodes`` of ``per_node`` equal GPUs."""

    nodes: int
    per_node: int
    gpu: Gpu

    @property
    def gpus(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}x{self.gpu.name}"


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; memory may be left out where only one size is known. Raises InputError with the names there are."""
    wanted = name.casefold()
    exact = [gpu for known, gpu in GPUS.items() if known.casefold() == wanted]
    sizes = [gpu for known, gpu in GPUS.items() if known.casefold().rpartition("-")[0] == wanted]
    found = exact or sizes
    if len(found) == 1:
        return found[0]
    choices = [gpu.name for gpu in found] or list(GPUS)
    raise InputError(
        f"--gpus: {name!r} is {'ambiguous' if found else 'not known'}: choose one of {', '.join(choices)}"
    )


def parse_cluster(text: str) -> Cluster:
    """``96x8xA100-40G`` (nodes, GPUs a node, which) or ``8xA100-40G`` (one node). Raises InputError."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z][\w-]*)", text.strip())
    if match is None:
        raise InputError(f"--gpus {text!r} is not NODESxGPUSxNAME: write it as 96x8xA100-40G")
    nodes, per_node = int(match[1] or 1), int(match[2])
    if nodes < 1 or per_node < 1:
        raise InputError(f"--gpus {text!r} has no GPUs: give at least 1x1xNAME")
    return Cluster(nodes=nodes, per_node=per_node, gpu=find_gpu(match[3]))
