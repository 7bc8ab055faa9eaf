#!/usr/bin/env bash
# GrokAdamW (transformers' optim="grokadamw"): does a run that is saved and resumed go on as if it had not stopped?
#
# Written down before running: yes. state_dict and load_state_dict are torch's, which carry an optimizer's moments over, and the package
# extends both only for its signal functions.
# Seen with grokadamw 0.1.2, torch 2.13.0, Python 3.11 (2026-11-30): no. It keeps its moments and step counters in the parameter group,
# by parameter object, and torch copies a group's entries as they are: the file holds them, but no parameter of the resumed run finds
# them. All begin again at step 1, and the old moments stay in memory and go into every later file. The first step after the resume
# is large: the i-th parameter of a group has the beta1 of .9 * .9^i and the bias correction of .9, so the tenth one's first step is
# 6.5 learning rates, where the run that went on took 2.3 at most. torch's AdamW beside it resumes to the bit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.13.0 numpy==2.4.6 grokadamw==0.1.2
cat > "$work/resume.py" <<'PY'
import io
import sys
import warnings
from importlib.metadata import version

import torch
from grokadamw import GrokAdamW

warnings.simplefilter("ignore")
RATE, LAYERS, BEFORE = 1e-3, 10, 50


def layers() -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(32, 32, generator=random)) for _ in range(LAYERS)]


def train(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Largest step of any element in the first of ``steps``, in learning rates."""
    first = None
    for step in steps:
        random = torch.Generator().manual_seed(step)
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.randn(32, 32, generator=random)
        optimizer.step()
        moved = max(float((w.detach() - b).abs().max()) for w, b in zip(weights, before)) / RATE
        first = moved if first is None else first
    return first


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


print("grokadamw", version("grokadamw"), "torch", torch.__version__)
alike, steps, found = {}, {}, None
for kind in (torch.optim.AdamW, GrokAdamW):
    whole = layers()
    optimizer = kind(whole, lr=RATE, weight_decay=0.0)
    train(whole, optimizer, range(BEFORE))
    resumed = layers()
    with torch.no_grad():
        for mine, theirs in zip(resumed, whole):
            mine.copy_(theirs)
    again = kind(resumed, lr=RATE, weight_decay=0.0)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    steps[kind.__name__] = train(whole, optimizer, range(BEFORE, BEFORE + 1)), train(resumed, again, range(BEFORE, BEFORE + 1))
    alike[kind.__name__] = all(torch.equal(a, b) for a, b in zip(whole, resumed))
    went_on, stopped = steps[kind.__name__]
    print(f"{kind.__name__}: largest step that went on {went_on:.2f}, resumed {stopped:.2f} learning rates, alike: {alike[kind.__name__]}")
    if kind is GrokAdamW:
        kept = again.param_groups[0]["state"]
        found = len(kept), sorted({state["step"] for state in kept.values()})
        print(f"moments in the resumed optimizer: of {found[0]} parameters (there are {LAYERS}), at steps {found[1]}")
as_recorded = (
    alike == {"AdamW": True, "GrokAdamW": False}
    and found == (2 * LAYERS, [1, BEFORE])
    and steps["GrokAdamW"][1] > 1.5 * steps["GrokAdamW"][0]
)
sys.exit(0 if as_recorded else 1)
PY
"$work/env/bin/python" "$work/resume.py" 2> "$work/log" && echo "as recorded" || { tail -3 "$work/log"; echo "changed: look again"; exit 1; }
