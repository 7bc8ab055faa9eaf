"""C2. Does the spike come from the embedding? Replays with one group's updates withheld.

From a state 24 to 25 steps before each collapse a fork trains on as the run did, except that one group of parameters stands still
until two steps after the original's collapse. A group is *necessary* if the collapse does not come without its updates, and
*sufficient* if it comes with its updates alone. The group's share of the gradient norm tells neither.

The moments of a group stand still with it, as in ``glm replay --hold``. In the first runs of this study (seeds 1 to 24) they went
on, so the group leapt once released; those runs do not count, and these seeds are fresh.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.arm import Arm
from experiments.study import Cell, Outcome, Study
from experiments.suites._collapse import CLIMB, collapsing, comes_again
from experiments.suites._proxy import proxy_text
from experiments.verdicts import Claim

BEFORE, AFTER = 24, 2
GROUPS = {"embedding": "embedding", "attention": "attention", "feed-forward": "feed_forward", "norm": "norm"}


def measure(cell: Cell) -> Mapping[str, float]:
    run = collapsing(cell.config, cell.data)
    if run.onset is None or run.onset < 2 * BEFORE:
        return {"collapsed": 0.0}
    name = cell.arm.name
    if name == "unchanged":
        came = comes_again(run, cell.data, before=BEFORE)
    else:
        kind, _, group = name.partition("-")
        chosen = GROUPS.get(group)
        came = comes_again(
            run,
            cell.data,
            before=BEFORE,
            until=AFTER,
            withheld=lambda one: (
                (kind == "hold" and (chosen is None or one == chosen)) or (kind == "only" and one != chosen)
            ),
        )
    return {"collapsed": 1.0, "came": float(came)}


ARMS = (
    Arm(name="unchanged", summary="control: the fork is the run"),
    *(Arm(name=f"hold-{group}", summary=f"the {group} stands still") for group in GROUPS),
    *(
        Arm(name=f"only-{group}", summary=f"all but the {group} stands still")
        for group in GROUPS
        if group != "norm"
    ),
    Arm(name="hold-all", summary="nothing moves: what the batches alone do"),
)

STUDY = Study(
    name="cause",
    question="Does a collapse need the embedding's last updates, and do they suffice for it?",
    arms=ARMS,
    first=101,
    seeds=24,
    settings={**CLIMB, "model.norm": "deepnorm"},
    data=proxy_text,
    measure=measure,
    outcomes={"came": Outcome(title="The collapse comes", margin=0.2, unit="share")},
    claims=(
        Claim(
            text="C2 Without the embedding's updates the collapse does not come (necessity)",
            metric="came",
            arm="hold-embedding",
            baseline="unchanged",
        ),
        *(
            Claim(
                text=f"C2 The embedding's updates are needed more than the {group}'s",
                metric="came",
                arm="hold-embedding",
                baseline=f"hold-{group}",
            )
            for group in ("attention", "feed-forward")
        ),
        Claim(
            text="C2 The embedding's updates suffice more than the feed-forward's",
            metric="came",
            arm="only-embedding",
            baseline="only-feed-forward",
            direction="more",
        ),
    ),
    predictions=(
        "2026-11-29, before the runs: against. The feed-forward and attention are needed more than the embedding, whose share "
        "of the norm fell before the collapses of the earlier suite.",
        "2026-11-29, before the runs with moments that stand still, after those without: the same; and with all held the collapse "
        "comes in fewer than half of the forks, where it came in 11 of 11.",
    ),
)
