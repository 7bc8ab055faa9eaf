"""Compares ``glm plan`` with 28 published training runs: TFLOP/s per GPU with recomputation, as their papers count it.

    python -m experiments.benchmarks published_runs

Megatron-LM's ten runs chose the share of a GPU's peak that products reach; ZeRO-3's two runs of 175B with 384 and 768 GPUs chose
how much transfers and products slow each other down. All others are predictions. Where a paper does not give micro-batch or chunks,
the benchmark takes the plan's best, since a paper reports its best.

Sources: Narayanan et al. 2104.04473, tables 1 and 2 (PTD with the interleaved schedule; ZeRO-3 in DeepSpeed's version of 2021);
Smith et al. 2201.11990 (MT-NLG, 1,920 rows); BLOOM 2211.05100; OPT 2205.01068 (992 rows taken for its 2M tokens); GLM-130B
2210.02414.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from glm.planning.hardware import parse_cluster
from glm.planning.layout import Layout
from glm.planning.memory import peak_memory
from glm.planning.shape import Shape, shape_of
from glm.planning.step_time import step_time
from glm.presets import PRESETS

MICRO = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run as its paper describes it.

    Attributes:
        name, group: of the run, and its set, by constants or claim.
        shape: of the model.
        nodes, gpu: of eight GPUs each.
        rows: of an update; ``rate``: TFLOP/s a GPU.
        tensor, pipeline, zero: layout.
        micro: rows of a micro-batch, or None; ``interleaved``: Megatron-LM's schedule, with unknown chunks.
        calibrates: it chose a constant.
    """

    name: str
    group: str
    shape: Shape
    nodes: int
    rows: int
    rate: float
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    micro: int | None = None
    interleaved: bool = False
    precision: str = "fp16"
    gpu: str = "A100-80G"
    calibrates: bool = False

    @property
    def flops(self) -> float:
        """FLOPs of an update with recomputation: 96 B s L h^2 (1 + s/6h + V/16Lh), for layers of 12 h^2 parameters."""
        return self.shape.hardware_flops(self.rows * self.shape.length, recompute=True)

    def planned(self) -> float:
        """TFLOP/s per GPU of the best layout that agrees with the paper."""
        cluster = parse_cluster(f"{self.nodes}x8x{self.gpu}")
        best = 0.0
        for layout in self._layouts(cluster.gpus):
            fits = (
                peak_memory(self.shape, layout, self.rows, cluster.gpu, self.precision).total
                <= cluster.gpu.memory
            )
            # A published layout did fit, whatever the plan says of its memory.
            if self.micro is None and not fits:
                continue
            seconds = step_time(self.shape, layout, cluster, self.rows, self.precision).seconds
            best = max(best, self.flops / cluster.gpus / seconds / 1e12)
        return best

    def _layouts(self, gpus: int) -> Iterator[Layout]:
        data = gpus // (self.tensor * self.pipeline)
        per_stage = self.shape.layers // self.pipeline
        chunks = (
            [v for v in range(1, per_stage + 1) if per_stage % v == 0]
            if self.interleaved and self.pipeline > 1
            else [1]
        )
        for micro in MICRO if self.micro is None else (self.micro,):
            if self.rows % (data * micro) == 0:
                for v in chunks:
                    yield Layout(
                        tensor=self.tensor,
                        pipeline=self.pipeline,
                        data=data,
                        micro=micro,
                        zero=self.zero,
                        chunks=v,
                    )


def gpt(layers: int, hidden: int, heads: int) -> Shape:
    """A GPT as Megatron-LM trains it."""
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocabulary=51_200,
        length=2048,
        inner=4 * hidden,
        gated=False,
        learned_positions=True,
        softmax="kernel",
        dropout=True,
    )


# Billions of parameters, heads, hidden, layers, t, p, GPUs, rows, TFLOP/s a GPU.
MEGATRON = (
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    (3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
    (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
    (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
)
GPT3, MT_NLG = gpt(96, 12288, 96), gpt(105, 20480, 128)
BLOOM = replace(gpt(70, 14336, 112), vocabulary=250_880, learned_positions=False, embedding_norm=True)


def published() -> list[Published]:
    """Every run."""
    megatron = [
        Published(
            name=f"Megatron {billions}B",
            group="Megatron",
            shape=gpt(layers, hidden, heads),
            nodes=gpus // 8,
            rows=rows,
            rate=rate,
            tensor=t,
            pipeline=p,
            interleaved=True,
            calibrates=True,
        )
        for billions, heads, hidden, layers, t, p, gpus, rows, rate in MEGATRON
    ]
    zero = [
        Published(
            name=f"ZeRO-3 {words}, {gpus} GPUs",
            group=group,
            shape=shape,
            nodes=gpus // 8,
            rows=rows,
            rate=rate,
            zero=3,
            micro=micro,
            calibrates=gpus in (384, 768),
        )
        for words, group, shape, gpus, rows, micro, rate in (
            ("175B", "ZeRO-3", GPT3, 384, 1536, 4, 144),
            ("175B", "ZeRO-3", GPT3, 768, 1536, 2, 88),
            ("175B", "ZeRO-3", GPT3, 1536, 1536, 1, 44),
            ("530B", "ZeRO-3 530B", MT_NLG, 640, 2560, 4, 138),
            ("530B", "ZeRO-3 530B", MT_NLG, 1120, 2240, 2, 98),
            ("530B", "ZeRO-3 530B", MT_NLG, 2240, 2240, 1, 48),
        )
    ]
    pipelines = [
        Published(
            name=f"PTD {words}, {gpus} GPUs",
            group="PTD",
            shape=shape,
            nodes=gpus // 8,
            rows=rows,
            rate=rate,
            tensor=8,
            pipeline=p,
            micro=1,
            interleaved=True,
        )
        for words, shape, p, gpus, rows, rate in (
            ("175B", GPT3, 12, 384, 1536, 153),
            ("175B", GPT3, 12, 768, 1536, 149),
            ("175B", GPT3, 12, 1536, 1536, 141),
            ("530B", MT_NLG, 35, 560, 2240, 171),
            ("530B", MT_NLG, 35, 1120, 2240, 167),
            ("530B", MT_NLG, 35, 2240, 2240, 159),
        )
    ]
    others = [
        *(
            Published(
                name=f"MT-NLG 530B, {gpus} GPUs",
                group="MT-NLG",
                shape=MT_NLG,
                nodes=gpus // 8,
                rows=1920,
                rate=rate,
                tensor=8,
                pipeline=35,
                micro=1,
                precision="bf16",
            )
            for gpus, rate in ((2240, 126), (2800, 121), (3360, 113))
        ),
        Published(
            name="BLOOM 176B",
            group="others",
            shape=BLOOM,
            nodes=48,
            rows=2048,
            rate=156,
            tensor=4,
            pipeline=12,
            micro=2,
            precision="bf16",
        ),
        Published(
            name="OPT-175B, FSDP",
            group="others",
            shape=GPT3,
            nodes=124,
            rows=992,
            rate=147,
            tensor=8,
            zero=3,
            micro=8,
        ),
        Published(
            name="GLM-130B",
            group="others",
            shape=shape_of(PRESETS["glm-130b"].model),
            nodes=96,
            rows=4224,
            rate=0.433 * 312,
            tensor=4,
            pipeline=8,
            micro=1,
            gpu="A100-40G",
        ),
    ]
    return [*megatron, *zero, *pipelines, *others]


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    del argv
    table = Table("run", "published", "planned", "off", "", box=None, pad_edge=False)
    off = {}
    for run in published():
        planned = run.planned()
        off[run.name] = planned / run.rate - 1
        table.add_row(
            run.name,
            f"{run.rate:.0f}",
            f"{planned:.1f}",
            f"{off[run.name]:+.1%}",
            "chosen on" if run.calibrates else "",
        )
    console = Console()
    console.print(table)
    within = sum(abs(value) <= 0.1 for value in off.values())
    console.print(f"within 10 %: {within} of {len(off)}")
    return 0
