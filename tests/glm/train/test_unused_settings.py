"""Every setting of a configuration changes the run, or the command says that it lies idle."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import pytest

from glm.commands.train import preset_config
from glm.data.loader import Loader
from glm.errors import InputError
from glm.presets import PRESETS
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine
from glm.train.loop import Trainer
from glm.train.unused_settings import IDLE, fields_of, idle_by_hand, idle_settings, refuse_idle


def changed(config: Any, **settings: Any) -> Any:
    """``optimizer__kind="muon"`` is ``optimizer.kind``."""
    own: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, rest = name.partition("__")
        if rest:
            value = changed(own.get(group, getattr(config, group)), **{rest: value})
        own[group] = value
    return dataclasses.replace(config, **own)


def setting(config: TrainConfig, name: str, value: Any, **others: Any) -> TrainConfig:
    """With one setting by its name, and others."""
    return changed(config, **others, **{name.replace(".", "__"): value})


SMALL = changed(
    TrainConfig(),
    steps=4,
    model__vocabulary=1000,
    model__length=32,
    model__layers=2,
    model__hidden=16,
    model__heads=4,
    batch__rows=4,
    objective__pieces=2,
    schedule__warmup=1,
)
MIXED: dict[str, Any] = {
    "sampling__mixture": (("zh", 1.0), ("pydoc", 1.0)),
    "sampling__mixture_before": (("zh", 1.0),),
    "sampling__mixture_ramp": (0, 4096),
}
GLU: dict[str, Any] = {"model__feed_forward__kind": "swiglu"}
EXPERTS: dict[str, Any] = {"model__feed_forward__experts__count": 4, "schedule__peak": 0.05}
ROUNDED: dict[str, Any] = {"emulate__recipe": "mxfp4"}
# Another value of each setting that moves numbers, and what it needs.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "steps": (5, {}),
    "seed": (1, {}),
    "precision": ("bf16", {}),
    "bf16_weights": ("kahan", {"precision": "bf16"}),
    "model.vocabulary": (1010, {}),
    "model.length": (40, {}),
    "model.layers": (3, {}),
    "model.hidden": (32, {}),
    "model.heads": (2, {}),
    "model.norm": ("pre", {}),
    "model.norm_kind": ("rms", {}),
    "model.dropout": (0.1, {}),
    "model.z_loss": (0.1, {}),
    "model.logit_cap": (1.0, {}),
    "model.init": ("gpt2", {}),
    "model.spectral": (True, {}),
    "model.bias": (False, {}),
    "model.parallel_block": (True, {"model__norm": "pre"}),
    "model.norm_epsilon": (1e-2, {}),
    "model.embedding.gradient_shrink": (0.1, {}),
    "model.embedding.shrink_side": ("both", {"model__embedding__gradient_shrink": 0.1}),
    "model.embedding.norm": (True, {}),
    "model.embedding.tied": (False, {}),
    "model.embedding.scale": ("sqrt", {"model__norm": "pre"}),
    "model.embedding.std": (0.5, {"model__norm": "pre"}),
    "model.attention.positions": ("alibi", {}),
    "model.attention.softmax": ("compute", {"precision": "bf16"}),
    "model.attention.relax": (3.0, {"model__attention__softmax": "pb-relax", "precision": "bf16"}),
    "model.attention.qk_norm": (True, {}),
    "model.attention.v_norm": (True, {}),
    "model.attention.soft_cap": (1.0, {}),
    "model.attention.clip_qkv": (0.1, {}),
    "model.attention.qk_clip": (0.1, {}),
    "model.attention.gate": ("head", {}),
    "model.attention.sink": ("off-by-one", {}),
    "model.attention.key_heads": (2, {}),
    "model.attention.rope_base": (100.0, {}),
    "model.feed_forward.kind": ("relu", {}),
    "model.feed_forward.inner": (24, {}),
    "model.feed_forward.clamp": (0.01, GLU),
    "model.feed_forward.experts.count": (4, {}),
    "model.feed_forward.experts.active": (3, EXPERTS),
    "model.feed_forward.experts.shared": (1, EXPERTS),
    "model.feed_forward.experts.balance": (0.5, EXPERTS),
    "model.feed_forward.experts.router_z": (0.5, EXPERTS),
    "model.feed_forward.experts.bias_rate": (0.5, EXPERTS),
    "model.feed_forward.experts.capacity": (0.5, EXPERTS),
    "model.scaling.kind": ("mup", {"model__norm": "pre"}),
    "model.scaling.base_hidden": (8, {"model__norm": "pre", "model__scaling__kind": "mup"}),
    "model.scaling.base_layers": (1, {"model__norm": "pre", "model__scaling__kind": "complete-p"}),
    "objective.kind": ("causal", {}),
    "objective.gmask_share": (0.1, {}),
    "objective.pieces": (3, {"objective__gmask_share": 0.0}),
    "objective.mask_fraction": (0.4, {"objective__gmask_share": 0.0}),
    "objective.span_mean": (6.0, {"objective__gmask_share": 0.0}),
    "objective.single_span": (1.0, {"objective__gmask_share": 0.0}),
    "objective.gmask_least": (0.9, {}),
    "objective.positions": ("2d", {"model__attention__positions": "rope2d"}),
    "sampling.skip": (((0, 4),), {}),
    "sampling.mixture": ((("zh", 1.0),), {}),
    "sampling.mixture_before": ((("pydoc", 1.0),), MIXED),
    "sampling.mixture_ramp": ((0, 512), MIXED),
    "batch.rows": (6, {}),
    "batch.micro_rows": (1, {}),
    "batch.ramp_from": (2, {"batch__ramp_samples": 8, "batch__micro_rows": 1}),
    "batch.ramp_samples": (100, {"batch__ramp_from": 1, "batch__micro_rows": 1}),
    "optimizer.kind": ("lion", {}),
    "optimizer.beta1": (0.5, {}),
    "optimizer.beta2": (0.5, {}),
    "optimizer.epsilon": (1e-2, {}),
    "optimizer.weight_decay": (1.0, {}),
    "optimizer.decay": ("adamc", {"schedule__warmup": 2}),
    "optimizer.decay_embedding": (False, {}),
    "optimizer.cautious": (True, {}),
    "optimizer.cautious_decay": (True, {}),
    "optimizer.clip": (0.1, {}),
    "optimizer.zclip": (True, {}),
    "optimizer.update_clipping": (True, {"optimizer__beta2": 0.999}),
    "optimizer.rates.embedding": (0.1, {}),
    "optimizer.rates.output": (0.1, {"model__embedding__tied": False}),
    "optimizer.rates.vectors": (0.1, {}),
    "optimizer.rates.hidden": (0.1, {}),
    "optimizer.muon.momentum": (0.5, {"optimizer__kind": "muon"}),
    "optimizer.muon.nesterov": (False, {"optimizer__kind": "muon"}),
    "optimizer.muon.iterations": (2, {"optimizer__kind": "muon"}),
    "optimizer.muon.scale": ("spectral", {"optimizer__kind": "muon"}),
    "optimizer.muon.per_head": (True, {"optimizer__kind": "muon"}),
    "optimizer.slow.weight": (0.5, {"optimizer__kind": "ademamix"}),
    "optimizer.slow.beta3": (0.5, {"optimizer__kind": "ademamix"}),
    "optimizer.slow.warmup": (5, {"optimizer__kind": "ademamix"}),
    "optimizer.guard.adagc": (True, {"optimizer__guard__warmup": 1}),
    "optimizer.guard.warmup": (1, {"optimizer__guard__adagc": True}),
    "optimizer.guard.spam": ("stable", {}),
    "optimizer.guard.reset": (2, {"optimizer__guard__spam": "spam"}),
    "optimizer.guard.skip_step": (3.0, {}),
    "optimizer.guard.update_norm": (3.0, {}),
    "schedule.peak": (1e-2, {}),
    "schedule.least": (0.9, {}),
    "schedule.warmup": (3, {}),
    "schedule.shape": ("constant", {}),
    "schedule.decay_steps": (3, {}),
    "schedule.decay_share": (0.9, {"schedule__shape": "wsd"}),
    "schedule.shrink_to": (0.1, {"schedule__shrink_to_step": 2}),
    "schedule.shrink_from_step": (1, {"schedule__shrink_to": 0.1, "schedule__shrink_to_step": 2}),
    "schedule.shrink_to_step": (3, {"schedule__shrink_to": 0.1}),
    "emulate.recipe": ("fp8", {}),
    "emulate.activations": ("fp8-e4m3-tensor", ROUNDED),
    "emulate.weights": ("fp8-e4m3-tensor", ROUNDED),
    "emulate.gradients": ("fp8-e4m3-tensor", ROUNDED),
    "emulate.products": ("forward", ROUNDED),
    "emulate.sites": ("layers.0.*", ROUNDED),
    "emulate.spared": ("layers.0.*", ROUNDED),
    "emulate.stochastic": (False, ROUNDED),
    "emulate.hadamard": (True, ROUNDED),
    "loss_scale.initial": (8.0, {"precision": "fp16"}),
    "loss_scale.window": (1, {"precision": "fp16"}),
    "loss_scale.hysteresis": (3, {"precision": "fp16", "loss_scale__window": 1}),
    "loss_scale.minimum": (2.0**60, {"precision": "fp16", "loss_scale__initial": 2.0**60,
                                     "loss_scale__hysteresis": 1}),
    "loss_scale.factor": (4.0, {"precision": "fp16", "loss_scale__window": 1}),
}  # fmt: skip
# What is watched, kept, answered and spread moves no numbers of three healthy updates; tasks the data has not.
ASIDE = (
    "preset", "stop_when_lost", "compile", "model.recompute", "objective.multitask_share", "monitor.*", "checkpoint.*",
    "responder.*", "parallel.*", "heldout.*",
)  # fmt: skip
# Configurations in which one setting after another is tried, besides those that it needs.
BASES: dict[str, dict[str, Any]] = {
    "default": {},
    "recent": {
        "optimizer__kind": "lion", "objective__kind": "causal", "model__norm": "pre", "model__norm_kind": "rms-plain",
        "model__bias": False, "model__attention__positions": "none", "schedule__shape": "constant",
        "model__embedding__tied": False, "model__embedding__shrink_side": "output", "optimizer__weight_decay": 0.0,
    },
    "other": {
        "optimizer__kind": "adam-atan2", "objective__gmask_share": 1.0, "model__norm": "pre", "model__norm_kind": "dyt",
        "model__attention__positions": "alibi", "schedule__shape": "inverse-sqrt", "model__scaling__kind": "mup",
        "emulate__recipe": "fp8", "emulate__products": "forward",
    },
    "gradients": {"emulate__recipe": "mxfp4", "emulate__products": "grad-weight", "objective__gmask_share": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(data):
    """The results of three updates: losses, weights, the engine's counters. Each configuration runs once."""
    found: dict[str, Any] = {}

    def traced(config: TrainConfig) -> Any:
        key = config.to_json()
        if key not in found:
            loader = Loader(
                data, config.objective, config.sampling, length=config.model.length, seed=config.seed
            )
            trainer = Trainer(config, LocalEngine(config), loader)
            trainer.advance(3)
            weights, _ = trainer.engine.tensors()
            found[key] = [
                trainer.engine.state_dict(),
                {name: tensor.detach().numpy().tobytes() for name, tensor in weights.items()},
            ]
        return found[key]

    return traced


def test_every_setting_is_tried_or_set_aside():
    names = [name for name, _ in fields_of(TrainConfig())]
    aside = [name for name in names if any(fnmatchcase(name, glob) for glob in ASIDE)]
    assert sorted([*OTHER, *aside]) == sorted(names)
    for one in IDLE:
        assert all(any(fnmatchcase(name, glob) for name in names) for glob in one.fields), one.fields


def both(base: TrainConfig, name: str, value: Any) -> TrainConfig | None:
    """With the setting moved; None where it is refused there, or stands so already."""
    try:
        moved = setting(base, name, value)
    except InputError:
        return None
    return None if moved == base else moved


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_moves_numbers_where_it_is_read_and_none_where_it_is_told_to_lie_idle(name, trace):
    value, needed = OTHER[name]
    base = changed(SMALL, **needed)
    moved = setting(base, name, value)
    assert name not in idle_settings(moved)
    assert trace(moved) != trace(base)
    alone = both(SMALL, name, value)
    if alone is not None and name in idle_settings(alone):
        assert trace(alone) == trace(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_what_is_told_to_lie_idle_moves_nothing(base, trace):
    config = changed(SMALL, **BASES[base])
    idle = [name for name in OTHER if name in idle_settings(config)]
    assert idle
    for name in idle:
        moved = both(config, name, OTHER[name][0])
        if moved is not None and name in idle_settings(moved):
            assert trace(moved) == trace(config), name


IDLE_ASIDE = {
    "checkpoint.ring_every": {"checkpoint__ring": 0},
    "checkpoint.ring_keep": {"checkpoint__ring": 0},
    "monitor.curvature_every": {"optimizer__kind": "lion"},
    "monitor.sites": {"monitor__every": 0, "monitor__gradients_every": 0},
    "responder.alpha": {"responder__policy": "clip"},
    "responder.clip": {"responder__policy": "lower-rate"},
    "responder.memory": {"responder__policy": "roll-back"},
    "responder.skip_batches": {"responder__policy": "skip-batch"},
    "responder.rate_factor": {}, "responder.budget": {}, "parallel.zero": {}, "parallel.timeout": {},
}  # fmt: skip


@pytest.mark.parametrize("name", IDLE_ASIDE)
def test_what_moves_no_numbers_lies_idle_too(name):
    assert name in idle_settings(changed(SMALL, **IDLE_ASIDE[name]))
    read = changed(SMALL, parallel__data=2) if name.startswith("parallel") else SMALL
    if name.startswith("responder"):
        policy = "shrink-embedding-gradient" if name == "responder.alpha" else "escalate"
        read = changed(SMALL, responder__policy=policy)
    assert name not in idle_settings(read)


def test_presets_hold_nothing_idle():
    usual = dict(fields_of(TrainConfig()))
    for name in PRESETS:
        config = preset_config(name)
        idle = idle_settings(config)
        assert [n for n, value in fields_of(config) if n in idle and value != usual[n]] == [], name


def test_flags_without_effect_are_refused_in_one_line():
    config = preset_config("glm-5-like")
    refuse_idle(["--optimizer.muon.no-per-head", "--seed", "1"], config)
    # A preset's own setting may lie idle; what is given may not, however it is written.
    refuse_idle(["--optimizer.kind", "adamw"], changed(config, optimizer__kind="adamw"))
    # A launch script of several processes also starts one.
    refuse_idle(["--parallel.zero", "1", "--parallel.timeout=60"], config)
    adamw = changed(config, optimizer__kind="adamw")
    for flag in (
        "--optimizer.muon.per-head",
        "--optimizer.muon.no-per-head",
        "--optimizer.muon.per_head=True",
    ):
        with pytest.raises(InputError) as refusal:
            refuse_idle([flag, "--loss-scale.window", "3"], adamw)
        assert str(refusal.value) == (
            "optimizer.muon.per_head has no effect without optimizer.kind muon: choose that, or leave "
            "optimizer.muon.per_head out; loss_scale.window has no effect without precision fp16: choose that, or leave "
            "loss_scale.window out"
        )


def test_configurations_by_hand_are_warned_of(data):
    idle = changed(SMALL, optimizer__muon__per_head=True)
    (line,) = idle_by_hand(idle)
    assert line.startswith("optimizer.muon.per_head has no effect without optimizer.kind muon")
    loader = Loader(data, idle.objective, length=idle.model.length, seed=0)
    with pytest.warns(UserWarning, match=r"optimizer\.muon\.per_head has no effect"):
        Trainer(idle, LocalEngine(idle), loader).train()
    assert idle_by_hand(changed(idle, preset="glm-tiny")) == []
