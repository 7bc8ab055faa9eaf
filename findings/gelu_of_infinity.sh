#!/usr/bin/env bash
# What does exact GELU make of an activation that has overflowed to infinity, on a CPU?
#
# Written down before running: x F(x) is infinity there, whatever the size of the tensor.
# Seen with torch 2.13.0, Python 3.11, AVX512 and AVX2 (2026-11-29): a tensor of one element gives inf, one of 32 gives NaN, in fp32
# and in bf16; float64 and approximate="tanh" give inf. A monitor that looks for the first NaN blames the feed-forward layer,
# although the first number that left its format comes before it; one that counts infinities finds none after the GELU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/gelu.py" <<'PY'
import sys

import torch
from torch.nn.functional import gelu

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
infinity = torch.full((32,), torch.inf)
seen = {
    "fp32, 1 element": gelu(infinity[:1]),
    "fp32, 32 elements": gelu(infinity),
    "bf16, 32 elements": gelu(infinity.bfloat16()),
    "float64, 32 elements": gelu(infinity.double()),
    "fp32, 32 elements, tanh": gelu(infinity, approximate="tanh"),
}
for name, value in seen.items():
    print(f"{name}: {float(value[0])}")
nan = [bool(value.isnan().all()) for value in seen.values()]
sys.exit(0 if nan == [False, True, True, False, False] else 1)
PY
"$work/env/bin/python" "$work/gelu.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
