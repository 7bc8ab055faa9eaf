#!/usr/bin/env bash
# Infinity, cast to the 8-bit formats of torch and of ml_dtypes.
#
# One would expect NaN in E4M3, which has no infinity (Micikevicius et al., 2209.05433, table 1), as torch made before its pull
# request 178817, whose title speaks of finite overflow alone.
# Written down before running: beyond 464 NaN in E4M3, infinity in E5M2, in torch and ml_dtypes alike.
# Seen with torch 2.13.0, ml_dtypes 0.6.0, Python 3.11 (2026-11-30): torch turns infinity into 448 in E4M3, as it does with all
# numbers above 448; in E5M2, E4M3FNUZ and E5M2FNUZ infinity stays infinity or NaN, as in ml_dtypes. A layer that has blown up to
# infinity is finite after its cast to E4M3, and every check for NaN behind it passes. Of E8M0, the scales of MX: torch drops the
# sign of negative numbers and makes 0 the smallest scale, 2^-127; ml_dtypes makes NaN of both. NaN is NaN in all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$work/cast.py" <<'PY'
import sys
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

VALUES = np.array([460.0, 500.0, 1e6, np.inf, -np.inf, np.nan, 0.0, -2.0], np.float32)
seen = {}
print("torch", torch.__version__, "ml_dtypes", version("ml_dtypes"), "of", VALUES.tolist())
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
    by_torch = torch.from_numpy(VALUES).to(getattr(torch, name)).float().numpy()
    with np.errstate(all="ignore"):
        by_numpy = VALUES.astype(getattr(ml_dtypes, name)).astype(np.float32)
    print(f"{name}:\n    torch     {by_torch.tolist()}\n    ml_dtypes {by_numpy.tolist()}")
    seen[name] = by_torch, by_numpy
e4m3, e5m2, e8m0 = seen["float8_e4m3fn"], seen["float8_e5m2"], seen["float8_e8m0fnu"]
hidden = np.array_equal(e4m3[0][3:5], [448, -448]) and np.isnan(e4m3[1][3:5]).all()
others = all(np.array_equal(*seen[name], equal_nan=True) for name in ("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))
scales = np.isfinite(e8m0[0][6:]).all() and np.isnan(e8m0[1][6:]).all()
sys.exit(0 if hidden and others and np.isinf(e5m2[0][3]) and scales else 1)
PY
"$work/env/bin/python" "$work/cast.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
