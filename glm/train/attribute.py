"""``glm attribute`` proves which one thing an event needs, by forks that each go without one.

    glm attribute RUN --event 3 [--budget 10m] [--json] [--html OUT]

An event's number is its place among the run's episodes, as ``stabilitylab spikes RUN`` lists them. From the newest kept state
before it (``flight/``, ``checkpoints/``) the command trains the run on unchanged to a few steps before the onset; the control from
there repeats the run to the last bit, and the command says whether it did. Then forks go without the update of a parameter group,
without a batch, at half the rate, in fp32, ... (``stabilitylab/attribution/ablation.py`` has the table), side by side over the
cores, and the search narrows the answer down within the budget. ``RUN/attribution/`` keeps the forks: after an interruption the
same command resumes where it stopped.

The result is an event ``attribution`` in ``events.jsonl`` and a section of the run's report.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glm.data.shards import open_data
from glm.errors import InputError
from glm.train.config import TrainConfig
from glm.train.event_options import event_parser, parsed
from glm.train.fork_loop import ForkLoop
from glm.train.replay_forks import config_of, data_of, episode_of, state_before
from glm.train.reproducibility import device_of, machine, otherwise, threads, threads_of
from stabilitylab.attribution import Attribution, Fork, LoopState, attribute
from stabilitylab.attribution.forks import signal_of
from stabilitylab.attribution.search import BEFORE
from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.runs import Run, load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes import Episode
from stabilitylab.telemetry import GRADIENT_NORM, LOSS, LOSS_SCALES, Event

SIGNALS = {LOSS: "loss", GRADIENT_NORM: "gradient_norm", **dict.fromkeys(LOSS_SCALES, "loss_scale")}
# The command trains so young a run from its beginning.
FROM_THE_START = 50
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's arguments.

    Attributes:
        run, event: the run, and its event's number.
        budget: seconds to spend.
        groups: globs of parameters to withhold together, instead of each layer's parts.
        before: steps ahead of the onset at which forks begin.
        processes: number of forks to train side by side; None: as many as fit the cores at the run's number of threads.
        threads: threads of each fork; None: as many as the run had.
        data: where the data are, if they have moved.
        device: device to train forks on; None: the kind of device that trained the run.
        from_start: train from the beginning where the run kept no state.
        json: print the result as JSON.
        html: file to write a page about it to.
    """

    run: Path
    event: int
    budget: float = 600.0
    groups: tuple[str, ...] = ()
    before: int = BEFORE
    processes: int | None = None
    data: Path | None = None
    device: str | None = None
    threads: int | None = None
    from_start: bool = False
    json: bool = False
    html: Path | None = None


def attribute_command(arguments: Sequence[str]) -> int:
    """Parse ``RUN --event N [flags]``, train the forks, print what they prove. Returns the exit code."""
    asked = parse_attribute(arguments)
    console = Console(stderr=True)
    proof = attribute_event(asked, console=console)
    if asked.json:
        print(json.dumps(json.loads(proof.event.to_json())["data"]))
    else:
        show(Console(), proof)
    if asked.html is not None:
        from stabilitylab.report.attribution_section import attribution_page  # draws: only where needed

        console.print(f"page: {attribution_page(load_run(asked.run), asked.html)}", highlight=False)
    return 0


def attribute_event(asked: Asked, *, console: Console) -> Attribution:
    """Train the forks and record what they prove.

    Raises:
        InputError: there is no such event, the run kept no state before it, a glob matches nothing, or the budget is too small.
    """
    run = load_run(asked.run)
    # The number of threads decides the order in which sums are added.
    number = asked.threads or threads_of(run)
    processes = asked.processes or max(1, _cores() // (number or _cores()))
    with threads(number):
        return _attribute_event(run, dataclasses.replace(asked, processes=processes), console)


def _attribute_event(run: Run, asked: Asked, console: Console) -> Attribution:
    config = config_of(run)
    episode = episode_of(run, asked.event)
    if config.parallel.ranks > 1:
        raise InputError(
            f"{run.path} was trained by {config.parallel.ranks} processes: forks know the local engine only"
        )
    if episode.signal not in SIGNALS:
        raise InputError(
            f"event {asked.event} of {run.path} is one of {episode.signal}: forks are judged by loss, gradient norm or loss scale"
        )
    folder = asked.data or data_of(run)
    device = device_of(run, asked.device)
    loop, state = _begun(asked, run, config, episode, folder, device, console)
    console.print(
        f"event {asked.event}: {episode.kind} at step {episode.onset}; from the state of step {state.index}, "
        f"{asked.processes} forks at a time, {asked.budget:g} s",
        highlight=False,
    )
    assert asked.processes is not None
    _recorded(asked.run, (), console)  # tell before spending the time
    several = asked.processes > 1
    proof = attribute(
        loop,
        episode,
        begin=state.index,
        state=state,
        original=_original(run, episode.signal, state.index),
        signal=SIGNALS[episode.signal],
        before=asked.before,
        budget=asked.budget,
        groups=asked.groups,
        memory=run.path / "attribution" / f"event-{asked.event}.jsonl",
        processes=asked.processes,
        open_loop=functools.partial(ForkLoop.of_run, asked.run.resolve(), folder.resolve(), device)
        if several
        else None,
        tell=_Progress(console),
        otherwise=otherwise(run, machine(device)),
    )
    _recorded(asked.run, [proof.event], console)
    return proof


def _recorded(path: Path, events: Sequence[Event], console: Console) -> None:
    """Write events to the run, unless another process writes there: the result is worth reading even while the run continues."""
    folder = RunFolder(path)
    try:
        folder.claim()
    except InputError as error:
        console.print(f"not recorded in the run: {error}", highlight=False, markup=False, soft_wrap=True)
        return
    try:
        folder.append_events(events)
    finally:
        folder.release()


def _begun(
    asked: Asked,
    run: Run,
    config: TrainConfig,
    episode: Episode,
    folder: Path,
    device: torch.device,
    console: Console,
) -> tuple[ForkLoop, LoopState]:
    """The loop, and the newest state from which forks can begin."""
    lost: list[InputError] = []
    state = state_before(run, max(0, episode.onset - asked.before), damaged=lost.append)
    for error in lost:
        console.print(
            f"left out, an older state is taken: {error}", highlight=False, markup=False, soft_wrap=True
        )
    if state is None and episode.onset > FROM_THE_START and not asked.from_start:
        keeps = (
            "a hard batch breaks nothing, so none is written to flight/: train with --checkpoint.every N"
            if episode.kind == "hard-batch"
            else "train with --checkpoint.ring 4, which writes one to flight/ when something breaks"
        )
        raise InputError(
            f"{run.path} keeps no {'whole ' * bool(lost)}state from before its event {asked.event} at step "
            f"{episode.onset}: {keeps}, or give --from-start to train up to it"
        )
    loop = ForkLoop(config, open_data(folder), device=device)
    if state is not None:
        return loop, LoopState(state.step, state, LoopState.of(loop, state.step).randomness)
    return loop, LoopState.of(loop, 0)


def _original(run: Run, metric: str, begin: int) -> dict[int, float]:
    """The run's records from ``begin`` on, up to the first event that forks do not repeat."""
    until = min(
        (event.step for event in run.events if event.kind in ("response", "rewind") and event.step > begin),
        default=None,
    )
    recorded = run.series(metric)
    found = {}
    for step, value in zip(recorded.index.tolist(), recorded.tolist(), strict=True):
        if until is None or step < until:
            name = SIGNALS[metric]
            found[int(step)] = signal_of({name: float(value)}, name)
    return found


class _Progress:
    """Prints one line for each fork that ends."""

    def __init__(self, console: Console) -> None:
        self._console, self._count = console, 0

    def __call__(self, fork: Fork) -> None:
        self._count += 1
        said = (
            f"fork {self._count}  {fork.verdict.word:8}  without {fork.without.words}  {fork.seconds:.1f} s"
        )
        self._console.print(said, highlight=False, markup=False, soft_wrap=True)


def show(console: Console, proof: Attribution) -> None:
    """Print the sentence, then the table."""
    console.print(proof.sentence, highlight=False, soft_wrap=True, markup=False)
    of = proof.yardstick
    same = {
        True: "bit-identical to the run",
        False: f"departs from the run at step {proof.departs}"
        + (f": forks have {proof.otherwise} (see --threads)" * bool(proof.otherwise)),
        None: "repeats itself",
    }
    console.print(
        f"control: {same[proof.repeats]}; height {of.height:.4g} over {of.base:.4g}, area {of.area:.4g}; "
        f"{len(proof.forks)} forks from step {proof.begin} to {of.end} in {proof.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if proof.needed is not None:
        console.print(f"needed: {proof.needed.words}", highlight=False, soft_wrap=True, markup=False)
    if proof.enough is not None:
        console.print(
            f"enough: updates of {proof.enough.where}", highlight=False, soft_wrap=True, markup=False
        )
    table = Table(title="What a fork was without, and what became of the event", title_justify="left")
    table.add_column("without", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for name in ("height", "area"):
        table.add_column(name, justify="right")
    for row in proof.rows:
        table.add_row(*row)
    print_table(console, table)
    if proof.untried:
        console.print(f"the budget ended before {len(proof.untried)} more", highlight=False)


def parse_attribute(arguments: Sequence[str]) -> Asked:
    """``RUN --event N [flags]``. Raises InputError for wrong ones."""
    own = event_parser("glm attribute", "Prove what an event needs, by forks that go without it.")
    own.add_argument("--budget", default="10m", help="time to spend: 90s, 10m, 1h (10m)")
    own.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="GLOB",
        help="parameters or modules to withhold together; may be repeated",
    )
    own.add_argument(
        "--before", type=int, default=BEFORE, help=f"steps before the onset at which forks begin ({BEFORE})"
    )
    own.add_argument("--processes", type=int, help="forks side by side (as many as the cores hold)")
    own.add_argument("--threads", type=int, help="threads of each fork (as many as the run had)")
    own.add_argument(
        "--from-start", action="store_true", help="train from the beginning where no state was kept"
    )
    own.add_argument("--json", action="store_true", help="print the result as JSON")
    own.add_argument("--html", type=Path, metavar="OUT", help="write a page of its own")
    words, _ = parsed(own, arguments)
    if words.before < 1 or any(
        number is not None and number < 1 for number in (words.processes, words.threads)
    ):
        raise InputError("glm attribute: --before, --processes and --threads are at least 1")
    return Asked(
        run=words.run,
        event=words.event,
        budget=seconds_of(words.budget),
        groups=tuple(words.group),
        before=words.before,
        processes=words.processes,
        threads=words.threads,
        data=words.data,
        device=words.device,
        from_start=words.from_start,
        json=words.json,
        html=words.html,
    )


def seconds_of(text: str) -> float:
    """90, 90s, 10m or 1h in seconds. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or not float(found[1]) > 0:
        raise InputError(f"--budget {text!r} is not a time: give seconds, or 90s, 10m, 1h")
    return float(found[1]) * _SECONDS[found[2]]


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows has it
        return os.cpu_count() or 1
