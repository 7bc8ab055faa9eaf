"""Loops to fork: a small model on a fixed task, with something that can be done to it at a step."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

TOKENS, WIDTH, ROWS, LENGTH = 24, 16, 6, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        x = self.drop(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Loop:
    """The next token is the last one plus 7. The loop calls ``act`` before update ``at``; ``spoil`` makes that index's batch."""

    def __init__(self, *, act=None, spoil=None, at=30, dropout=0.0, install=None):
        torch.manual_seed(0)
        self.model = Model(dropout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, 0.95))
        self.step, self.act, self.spoil, self.at = 0, act, spoil, at
        if install is not None:
            install(self)

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def batch(self, index):
        first = torch.randint(TOKENS, (ROWS, 1), generator=torch.Generator().manual_seed(index))
        tokens = (first + 7 * torch.arange(LENGTH + 1)) % TOKENS
        return self.spoil(tokens) if self.spoil is not None and index == self.at else tokens

    def train_step(self, index):
        return self.train_step_without(index, ())

    def train_step_without(self, index, rows):
        if self.act is not None and self.step == self.at:
            with torch.no_grad():
                self.act(self)
        tokens = self.batch(index)
        tokens = tokens[[row for row in range(ROWS) if row not in rows]]
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def row_losses(self, index):
        tokens = self.batch(index)
        losses = cross_entropy(self.model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        return [(float(loss.detach()), 0.0) for loss in losses.mean(dim=1)]


def run(loop, steps):
    return [loop.train_step(step) for step in range(steps)]
