#!/usr/bin/env bash
# The global norm of gradients in bf16, by optax, and the gradients after optax clipped by it.
#
# One would expect the norm within bf16's rounding, .4 %, as torch has it: jax sums a tensor of bf16 in fp32.
# Written down before running: optax adds the tensors' squares one after the other in bf16, so for 1,000 tensors of norm 1 the sum
# stops at 256, where the next number is 258, and the norm is 16 instead of 31.6; under jit the compiler keeps fp32 and is right.
# Seen with optax 0.2.8, jax 0.10.2, Python 3.11 (2026-11-30): 16, under jit as well. Of 1,000 tensors whose norms scatter the norm
# is 11 % short; after one tensor of norm 10, an embedding's, 999 others of norm .4 vanish: 10 instead of 16.1.
# clip_by_global_norm(1) leaves norms of 1.98, 1.12 and 1.61. The same gradients cast to fp32 have the right norm. The
# docstrings of global_norm and clip_by_global_norm name no type.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
cat > "$work/norm.py" <<'PY'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

random = np.random.default_rng(0)
clip = optax.clip_by_global_norm(1.0)


def gradients(norms: np.ndarray) -> list[jax.Array]:
    """Tensors of these norms in bf16."""
    drawn = [random.normal(size=(16, 16)) for _ in norms]
    return [jnp.asarray(x / np.linalg.norm(x) * norm, jnp.bfloat16) for x, norm in zip(drawn, norms, strict=True)]


def in_float64(tensors: list[jax.Array]) -> float:
    return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in tensors)))


def clipped(tensors: list[jax.Array]) -> list[jax.Array]:
    return clip.update(tensors, clip.init(tensors))[0]


print("optax", version("optax"), "jax", version("jax"))
short = []
for n in (100, 300, 1000):
    for kind, norms in (
        ("all of norm 1", np.ones(n)),
        ("scattered", 0.3 * np.exp(0.7 * random.normal(size=n))),
        ("one of 10, others .4", np.array([10.0] + [0.4] * (n - 1))),
    ):
        tensors = gradients(norms)
        true, told, jitted = in_float64(tensors), float(optax.global_norm(tensors)), float(jax.jit(optax.global_norm)(tensors))
        wide = float(optax.global_norm([x.astype(jnp.float32) for x in tensors]))
        left = in_float64(jax.jit(clipped)(tensors))
        print(f"{n} tensors, {kind}: true {true:.2f}, bf16 {told:.2f}, jit {jitted:.2f}, as fp32 {wide:.2f}; clipped at 1 {left:.2f}")
        assert abs(wide / true - 1) < 1e-3
        if n == 1000:
            short += [told / true, jitted / true, 1 / left]
sys.exit(0 if max(short) < 0.92 and min(short) < 0.52 else 1)
PY
JAX_PLATFORMS=cpu "$work/env/bin/python" "$work/norm.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
