"""A plain PyTorch loop, watched: three lines more, and a weight that is damaged on the way.

python examples/plain_loop.py            writes runs/plain and its report
"""

import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.cli import main


def model() -> nn.Sequential:
    """Four blocks that add to a stream, small enough for a few seconds."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    return nn.Sequential(nn.Linear(16, 32), *(Block() for _ in range(4)), nn.Linear(32, 1))


torch.manual_seed(0)
net = model()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

monitor = Monitor(net, optimizer, out="runs/plain", every=1)  # 1
for step in range(200):
    x = torch.randn(64, 16)
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    monitor.step(step, loss=loss)  # 2
    if step == 150:
        with torch.no_grad():
            net[2].down.weight.mul_(30)  # what a broken kernel or a bad restart does
monitor.close()  # 3

main(["report", "runs/plain"])
main(["show", "runs/plain"])
