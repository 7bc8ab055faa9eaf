#!/usr/bin/env bash
# torchao's AdamW with states of eight and of four bits, on a matrix one column of which has gradients 300, 1,000 and 3,000 times
# the others' (what an outlier among the layer's inputs does), the others' of std 1e-5.
#
# One would expect steps of about the learning rate, which Adam makes whatever a gradient's size, and four bits to be the worse.
# Written down before running: v of the others, a millionth of the block's largest, becomes 0 in eight bits and m does not; they
# then move by lr m / eps, hundreds of times the rate. In four bits both become 0 or nearly so, and the others stand still.
# Seen with torchao 0.18.0, torch 2.13.0, Python 3.11 (2026-11-30), largest of all the others' steps, in learning rates:
#     ratio     AdamW   AdamW8bit   AdamWFp8   AdamW4bit
#     300       1.1     25          470        1.3
#     1,000     1.1     510         960        1.3
#     3,000     1.1     870         980        1.3
# The eight-bit codes of v begin with 0 and 3e-7 of the block's largest, so m / eps it is; those of four bits have no 0 and so bound
# every step. Of gradients ten times as large it is 2,900 at 1,000. Dettmers et al., 2110.02861, whose maps these are, keep embeddings
# in 32 bits for stability; torchao takes every tensor of 4,096 elements or more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$work/steps.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

RATE, SMALL = 1e-3, 1e-5
RATIOS = (300, 1000, 3000)


def largest_step(optimizer_class: type[torch.optim.Optimizer], ratio: int) -> float:
    """Largest of 100 steps of any element outside of the first column, over the learning rate."""
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = optimizer_class([weight], lr=RATE, weight_decay=0.0)
    largest = 0.0
    for _ in range(100):
        weight.grad = SMALL * torch.randn(64, 256, generator=random)
        weight.grad[:, 0] *= ratio
        before = weight.detach().clone()
        optimizer.step()
        largest = max(largest, float((weight.detach() - before)[:, 1:].abs().max()) / RATE)
    return largest


print("torchao", version("torchao"), "torch", torch.__version__)
seen = {one.__name__: [largest_step(one, ratio) for ratio in RATIOS] for one in (torch.optim.AdamW, AdamW8bit, AdamWFp8, AdamW4bit)}
for name, steps in seen.items():
    print(f"{name}: " + ", ".join(f"ratio {ratio}: {step:.1f}" for ratio, step in zip(RATIOS, steps, strict=True)))
exploded = min(seen["AdamW8bit"][1], seen["AdamWFp8"][1]) > 100
held = max(*seen["AdamW"], *seen["AdamW4bit"]) < 2
sys.exit(0 if exploded and held else 1)
PY
"$work/env/bin/python" "$work/steps.py" 2> "$work/log" && echo "as recorded" || { tail -3 "$work/log"; echo "changed: look again"; exit 1; }
