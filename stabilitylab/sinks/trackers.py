"""Trackers by name: ``Monitor(..., out="runs/x", trackers=["wandb"])``, ``glm train --trackers wandb,mlflow``.

A sink uses the run that the process has begun already; else it begins one under the run folder's name in the project (experiment)
``stabilitylab``, with the run's ``config.json``, and ends it with the monitor. The trackers' own variables say the rest
(``WANDB_PROJECT``, ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ``TRACKIO_PROJECT``).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from stabilitylab.errors import InputError
from stabilitylab.runs.config import flat
from stabilitylab.sinks.base import Sink

NAMES = ("wandb", "mlflow", "trackio")
PROJECT = "stabilitylab"
BEGIN_SECONDS = 30.0
T = TypeVar("T")
_log = logging.getLogger("stabilitylab")


def names_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """The given names, checked: known here and installed.

    Raises:
        InputError: one is not.
    """
    words = given.split(",") if isinstance(given, str) else list(given)
    names = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    for name in names:
        if name not in NAMES:
            raise InputError(f"there is no tracker {name!r}: choose among {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the tracker {name} is not installed: pip install 'stabilitylab[trackers]', or pip install {name}"
            )
    return names


def open_trackers(names: Iterable[str], folder: Path | None) -> list[Sink]:
    """A sink for each. Tells of one that cannot begin (no login, no server), and leaves it out: training does not wait for it."""
    sinks: list[Sink] = []
    config = _config(folder)
    title = folder.resolve().name if folder is not None else None
    for name in names:
        try:
            sinks.append(_OPEN[name](title, config, folder))
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:200]
            _log.warning(
                "%s cannot begin a run (%s: %s); training continues without it",
                name,
                type(error).__name__,
                said,
            )
    return sinks


def _config(folder: Path | None) -> Mapping[str, Any]:
    if folder is None:
        return {}
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wandb(title: str | None, config: Mapping[str, Any], folder: Path | None) -> Sink:
    import wandb

    from stabilitylab.sinks.wandb_sink import WandbSink

    if wandb.run is not None:
        return WandbSink(wandb.run)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(project=project, name=title, config=dict(config), dir=folder, settings=settings)
    return WandbSink(run, owned=True)


def _mlflow(title: str | None, config: Mapping[str, Any], folder: Path | None) -> Sink:
    import mlflow
    from mlflow.entities import Param

    from stabilitylab.sinks.mlflow_sink import MlflowSink

    client = mlflow.MlflowClient()
    if (active := mlflow.active_run()) is not None:
        return MlflowSink(active.info.run_id, client=client)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)

    def begin() -> str:
        experiment = client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment is not None else client.create_experiment(name)
        run = client.create_run(identity, run_name=title)
        params = [Param(key, str(value)[:500]) for key, value in flat(config).items()][:100]
        if params:
            client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    # By default MLflow tries a silent server for some four minutes.
    return MlflowSink(_within(BEGIN_SECONDS, begin), client=client, owned=True)


def _within(seconds: float, begin: Callable[[], T]) -> T:
    """The result of ``begin``, from a thread that this call abandons where it takes longer."""
    done: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((begin(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, name="stabilitylab-tracker-begins", daemon=True).start()
    try:
        begun, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast(T, begun)


def _trackio(title: str | None, config: Mapping[str, Any], folder: Path | None) -> Sink:
    import trackio
    from trackio import context_vars

    from stabilitylab.sinks.trackio_sink import TrackioSink

    if (current := context_vars.current_run.get()) is not None:
        return TrackioSink(current)
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project=project, name=title, config=dict(flat(config)), embed=False)
    return TrackioSink(run, owned=True)


_OPEN = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
