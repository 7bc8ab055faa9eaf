"""Settings that nothing in a configuration reads: those of a technique that is off.

    --optimizer.muon.per-head           without --optimizer.kind muon
    --loss-scale.window 500             without --precision fp16

change nothing, but whoever gives them believes that they do. So the command refuses a flag without effect and names what the flag
needs; a preset's settings may lie idle (``glm train glm-5-like --optimizer.kind adamw`` trains, its ``per_head`` unread). A
configuration built in Python does not say which settings its author gave: where it has no preset's name, a run that begins warns of
idle settings that differ from their defaults.

``IDLE`` is the full list: fields, when something reads them, and what they need. A test walks every field of a configuration: with
what the field needs it changes the run, without that it is listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from glm.errors import InputError
from glm.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Condition:
    """When something reads some settings.

    Attributes:
        fields: globs of their names.
        needs: what they need, in words that follow "without".
        holds: whether a configuration has it.
    """

    fields: tuple[str, ...]
    needs: str
    holds: Callable[[TrainConfig], bool]


def _shrinks(config: TrainConfig) -> bool:
    """Whether EGS's alpha is ever below 1."""
    alphas = config.model.embedding.gradient_shrink, config.schedule.shrink_to
    return config.responder.policy == "shrink-embedding-gradient" or any(a not in (None, 1) for a in alphas)


def _shrinks_something(config: TrainConfig) -> bool:
    return config.model.embedding.tied or config.model.embedding.shrink_side != "output"


def _has_vectors(config: TrainConfig) -> bool:
    """Whether any parameter is a vector."""
    model = config.model
    return model.bias or model.spectral or model.norm_kind != "rms-plain" or model.attention.sink == "learned"


def _divides(config: TrainConfig) -> bool:
    """Whether anything divides by epsilon."""
    kind = config.optimizer.kind
    return kind != "lion" and (kind != "adam-atan2" or config.optimizer.guard.spam == "stable")


def _has_pieces(config: TrainConfig) -> bool:
    """Whether any row has [MASK] pieces."""
    own = config.objective
    return own.kind == "span-corruption" or (own.kind == "glm" and own.gmask_share < 1)


def _rounds(operand: int, *products: str) -> Callable[[TrainConfig], bool]:
    """Whether emulation rounds an operand (activations, weights, gradients) in one of these products."""
    return lambda c: bool(c.emulate.formats[operand]) and any(name in c.emulate.chosen for name in products)


def _watches(config: TrainConfig) -> bool:
    own = config.monitor
    return any((own.every, own.gradients_every, own.recorder, own.weights_every, own.formats_every))


IDLE = (
    # model
    Condition(("model.norm_epsilon",), "a norm_kind of statistics", lambda c: c.model.norm_kind != "dyt"),
    Condition(
        ("model.embedding.shrink_side",),
        "a model.embedding.gradient_shrink or schedule.shrink_to below 1",
        _shrinks,
    ),
    Condition(
        ("model.embedding.gradient_shrink", "schedule.shrink_to"),
        "model.embedding.tied or a shrink_side other than output",
        _shrinks_something,
    ),
    Condition(
        ("model.attention.relax",),
        "model.attention.softmax pb-relax",
        lambda c: c.model.attention.softmax == "pb-relax",
    ),
    Condition(
        ("model.attention.rope_base",),
        "model.attention.positions rope or rope2d",
        lambda c: c.model.attention.positions in ("rope", "rope2d"),
    ),
    Condition(
        tuple(
            f"model.feed_forward.experts.{name}"
            for name in ("active", "shared", "balance", "router_z", "bias_rate", "capacity")
        ),
        "a model.feed_forward.experts.count above 0",
        lambda c: c.model.feed_forward.experts.count > 0,
    ),
    Condition(
        ("model.scaling.base_hidden",),
        "model.scaling.kind mup or complete-p",
        lambda c: c.model.scaling.kind != "standard",
    ),
    Condition(
        ("model.scaling.base_layers",),
        "model.scaling.kind complete-p",
        lambda c: c.model.scaling.kind == "complete-p",
    ),
    # data
    Condition(("objective.gmask_share",), "objective.kind glm", lambda c: c.objective.kind == "glm"),
    Condition(
        ("objective.gmask_least",),
        "objective.kind glm and a gmask_share above 0",
        lambda c: c.objective.kind == "glm" and c.objective.gmask_share > 0,
    ),
    Condition(
        tuple(f"objective.{name}" for name in ("mask_fraction", "span_mean", "single_span")),
        "objective.kind span-corruption, or glm with a gmask_share below 1",
        _has_pieces,
    ),
    Condition(
        ("objective.pieces",),
        "objective.kind glm or span-corruption",
        lambda c: c.objective.kind != "causal",
    ),
    Condition(
        ("objective.positions",),
        "model.attention.positions rope2d",
        lambda c: c.model.attention.positions == "rope2d",
    ),
    Condition(
        ("sampling.mixture_before",),
        "sampling.mixture_ramp",
        lambda c: c.sampling.mixture_ramp[1] > 0,
    ),
    Condition(("batch.ramp_from",), "a batch.ramp_samples above 0", lambda c: c.batch.ramp_samples > 0),
    Condition(("batch.ramp_samples",), "batch.ramp_from", lambda c: c.batch.ramp_from is not None),
    # updates
    Condition(("optimizer.muon.*",), "optimizer.kind muon", lambda c: c.optimizer.kind == "muon"),
    Condition(("optimizer.slow.*",), "optimizer.kind ademamix", lambda c: c.optimizer.kind == "ademamix"),
    Condition(("optimizer.epsilon",), "an optimizer.kind other than lion and adam-atan2", _divides),
    Condition(("optimizer.guard.warmup",), "optimizer.guard.adagc", lambda c: c.optimizer.guard.adagc),
    Condition(
        ("optimizer.guard.reset",),
        "optimizer.guard.spam spam or stable",
        lambda c: c.optimizer.guard.spam != "off",
    ),
    Condition(
        ("optimizer.decay", "optimizer.decay_embedding", "optimizer.cautious_decay"),
        "an optimizer.weight_decay above 0",
        lambda c: c.optimizer.weight_decay > 0,
    ),
    Condition(
        ("optimizer.rates.output",),
        "an output projection of its own (model.embedding.no-tied)",
        lambda c: not c.model.embedding.tied,
    ),
    Condition(("optimizer.rates.vectors",), "norms with gains, or biases", _has_vectors),
    Condition(
        ("schedule.least",),
        "a schedule.shape other than constant",
        lambda c: c.schedule.shape != "constant",
    ),
    Condition(
        ("schedule.decay_steps",),
        "schedule.shape cosine, linear or wsd",
        lambda c: c.schedule.shape in ("cosine", "linear", "wsd"),
    ),
    Condition(("schedule.decay_share",), "schedule.shape wsd", lambda c: c.schedule.shape == "wsd"),
    Condition(
        ("schedule.shrink_from_step", "schedule.shrink_to_step"),
        "schedule.shrink_to",
        lambda c: c.schedule.shrink_to is not None,
    ),
    # precision
    Condition(("loss_scale.*",), "precision fp16", lambda c: c.precision == "fp16"),
    Condition(
        ("emulate.products",),
        "a format: emulate.recipe, or one of emulate.activations, weights and gradients",
        lambda c: c.emulate.is_on,
    ),
    Condition(
        ("emulate.stochastic",),
        "gradients that are rounded: emulate.recipe or emulate.gradients, in grad-input or grad-weight",
        _rounds(2, "grad-input", "grad-weight"),
    ),
    Condition(
        ("emulate.hadamard",),
        "a grad-weight whose operands are rounded: emulate.recipe, and emulate.products",
        lambda c: _rounds(0, "grad-weight")(c) or _rounds(2, "grad-weight")(c),
    ),
    Condition(
        ("emulate.activations",),
        "forward or grad-weight among emulate.products",
        lambda c: {"forward", "grad-weight"} & {*c.emulate.chosen} != set(),
    ),
    Condition(
        ("emulate.weights",),
        "forward or grad-input among emulate.products",
        lambda c: {"forward", "grad-input"} & {*c.emulate.chosen} != set(),
    ),
    Condition(
        ("emulate.gradients",),
        "grad-input or grad-weight among emulate.products",
        lambda c: {"grad-input", "grad-weight"} & {*c.emulate.chosen} != set(),
    ),
    # what is watched, kept and answered
    Condition(
        ("monitor.curvature_every",),
        "optimizer.kind adamw, whose bound it tells",
        lambda c: c.optimizer.kind == "adamw",
    ),
    Condition(("monitor.sites",), "anything that is measured of them: monitor.every, say", _watches),
    Condition(
        ("checkpoint.ring_every", "checkpoint.ring_keep"),
        "a checkpoint.ring above 0",
        lambda c: c.checkpoint.ring > 0 or c.responder.active,
    ),
    Condition(
        ("responder.alpha",),
        "responder.policy shrink-embedding-gradient",
        lambda c: c.responder.policy == "shrink-embedding-gradient",
    ),
    Condition(
        ("responder.clip",),
        "responder.policy clip or escalate",
        lambda c: c.responder.policy in ("clip", "escalate"),
    ),
    Condition(
        ("responder.skip_batches",),
        "responder.policy roll-back or escalate",
        lambda c: c.responder.policy in ("roll-back", "escalate"),
    ),
    Condition(("responder.memory",), "responder.policy escalate", lambda c: c.responder.policy == "escalate"),
    Condition(
        tuple(
            f"responder.{name}"
            for name in ("rate_factor", "rollback_steps", "hard_batches", "cooldown", "budget")
        ),
        "a responder.policy other than none",
        lambda c: c.responder.active,
    ),
    Condition(
        ("parallel.zero", "parallel.timeout"),
        "several processes: parallel.data, tensor or pipeline",
        lambda c: c.parallel.ranks > 1,
    ),
)


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's name, such as ``optimizer.muon.per_head``, and its value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def idle_settings(config: TrainConfig) -> dict[str, str]:
    """Settings that nothing reads, and what each needs."""
    lacking = [one for one in IDLE if not one.holds(config)]
    return {
        name: one.needs
        for name, _ in fields_of(config)
        for one in lacking
        if any(fnmatchcase(name, glob) for glob in one.fields)
    }


def refuse_idle(words: Sequence[str], config: TrainConfig) -> None:
    """Raises InputError where a flag among a command line's words is a setting that nothing reads; one process may get the flags of
    several.

    Args:
        words: ``--optimizer.muon.per-head``, ``--batch.rows``, ``4``, ...
        config: the configuration made from them.
    """
    idle, given = idle_settings(config), _given(words, config)
    # A script may start one process here and many there, with its ZeRO stage in both.
    if said := [
        told(name, idle[name]) for name in given if name in idle and not name.startswith("parallel.")
    ]:
        raise InputError("; ".join(said))


def idle_by_hand(config: TrainConfig) -> list[str]:
    """A line for each idle setting of a configuration without a preset that differs from its default."""
    if config.preset:
        return []
    usual, idle = dict(fields_of(TrainConfig())), idle_settings(config)
    return [
        told(name, idle[name]) for name, value in fields_of(config) if name in idle and value != usual[name]
    ]


def told(name: str, needs: str) -> str:
    """The line about an idle setting."""
    return f"{name} has no effect without {needs}: choose that, or leave {name} out"


def _given(words: Sequence[str], config: TrainConfig) -> list[str]:
    """The settings whose flags are among the words, in their order."""
    flags: dict[str, str] = {}
    for name, _ in fields_of(config):
        group, _, last = name.rpartition(".")
        flags |= {name: name, f"{group}.no_{last}" if group else f"no_{last}": name}
    words_given = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return list(dict.fromkeys(flags[word] for word in words_given if word in flags))
