"""Failures, the best checkpoint interval, and the share of time spent training.

Failures of N GPUs with one failure in H GPU-hours each come every M = H / N hours on average, independently. With C seconds to
write a checkpoint, R seconds to restart, tau seconds of training between checkpoints:

    Young (1974)     tau = sqrt(2 C M)
    Daly (2006)      tau = sqrt(2 C M) [1 + sqrt(C / 2M) / 3 + (C / 2M) / 9] - C      for C < 2M, else M
    goodput          tau / (M e^(R/M) (e^((tau + C)/M) - 1))                          (Daly, equation 20)

Daly's goodput holds for exponential failures that may also strike during a checkpoint or a restart; a test simulates it.

Rates: Llama 3's 405B run lost 54 days x 16,384 GPUs to 419 unexpected interruptions, one in 50,700 GPU-hours (2407.21783, table 5);
OPT-175B restarted about 105 times in two months on 992 GPUs, one in 13,000 (2205.01068, section 2.5).

Limits: lost GPUs are replaced at once; training stops while a checkpoint is written (asynchronous ones cost less); the storage's
rate grows with the nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm.planning.shape import Shape

# A checkpoint holds master and two moments in fp32.
CHECKPOINT_BYTES = 12
GPU_HOURS_PER_FAILURE = 50_000.0
RESTART_SECONDS = 600.0
NODE_STORAGE = 1e9  # bytes/s a node; Llama 3's storage gave 2 TB/s to 3,000 nodes


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The cost of failures, in seconds.

    Attributes:
        between_failures: M.
        checkpoint: C.
        restart: R.
        interval: Daly's best tau.
        goodput: share of time spent in training that is kept, at ``interval``.
    """

    between_failures: float
    checkpoint: float
    restart: float
    interval: float
    goodput: float


def young_interval(checkpoint: float, between_failures: float) -> float:
    """Young's first-order interval, seconds."""
    return math.sqrt(2 * checkpoint * between_failures)


def daly_interval(checkpoint: float, between_failures: float) -> float:
    """Daly's higher-order interval, seconds."""
    C, M = checkpoint, between_failures
    if C >= 2 * M:
        return M
    ratio = C / (2 * M)
    return math.sqrt(2 * C * M) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - C


def goodput(interval: float, checkpoint: float, restart: float, between_failures: float) -> float:
    """Share of wall time spent in training that is kept."""
    M = between_failures
    exponent = (interval + checkpoint) / M
    if exponent > 700:
        return 0.0  # no interval ever completes
    return interval / (M * math.exp(restart / M) * math.expm1(exponent))


def reliability(
    shape: Shape,
    *,
    gpus: int,
    nodes: int,
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE,
    restart: float = RESTART_SECONDS,
    node_storage: float = NODE_STORAGE,
) -> Reliability:
    """Reliability of a run of the model on that many GPUs."""
    between = gpu_hours_per_failure * 3600 / gpus
    write = CHECKPOINT_BYTES * shape.parameters / (node_storage * nodes)
    interval = daly_interval(write, between)
    return Reliability(
        between_failures=between,
        checkpoint=write,
        restart=restart,
        interval=interval,
        goodput=goodput(interval, write, restart, between),
    )
