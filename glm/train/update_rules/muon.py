"""Muon: the momentum's nearest orthogonal matrix.

    M = mu M + (1 - mu) G          G' = (1 - mu) G + mu M (Nesterov), or M          u = s orthogonalized(G')

(Jordan et al., kellerjordan.github.io/posts/muon, as torch.optim.Muon has it.) s = .2 sqrt(max(m, n)) gives u AdamW's root mean
square, so that one rate and one decay serve both (Moonlight, 2502.16982, section 2.2); sqrt(max(1, m / n)) is the original's.
Orthogonalized: five times X <- a X + (b A + c A^2) X, A = X X', from X = G' / |G'|, with (a, b, c) = (3.4445, -4.7750, 2.0315):
singular values end between .7 and 1.2, not at 1.

Muon first splits a weight of several matrices: query, key and value, the halves of a gated feed-forward, experts; with ``per_head``
each head's (GLM-5, 2602.15763: the split keeps one head's scores from growing with another's). It iterates matrices of one shape
together, on a CPU as many as its cache holds.

Limits: hidden matrices only: an embedding's rows are tokens, of which a step sees some. In fp32 on a CPU without bf16 units, in
bf16 elsewhere, as the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glm.model.attention import Attention
from glm.model.experts import Experts
from glm.model.feed_forward import FeedForward
from glm.precision import multiplies_natively
from glm.train.update_rules.config import MuonConfig, OptimizerConfig
from glm.train.update_rules.rule import Tensors, UpdateRule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
# Most numbers to iterate together on a CPU.
CACHED = 2**19


def muon(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of Muon for weights that are matrices; advances the momentum."""
    gradients, constants = list(tensors.gradients), config.muon
    momenta = [state["momentum"] for state in tensors.states]
    torch._foreach_lerp_(momenta, gradients, 1 - constants.momentum)
    raw = list(torch._foreach_lerp(gradients, momenta, constants.momentum)) if constants.nesterov else momenta
    pieces = [_pieces(one, rows) for one, rows in zip(raw, tensors.rows, strict=True)]
    flat = [piece for parts in pieces for piece in parts]
    done = iter(_scaled(orthogonalized(flat, constants.iterations), constants))
    return [
        torch.cat([next(done) for _ in parts], dim=-2) if len(parts) > 1 else next(done) for parts in pieces
    ]


def _pieces(matrix: Tensor, rows: tuple[int, ...] | None) -> list[Tensor]:
    return [matrix] if rows is None else list(torch.split(matrix, list(rows), dim=-2))


def _scaled(matrices: list[Tensor], config: MuonConfig) -> list[Tensor]:
    factors = []
    for matrix in matrices:
        m, n = matrix.shape[-2:]
        factors.append(0.2 * max(m, n) ** 0.5 if config.scale == "rms" else max(1.0, m / n) ** 0.5)
    torch._foreach_mul_(matrices, factors)
    return matrices


def orthogonalized(matrices: Sequence[Tensor], iterations: int = 5) -> list[Tensor]:
    """The Newton-Schulz image of each of some matrices [..., m, n], in fp32; those of one shape, or its transpose, together."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        alike[min(matrix.shape[-2:]), max(matrix.shape[-2:])].append(place)
    results: list[Tensor] = [*matrices]
    for (m, n), places in alike.items():
        wide = [_wide(matrices[place]).reshape(-1, m, n) for place in places]
        image = torch.cat(wide)
        # Few at a time: the matrices stay in the processor's cache, and need no new pages from the system.
        together = len(image) if image.device.type != "cpu" else max(1, CACHED // (m * n))
        for part in torch.split(image, together):
            part.copy_(_newton_schulz(part, iterations))
        for place, part in zip(places, torch.split(image, [len(one) for one in wide]), strict=True):
            matrix = matrices[place]
            tall = matrix.shape[-2] > matrix.shape[-1]
            part = part.view(*matrix.shape[:-2], m, n)
            results[place] = part.mT.contiguous() if tall else part
    return results


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def _newton_schulz(X_Nmn: Tensor, iterations: int) -> Tensor:
    a, b, c = COEFFICIENTS
    norms = torch.linalg.matrix_norm(X_Nmn, keepdim=True)
    X_Nmn = X_Nmn / norms.clamp_min(EPSILON)
    in_half = X_Nmn.device.type != "cpu" or multiplies_natively(torch.bfloat16)
    X_Nmn = X_Nmn.bfloat16() if in_half else X_Nmn
    A_Nmm = X_Nmn.new_empty(*X_Nmn.shape[:-1], X_Nmn.shape[-2])
    B_Nmm, next_Nmn = torch.empty_like(A_Nmm), torch.empty_like(X_Nmn)
    for _ in range(iterations):
        torch.bmm(X_Nmn, X_Nmn.mT, out=A_Nmm)
        torch.baddbmm(A_Nmm, A_Nmm, A_Nmm, beta=b, alpha=c, out=B_Nmm)
        torch.baddbmm(X_Nmn, B_Nmm, X_Nmn, beta=a, out=next_Nmn)
        X_Nmn, next_Nmn = next_Nmn, X_Nmn
    return X_Nmn


def matrix_rows(model: nn.Module, *, per_head: bool) -> dict[str, tuple[int, ...]]:
    """Rows of each of the matrices that make up a weight of this model, by the weight's name; leaves out single matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Attention):
            head, kinds = module.head, (module.heads, module.key_heads, module.key_heads)
            rows = (head,) * sum(kinds) if per_head else tuple(count * head for count in kinds)
            found[f"{prefix}query_key_value.weight"] = rows
        elif isinstance(module, FeedForward) and module.is_gated:
            half = module.up.weight.shape[0] // 2
            found[f"{prefix}up.weight"] = (half, half)
        elif isinstance(module, Experts) and module.activation.is_gated:
            half = module.up.shape[1] // 2
            found[f"{prefix}up"] = (half, half)
    return found


MUON = UpdateRule(names=("momentum",), directions=muon)
