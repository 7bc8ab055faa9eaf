"""The numbers in a line of any text, named by the words before them, and which of them counts.

    2026-03-01 10:00:01 | INFO | step 12/300 | loss 2.31 | grad norm 0.9      step 12, loss 2.31, grad norm 0.9
    Epoch: [1][ 20/100]  Loss 2.3e+00 (2.4e+00)  lr: 1e-4                     step 120, Loss 2.3, lr 1e-4
    [Epoch 0/3] loss: 2.31:  12%|#    | 24/200 [00:12<01:30, 1.9it/s]         epoch 0, loss 2.31, step 24 (the bar's)
    17 | loss 2.31 | lr 5e-4 | 100ms                                          step 17, ...

A name is up to four words, separated from its number by ``:``, ``=``, a bracket or blanks. The step is a counter's number
(``step``, ``iteration``, ``it``, ``batch``...), the place within an epoch, the progress bar's number, or a number that opens the
line.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from stabilitylab.logs.column_names import counter_of, is_loss
from stabilitylab.logs.pattern import NUMBER, LineValues, number

# The length in which the step is a place; no number of the log.
OF = "\0of"
# "loss nan grad_norm inf" holds two names: a word of a name is no number.
_NO_NUMBER = r"(?!(?:nan|inf|infinity)\b)"
_WORD = rf"{_NO_NUMBER}[A-Za-z_]"
# "loss after 500" is no loss of 500.
_NO_PREPOSITION = "".join(
    rf"(?<!\b{word})" for word in ("after", "before", "at", "in", "on", "of", "for", "over", "by")
)
_PAIR = re.compile(
    rf"(?<![\w.])({_WORD}[\w/.@-]*(?:\([A-Za-z]\w*\))?(?: {_NO_NUMBER}(?:[A-Za-z]|\([A-Za-z])[\w/.()@-]*){{0,3}})"
    rf"['\"]?[)\]]?(?:\s*[:=]\s*|\s*[\[(]\s*|{_NO_PREPOSITION}\s+)"
    rf"['\"]?[#\[(]?\s*({NUMBER})((?-i:[KMGT])(?!\w))?(?!\s?%|\s*=\s*[-+.\d])(?=['\"\s,;:|/\])}}(>]|[a-zA-Z]+\b|--|\.\s|\.{{2,}}|\.?$)",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"(?:epoch|\btrain)\W{0,3}(\d+)(?:/\d+\]?)?\W{0,4}\[\s*(\d[\d,]*)\s*/\s*(\d[\d,]*)\b", re.IGNORECASE
)
_PAIR_OF_COUNTS = re.compile(
    r"^\s*\[\s*(\d+),\s*(\d+)\](?!<)|[\s:]\[\s*(\d+),\s*(\d+)\](?=[\s:]*(?:\w+ ){0,2}\w*loss\b)",
    re.IGNORECASE,
)  # PyTorch's CIFAR tutorial: [epoch, batch]
_ABSL = re.compile(r"^[IWEF]\d{4} [\d:.]+\s+\d+ [\w.]+:\d+\] ")
_BAR = re.compile(r"\s(\d+)/(\d+) \[\d")
# A number that opens the line, also in brackets, but not a time of day or a date.
_OPENS = re.compile(
    r"^\s*(?:[A-Z]+:[\w.]*:\s*)?(?:\[?(?:\d{4}[-/]\d\d[-/]\d\d[T ])?\d\d:\d\d:\d\d(?:[.,]\d+)?Z?\]?[ \t|:-]*)?"
    r"[\[(#]?\s*(\d+)\s*(?:(?:st|nd|rd|th)\b|[|,:\])#](?!\d)|/(\d+)(?=[\])(,:|\s]|\.\s)|\s(?=(?:\w+_)?loss\b))"
)
_LETTERS = re.compile(r"\bE\d+[ /,|:-]{0,3}[SBI](\d+)\b")  # E1 S50
_NUMBERED = re.compile(r"(?:^|[\s|\]>-])#(\d+)(?=[\s,;:|]|$)")  # #12
_TWO_PLACES = re.compile(
    r"[\[(]\s*(\d+)\s*/\s*\d+\s*[\])][\s:-]{0,8}[\[(]\s*(\d+)\s*/\s*\d+\b|(?i:epoch)\W{0,3}(\d+)\W{1,3}\[(\d+)\](?!/)"
)  # [epoch/epochs][place/length]
_GLUED_STEP = re.compile(r"\b(?:step|iter|it)(\d+)\b", re.IGNORECASE)
_GLUED_EPOCH = re.compile(r"\b(?:epoch|ep|e)(\d+)(?=\b|_)", re.IGNORECASE)
_BATCH = re.compile(r"\bbatch\W{1,8}(\d+)\s*/\s*(\d+)\b", re.IGNORECASE)
# "loss at epoch 3, batch 20: 2.3", "loss after 500 of 900 iterations: 2.3", "loss[12] = 2.3"
_COUNTED = r"(?:steps?|iterations?|iters?|epochs?|(?:mini[ -]?)?batch(?:es)?|updates?|episodes?|rounds?)"
_LOSS_AT = re.compile(
    rf"\b(?P<loss>\w*loss\w*|cost)(?: \([^)]*\))? ?(?:\[(?P<at>\d+)\]"
    rf"|(?:at|@|on|in|after|for) (?:the )?(?:{_COUNTED}\s+#?(?P<n>\d+)"
    rf"|(?P<m>\d+)(?:st|nd|rd|th)?(?: (?:of|out of) \d+|/\d+)? {_COUNTED}\b)"
    rf"(?:,?(?: and)? {_COUNTED}(?: (?:index|number|idx))?\s+(?P<then>\d+))?"
    r"|(?:step|iteration|iter|epoch)\[(?P<of>\d+)\](?=\s*[:=]))",
    re.IGNORECASE,
)
# "Step: 12ms" is a duration
_TAKEN = re.compile(
    r"\b(?:step|iter|iteration|batch|it): ?[\d.]+(?:ms|us|µs|s|h|m)(?:\d+\w+)?\b", re.IGNORECASE
)
_DASHED_TO = re.compile(
    r"\b(epoch|step|iter|iteration|batch)-(\d+)(?![\w.-])", re.IGNORECASE
)  # Batch-3/Epoch-1
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
_LOSS_PERCENT = re.compile(r"(\btrain(?:ing)? loss\s*[:=]\s*\d+\.\d+)\s?%", re.IGNORECASE)
_PARTED = re.compile(r"\.\.(?=[A-Za-z])")  # seconds..Epoch 3/10..
_LEADERS = re.compile(r"\s*\.{3,}:?\s*")  # loss ......... 2.31
# loss -> 2.31, loss => 2.31, loss := 2.31; not "from 2.31 -> 2.28", whose arrow stands between numbers.
_ARROW = re.compile(
    r"(?<=[A-Za-z_)\]])(?<!\binf)(?<!\bnan)\s*(?:-{1,2}>|=>|→|:=)\s*(?=[-+]?(?:[\d.]|nan\b|inf\b))",
    re.IGNORECASE,
)
_WITHIN = re.compile(r"[\[(]\s*(\d+)\s*/\s*(\d+)\b")
# A norm of several groups: the first.
_NORMS = re.compile(r"(\w*norm)\s*[=:]\s*\{['\"]\w+['\"]:\s*(?=[-+\d.n])", re.IGNORECASE)
# |g|=0.9, ||grad||: 0.9, ‖∇L‖ 0.9, η=1e-4
_BARRED_NORM = re.compile(r"(?:\|{1,2}|‖)(?:g|grad|∇|∇L)(?:\|{1,2}|‖)(?=\s*[:=]?\s*[-+\d.n])", re.IGNORECASE)
_OWNER = re.compile(r"(?<=\w)'s (?=\w)")  # LightGBM's training's l2
_DEVIATION = re.compile(
    r"(?<=\d)(?: ?±| ?\+/?- ?|\+) ?\d+\.\d+(?:e[-+]?\d+)?", re.IGNORECASE
)  # XGBoost's 0.48+0.01
_ETA = re.compile(r"(?<!\w)η(?=\s*[:=]?\s*\d)")
# Katib's {metricName: loss, metricValue: 2.3}; SageMaker's <loss>=2.3
_SPELT_OUT = re.compile(r"metricName: ([\w./-]+), metricValue: |<(\w+)>")
_WRAPPED = re.compile(
    r"\b(?:(?:np|numpy|torch|jnp)\.)?(?:float\d*|int\d*|bfloat16|tensor|array|FloatTensor)\(\[?",
    re.IGNORECASE,
)
_LEVEL = re.compile(
    r"^(?:(?:info|debug|warning|warn|error|root|main|train|trainer)\s+)+(?=\S)", re.IGNORECASE
)
# "1.23Test loss: 2.3": printed without a blank.
_GLUED = re.compile(r"(?<=\d)(?=[A-Z][a-z]+ ?[A-Za-z]*\s*[:=])")
# GradNorm: avg=0.9 max=2.1
_OF_EACH = re.compile(r"\b([A-Za-z_]\w*):[ ]+(?=(?:avg|mean|max|min|std|cur)\s*[=:])", re.IGNORECASE)
_OF_COUNTED = re.compile(r"\b(?:for|per|this|of|in|over|each)\b", re.IGNORECASE)
# A count behind a word of other letters: 评估 3:
_OTHER_COUNT = re.compile(r"[^\W\d_A-Za-z]\s*(\d+)\s*[:/|,]")
# "MSE loss ||y - Q(s, a)||: 2.3": a formula in between.
_LOSS_FAR = re.compile(
    rf"\b((?:[A-Za-z_][\w-]* ){{0,3}}\w*loss)\b[^:=\n]{{1,40}}(?::|=|\bis\b)\s*({NUMBER})(?=[\s,;|]|\.?$)",
    re.IGNORECASE,
)
# "0.4 s loss: 2.3": a unit is no word of the name after it.
_UNIT = re.compile(
    r"(?<=\d) ?(ms|us|s|sec|secs|seconds|GB|GiB|MB|MiB|(?:it|tok|tokens|samples|images|img|imgs|steps)/s(?:ec)?)"
    r"(?= (?:\w+[ _-]){0,3}\w*loss\b)",
    re.IGNORECASE,
)
# Loss D/G: 0.3/1.2, loss(s|e): 0.3|1.2: as many numbers as names.
_PAIRED = re.compile(
    rf"(?P<stem>\bloss\w*)?(?P<open>[ _]?[ (\[])?\b(?P<a>[A-Za-z]\w*) ?(?P<sign>[/|]) ?(?P<b>[A-Za-z]\w*)[)\]]?"
    rf"(?P<tail> loss(?:es)?)?"
    rf"\s*[:=]\s*(?P<x>{NUMBER}) ?(?P=sign) ?(?P<y>{NUMBER})(?![\w./|])",
    re.IGNORECASE,
)
# A scaled or weighted loss is no loss, nor is one of packets.
NO_LOSS = re.compile(
    r"scale|weight|coef|(?:packet|link|signal|heat|hearing|blood|stop|data)[ -]loss", re.IGNORECASE
)
# Where a logger was called: trainer:fit:120 -
_CALLED = re.compile(
    r"(?<![\w.:])[A-Za-z_][\w.]*:(?!(?:step|iter|iteration|epoch|it|batch|update):)[A-Za-z_<][\w<>]*:\d+"
    r"(?=\s+[-|]\s|\s*\])"
)


def _parted(both: re.Match[str]) -> str:
    """Two names with their two numbers one after the other, where they are losses; else the text as it was."""
    stem, tail = both["stem"] or "", both["tail"] or ""
    if not is_loss(f"{stem}{both['a']}{both['b']}{tail}"):
        return both[0]
    before = f"{stem} " if stem else both["open"] or ""
    return f"{before}{both['a']}{tail}: {both['x']}, {before}{both['b']}{tail}: {both['y']}"


def _spelt_out(found: re.Match[str]) -> str:
    return f"{found[1]}: " if found[1] else found[2]


# What hinders reading a line and what stands in its place, in this order. The signs, one of which is in every line that has the
# hindrance, spare the others the search.
_REWRITES: tuple[tuple[tuple[str, ...], re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (("] ",), _ABSL, ""),
    (("_", ":"), _CALLED, ""),
    (("'s ",), _OWNER, "_"),
    (("+", "±"), _DEVIATION, ""),
    (("{",), _NORMS, r"\1="),
    (("<", "metricName"), _SPELT_OUT, _spelt_out),
    ((":",), _TAKEN, ""),
    (("|g", "‖", "∇"), _BARRED_NORM, "grad_norm"),
    (("η",), _ETA, "lr"),
    (("=", ":"), _GLUED, " "),
    (("=", ": "), _OF_EACH, r"\1 "),
    (("/", "|"), _PAIRED, _parted),
    ((" ",), _UNIT, r"\1,"),
    (("...",), _LEADERS, ": "),
    ((">", "→", ":="), _ARROW, ": "),
    (("%",), _LOSS_PERCENT, r"\1"),
    (("..",), _PARTED, " "),
    (("last",), _SPAN, ""),
    ((" - ",), _DASHED, r"\1 \2"),
    (("-",), _DASHED_TO, r"\1 \2"),
    (("-",), _RANGE, r"\1\2"),
)


def named(line: str) -> tuple[str, LineValues]:
    """The line without what hinders reading it, and its numbers by name."""
    values: LineValues = {}
    for signs, hindrance, instead in _REWRITES:
        for sign in signs:
            if sign in line:
                line = hindrance.sub(instead, line)
                break
    if told := _LOSS_AT.search(line):
        line = line[: told.end("loss")] + line[told.end() :]
        if told["then"]:
            values["epoch"] = float(told["n"] or told["m"])
        values["step"] = float(told["at"] or told["then"] or told["n"] or told["m"] or told["of"])
    for said, digits, unit in _PAIR.findall(_WRAPPED.sub("", line) if "(" in line else line):
        name = _name(said)
        if name not in values:
            values[name] = number(digits, unit)
    if not any(is_loss(name) and not NO_LOSS.search(name) for name in values):
        far = _LOSS_FAR.search(line)
        if far is not None and not NO_LOSS.search(far[0]):
            values[far[1]] = number(far[2])
    return line, values


def placed(line: str, values: LineValues) -> LineValues:
    """The same numbers with a step, where the line shows it."""
    if "epoch" not in values and (batch := _BATCH.search(line)):
        # A batch beside its epoch's length; the epoch has no name.
        values = {name: x for name, x in values.items() if "batch" not in name.lower() or is_loss(name)}
        values["step"], values[OF] = float(batch[1]), float(batch[2])
        return values
    counters = {name.lower() for name in values if counter_of(name)} - {"epoch"}
    counted = bool(counters)
    if counters <= {"batch", "steps"}:  # only all lines together show whether they count
        for place_, length_ in _RATIO.findall(line):
            values.setdefault(f"/{length_}", float(place_))
        if not counted and (alone := _ALONE.search(line)):
            values.setdefault("#", float(alone[1]))
        if not counted and not line.isascii() and (other := _OTHER_COUNT.search(line)):
            values.setdefault("#", float(other[1]))
    if "epoch" not in values and (epoch_ := _GLUED_EPOCH.search(line)):
        values["epoch"] = float(epoch_[1])
    if place := _PLACE.search(line):
        values = {name: value for name, value in values.items() if name.lower() != "epoch"}
        epoch, at, length = (float(text.replace(",", "")) for text in place.groups())
        values["step"] = epoch * length + at
    elif not counted:
        values |= _uncounted(line)
    return values


def _uncounted(line: str) -> LineValues:
    """The step, and perhaps the epoch, of a line in which no name counts; empty where it shows none."""
    if steps := _STEPS.search(line):
        return {"step": float(steps[1])}
    if told := _LETTERS.search(line) or _NUMBERED.search(line):
        return {"step": float(told[1])}
    if two := _PAIR_OF_COUNTS.search(line):
        return {"epoch": float(two[1] or two[3]), "step": float(two[2] or two[4])}
    if both := _TWO_PLACES.search(line):
        return {"epoch": float(both[1] or both[3]), "step": float(both[2] or both[4])}
    if glued := _GLUED_STEP.search(line):
        return {"step": float(glued[1])}
    if within := _BAR.search(line) or _WITHIN.search(line):
        return {"step": float(within[1]), OF: float(within[2])}
    if opens := _OPENS.match(line):
        return {"step": float(opens[1]), OF: number(opens[2] or "")}
    return {}


def _name(said: str) -> str:
    """The name without a logger's level, and without words before a counter or before "loss"."""
    if not is_loss(said):  # Loss(gen) and Loss(disc) are two
        said = re.sub(r"(?<=\w)\([A-Za-z]\w*\)?$", "", said)  # lr(PiecewiseDecay)
    said = said.strip("()")
    bare = re.sub(r" (?:is|was|of)$", "", said)  # "loss is 2.31"
    if is_loss(said) and _OF_COUNTED.search(said):  # "loss for this batch" is no batch
        return said
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
    if " " not in said or said.lower().startswith("train loss"):
        return said
    bare = _LEVEL.sub("", said)
    return bare if is_loss(bare) or not said.lower().startswith("train") else said
