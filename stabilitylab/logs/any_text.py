r"""A line of any trainer: whatever numbers stand in it, by the words before them.

    2026-03-01 10:00:01 | INFO | step 12/300 | loss 2.31 | grad norm 0.9      step 12, loss 2.31, grad norm 0.9
    Epoch: [1][ 20/100]  Loss 2.3e+00 (2.4e+00)  lr: 1e-4                     step 120, Loss 2.3, lr 1e-4
    [Epoch 0/3] loss: 2.31:  12%|#    | 24/200 [00:12<01:30, 1.9it/s]         epoch 0, loss 2.31, step 24 (the bar's)
    17 | loss 2.31 | lr 5e-4 | 100ms                                          step 17, ...

A name is up to four words, parted from its number by ``:``, ``=``, a bracket or blanks. Such a line is a record when a name in
it is a loss of training; one of validation alone is none, and is counted. The step is a counter's number (``step``,
``iteration``, ``it``, ``batch``...), or the place within an epoch, or the bar's, or a number that opens the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stabilitylab.logs.columns import counter_of, is_evaluation, is_loss
from stabilitylab.logs.languages import in_english
from stabilitylab.logs.pattern import ABOVE, NUMBER, TextFormat, Values, number

# "loss nan grad_norm inf" are two names: a word of a name is no number.
_NO_NUMBER = r"(?!(?:nan|inf|infinity)\b)"
_WORD = rf"{_NO_NUMBER}[A-Za-z_]"
_PAIR = re.compile(
    rf"(?<![\w.])({_WORD}[\w/.@-]*(?:\([A-Za-z]\w*\))?(?: {_NO_NUMBER}[A-Za-z(][\w/.()@-]*){{0,3}})"
    rf"['\"]?[)\]]?(?:\s*[:=]\s*|\s*[\[(]\s*|\s+)"
    rf"['\"]?[#\[(]?\s*({NUMBER})((?-i:[KMGT])(?!\w))?(?!\s?%|\s*=\s*[-+.\d])(?=['\"\s,;:|/\])}}(>]|[a-zA-Z]+\b|--|\.\s|\.?$)",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"(?:epoch|\btrain)\W{0,3}(\d+)(?:/\d+\]?)?\W{0,4}\[\s*(\d[\d,]*)\s*/\s*(\d[\d,]*)\b", re.IGNORECASE
)
_PAIR_OF_COUNTS = re.compile(r"^\s*\[\s*(\d+),\s*(\d+)\](?!<)")  # PyTorch's CIFAR tutorial: [epoch, batch]
_ABSL = re.compile(r"^[IWEF]\d{4} [\d:.]+\s+\d+ [\w.]+:\d+\] ")
_BAR = re.compile(r"\s(\d+)/(\d+) \[\d")
# A number that opens the line, also in brackets, and is no time of day and no date.
_OPENS = re.compile(
    r"^\s*(?:[A-Z]+:[\w.]*:\s*)?[\[(]?\s*(\d+)\s*(?:(?:st|nd|rd|th)\b|[|,:\])](?!\d)|/(\d+)(?=[\])(,:|\s]))"
)
_TWO_PLACES = re.compile(
    r"[\[(]\s*(\d+)\s*/\s*\d+\s*[\])][\s:-]{0,8}[\[(]\s*(\d+)\s*/\s*\d+\b|(?i:epoch)\W{0,3}(\d+)\W{1,3}\[(\d+)\](?!/)"
)  # [epoch/epochs][place/length]
_GLUED_STEP = re.compile(r"\b(?:step|iter|it)(\d+)\b", re.IGNORECASE)
_GLUED_EPOCH = re.compile(r"\b(?:epoch|ep|e)(\d+)(?=\b|_)", re.IGNORECASE)
_BATCH = re.compile(r"\bbatch\W{1,8}(\d+)\s*/\s*(\d+)\b", re.IGNORECASE)
_LOSS_AT = re.compile(
    r"\b(\w*loss\w*|cost)(?: \([^)]*\))? ?(?:\[(\d+)\]|(?:at|@|on|in|after) (?:step|iteration|iter|epoch)\s+(\d+)"
    r"|(?:step|iteration|iter|epoch)\[(\d+)\](?=\s*[:=]))",
    re.IGNORECASE,
)
# "MSE loss ||y - Q(s, a)||: 2.3": a formula between.
_LOSS_FAR = re.compile(
    rf"\b(\w*loss)\b[^:=\n]{{1,40}}(?::|=|\bis\b)\s*({NUMBER})(?=[\s,;|]|\.?$)", re.IGNORECASE
)
# "Step: 12ms" is how long one took
_TAKEN = re.compile(
    r"\b(?:step|iter|iteration|batch|it): ?[\d.]+(?:ms|us|µs|s|h|m)(?:\d+\w+)?\b", re.IGNORECASE
)
_DASHED = re.compile(r"\b(epoch|step|iter|iteration|batch) - (\d)", re.IGNORECASE)  # Epoch - 3 | loss
# Minibatch[ 1- 10]: the last of them
_RANGE = re.compile(
    r"\b((?:mini)?batch(?:es)?|steps|iterations|iters)(\W{0,6})\d+\s*-\s*(?=\d+\b)", re.IGNORECASE
)
_SPAN = re.compile(
    r" (?:over|of|in|for) (?:the )?last \d+(?: \w+)?(?=\s*[:=])"
)  # "average loss over last 10 = 2.3"
_STEPS = re.compile(r"(?<![/\w.])(\d+) (?:\w+ )?(?:steps|iterations|updates|iters)\b(?!/)", re.IGNORECASE)
_ALONE = re.compile(r"\]\s*(\d+)\s*[:|]\s")
_RATIO = re.compile(r"(?<![\w./])(\d+)(?:/\s?| of )(\d+)(?![\w./])")
_LEADERS = re.compile(r"\s*\.{3,}:?\s*")  # loss ......... 2.31
_WITHIN = re.compile(r"[\[(]\s*(\d+)\s*/\s*(\d+)\b")
# A norm of several groups: the first.
_NORMS = re.compile(r"(\w*norm)\s*[=:]\s*\{['\"]\w+['\"]:\s*(?=[-+\d.n])", re.IGNORECASE)
# |g|=0.9, ||grad||: 0.9, ‖∇L‖ 0.9, η=1e-4
_BARRED_NORM = re.compile(r"(?:\|{1,2}|‖)(?:g|grad|∇|∇L)(?:\|{1,2}|‖)(?=\s*[:=]?\s*[-+\d.n])", re.IGNORECASE)
_ETA = re.compile(r"(?<!\w)η(?=\s*[:=]?\s*\d)")
# Katib's {metricName: loss, metricValue: 2.3}; SageMaker's <loss>=2.3
_SPELT_OUT = re.compile(r"metricName: ([\w./-]+), metricValue: |<(\w+)>")
# Words that make a line one of validation, where they stand before its first loss and no training does.
_OF_VALIDATION = re.compile(
    r"(?:^|[\s\[(|:])(?:eval|evaluation|evaluating|valid|validation|validate|val|test|testing|dev|development)\b(?![./_=-]\w)"
    r"|^\s*\w+_(?:eval|val|valid|validation|test|dev)\b",
    re.IGNORECASE,
)
_OF_TRAINING = re.compile(r"train", re.IGNORECASE)
_LOSS = re.compile(r"loss|xent|nll", re.IGNORECASE)
_WRAPPED = re.compile(
    r"\b(?:(?:np|numpy|torch|jnp)\.)?(?:float\d*|int\d*|bfloat16|tensor|array|FloatTensor)\(\[?",
    re.IGNORECASE,
)
_LEVEL = re.compile(
    r"^(?:(?:info|debug|warning|warn|error|root|main|train|trainer)\s+)+(?=\S)", re.IGNORECASE
)
# What is remembered of the line before, and no number of the log.
_OF, _LAST, _EPOCHS, _MOVES, _GAP = "\0of", "\0last", "\0epochs", "\0moves", "\0gap"
# A loss that is scaled or weighted is none, nor one of packets.
_NO_LOSS = re.compile(
    r"scale|weight|coef|(?:packet|link|signal|heat|hearing|blood|stop|data)[ -]loss", re.IGNORECASE
)
_INFO = b" Info: "
_INFO_LINES = re.compile("(?m:^(?:\\[|┌) Info: .*$(?:\\n(?:│|└) .*$)*)".encode())
_INFO_GOES_ON = re.compile("\\r?\\n(?:│|└)[ \\t]+(?=\\w+ = )".encode())
_FLOAT32 = re.compile(rb"(?<![\w.])([-+]?\d+\.\d+)f(?=[-+]?\d+\b)")
# "1.23Test loss: 2.3": what is printed without a blank.
_GLUED = re.compile(r"(?<=\d)(?=[A-Z][a-z]+ ?[A-Za-z]*\s*[:=])")
# Where a logger was called: trainer:fit:120 -
_CALLED = re.compile(
    r"(?<![\w.:])[A-Za-z_][\w.]*:(?!(?:step|iter|iteration|epoch|it|batch|update):)[A-Za-z_<][\w<>]*:\d+"
    r"(?=\s+[-|]\s|\s*\])"
)
# What a loss is called where nothing in the log is called one, best first.
OTHER_LOSSES = (
    "total",
    "cross-entropy",
    "cross entropy",
    "cross_entropy",
    "crossentropy",
    "ce",
    "objective",
    "obj",
    "cost",
    "mse",
    "bce",
    "elbo",
    "l",
)
# "lr 1e-4 | train 2.31 | val 2.40" beside a rate, a norm or an error, and no share of anything: the loss goes unnamed.
_UNNAMED = re.compile(r"\b(?:lr|norm|\w*mae|\w*mse|ppl|perplexity|bits|bpc|bpb)\b", re.IGNORECASE)
_SHARE = re.compile(r"acc|f1|auc|score|reward|return|%|top-?1|precision|recall|iou", re.IGNORECASE)
_VALIDATION = ("val", "valid", "validation", "test", "dev")
# Beside which a mean square is one part of several.
_OTHER_PARTS = re.compile(r"\b(?:l1|l2|kl\w*|recon\w*|reg|dur|adv|gan|perc\w*|ssim|lpips)\b", re.IGNORECASE)
# Before such a name.
_OF_WHAT = re.compile(r"^(?:train(?:ing)?|avg|average|mean)[ _]", re.IGNORECASE)
# Numbers beside a total that it is no sum of.
_NO_PARTS = frozenset({"lr", "learning_rate", "epoch", "time", "eta", "seconds", "batch_size"})


@dataclass(frozen=True, kw_only=True)
class AnyText(TextFormat):
    """The format of a text that no known trainer prints.

    Attributes:
        strict: leave out lines that say before the loss that they are of validation ("Test: [3/40] Loss 2.1").
    """

    strict: bool = True

    def read(self, line: str) -> Values | None:
        """The numbers of one line; None: it holds no loss."""
        values: Values = {}
        line = _ABSL.sub("", line)
        if "_" in line or ":" in line:
            line = _CALLED.sub("", line)
        if "{" in line:
            line = _NORMS.sub(r"\1=", line)
        if "<" in line or "metricName" in line:
            line = _SPELT_OUT.sub(lambda m: f"{m[1]}: " if m[1] else m[2], line)
        if _TAKEN.search(line):
            line = _TAKEN.sub("", line)
        if "|g" in line or "‖" in line or "∇" in line:
            line = _BARRED_NORM.sub("grad_norm", line)
        if "η" in line:
            line = _ETA.sub("lr", line)
        if _GLUED.search(line):
            line = _GLUED.sub(" ", line)
        if "..." in line:
            line = _LEADERS.sub(": ", line)
        if "last" in line:
            line = _SPAN.sub("", line)
        if " - " in line:
            line = _DASHED.sub(r"\1 \2", line)
        if "-" in line:
            line = _RANGE.sub(r"\1\2", line)
        if told := _LOSS_AT.search(line):
            line = line[: told.end(1)] + line[told.end() :]
            values["step"] = float(told[2] or told[3] or told[4])
        for said, digits, unit in _PAIR.findall(_WRAPPED.sub("", line) if "(" in line else line):
            name = _name(said)
            if name not in values:
                values[name] = number(digits, unit)
        losses = [name for name in values if is_loss(name) and not _NO_LOSS.search(name)]
        if not losses and (far := _LOSS_FAR.search(line)) and not _NO_LOSS.search(far[0]):
            values[far[1]] = number(far[2])
            losses = [far[1]]
        if not losses:
            return None
        if all(is_evaluation(name) for name in losses) or (self.strict and _is_of_validation(line)):
            return {}
        if "epoch" not in values and (batch := _BATCH.search(line)):
            # A batch that is told with its epoch's length; epochs go unnamed.
            values = {name: x for name, x in values.items() if "batch" not in name.lower() or is_loss(name)}
            values["step"], values[_OF] = float(batch[1]), float(batch[2])
            return values
        counters = {name.lower() for name in values if counter_of(name)} - {"epoch"}
        counted = bool(counters)
        if counters <= {"batch", "steps"}:  # whether they count is told by all lines together
            for place_, length_ in _RATIO.findall(line):
                values.setdefault(f"/{length_}", float(place_))
            if not counted and (alone := _ALONE.search(line)):
                values.setdefault("#", float(alone[1]))
        if "epoch" not in values and (epoch_ := _GLUED_EPOCH.search(line)):
            values["epoch"] = float(epoch_[1])
        if place := _PLACE.search(line):
            values = {name: value for name, value in values.items() if name.lower() != "epoch"}
            epoch, at, length = (float(text.replace(",", "")) for text in place.groups())
            values["step"] = epoch * length + at
        elif not counted and (steps := _STEPS.search(line)):
            values["step"] = float(steps[1])
        elif not counted and (two := _PAIR_OF_COUNTS.match(line)):
            values["epoch"], values["step"] = float(two[1]), float(two[2])
        elif not counted and (both := _TWO_PLACES.search(line)):
            values["epoch"], values["step"] = float(both[1] or both[3]), float(both[2] or both[4])
        elif not counted and (glued := _GLUED_STEP.search(line)):
            values["step"] = float(glued[1])
        elif not counted and (bar := _BAR.search(line)):
            values["step"], values[_OF] = float(bar[1]), float(bar[2])
        elif not counted and (within := _WITHIN.search(line)):
            values["step"], values[_OF] = float(within[1]), float(within[2])
        elif not counted and (opens := _OPENS.match(line)):
            values["step"], values[_OF] = float(opens[1]), number(opens[2] or "")
        return values


class OtherText(AnyText):
    """Lines whose loss has another name: ``ce``, ``cost``; ``total`` beside its parts. Each has a counter."""

    def read(self, line: str) -> Values | None:
        """The numbers of one line; None: no such loss is in it."""
        values = super().read(line + " | loss 0")  # what the line above asks for; taken out again
        if not values:
            return None
        values = {name: value for name, value in values.items() if name not in ("loss", "| loss")}
        counted = any(counter_of(name) or name.startswith("/") for name in values)
        if not counted or is_evaluation(line.partition(" ")[0]):
            return None
        values = {
            _OF_WHAT.sub("", n) if _OF_WHAT.sub("", n).lower() in OTHER_LOSSES else n: x
            for n, x in values.items()
        }
        small = {name.lower(): name for name in values}
        parts = [x for n, x in values.items() if x and not counter_of(n) and n.lower() not in _NO_PARTS]
        if "total" in small and not (len(parts) > 2 and any(x % 1 for x in parts)):
            del values[small.pop("total")]
        named = [name for name in OTHER_LOSSES if name in small]
        if named and not (named[0] in ("mse", "bce") and _OTHER_PARTS.search(line)):
            return values
        beside = any(name in small for name in _VALIDATION)
        unnamed = "train" in small and beside and _UNNAMED.search(line) and not _SHARE.search(line)
        return values if unnamed else None


def prepared(chunk: bytes) -> bytes:
    """The piece with Julia's records of several lines on one: ``@info "Epoch 3" loss lr``, whose Float32 are 2.31f0."""
    if _INFO not in chunk:
        return chunk
    lines = _INFO_LINES.sub(lambda m: _FLOAT32.sub(rb"\1e", m[0]), chunk)
    return _INFO_GOES_ON.sub(b" | ", lines)


def prepared_english(chunk: bytes) -> bytes:
    """The same of a text in another language."""
    return in_english(prepared(chunk).decode("utf-8", "replace")).encode()


class Evidence:
    """Whether lines with a loss in them are a log: a sentence, a setting or a trace of the stack names one, too.

    Three lines of one loss that takes two values at least, or two lines whose counter goes on.
    """

    LINES = 3

    def __init__(self) -> None:
        self.lines = 0
        self._seen: dict[str, list[float | None]] = {}
        self._counted: float | None = None

    def suffices(self, values: Values) -> bool:
        """Take one line's numbers; whether there is enough now."""
        self.lines += 1
        counter = next((values[n] for n in values if counter_of(n)), None)
        goes_on = counter is not None and self._counted is not None and counter > self._counted
        self._counted = counter if counter is not None else self._counted
        for name in values:
            if is_loss(name) or name.lower() in (*OTHER_LOSSES, "train"):
                seen = self._seen.setdefault(name, [])
                seen.append(values[name])
                if len(seen) > 1 and goes_on:
                    return True
                if len(seen) >= self.LINES and (counter is not None or len(set(map(repr, seen))) > 1):
                    return True
        return False


def _counted_on(values: Values, before: Values) -> Values:
    """A bar that begins again after it was full is the next epoch's; bars that are always full count nothing."""
    if _OF not in values and _OF not in before and _LAST not in before:
        return values
    length, step = values.get(_OF), values.get("step")
    if length is None or step is None:
        values |= {
            name: before[name]
            for name in (_OF, _LAST, _EPOCHS, _MOVES, _GAP)
            if name in before and name not in values
        }
        return {name: value for name, value in values.items() if not name.startswith("\0")}
    last, epochs = before.get(_LAST), before.get(_EPOCHS) or 0.0
    moves = bool(before.get(_MOVES)) or step < length
    gap = before.get(_GAP) or 0.0
    if last is not None and step < last:
        # It was full, or the next would have been beyond its end.
        if before.get(_OF) == length and last + gap >= length > step and "epoch" not in values:
            epochs += 1
    elif last is not None:
        gap = step - last
    values |= {_LAST: step, _EPOCHS: epochs, _MOVES: float(moves), _GAP: gap}
    kept = {name: value for name, value in values.items() if not name.startswith("\0") and name != "step"}
    return {**kept, "step": step + epochs * length} if moves else kept


def _name(said: str) -> str:
    """Without what is no part of it: a logger's level; words before a counter or before "loss"."""
    if not is_loss(said):  # Loss(gen) and Loss(disc) are two
        said = re.sub(r"(?<=\w)\([A-Za-z]\w*\)?$", "", said)  # lr(PiecewiseDecay)
    said = said.strip("()")
    bare = re.sub(r" (?:is|was|of)$", "", said)  # "loss is 2.31"
    said = said if counter_of(bare.rpartition(" ")[2]) else bare
    if counter_of(said):
        return "epoch" if said.lower().endswith(("epoch", "epochs")) else said
    last = said.rpartition(" ")[2]
    if counter_of(last):
        return "epoch" if last.lower() == "epoch" else last
    if last.lower() == "ep":
        return "epoch"
    if last.lower() == "lr":
        return last
    return _LEVEL.sub("", said) if " " in said and not said.lower().startswith("train loss") else said


def _is_of_validation(line: str) -> bool:
    loss = _LOSS.search(line)
    before = line[: loss.start()] if loss else line
    return _OF_VALIDATION.search(before) is not None and _OF_TRAINING.search(before) is None


ANY_TEXT = AnyText(
    name="text",
    trigger=re.compile(b"(?i:loss|xent|(?:\\b|_)nll)"),
    lines=(),
    finish=_counted_on,
    above=ABOVE,
    words=(b"loss", b"xent", b"nll"),
)
# Where nothing at all is called a loss.
OTHER_TEXT = OtherText(
    name="text",
    steady=False,
    trigger=re.compile(
        rb"(?i:(?:\b|_)(?:total|ce|cross[-_ ]?entropy|cost|objective|obj|mse|bce|elbo|train)\b|\bl[=:])"
    ),
    lines=(),
    finish=_counted_on,
    words=(b"total", b"ce", b"entropy", b"cost", b"obj", b"mse", b"elbo", b"l=", b"l:", b"train"),
    losses=tuple(
        spelt for name in (*OTHER_LOSSES, "train") for spelt in (name, name.capitalize(), name.upper())
    ),
)
# Where every line says so, it is no more than a logger's name.
ANY_LINE = replace(ANY_TEXT, strict=False)
