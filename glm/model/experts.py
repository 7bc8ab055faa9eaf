"""A mixture of experts in place of a feed-forward layer: each token passes through the k experts that its router prefers.

    p = softmax(R x)     chosen: the k largest of p + b     y = sum over the chosen  p_e / (sum of theirs)  F_e(x)  [+ S(x)]

F_e are feed-forward layers without biases, S a shared one for every token (DeepSeekMoE, 2401.06066). The router computes in fp32.
These keep the experts in use:

    balance     c E sum_e f_e P_e, f_e the share of choices that fell on e, P_e the mean of p_e     (Switch, 2101.03961, equation 4)
    router_z    c mean logsumexp(R x)^2                                                             (ST-MoE, 2202.08906, equation 5)
    bias_rate   b_e moves by it towards the mean load after every update, without a gradient        (DeepSeek-V3, 2412.19437, 2.1.2)

Without a capacity the layer drops no token. With one, an expert takes its first ceil(capacity k N / E) tokens, of N in all; later
ones pass it by, and ``dropped`` counts them.

Shapes: N tokens, C hidden, E experts, k chosen. Limits: the layer computes experts one after the other, and on an accelerator waits
for their loads; every replica has all experts (no expert parallelism). Capacity and balance are per micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glm.model.config import ModelConfig
from glm.model.feed_forward import Activation, FeedForward
from glm.model.layers import Linear
from glm.precision import at_least_fp32, linear


class Experts(nn.Module):
    """The position-wise layer, by experts.

    Attributes:
        load_E: choices of each expert since the last update, dropped ones included; None: none yet.
        dropped: choices dropped since then for lack of experts' capacity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own, C = config.feed_forward.experts, config.hidden
        self.count, self.active, self.capacity = own.count, own.active, own.capacity
        self.balance, self.router_z, self.bias_rate = own.balance, own.router_z, own.bias_rate
        self.activation = Activation(config.feed_forward)
        inner = config.feed_forward.width(C)
        self.router = Linear(C, own.count, bias=False)
        self.up = nn.Parameter(torch.empty(own.count, inner * (2 if config.feed_forward.is_gated else 1), C))
        self.down = nn.Parameter(torch.empty(own.count, C, inner))
        self.shared = FeedForward(config, inner=own.shared * inner) if own.shared else None
        self.bias_E: Tensor | None
        self.register_buffer("bias_E", torch.zeros(own.count) if own.bias_rate else None)
        self.load_E: Tensor | None = None
        self.dropped: Tensor | None = None
        self.penalty: Tensor | None = None

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
        logits_NE = linear(at_least_fp32(x_NC), at_least_fp32(self.router.weight))
        share_NE = logits_NE.softmax(-1)
        ranked_NE = share_NE.detach() if self.bias_E is None else share_NE.detach() + self.bias_E
        chosen_Nk = ranked_NE.topk(self.active, dim=-1).indices
        weight_Nk = share_NE.gather(-1, chosen_Nk)
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        load_E = _loads(chosen_Nk, self.count)
        y_NC = torch.zeros_like(x_NC)
        dropped = 0
        limit = math.ceil(self.capacity * chosen_Nk.numel() / self.count) if self.capacity else None
        for expert in range(self.count):
            tokens, places = (chosen_Nk == expert).nonzero(as_tuple=True)
            if limit is not None:
                dropped += max(0, len(tokens) - limit)
                tokens, places = tokens[:limit], places[:limit]
            out = linear(self.activation(linear(x_NC[tokens], self.up[expert])), self.down[expert])
            y_NC = y_NC.index_add(0, tokens, out * weight_Nk[tokens, places, None].to(out.dtype))
        if self.training and torch.is_grad_enabled():
            self._note(load_E, dropped)
            self.penalty = self._penalty(logits_NE, share_NE, load_E)
        if self.shared is not None:
            y_NC = y_NC + self.shared(x_NC)
        return y_NC.view_as(x_BTC)

    def _note(self, load_E: Tensor, dropped: int) -> None:
        self.load_E = load_E if self.load_E is None else self.load_E + load_E
        count = load_E.new_full((), dropped)
        self.dropped = count if self.dropped is None else self.dropped + count

    def _penalty(self, logits_NE: Tensor, share_NE: Tensor, load_E: Tensor) -> Tensor:
        penalty = logits_NE.new_zeros(())
        if self.balance:
            chosen_E = load_E.to(share_NE.dtype) / load_E.sum()
            penalty = penalty + self.balance * self.count * (chosen_E * share_NE.mean(0)).sum()
        if self.router_z:
            penalty = penalty + self.router_z * logits_NE.logsumexp(-1).square().mean()
        return penalty

    @torch.no_grad()
    def follow(self, *, applied: bool) -> None:
        """After an update, or a skipped one: move the bias towards an even load, and reset the counts."""
        if applied and self.bias_E is not None and self.load_E is not None:
            load_E = self.load_E.to(torch.float32)
            self.bias_E += self.bias_rate * torch.sign(load_E.mean() - load_E).to(self.bias_E.dtype)
        self.load_E = self.dropped = None


def _loads(chosen_Nk: Tensor, experts: int) -> Tensor:
    """Choices of each expert, [E]."""
    chosen = chosen_Nk.flatten()
    load_E = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return load_E.scatter_add_(0, chosen, torch.ones_like(chosen))


def share_loads(model: nn.Module, summed: Callable[[Tensor], Tensor]) -> None:
    """Let replicas count together: ``summed`` gives a tensor's sum over all of them. A replica without rows counts none."""
    for module in model.modules():
        if isinstance(module, Experts):
            counts = torch.zeros(module.count + 1, dtype=torch.int64, device=module.router.weight.device)
            if module.load_E is not None and module.dropped is not None:
                counts[:-1], counts[-1] = module.load_E, module.dropped
            counts = summed(counts)
            module.load_E, module.dropped = counts[:-1], counts[-1]


def penalties(model: nn.Module) -> Tensor:
    """Sum of the terms that the layers' routers add to the mean loss of the last forward pass."""
    found = [m.penalty for m in model.modules() if isinstance(m, Experts) and m.penalty is not None]
    return torch.stack(found).sum()


def expert_loads(model: nn.Module) -> dict[str, Tensor]:
    """Telemetry of every layer's experts since the last update, by name.

    load_max: largest load over an even one; entropy: of the loads, over that of even ones; dead: share of experts that no token
    chose; dropped: share of choices left out.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Experts) or module.load_E is None or module.dropped is None:
            continue
        share_E = module.load_E.double() / module.load_E.sum()
        entropy = torch.special.entr(share_E).sum() / math.log(max(2, module.count))
        found |= {
            f"experts/{path}/load_max": share_E.amax() * module.count,
            f"experts/{path}/load_entropy": entropy,
            f"experts/{path}/dead": (share_E == 0).double().mean(),
            f"experts/{path}/dropped": module.dropped / module.load_E.sum(),
        }
    return found
