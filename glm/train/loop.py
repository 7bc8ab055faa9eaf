"""The training loop, which is the pseudocode at the head of ``glm/train/events.py``, and the state that a checkpoint holds.

Everything on which a step depends is in the configuration, a function of (seed, step or sample index), or in the state saved here:
so a killed and resumed run ends with the weights of an uninterrupted one, bit for bit.

A checkpoint that cannot be written, for example on a full disk, costs only itself: the loop records ``checkpoint-lost``, keeps the
older ones, trains on, and tries the next one when it is due. The run fails only where it cannot save its last state, or its state
when asked to stop. Where the launcher is gone nobody would start the run again: all processes save and end.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

from glm.data.loader import Loader
from glm.errors import InputError
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.engine import Engine
from glm.train.events import Callback, StepInfo
from glm.train.intervention import Intervention
from glm.train.state_ring import StateRing
from glm.train.unused_settings import idle_by_hand
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes import Policy, Responder
from stabilitylab.telemetry import Event

# Where a run folder keeps states from before events, and how long before.
FLIGHT = "flight"
REPLAY_MARGIN = 20


def ring_for(config: TrainConfig, *, answers: bool = False) -> StateRing | None:
    """The ring that the responder's rollbacks and the replay of events need; ``answers``: a custom policy may go back."""
    if config.responder.active or answers:
        return StateRing.covering(config.responder.rollback_steps)
    if config.checkpoint.ring:
        return StateRing(every=config.checkpoint.ring_every, size=config.checkpoint.ring)
    return None


class Trainer:
    """A run: configuration, engine, data, observers, responder, and its progress.

    Args:
        config: the settings that determine the numbers.
        engine: computes updates.
        loader: gives the rows by sample index.
        run: where checkpoints go; None keeps none.
        callbacks: observers, which hear every event in this order.
        responder: a custom policy; None: the configuration's.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        loader: Loader,
        *,
        run: RunFolder | None = None,
        callbacks: Sequence[Callback] = (),
        responder: Policy | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.processes = engine.processes
        self.loader = loader
        self.run = run
        self.callbacks = tuple(callbacks)
        self.responder: Policy = Responder(config.responder) if responder is None else responder
        self.intervention = Intervention()
        self.step = 0
        self.samples = 0
        self.tokens = 0
        self.stop_requested = False
        # Set by a callback that gives the run up (``glm/train/lost_run.py``): the run then ends, complete.
        self.lost = False
        self._ring = ring_for(config, answers=responder is not None)
        # The newest state saved, or being saved.
        self._saved_at: int | None = None
        self._writing: CheckpointWriter | None = None

    def train(self, *, until: int | None = None) -> bool:
        """Make the remaining updates, or those before ``until``. Returns whether the run is complete (False: something asked it to
        stop).
        """
        # A fork may lack what the run had; a custom policy may read settings that the configuration's does not.
        if self.step == 0 and until is None and isinstance(self.responder, Responder):
            for line in idle_by_hand(self.config):
                warnings.warn(line, stacklevel=2)
        end = self.config.steps if until is None else min(until, self.config.steps)
        try:
            for callback in self.callbacks:
                callback.train_start(self)
            while self.step < end and not self._stops():
                self._one_step()
            _give_back_memory()
            self._save_last()
            complete = self.lost or self.step >= self.config.steps
            self.tell(
                Event(
                    step=self.step,
                    kind="run-end" if complete else "interrupted",
                    data={"lost": True} if self.lost else {},
                )
            )
            return complete
        finally:
            if self._writing is not None:
                self._writing.leave(keep=self.config.checkpoint.keep)
            for callback in self.callbacks:
                callback.train_end()

    def advance(self, step: int) -> Checkpoint:
        """Train on up to ``step`` and return the state there, with the observers' state, before they close."""
        for callback in self.callbacks:
            callback.train_start(self)
        try:
            while self.step < step and not self._stops():
                self._one_step()
            return self.state()
        finally:
            for callback in self.callbacks:
                callback.train_end()

    def tell(self, event: Event) -> None:
        """Give an event to every observer."""
        for callback in self.callbacks:
            callback.event(event)

    def _stops(self) -> bool:
        """Whether something asked any process to stop, or no launcher is left that would start the run again."""
        return self.processes.any(self.lost or self.stop_requested or self.processes.forsaken)

    def _one_step(self) -> None:
        started = time.perf_counter()
        step, schedule, intervention = self.step, self.config.schedule, self.intervention
        if self._ring is not None and self._ring.is_due(step):
            self._ring.keep(self.state())
        for callback in self.callbacks:
            callback.step_start(step)
        rows = self.config.batch.rows_at(self.samples)
        self.samples += intervention.skipped_before(step) * rows
        learning_rate = schedule.learning_rate(step, self.config.steps) * intervention.rate_factor
        alpha = intervention.shrink(
            schedule.embedding_gradient_shrink(step, self.config.model.embedding.gradient_shrink)
        )
        self.engine.set_embedding_gradient_shrink(alpha)
        self.engine.withhold(intervention.held_at(step))
        own = self.engine.own_rows(rows)
        batch = self.loader.samples(range(self.samples + own.start, self.samples + own.stop))
        data_seconds = time.perf_counter() - started

        scale = self.engine.loss_scale
        whole = self.engine.whole(batch, rows)
        loss = self.engine.forward_backward(batch, step, whole)
        gradients = self.engine.gradients()
        for callback in self.callbacks:
            callback.gradients_ready(step, gradients)
        applied = self.engine.update(learning_rate, clip=intervention.clipping(self.config.optimizer.clip))

        self.step += 1
        self.samples += rows
        tokens = rows * batch.tokens_BT.shape[1]
        self.tokens += tokens
        info = StepInfo(
            step=step,
            loss=loss,
            gradient_norm=gradients.global_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            targets=whole.targets,
            loss_scale=scale,
            skipped=not applied,
            seconds=time.perf_counter() - started,
            embedding_gradient_shrink=alpha,
            data_seconds=data_seconds,
            first_sample=self.samples - rows,
            levers=self.engine.levers(),
        )
        noticed = [event for callback in self.callbacks for event in callback.step_end(info)]
        # One process judges; all answer what it notices.
        if self.processes.any(bool(noticed)):
            noticed = self.processes.from_first(noticed)
        self._keep_for_replay(noticed)
        self._respond(noticed, step)
        self._settle(wait=False)
        every = self.config.checkpoint.every
        if every and self.step % every == 0 and self._saved_at != self.step:
            self.save()

    def _keep_for_replay(self, noticed: Sequence[Event]) -> None:
        """When something breaks, save a state from before it."""
        onsets = [int(event.data["onset"]) for event in noticed if event.is_alarm]
        if not onsets or self._ring is None or self.run is None:
            return
        state = self._ring.newest_at(min(onsets) - REPLAY_MARGIN)
        if state is None:
            return
        if self.processes.from_first(checkpoints.path_of(self.run.path / FLIGHT, state.step).exists()):
            return
        try:
            self.engine.save(self.run.path / FLIGHT, state, keep=self.config.checkpoint.ring_keep)
        except OSError as error:
            reason = f"the state before the event could not be kept: {error}"
            self.tell(Event(step=self.step, kind="telemetry-lost", data={"reason": reason}))

    def _respond(self, noticed: Sequence[Event], step: int) -> None:
        """Let the responder decide, and carry it out."""
        # A ring holds a state from its first step on: only without a ring may there be nothing to go back to.
        before = self.responder.state_dict() if self._ring is None else None
        decision = self.responder.decide(noticed, step)
        if decision.kind == "continue":
            return
        state = None
        if decision.back_to is not None and self._ring is not None:
            state = self._ring.take_back(decision.back_to)
        if state is not None:
            # The oldest kept state may be younger than asked for; the loop then leaves out batches from there.
            decision = replace(decision, back_to=max(state.step, decision.back_to or 0))
        elif decision.back_to is not None:
            if (decision.rate_factor, decision.alpha, decision.clip) == (None, None, None):
                # The loop can do nothing, so it neither records the decision nor charges the budget for it.
                if before is not None:
                    self.responder.load_state_dict(before)
                return
            decision = replace(decision, back_to=None, skip_batches=0)
        self.intervention = self.intervention.after(decision)
        if state is not None:
            self._go_back(state, asked=decision.back_to or 0)
        # Record the decision once carried out, as carried out.
        self.tell(decision.event)

    def _go_back(self, state: Checkpoint, *, asked: int) -> None:
        """Train on from a kept state."""
        self._settle()
        # Decisions outlive the history that they take back, and so does the budget that paid for them.
        responder, intervention = self.responder.state_dict(), self.intervention
        self.restore(state)
        self.responder.load_state_dict(responder)
        self.intervention = intervention
        if self.run is not None and self.processes.leads:
            checkpoints.drop_after(self.run.checkpoints, self.step)
            checkpoints.drop_after(self.run.path / FLIGHT, self.step)
        self._saved_at = None
        self.tell(Event(step=self.step, kind="rewind", data={"why": "the responder went back", "to": asked}))

    # -------------------------------------------------------------------------------------------------- states

    def save(self) -> OSError | None:
        """Begin a checkpoint of the present state, and unless it is asynchronous finish it. Returns why it could not be written;
        the older ones then stay, and training continues.
        """
        if self.run is None:
            return None
        self._settle()
        # Telemetry first: a run resumed from the checkpoint will not see these steps again.
        for callback in self.callbacks:
            callback.saving(self.step)
        background = self.config.checkpoint.asynchronous
        try:
            self._writing = self.engine.begin_save(self.run.checkpoints, self.state(), background=background)
        except OSError as error:
            return self._lost(self.step, error)
        self._saved_at = self.step
        return None if background else self._settle()

    def _save_last(self) -> None:
        """Make sure that the present state is on disk. Raises OSError where that fails."""
        lost = self._settle()
        if self._saved_at != self.step:
            lost = self.save() or self._settle()
        if lost is not None and self._saved_at != self.step:
            raise lost

    def _settle(self, *, wait: bool = True) -> OSError | None:
        """Publish the checkpoint being written; unless ``wait``, only if all have written it. Returns why that failed."""
        writing = self._writing
        if writing is None or (not wait and self.processes.any(not writing.done)):
            return None
        self._writing = None
        try:
            path = writing.publish(keep=self.config.checkpoint.keep)
        except OSError as error:
            return self._lost(writing.step, error)
        self.tell(Event(step=writing.step, kind="checkpoint", data={"path": path.name}))
        return None

    def _lost(self, step: int, error: OSError) -> OSError:
        self._saved_at = None
        self.tell(Event(step=step, kind="checkpoint-lost", data={"reason": str(error)}))
        return error

    def state(self) -> Checkpoint:
        """Everything on which the next step depends. The tensors are live."""
        weights, moments = self.engine.tensors()
        return Checkpoint(
            step=self.step,
            model=weights,
            optimizer=moments,
            state={
                "samples": self.samples,
                "tokens": self.tokens,
                "data": self.loader.fingerprint,
                "engine": self.engine.state_dict(),
                "responder": self.responder.state_dict(),
                "intervention": self.intervention.state_dict(),
                "callbacks": {callback.state_name: callback.state_dict() for callback in self.callbacks},
            },
        )

    def restore(self, state: Checkpoint) -> None:
        """Continue from a state. Raises InputError where it belongs to another model or other data."""
        saved = state.state
        if saved["data"] != self.loader.fingerprint:
            raise InputError(
                f"the checkpoint was trained on other data ({saved['data']}, here {self.loader.fingerprint}): "
                "give --data as it was"
            )
        self.engine.load_tensors(state.model, state.optimizer)
        self.engine.load_state_dict(saved["engine"])
        self.step, self.samples, self.tokens = state.step, saved["samples"], saved["tokens"]
        self.responder.load_state_dict(saved["responder"])
        self.intervention = Intervention.from_state(saved["intervention"])
        for callback in self.callbacks:
            if (own := saved["callbacks"].get(callback.state_name)) is not None:
                callback.load_state_dict(own)
        self._saved_at = self.step


def _give_back_memory() -> None:
    """Free the steps' memory before closing the run imports and draws: both together would be a tiny run's peak."""
    # Imported here: a run that begins does not need the models' package.
    from stabilitylab.models.freed_memory import give_back_memory

    give_back_memory()
