#!/usr/bin/env bash
# A frozen LLM.int8() layer of bitsandbytes on a CPU: does train() against eval() change what it computes?
#
# Written down before running: no. Its weight is int8 and frozen (has_fp16_weights=False) and it holds no dropout; in both modes
# columns above the threshold are kept apart and the other activations are int8.
# Seen with bitsandbytes 0.50.2, torch 2.13.0, Python 3.11 (2026-11-29): in eval() it does that. In train(), the mode of every new
# module, the layer quantizes no activation and the threshold has no effect: the result is x times the dequantized weight. On inputs
# with one column of outliers and threshold 0 the two modes differ by 3 %; on a GPU, by its source, both take the first way. Anyone
# who fine-tunes adapters on a CPU, or forgets eval(), measures weight-only int8.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cat > "$work/int8.py" <<'PY'
import sys

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
inputs, outputs = 256, 128
weight = torch.randn(outputs, inputs) / 16
x = torch.randn(32, inputs)
x[:, 7] = 40 * torch.randn(32)  # one outlier column, far above 6
scale = weight.abs().amax(1, keepdim=True) / 127
weight_only = x @ ((weight / scale).round() * scale).T
row = x.abs().amax(1, keepdim=True) / 127
both = ((x / row).round() * row) @ ((weight / scale).round() * scale).T


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


seen = {}
for training in (False, True):
    for threshold in (0.0, 6.0):
        layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict({"weight": weight})
        layer = layer.to("cpu").train(training)
        with torch.no_grad():
            seen[training, threshold] = layer(x)
        y = seen[training, threshold]
        print("train()" if training else "eval() ", f"threshold {threshold}: from weight-only int8 {apart(y, weight_only):.1e},", end=" ")
        print(f"from int8 times int8 {apart(y, both):.1e}")
print("bitsandbytes", bnb.__version__, "torch", torch.__version__)
as_recorded = (
    apart(seen[False, 0.0], both) < 0.005 < 0.02 < apart(seen[False, 0.0], weight_only)
    and apart(seen[False, 6.0], weight_only) < 0.005
    and torch.equal(seen[True, 0.0], seen[True, 6.0])
    and apart(seen[True, 0.0], weight_only) < 0.005
    and apart(seen[True, 0.0], seen[False, 0.0]) > 0.02
)
sys.exit(0 if as_recorded else 1)
PY
"$work/env/bin/python" "$work/int8.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
