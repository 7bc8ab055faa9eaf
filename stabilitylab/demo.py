"""``stabilitylab demo``: a small transformer breaks before your eyes, and the monitor finds, names and shows it. No download, some
ten seconds.

It learns to count on from sequences start, start + stride, start + 2 stride, ... modulo 64. At step 160 the demo multiplies its
learning rate by 40 for three steps: a misplaced decimal point in a schedule. Nobody tells the monitor.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.text import Text

STEPS, BREAKS, LASTS, FACTOR, RATE = 240, 160, 3, 40.0, 2e-3
TOKENS, WIDTH, HEADS, LAYERS, ROWS, LENGTH = 64, 32, 4, 3, 32, 24


def demo(*, out: Path | None = None) -> int:
    """Train a small model that breaks, and show how the monitor finds, names and reports it.

    Args:
        out: folder for the run; by default stabilitylab-demo, or the next free name after it.
    """
    # Imported here, so that the command line's help does not wait for torch.
    from stabilitylab.report import run_report
    from stabilitylab.runs import load_run

    folder = out if out is not None else _free(Path("stabilitylab-demo"))
    console = Console()
    console.print(
        f"Training {STEPS} steps of a transformer of {LAYERS} layers. From step {BREAKS} to {BREAKS + LASTS - 1} its learning "
        f"rate is {FACTOR:g} times what it should be; the monitor is not told.",
        soft_wrap=True,
        highlight=False,
    )
    # The monitor says its findings at once on standard error, as in any training of yours.
    logging.getLogger("stabilitylab").setLevel(logging.WARNING)
    train(folder)
    run = load_run(folder)
    report = run_report(run)
    path = report.write(run.folder.report)
    for event in run.events:
        if event.kind == "diagnosis":
            console.print()
            for sentence in event.data["sentences"]:
                console.print(Text(str(sentence)), soft_wrap=True)
            break
    console.print()
    console.print(Text(f"report: {path}"), soft_wrap=True)
    console.print(Text(f"events: stabilitylab show {folder}"), soft_wrap=True)
    console.print(Text(f"live:   tensorboard --logdir {folder}"), soft_wrap=True)
    return 0


def train(folder: Path) -> None:
    """Run the training that breaks, watched, into ``folder``."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    from stabilitylab import Monitor

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [
                nn.TransformerEncoderLayer(
                    WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(LAYERS)
            ]
            model = nn.ModuleDict(
                {
                    "embedding": nn.Embedding(TOKENS, WIDTH),
                    "layers": nn.ModuleList(layers),
                    "head": nn.Linear(WIDTH, TOKENS),
                }
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
            mask_TT = nn.Transformer.generate_square_subsequent_mask(LENGTH)
            monitor = Monitor(model, optimizer, out=folder, every=4)
            for step in range(STEPS):
                rate = RATE * (FACTOR if BREAKS <= step < BREAKS + LASTS else 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                start, stride = torch.randint(TOKENS, (ROWS, 1)), torch.randint(1, 8, (ROWS, 1))
                tokens_BT = (start + stride * torch.arange(LENGTH + 1)) % TOKENS
                x_BTD = model["embedding"](tokens_BT[:, :-1])
                for layer in model["layers"]:  # type: ignore[attr-defined]
                    x_BTD = layer(x_BTD, src_mask=mask_TT, is_causal=True)
                loss = cross_entropy(model["head"](x_BTD).flatten(0, 1), tokens_BT[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                monitor.step(step, loss=loss)
            monitor.close()
    finally:
        torch.set_num_threads(threads)


def _free(path: Path) -> Path:
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
