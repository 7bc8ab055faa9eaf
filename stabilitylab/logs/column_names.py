"""The words of a column's name: whether it is a loss, a counter or about validation.

Names are compared in English and lower case, with ``/``, ``-`` and blanks as ``_`` and without a leading ``train_``
(``plain_name``); where none fits as a whole, by their last part (``last_part``: ``learning/loss``). ``NAMES``, and docs/logs.md,
list each signal's names, best first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from stabilitylab.logs.languages import in_english, is_english
from stabilitylab.telemetry import (
    BATCH_SIZE,
    DATA_PHASE,
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    LOSS_SCALES,
    SKIPPED,
)

STEP = "step"
NAMES: Mapping[str, tuple[str, ...]] = {
    STEP: (
        *(
            "num_updates",
            "global_step",
            "trainer_global_step",
            "optimizer_step",
            "current_steps",
            "current_step",
        ),
        *(
            "stability_step",
            "global_step_max_steps",
            "step",
            "steps",
            "iteration",
            "iterations",
            "iter",
            "iters",
        ),
        *("it", "update", "updates", "num_steps", "nupdates", "global_steps", "opt_step", "optimizer_steps"),
        *("itr", "iter_num", "num_iter", "n_iter", "step_num", "step_count", "learner_steps"),
        *("batch", "batch_idx", "minibatch"),
        # Reinforcement learning: steps of the environment before iterations.
        *(
            "total_timesteps",
            "timesteps_total",
            "num_timesteps",
            "timesteps",
            "env_steps",
            "totalenvinteracts",
            "total_env_interacts",
        ),
        *("num_env_steps_sampled_lifetime", "num_env_steps_sampled", "training_iteration", "n_updates"),
    ),
    LOSS: (
        *(
            "loss",
            "lm_loss",
            "training_loss",
            "total_loss",
            "loss_total",
            "loss_train",
            "loss_train_total",
            "global_avg_loss",
        ),
        *(
            "avg_loss",
            "loss_avg",
            "mean_loss",
            "loss_mean",
            "ce_loss",
            "cross_entropy_loss",
            "crossentropyloss",
        ),
        *(
            "reduced_train_loss",
            "reduced_llm_loss",
            "llm_loss",
            "step_loss",
            "batch_loss",
            "smooth_loss",
            "nll_loss",
        ),
        "average_loss",
    ),
    GRADIENT_NORM: (
        *(
            "grad_norm",
            "gradient_norm",
            "global_grad_norm",
            "grad_norm_total",
            "total_grad_norm",
            "gnorm",
            "gn",
            "norm",
        ),
        *("gradnorm", "raw_grad_norm", "l2_norm_grad_global", "global_norm", "total_norm", "l2_grads"),
        *("grad_2_0_norm_total", "grad_2_norm_total", "grad_inf_norm_total"),  # Lightning's
        "grad",
    ),
    LOSS_SCALES[0]: ("loss_scale", "scale", "grad_scale", "scaler_scale"),
    LEARNING_RATE: (
        "lr",
        "learning_rate",
        "lr_group_0",
        "lr_group0",
        "lr_pg0",
        "lr_adamw",
        "lr_adam",
        "lr_sgd",
    ),
    SKIPPED: (
        *("skipped", "overflow", "step_skipped", "skipped_iterations", "number_of_skipped_iterations"),
        *("skipped_iter", "skipped_steps"),
    ),
    BATCH_SIZE: ("batch_size", "global_batch_size"),
    DATA_PHASE: ("data_phase", "curriculum_step", "curriculum_seqlen", "sequence_length", "seq_length"),
}
OTHER_LOSSES = frozenset(
    {"xent", "nll", "cross_entropy", "crossentropy", "train_xent", "train_nll"}
)  # names of losses without the word
# Where no column is called a loss, best first; an error only where training's is told from validation's.
LONE_LOSSES = (
    *(frozenset({"ce", "xe"}), frozenset({"objective", "cost"}), frozenset({"bpb", "bpc", "bpd"})),
    *(frozenset({"perplexity", "ppl"}), frozenset({"rmse", "mse"})),
)
_COUNTERS = frozenset({*NAMES[STEP], "epoch", "epochs"})
EVALUATION = re.compile(r"(^|_)(val|valid|validation|eval|evaluation|test|dev)(_|$)")
_STEADYING = re.compile(r"(^|_)(z|zloss|aux|auxiliary|router|balanc\w*|load|lb|moe)(_|$)")  # never alone


@lru_cache(4096)
def is_evaluation(name: str) -> bool:
    """Whether a column is about validation or test rather than training."""
    return EVALUATION.search(re.sub(r"[^0-9a-z]+", "_", _english(name).lower())) is not None


def may_be_loss(name: str) -> bool:
    """Whether a column of this name is taken for the loss, at least where no other is called one."""
    return is_loss(name) or any(is_lone_loss(name, family) for family in LONE_LOSSES)


def is_lone_loss(name: str, family: frozenset[str]) -> bool:
    """Whether a name is one of those that stand for a loss where nothing is called one; of errors, only training's."""
    return last_part(name) in family and (family is not LONE_LOSSES[-1] or name.lower().startswith("train"))


@lru_cache(4096)
def is_loss(name: str) -> bool:
    """Whether a name is that of a loss, of training or anything else."""
    return "loss" in _english(name).lower() or last_part(name) in OTHER_LOSSES


def _english(name: str) -> str:
    """The English for a name in another language."""
    spoken = name.replace("_", " ")
    return name if is_english(spoken) else in_english(spoken)


@lru_cache(4096)
def counter_of(name: str) -> bool:
    """Whether a column of this name counts steps or epochs."""
    return plain_name(name) in _COUNTERS


@lru_cache(4096)
def plain_name(name: str) -> str:
    """The name as it is compared: ``trainLoss`` and ``train/loss`` are both ``loss``."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _english(name).strip())  # trainLoss, globalStep
    plain = re.sub(r"[^0-9a-z]+", "_", parted.lower()).strip("_")
    for prefix in ("train_", "training_", "precision_"):
        if plain != "training_loss":
            plain = plain.removeprefix(prefix)
    return plain


@lru_cache(4096)
def last_part(name: str) -> str:
    """The last part of a path (``learning/loss``) or of a tracker's title (``RUN - train/loss``)."""
    return plain_name(re.split(r"/| - |\.", name.strip())[-1])


def steadies(name: str) -> bool:
    """Whether a loss of this name is one that only steadies a model."""
    return _STEADYING.search(plain_name(name)) is not None
