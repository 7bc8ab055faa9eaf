"""Events as sentences, one line each, for a terminal and a log.

- step 34: the responder answered the non-finite of train/-/loss since step 34: back to step 34, learning rate x 0.5
- step 32: overflow: the output of layers.3.feed_forward.down left the number format
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabilitylab.monitoring.alarms import TOLD, alarm_line
from stabilitylab.spikes import KINDS
from stabilitylab.telemetry import Event

LONGEST_VALUE = 80


def event_line(event: Event) -> str:
    """What happened, as a person would say it."""
    data = event.data
    if event.kind == "response":
        return f"step {event.step}: {_response(data)}"
    if event.kind == "rewind":
        why = f": {data['why']}" if data.get("why") else ""
        return f"step {event.step}: training went on from here{why}"
    if event.kind == "recovered" and data.get("problem"):
        return f"step {event.step}: recovered: {' '.join(str(data['problem']).split())}"
    if event.kind == "overflow" and "site" in data:
        tensor = str(data.get("tensor", "a number")).replace("_", " ")
        return f"step {event.step}: overflow: the {tensor} of {data['site']} left the number format"
    if event.kind == "diagnosis" and isinstance(data.get("sentences"), Sequence):
        return f"step {event.step}: why: {' '.join(map(str, data['sentences'][:3]))}"
    if event.kind in TOLD or event.kind in KINDS:
        if data.get("phase") == "end" and data.get("to_the_end"):
            return f"step {event.step}: {event.kind} that began at step {data.get('onset')} was not over when the run ended"
        if data.get("phase") == "end" and data.get("end") is not None:
            return f"step {event.step}: {event.kind} that began at step {data.get('onset')} is over, its last step {data['end']}"
        return alarm_line(event)
    words = ", ".join(f"{name} {value}" for name, value in _plain(data))
    return f"step {event.step}: {event.kind.replace('-', ' ')}" + (f": {words}" if words else "")


def _response(data: Mapping[str, Any]) -> str:
    """A decision: "the responder answered the non-finite of train/-/loss since step 34: back to step 34, rate x 0.5"."""
    reason = data.get("reason")
    cause = ""
    if isinstance(reason, Mapping) and "kind" in reason:
        since = f" since step {reason['onset']}" if "onset" in reason else ""
        cause = f" the {reason['kind']} of {reason.get('signal', 'the run')}{since}"
    skipped = int(data.get("skip_batches") or 0)
    done = [
        f"back to step {data['back_to']}" if data.get("back_to") is not None else "",
        f"learning rate x {data['rate_factor']:g}" if data.get("rate_factor") is not None else "",
        f"embedding gradient x {data['alpha']:g}" if data.get("alpha") is not None else "",
        f"clip at {data['clip']:g}" if data.get("clip") is not None else "",
        f"{skipped} {'batch' if skipped == 1 else 'batches'} left out" if skipped else "",
    ]
    said = ", ".join(filter(None, done)) or str(data.get("kind", "nothing")).replace("-", " ")
    return f"the responder answered{cause}: {said}"


def _plain(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values without brackets and quotes; long ones are cut, with their length."""
    for name, value in data.items():
        words = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _plain(value, f"{words} ")
            continue
        text = " and ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        text = " ".join(text.split())
        if value is not None and text:
            yield (
                words,
                text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text)} characters)",
            )
