"""The instrument in the training loop: gives each step to ``stabilitylab.Monitor`` and returns what it noticed.

Every ``monitor.every`` steps it adds what only the trainer knows: where the gradient lies in its format (``range_probe``).

It records a mixture of data as ``train/<component>/mixture_share``: the shares at a step's first row. The last step has the loss on
the rows of ``heldout.rows`` as ``train/-/heldout_loss``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from glm.data.batch import Batch
from glm.data.loader import Loader
from glm.train.batch_rebuild import BatchDescriber
from glm.train.config import MonitorConfig
from glm.train.engine import Engine
from glm.train.events import Callback, StepInfo
from glm.train.gradient_summary import GradientSummary
from glm.train.heldout import heldout_loss, heldout_rows
from glm.train.loop import Trainer
from glm.train.range_probe import GradientRangeProbe
from glm.train.reproducibility import machine
from stabilitylab import Monitor
from stabilitylab.monitoring.schedule import Schedule
from stabilitylab.probes.base import Probe
from stabilitylab.probes.curvature import CurvatureProbe
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FormatProbe
from stabilitylab.probes.weights import WeightProbe
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event


class MonitorCallback(Callback):
    """Watches every layer of the trainer's model and writes the run folder's telemetry.

    Args:
        run: the folder, claimed by the caller; None: only the detector watches, and writes nothing.
        config: what to watch, how often.
        trackers: experiment trackers, by name.
    """

    def __init__(self, run: RunFolder | None, config: MonitorConfig, *, trackers: Sequence[str] = ()) -> None:
        self._run = run
        self._trackers = trackers
        self._config = config
        self._monitor: Monitor | None = None
        self._pending_state: Mapping[str, Any] = {}
        self._pending_events: list[Event] = []
        self._range = GradientRangeProbe()
        self._mixed: Loader | None = None
        self._heldout: Batch | None = None

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "the monitor is attached at train_start"
        return self._monitor

    def train_start(self, trainer: Trainer) -> None:
        self._engine = trainer.engine
        self._mixed = trainer.loader if trainer.config.sampling.mixture else None
        self._steps, self._heldout = trainer.config.steps, None
        if rows := trainer.config.heldout.rows:
            # Built now: data that hold out too little fail before training, not after.
            self._heldout = heldout_rows(
                trainer.loader.data,
                trainer.config.objective,
                length=trainer.config.model.length,
                rows=rows,
            )
        describe = None
        if self._run is not None:
            describe = BatchDescriber(self._run, trainer.loader, trainer.config.model.length)
        self._monitor = Monitor(
            trainer.engine.model,
            trainer.engine.optimizer,
            out=self._run,
            parameters=_parameters(trainer.engine),
            schedule=self._schedule(),
            probes=self._probes(trainer),
            sites=self._config.sites,
            tensorboard=self._config.tensorboard,
            trackers=self._trackers,
            describe_batch=describe,
            recorder=self._config.recorder,
            sharded=trainer.engine.sharded,
            scattered=trainer.engine.scattered,
            shard=trainer.engine.shard,
        )
        if self._pending_state:
            self._monitor.load_state_dict(self._pending_state)
        started = {
            **machine(trainer.engine.device),
            "from_step": trainer.step,
            "data": str(trainer.loader.data.path.resolve()),
        }
        self._pending_events.append(Event(step=trainer.step, kind="run-start", data=started))
        for event in self._pending_events:
            self._monitor.event(event)
        self._pending_events.clear()

    def _schedule(self) -> Schedule:
        own = self._config
        cadence = {
            "gradients": own.gradients_every,
            WeightProbe.name: own.weights_every,
            CurvatureProbe.name: own.curvature_every,
            FormatProbe.name: own.formats_every,
        }
        return Schedule(every=own.every, probes=cadence)

    def _probes(self, trainer: Trainer) -> list[Probe]:
        """All standard probes, and those that the configuration adds."""
        probes = [*all_probes(), self._range]
        if self._config.weights_every:
            probes.append(WeightProbe())
        if self._config.formats_every:
            probes.append(FormatProbe())
        if self._config.curvature_every and trainer.config.optimizer.kind == "adamw":

            def backward() -> None:
                # The step's own batch: the trainer moves its sample number after the update.
                rows = trainer.config.batch.rows_at(trainer.samples)
                batch = trainer.loader.samples(range(trainer.samples, trainer.samples + rows))
                with trainer.engine.on_trial():
                    trainer.engine.forward_backward(batch, trainer.step, trainer.engine.whole(batch, rows))

            probes.append(CurvatureProbe(backward))
        return probes

    def step_start(self, step: int) -> None:
        self.monitor.start_step(step)

    def gradients_ready(self, step: int, gradients: GradientSummary) -> None:
        self._range.take(g for name, g in gradients.accumulated.items() if not self._engine.repeats(name))
        self.monitor.gradients_ready(
            gradients=gradients.gradients, norms=gradients.norms, loss_scale=self._engine.loss_scale
        )

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        more = {}
        if self._heldout is not None and info.step + 1 == self._steps:
            more["heldout_loss"] = heldout_loss(self._engine.model, self._heldout)
        shares = self._mixed.mixture_at(info.first_sample) if self._mixed is not None else {}
        return self.monitor.step(
            info.step,
            loss=info.loss,
            gradient_norm=info.gradient_norm,
            learning_rate=info.learning_rate,
            loss_scale=info.loss_scale,
            skipped=info.skipped,
            tokens=info.tokens,
            targets=info.targets,
            seconds=info.seconds,
            data_seconds=info.data_seconds,
            embedding_gradient_shrink=info.embedding_gradient_shrink,
            first_sample=info.first_sample,
            **info.levers,
            **{f"train/{component}/mixture_share": share for component, share in shares.items()},
            **more,
        )

    def saving(self, step: int) -> None:
        self.monitor.flush()

    def event(self, event: Event) -> None:
        if self._monitor is None:  # before train_start: a resume tells its rewind first
            self._pending_events.append(event)
        else:
            self._monitor.event(event)

    def train_end(self) -> None:
        if self._monitor is not None:
            self._monitor.close()

    def state_dict(self) -> Mapping[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._monitor is None:
            self._pending_state = state
        else:
            self._monitor.load_state_dict(state)


def _parameters(engine: Engine) -> dict[str, Tensor]:
    """The trained parameters, by name."""
    return {name: one for name, one in engine.tensors()[0].items() if isinstance(one, nn.Parameter)}
