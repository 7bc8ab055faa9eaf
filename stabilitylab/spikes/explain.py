"""The diagnoses of a finished run, and the outcomes of its responses, as events for ``events.jsonl``, TensorBoard and the
report."""

from __future__ import annotations

from collections.abc import Callable

from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.forensics import diagnose, explicable
from stabilitylab.spikes.treatment_outcomes import OUTCOME, outcomes
from stabilitylab.telemetry import DEPARTURES, Event

# Nobody understands a run that breaks a hundred times by reading a hundred diagnoses: explain the gravest.
MOST = 20
_GRAVITY = (
    "divergence",
    "spike",
    "non-finite",
    "dead",
    "frozen",
    "loss-scale-collapse",
    *sorted(DEPARTURES),
    "hard-batch",
)


def explain(run: RunFolder, *, describe_batch: Callable[[int], list[str]] | None = None) -> list[Event]:
    """A ``diagnosis`` event for each of the gravest episodes that has none yet, in the order of their onsets.

    Args:
        run: a run folder whose telemetry and events are on disk.
        describe_batch: step -> the documents and token ranges of its batch.
    """
    loaded = load_run(run.path)
    known = {_name(event.data["episode"]) for event in loaded.events if event.kind == "diagnosis"}
    open_questions = [one for one in explicable(loaded.events) if (one.onset, one.signal) not in known]
    gravest = sorted(open_questions, key=_gravity)[:MOST]
    gravest.sort(key=lambda one: one.onset)
    return [diagnose(loaded, one, describe_batch=describe_batch).event for one in gravest]


def write_diagnoses(
    run: RunFolder, *, describe_batch: Callable[[int], list[str]] | None = None
) -> list[Event]:
    """Write the outcomes of a run's responses, then the diagnoses of its episodes, into its ``events.jsonl``, and these as text
    into its TensorBoard folder if it has one."""
    if not run.events.is_file():
        return []
    loaded = load_run(run.path)
    known = {event.step for event in loaded.events if event.kind == OUTCOME}
    run.append_events([event for event in outcomes(loaded) if event.step not in known])
    events = explain(run, describe_batch=describe_batch)
    run.append_events(events)
    if events and run.tensorboard.is_dir():
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.tensorboard), filename_suffix=".diagnoses") as writer:
            for event in events:
                text = "\n".join(f"- {sentence}" for sentence in event.data["sentences"])
                writer.add_text("diagnoses", text, event.step)
    return events


def _gravity(one: Episode) -> tuple[int, float]:
    place = _GRAVITY.index(one.kind) if one.kind in _GRAVITY else len(_GRAVITY)
    return place, -(one.height or 0.0)


def _name(episode: dict[str, object]) -> tuple[object, object]:
    return episode["onset"], episode["signal"]
