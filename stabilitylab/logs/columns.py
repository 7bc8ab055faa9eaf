"""Chooses a log's loss, gradient norm, step and other columns by their names (``column_names``), as a person would.

Among losses it prefers training to everything else (columns of validation are never the training loss), the total to its parts,
``_step`` to ``_epoch``, and a curve to the average at the end.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import (
    LONE_LOSSES,
    NAMES,
    OTHER_LOSSES,
    STEP,
    counter_of,
    is_evaluation,
    is_lone_loss,
    is_loss,
    last_part,
    plain_name,
    steadies,
)
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS

_POLICY_LOSSES = ("policy_loss", "pg_loss", "actor_loss")  # of reinforcement learning, beside the value loss
# Names that also count behind a path (time/total_timesteps); a "step" may belong to anything.
_STEP_TAILS = frozenset({"total_timesteps", "global_step", "num_updates"})
# Without any of those names: optim/LR (group 0), x/lr0, optim0_lr0, lr-DecoupledAdamW/group0; actor_grad_norm.
_LIKE: Mapping[str, tuple[re.Pattern[str], re.Pattern[str]]] = {
    LEARNING_RATE: (
        re.compile(r"(^|_)(lrs?|lrc|learning_?rates?|lrate|l_r)\d*(_|$)"),
        re.compile(r"ratio|mult|scale|min|max|decay|warm|last_layer|peak|init"),
    ),
    GRADIENT_NORM: (
        re.compile(r"(^|_)(grad|gradients?)_?norm(_|$)|(^|_)gnorm(_|$)|(^|_)norm_grad(_|$)"),
        re.compile(r"layer|block|bias|weight|clipped|ratio|coef|\d$"),
    ),
}
_MOST_OFFERED = 8  # with more columns the error lists them and proposes none
_MOST_ALIKE = 4  # more would be one norm per layer
_BOUND = re.compile(r"__(MIN|MAX)$")  # the band that W&B exports around a panel's curve
_SCALE = re.compile(r"loss_scal|scale$")
_SETTING = re.compile(r"(config|hparams?|args|hyperparameters)[/.]")
# Dropped from several losses: averages beside the loss itself; beside the policy's, whatever else is optimised with it.
_TOTAL = re.compile(r"(^|_)(total|overall|combined|all)(_|$)")
_ELBO = re.compile(r"(^|_)elbo(_|$)")
_AVERAGE = re.compile(r"(^|_)(avg|average|mean|running|ema|smoothed|best|min|max|epoch)(_|$)")
_BEST = re.compile(r"(^|_)(best|min|max|lowest)(_|$)")
_OF_TARGETS = frozenset({"ce_loss", "cross_entropy_loss", "crossentropyloss", "nll_loss"})
# Terms that only steady a model: beside them the cross-entropy is the loss.
_SMALL_TERM = re.compile(
    r"(^|_)(z|zloss|aux\w*|router|balanc\w*|load|lb|moe|mtp|reg\w*|penalty|(?<!cross_)entropy)(_|$)"
)
_PART = re.compile(f"{_SMALL_TERM.pattern}|(^|_)kl")
_POLICY = re.compile(r"(^|_)(policy|pg|actor|surrogate)(_|$)")
# Never offered as the loss: counters by other names, times, rates, norms, settings.
_NO_LOSS = re.compile(
    r"(^|_)(t|ts|time\w*|date|datetime|secs?|seconds?|ms|eta|elapsed|duration|hours?|minutes?|epochs?|steps?|iters?|iterations?|"
    r"it|batch|batches|rounds?|idx|index|id|n|count|counts|tokens?|samples?|seen|tps|speed|throughput|mfu|mem|memory|gpu|rank|seed|"
    r"lrs?|learning|rate|grads?|gradients?|gradnorm|norms?|gnorm|scale|momentum|beta\d?|decay|acc|accuracy|percent)(_|$)"
)
# A store's summaries of a step's several values: their mean is the loss, the others are not.
_STATISTIC = re.compile(r"[/._](num|count|std|min|max|median|sum|variance)$", re.IGNORECASE)


def choose_columns(
    names: Iterable[str],
    *,
    source: Path,
    loss: str | None = None,
    step: str | None = None,
    counts: Mapping[str, int] | None = None,
    fractions: Collection[str] = (),
) -> dict[str, str]:
    """Signal -> its column.

    Args:
        names: the log's own names.
        source: the log's name in messages.
        loss, step: names that the user gave.
        counts: number of values in each column, where known: an average at the end is then no loss curve, and a column that most
            rows lack does not count steps.
        fractions: columns with numbers that are not whole: they do not count steps either.

    Raises:
        InputError: no loss column, or several that could be; the message names the columns.
    """
    names = list(names)
    plain = {name: plain_name(name) for name in names}
    chosen: dict[str, str] = {}
    for wanted, given in ((LOSS, loss), (STEP, step)):
        if given is not None:
            if given not in plain:
                raise InputError(f"{source} has no column {given!r}: its columns are {_list(names)}")
            chosen[wanted] = given
    if LOSS not in chosen:
        chosen[LOSS] = _loss(names, plain, source, counts, fractions)
    rows = (counts or {}).get(chosen[LOSS], 0)
    for signal, usual in NAMES.items():
        if signal in chosen or signal == LOSS:
            continue
        found = [
            name
            for word in usual
            for name in names
            if (plain[name] == word or ((signal != STEP or word in _STEP_TAILS) and last_part(name) == word))
            and not is_evaluation(name)
            and not _BOUND.search(name)
            and not _SETTING.match(name)
            and name not in chosen.values()
        ]
        if not found and signal in _LIKE:
            found = _alike(signal, names, plain)
        if signal == STEP and not found:  # data/step beside data/loss
            beside = [
                n for n in names if "/" in n and _group(n) == _group(chosen[LOSS]) and n != chosen[LOSS]
            ]
            found = [n for word in usual for n in beside if last_part(n) == word and not is_evaluation(n)]
        if signal == STEP:
            # beside another counter, a "step" with fractions counts nothing: it is a step size
            alone = not any(counter_of(n) and n not in fractions for n in names)
            found = [n for n in found if n not in fractions or (plain[n] == "step" and alone)]
            found = [n for n in found if not counts or counts[n] * 2 > rows]
            found.sort(key=lambda name: name == "_step")  # W&B's own step counts calls of log()
        else:
            # actor/grad_norm beside actor/pg_loss, not critic/grad_norm
            found.sort(key=lambda name: _group(name) != _group(chosen[LOSS]))
            found = [n for n in found if not counts or counts[n]]
        if found:
            chosen[signal] = found[0]
    return chosen


def _loss(
    names: Sequence[str],
    plain: Mapping[str, str],
    source: Path,
    counts: Mapping[str, int] | None,
    fractions: Collection[str],
) -> str:
    """The loss as a person would choose it: of training, the total, of each step."""
    found = _training_losses(names, plain, source, counts, fractions)
    totals = [n for n in found if _TOTAL.search(plain[n])]
    if len(totals) == 1 and _has_parts(found, plain):
        return totals[0]
    raw = [n for n in found if plain[n] in ("batch_loss", "step_loss", "loss_step")]
    if len(found) == 2 and len(raw) == 1 and any(plain[n] == "loss" for n in found):
        return raw[0]  # AllenNLP's loss is the mean since the epoch began
    own = [n for n in found if not _AVERAGE.search(plain[n])]
    if len(found) == 2 and len(own) == 1 and not _PART.search(plain[own[0]]):
        return own[0]  # gpt_loss beside its running loss_mean
    for usual in (NAMES[LOSS], _POLICY_LOSSES if len(totals) != 1 else ()):
        if (named := _of_a_usual_name(found, plain, usual, counts)) is not None:
            return named
    stems = {
        re.sub("_(step|epoch)$", "", plain[n]): n for n in reversed(found) if not plain[n].endswith("_epoch")
    }
    if len(found) == 1 or len(stems) == 1:
        return found[0] if len(found) == 1 else next(iter(stems.values()))
    for narrowed in (
        totals,
        [n for n in found if plain[n] != "losses"],  # a list of them
        [n for n in found if not _SMALL_TERM.search(plain[n])] if _is_target(found, plain) else [],
        [n for n in found if not (_AVERAGE.search(plain[n]) or _PART.search(plain[n]))],
        [n for n in found if _POLICY.search(plain[n])],
        [n for n in found if re.search(r"(^|_)(tr|trn)(_|$)", plain[n])],
    ):
        if len(narrowed) == 1:
            return narrowed[0]
    raise InputError(
        f"{source} has several loss columns: {_list(found)}; name one with --loss: {_paste(found)}"
    )


def _training_losses(
    names: Sequence[str],
    plain: Mapping[str, str],
    source: Path,
    counts: Mapping[str, int] | None,
    fractions: Collection[str],
) -> list[str]:
    """The columns that could be the loss of training, at least one.

    Raises:
        InputError: there is none; the message offers the other columns.
    """
    named = [n for n in names if is_loss(n) and not _BOUND.search(n) and not _SCALE.search(plain[n])]
    found = [n for n in named if not is_evaluation(n)]
    found = [n for n in found if not _STATISTIC.search(n)] or found
    if len(found) < len(named):  # "best loss" beside a validation loss is the best of that
        found = [n for n in found if not _BEST.search(plain[n])]
    if counts and any(counts[n] for n in found):
        most = max(counts[n] for n in found)
        found = [n for n in found if counts[n] * 20 > most]  # an average at the end is no curve
    if found and not all(map(steadies, found)):
        return found + _bounds(names, plain, named, found)
    for family in LONE_LOSSES if not named else ():
        if len(alone := [n for n in names if is_lone_loss(n, family) and not is_evaluation(n)]) == 1:
            return alone
    others = [n for n in names if not (counter_of(n) or is_evaluation(n) or _NO_LOSS.search(plain[n]))]
    others = [n for n in others if re.match(r"\w", n)]  # not a place known only by its length
    others.sort(key=lambda n: (n in found, n not in fractions))  # whole numbers count something
    if found:
        raise InputError(
            f"{source} has no loss but terms that steady a model ({_list(found)}); name one with --loss: {_paste(others)}"
        )
    if named:
        raise InputError(
            f"{source} has no loss column of training: it holds validation losses only ({_list(named)}); "
            f"to judge one: {_paste(named)}"
        )
    such = f": {_paste(others, 3)}" if 0 < len(others) <= _MOST_OFFERED else ""
    raise InputError(
        f"{source} has no loss column: its columns are {_list(names)}; name one with --loss{such}"
    )


def _bounds(
    names: Sequence[str], plain: Mapping[str, str], named: Sequence[str], found: Sequence[str]
) -> list[str]:
    """The evidence bounds beside a likelihood, which is a part of them."""
    if any("loss" in plain[n] for n in found):
        return []
    return [n for n in names if _ELBO.search(plain[n]) and n not in named and not is_evaluation(n)]


def _of_a_usual_name(
    found: Sequence[str], plain: Mapping[str, str], usual: Sequence[str], counts: Mapping[str, int] | None
) -> str | None:
    """The column with the first of the usual names, whole before behind a prefix, of each step before of an epoch."""
    for spell in (lambda n: plain[n], last_part):
        for word in usual:
            for ending in ("", "_step", "_epoch"):
                fit = [n for n in found if spell(n) == word + ending]
                if fit and not (word in _OF_TARGETS and _has_other_terms(found, fit, plain)):
                    return max(fit, key=lambda n: counts[n]) if counts else fit[0]
    return None


def _has_other_terms(found: Sequence[str], fit: Sequence[str], plain: Mapping[str, str]) -> bool:
    """Whether a cross-entropy stands beside another trained term of equal rank (a distillation, an overlap)."""
    return any(
        n not in fit and not _AVERAGE.search(plain[n]) and not _SMALL_TERM.search(plain[n]) for n in found
    )


def _is_target(found: Sequence[str], plain: Mapping[str, str]) -> bool:
    """Whether what stands beside terms that only steady a model is a likelihood or cross-entropy."""
    return any(plain[n] in OTHER_LOSSES for n in found)


def _has_parts(found: Sequence[str], plain: Mapping[str, str]) -> bool:
    """Whether a plain loss stands beside another term, so that a total adds both.

    ``loss`` and ``total_loss`` alone do not show that: the second is as often the sum since the epoch began.
    """
    terms = [n for n in found if not _TOTAL.search(plain[n]) and not _AVERAGE.search(plain[n])]
    return len(terms) > 1 and any(plain[n] == "loss" for n in terms)


def _alike(signal: str, names: Sequence[str], plain: Mapping[str, str]) -> list[str]:
    """Columns that match the signal by a part of their name; none if many do."""
    like, unlike = _LIKE[signal]
    found = [
        n
        for n in names
        if like.search(plain[n])
        and not unlike.search(plain[n])
        and not is_evaluation(n)
        and not _BOUND.search(n)
        and not _SETTING.match(n)
    ]
    return found if signal == LEARNING_RATE or len(found) <= _MOST_ALIKE else []


def _group(name: str) -> str:
    """The part before a name's last: ``actor/grad_norm``, ``actor_lr`` -> actor."""
    before, sign, _ = name.rpartition("/")
    return before if sign else name.partition("_")[0]


def _paste(names: Sequence[str], most: int = 6) -> str:
    return " or ".join(f"--loss {shlex.quote(name)}" for name in names[:most])


def _list(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
