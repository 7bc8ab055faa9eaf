"""A probe of one's own: the cosine between each matrix and its gradient, as family ``alignment``.

Before a norm the two are orthogonal, <g, w> = 0; a value that leaves zero says that something scales the layer.

    python examples/own_probe.py
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stabilitylab import Key, Monitor, load_run
from stabilitylab.probes.base import Context, Found, Readings
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered


class AlignmentProbe:
    """cos(g, w) of every matrix; see ``stabilitylab.probes.base`` for the order of calls."""

    name = "alignment"

    def attach(self, context: Context) -> None:
        self.context = context
        self.slots: dict[str, Slots] = {}

    def arm(self, measured: bool) -> None:
        pass

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        buffer = self.context.buffer
        for name, gradient in gradients.items():
            weight = self.context.parameters[name].detach()
            if weight.dim() != 2:
                continue
            cosine = nn.functional.cosine_similarity(
                gradient.flatten().double(), weight.flatten().double(), 0
            )
            if name not in self.slots:
                self.slots[name] = buffer.reserve("replicated", 1, cosine.device)
            buffer.put(self.slots[name], cosine[None])  # stays on the device; nothing is waited for

    def collect(self) -> Found | None:
        now = self.context.buffer.stamp
        seen = [(name, slots) for name, slots in self.slots.items() if slots.stamp == now]
        return Found(sites=tuple(n for n, _ in seen), slots=[(s,) for _, s in seen]) if seen else None

    def finish(self, gathered: Gathered) -> Readings:
        keys = tuple(Key("alignment", site, "gradient_weight_cosine") for site in gathered.sites)
        values = [numbers[0] for (numbers,) in gathered.numbers]
        return Readings(keys, torch.tensor(values, dtype=torch.float64).numpy())

    def detach(self) -> None:
        pass


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    monitor = Monitor(net, optimizer, out="runs/aligned", every=1, probes=[AlignmentProbe()])
    for step in range(50):
        x = torch.randn(64, 16)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step, loss=loss)
    monitor.close()
    values = load_run("runs/aligned").series("alignment/0.weight/gradient_weight_cosine")
    print(values.tail(3))
