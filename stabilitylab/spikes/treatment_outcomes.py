"""Whether a treatment of an event helped, recorded in the run as events ``outcome``.

    of a response    the event that it answers is over ``WITHIN`` steps after training went on from it, without a further decision
                     and without another event, hard batches aside
    of a replay      the fork's verdict is "prevented": nothing like the event came in it (``glm replay`` writes that)

An outcome that is not known yet (the run ended sooner) is not recorded. A run's outcomes include its own, those of its forks under
``replays/``, and those of the runs next to it: a suite's arms, or whatever else is in the same folder.

An outcome's ``treatment`` is a policy's word (skip-batch, lower-rate, clip, ...) or the name of the setting that a fork changed. A
fork that changed several settings says nothing about any one of them, and counts under all their names joined.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stabilitylab.runs import Run
from stabilitylab.spikes.episodes import episodes_of
from stabilitylab.telemetry import LOSS, Event

WITHIN = 64
OUTCOME = "outcome"
# A fork's change -> the policy that does the same.
TREATMENTS = {
    "optimizer.clip": "clip",
    "rate-factor": "lower-rate",
    "schedule.peak": "lower-rate",
    "skip": "skip-batch",
    "model.embedding.gradient-shrink": "shrink-embedding-gradient",
    "optimizer.update-clipping": "update-clipping",
    "model.attention.soft-cap": "soft-cap",
    # A cap needs these: beside one they are no treatment of their own.
    "model.attention.softmax": "",
}
_MOST_FILES, _LARGEST = 500, 1 << 24


def outcomes(run: Run) -> list[Event]:
    """An event ``outcome`` at the step of each response that can be judged by now."""
    responses = [event for event in run.events if event.kind == "response" and _asked(event) is not None]
    if not responses:
        return []
    loss = run.series(LOSS)
    last = int(loss.index.max()) if len(loss) else -1
    found = []
    for i, response in enumerate(responses):
        if response.data.get("kind") == "give-up":
            continue
        helped = _helped(run, response, responses[i + 1 :], last)
        if helped is not None:
            reason = dict(response.data["reason"])
            told = {name: reason.get(name) for name in ("kind", "signal", "onset")}
            data = {"of": "response", "treatment": response.data["kind"], "event": told, "within": WITHIN}
            found.append(Event(step=response.step, kind=OUTCOME, data={**data, "helped": helped}))
    return found


def treatment_of(change: Sequence[str]) -> str:
    """A fork's treatment: its changes are words ``name=value``."""
    names = {_name(*word.split("=", 1)) for word in change if "=" in word}
    return "+".join(sorted(names - {""} or names))


def tally(run: Run, treatment: str) -> tuple[int, int]:
    """How often a treatment helped, and in how many recorded outcomes."""
    own = [event.data for event in outcomes(run)]
    others = [data for data in _recorded(run.path) if data.get("of") != "response"]
    beside = [data for path in _beside(run.path) for data in _recorded(path)]
    alike = [data for data in (*own, *others, *beside) if data.get("treatment") == treatment]
    return sum(data.get("helped") is True for data in alike), len(alike)


def record_of(run: Run, treatment: str) -> str:
    """The tally as a sentence, with a space before it; empty where no run tried the treatment."""
    helped, of = tally(run, treatment)
    return f" {TRIED} {treatment} ended the event in {helped} of {of}." if of else ""


TRIED = "In recorded runs:"


def _name(setting: str, value: str) -> str:
    plain = setting.replace("_", "-")
    return value if plain == "responder.policy" else TREATMENTS.get(plain, plain)


def _asked(response: Event) -> str | None:
    reason = response.data.get("reason")
    return str(reason.get("kind")) if isinstance(reason, dict) else None


def _helped(run: Run, response: Event, later: Sequence[Event], last: int) -> bool | None:
    back_to = response.data.get("back_to")
    begins = response.step + 1 if back_to is None else int(back_to)
    until = begins + WITHIN
    if later and later[0].step <= until:
        return False
    for one in episodes_of(run.events):
        if one.kind == "hard-batch" or one.onset > until:
            continue
        end = math.inf if one.end is None or one.to_the_end else one.end
        if one.onset >= begins or end > until:
            return False
    return True if last >= until else None


def _recorded(path: Path) -> Iterator[dict[str, Any]]:
    """The recorded outcomes of a run and its forks. Files are read, not judged: an unreadable one is left out."""
    for file in (path / "events.jsonl", *sorted(path.glob("replays/*/*/events.jsonl"))):
        try:
            if file.stat().st_size > _LARGEST:
                continue
            text = file.read_bytes()
        except OSError:
            continue
        if b'"outcome"' not in text:
            continue
        for line in text.splitlines():
            if b'"outcome"' in line:
                try:
                    body = json.loads(line)
                except ValueError:
                    continue
                if (
                    isinstance(body, dict)
                    and body.get("kind") == OUTCOME
                    and isinstance(body.get("data"), dict)
                ):
                    yield body["data"]


def _beside(path: Path) -> Iterator[Path]:
    try:
        folders = sorted(one for one in path.resolve().parent.iterdir() if (one / "events.jsonl").is_file())
    except OSError:
        return
    yield from (one for one in folders[:_MOST_FILES] if one != path.resolve())
