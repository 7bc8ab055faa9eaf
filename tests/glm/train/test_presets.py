"""Every preset and every lever trains on real text: a few steps, and the loss falls. A case takes a fraction of a second."""

from __future__ import annotations

import dataclasses
import math
import statistics
import typing

import pytest
import torch

from glm.commands.train import preset_config
from glm.data.loader import Loader
from glm.model.block import Block
from glm.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    NormKind,
    NormPlacement,
)
from glm.model.positions import rotation, score_bias, visible
from glm.presets import PRESETS
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.rate_schedule import ScheduleConfig
from glm.train.update_rules import Kind, OptimizerConfig
from glm.train.update_rules.config import GuardConfig

STEPS = 10
ROWS = 4


def shrunk(name):
    """A preset at test size, everything but its size kept."""
    config = preset_config(name)
    model = dataclasses.replace(
        config.model,
        vocabulary=1000,
        layers=2,
        hidden=32,
        heads=2,
        length=64,
        feed_forward=dataclasses.replace(config.model.feed_forward, inner=None),
    )
    return dataclasses.replace(
        config,
        steps=STEPS,
        model=model,
        batch=BatchConfig(rows=ROWS),
        schedule=ScheduleConfig(peak=1e-2, warmup=2),
        monitor=MonitorConfig(every=0, gradients_every=0),
        checkpoint=CheckpointConfig(every=0, ring=0),
    )


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def step_end(self, info):
        assert not info.skipped
        self.seen.append(info.loss)
        return ()


def losses_of(config, data):
    loader = Loader(data, config.objective, config.sampling, length=64, seed=0)
    losses = Losses()
    Trainer(config, LocalEngine(config), loader, callbacks=(losses,)).train()
    return losses.seen


def learns(config, data):
    seen = losses_of(config, data)
    # Begun near the uniform guess, log 1000 nats; each batch is another one, and a tenth of a nat is what batches differ by.
    assert abs(seen[0] - math.log(1000)) < 1.0
    assert statistics.fmean(seen[-3:]) < seen[0] - 0.4, seen


COMPARED = [name for name in PRESETS if name == "glm-tiny" or name.endswith("-like")]


@pytest.mark.parametrize("name", COMPARED)
def test_presets_train(data, name):
    learns(shrunk(name), data)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in COMPARED])
def test_other_sizes_of_glm_are_glm_tiny_but_for_their_size(name):
    assert dataclasses.replace(shrunk(name), preset="") == dataclasses.replace(shrunk("glm-tiny"), preset="")


def model(**levers):
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **levers))


def attention(**levers):
    return model(attention=AttentionConfig(**levers))


def embedding(**levers):
    return model(embedding=EmbeddingConfig(**levers))


def optimizer(**levers):
    return lambda config: dataclasses.replace(config, optimizer=OptimizerConfig(**levers))


def objective(**levers):
    return lambda config: dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, **levers)
    )


def run(**levers):
    return lambda config: dataclasses.replace(config, **levers)


def two_dimensional(config):
    return attention(positions="rope2d")(objective(positions="2d")(config))


def alpha_ramp(config):
    ramp = dataclasses.replace(config.schedule, shrink_to=1.0, shrink_from_step=2, shrink_to_step=8)
    return dataclasses.replace(embedding(gradient_shrink=0.1)(config), schedule=ramp)


LEVERS = {
    **{f"norm {kind}": model(norm=kind) for kind in typing.get_args(NormPlacement)},
    **{f"positions {kind}": attention(positions=kind) for kind in ("rope", "alibi", "learned", "none")},
    "positions rope2d": two_dimensional,
    **{f"softmax {kind}": attention(softmax=kind) for kind in ("fp32", "compute", "pb-relax", "fused")},
    **{
        f"feed-forward {kind}": model(feed_forward=FeedForwardConfig(kind=kind))
        for kind in ("geglu", "swiglu", "gelu", "relu", "squared-relu")
    },
    **{f"init {kind}": model(init=kind) for kind in ("xavier", "gpt2", "small", "fan-in")},
    **{
        f"shrink {side}": embedding(gradient_shrink=0.1, shrink_side=side)
        for side in ("input", "output", "both")
    },
    "shrink ramp": alpha_ramp,
    "embedding norm": embedding(norm=True),
    "untied": embedding(tied=False),
    **{f"norm kind {kind}": model(norm_kind=kind) for kind in typing.get_args(NormKind)},
    "qk norm": attention(qk_norm=True),
    "qkv norm, gated by head": attention(qk_norm=True, v_norm=True, gate="head"),
    "qk clip, off by one": attention(qk_clip=5.0, sink="off-by-one", gate="element"),
    "grouped, learned sinks": attention(key_heads=1, sink="learned", clip_qkv=8.0),
    "experts": model(
        feed_forward=FeedForwardConfig(inner=32, experts=ExpertsConfig(count=4, shared=1, bias_rate=1e-3))
    ),
    "spectral, logit cap": model(spectral=True, logit_cap=15.0),
    "soft cap": attention(soft_cap=20.0),
    "z-loss": model(z_loss=1e-4),
    "dropout": model(dropout=0.1),
    "no bias": model(bias=False),
    "parallel block": model(norm="pre", parallel_block=True),
    "recompute": model(recompute=True),
    "zclip": optimizer(zclip=True),
    "update clipping": optimizer(update_clipping=True),
    "no clipping": optimizer(clip=0.0),
    **{f"optimizer {kind}": optimizer(kind=kind) for kind in typing.get_args(Kind) if kind != "adamw"},
    "cautious, AdaGC": optimizer(
        cautious=True, decay="independent", guard=GuardConfig(adagc=True, skip_step=6)
    ),
    **{f"objective {kind}": objective(kind=kind) for kind in ("causal", "span-corruption")},
    **{f"precision {kind}": run(precision=kind) for kind in ("bf16", "fp16")},
    "micro-batches": run(precision="bf16", batch=BatchConfig(rows=ROWS, micro_rows=2)),
    "batch ramp": run(batch=BatchConfig(rows=ROWS, micro_rows=1, ramp_from=2, ramp_samples=20)),
    "wsd schedule": run(schedule=ScheduleConfig(peak=1e-2, warmup=2, shape="wsd")),
    "linear schedule": run(schedule=ScheduleConfig(peak=1e-2, warmup=2, shape="linear")),
}


@pytest.mark.parametrize("lever", LEVERS)
def test_levers_train(data, lever):
    learns(LEVERS[lever](shrunk("glm-tiny")), data)


def test_every_choice_of_a_lever_is_here():
    """Fails for a new norm, softmax, init or the like that no case trains."""
    for config, field, prefix in (
        (ModelConfig, "init", "init"),
        (ModelConfig, "norm", "norm"),
        (ModelConfig, "norm_kind", "norm kind"),
        (AttentionConfig, "softmax", "softmax"),
        (AttentionConfig, "positions", "positions"),
        (FeedForwardConfig, "kind", "feed-forward"),
        (EmbeddingConfig, "shrink_side", "shrink"),
    ):
        choices = typing.get_args(typing.get_type_hints(config)[field])
        assert {f"{prefix} {choice}" for choice in choices} <= LEVERS.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
@pytest.mark.parametrize(("dtype", "softmax"), [(torch.bfloat16, "fp32"), (torch.float32, "fused")])
def test_a_layer_traces_as_one_graph(dtype, softmax):
    """``compile`` is of use only without graph breaks; the traced layer is the layer."""
    config = ModelConfig(
        vocabulary=7, layers=1, hidden=32, heads=2, length=16, attention=AttentionConfig(softmax=softmax)
    )
    torch.manual_seed(0)
    block = Block(config, 0).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    place_BT, segments_BT = torch.arange(16)[None], torch.zeros(1, 16, dtype=torch.int32)
    turned = rotation(place_BT, 16, 10_000.0, dtype, two=False)
    bias = score_bias(visible(segments_BT, place_BT < 5), None, torch.float32)
    torch._dynamo.reset()
    traced = torch.compile(block, backend="aot_eager", fullgraph=True)
    outcomes = []
    for call in (block, traced):
        x_BTC = torch.linspace(-2, 2, 16 * 32, dtype=dtype).view(1, 16, 32).requires_grad_()
        y_BTC = call(x_BTC, bias, turned)
        y_BTC.float().square().sum().backward()
        outcomes.append((y_BTC.detach(), x_BTC.grad))
    torch._dynamo.reset()
    # Traced operators are decomposed, and round elsewhere: some tens of roundings of the largest element.
    roundings = 64 * (2.0**-24 if dtype == torch.float32 else 2.0**-8)
    for a, b in zip(*outcomes, strict=True):
        assert (a - b).abs().max() <= roundings * a.abs().max()
