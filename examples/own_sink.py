"""A sink of one's own: every event as a line of JSON on a socket, a queue, or here a file.

python examples/own_sink.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stabilitylab import Event, Monitor
from stabilitylab.telemetry import Samples


class LinesSink:
    """Anything with ``write`` and ``close`` is a sink. One that raises loses what it was given; training continues."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        for event in events:
            self.file.write(json.dumps({"step": event.step, "kind": event.kind}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    monitor = Monitor(net, optimizer, sinks=[LinesSink(Path("runs/events.jsonl"))], every=5)
    for step in range(120):
        x = torch.randn(64, 16)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        if step == 100:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step, loss=loss)
    monitor.close()
    print(Path("runs/events.jsonl").read_text(encoding="utf-8"))
