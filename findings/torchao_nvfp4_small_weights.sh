#!/usr/bin/env bash
# torchao's NVFP4 with one level of scales, what to_nvfp4 does unless a scale of the whole tensor is given, on weights of the sizes
# that language models have.
#
# Written down before running: at a standard deviation of .02 (where most models begin) one level is as good as two, 9.5 %; the
# scales are E4M3 numbers about .007, and E4M3 reaches down to 2^-9 = .002 with its subnormals.
# Seen with torchao 0.18.0, torch 2.13.0, Python 3.11 (2026-11-29): torchao raises scales below 2^-6, the smallest normal number, to
# it, and so never uses the subnormals. Relative error of the dequantized weight, normal numbers of 512 x 1024: 13 % at .02, 23 % at
# .01, 45 % at .005, and at .001 nearly every weight is 0 (100 %). With a scale of the tensor 9.5 % at all of them; one level whose
# scales may be subnormal has 10.3, 12.6, 11.8 and 28 %.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$work/levels.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

ones = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))


def error(std: float, two_levels: bool) -> float:
    """Relative error of weights of this standard deviation, quantized and dequantized."""
    weight = ones * std
    scale = per_tensor_amax_to_scale(weight.abs().max()) if two_levels else None
    return float((NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize() - weight).norm() / weight.norm())


print("torchao", version("torchao"))
for std in (0.1, 0.02, 0.01, 0.005, 0.001):
    print(f"std {std}: one level {error(std, False):.3f}, two levels {error(std, True):.3f}")
sys.exit(0 if error(0.02, False) > 1.3 * error(0.02, True) and error(0.001, False) > 0.99 else 1)
PY
"$work/env/bin/python" "$work/levels.py" 2>/dev/null && echo "as recorded" || { echo "changed: look again"; exit 1; }
