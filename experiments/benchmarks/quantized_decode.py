"""Tokens a second of a GLM that generates one token at a time, with quantized layers beside bf16 and fp32; and loading's memory.

    python -m experiments.benchmarks quantized_decode [--layers 12] [--tokens 24] [--rounds 5] [--json]

A GLM of glm-medium's shape (hidden 768) with random weights and 32,000 pieces: 110M parameters at 12 layers. Every variant
continues the same 64 tokens greedily with its own cache; variants take turns of ``tokens`` steps; figures are medians, and the
median of ratios within a turn, of one thread's time on its core. The output projection is the embedding and stays in floats, as in
GLM-130B. Separate processes measure memory: peak resident size while opening an export, less their size before, beside the bytes
opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from experiments.benchmarks.sample_building import sample_data
from glm.commands.train import preset_config, with_vocabulary
from glm.inference.decoding import Decoder, Timing
from glm.inference.loading import OpenedModel, open_model
from glm.inference.prompt import Prompt
from glm.inference.quantized_model import open_quantized
from glm.model.transformer import Transformer

VARIANTS = {
    "fp32": (None, "fp32"),
    "bf16": (None, "bf16"),
    "int8, rest fp32": ("int8", "fp32"),
    "int4, rest fp32": ("int4", "fp32"),
    "int4, rest bf16": ("int4", "bf16"),
}
PROMPT = 64
_MEMORY = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from glm.inference.loading import open_model
from glm.inference.quantized_model import open_quantized
def kept(name):  # of this process alone: what getrusage calls the peak begins with that of its parent
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])
path, how = Path(sys.argv[1]), sys.argv[2]
before = kept("VmRSS:")
model = (open_model(path) if how == "none" else open_quantized(path, how)).model
tensors = [*model.parameters(), *model.buffers()]
print(json.dumps({"peak": kept("VmHWM:") - before, "held": kept("VmRSS:") - before, "bytes": sum(t.nbytes for t in tensors)}))
"""


def write_export(folder: Path, layers: int, vocabulary: int) -> int:
    """An export with random weights; returns how many."""
    with tempfile.TemporaryDirectory() as scratch:
        data = sample_data(Path(scratch))
        config = with_vocabulary(preset_config("glm-medium"), data)
        model_config = dataclasses.replace(config.model, layers=layers, vocabulary=vocabulary)
        config = dataclasses.replace(config, model=model_config)
        torch.manual_seed(0)
        model = Transformer(config.model)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        tokenizer = next(Path(scratch).rglob("tokenizer.model"))
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        return sum(parameter.numel() for parameter in model.parameters())


def open_variant(folder: Path, how: str | None, precision: str) -> OpenedModel:
    if how is None:
        return open_model(folder, precision=precision)  # type: ignore[arg-type]
    return open_quantized(folder, how, precision=precision)  # type: ignore[arg-type]


@torch.inference_mode()
def turn(opened: OpenedModel, tokens: int) -> float:
    """Continue the prompt, and return tokens a second; the first two steps warm up."""
    special = opened.tokenizer.special
    prompt = Prompt(
        kind="gmask",
        context=(*range(100, 100 + PROMPT - 1), special.gmask),
        blanks=(PROMPT - 1,),
        parts=(),
        sop=special.sop,
    )
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    decoder = Decoder(opened.model, prompt, [], rows=1, room=tokens + 3, two=False, timing=Timing())
    for step in range(tokens + 2):
        if step == 2:
            started = clock()
        decoder.append(decoder.logits_WV.argmax(-1))
    return tokens / (clock() - started)


def loading_memory(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes at the peak and after, for processes that open the export in each way."""
    found = {}
    for how in ("none", "int8", "int4"):
        run = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(folder), how], capture_output=True, text=True, check=True
        )
        found[how] = json.loads(run.stdout)
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="quantized_decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=24, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        weights = write_export(folder, options.layers, options.vocabulary)
        opened = {name: open_variant(folder, *how) for name, how in VARIANTS.items()}
        speeds: dict[str, list[float]] = {name: [] for name in opened}
        for _ in range(options.rounds):
            for name, model in opened.items():
                speeds[name].append(turn(model, options.tokens))
        del opened
        memory = loading_memory(folder)
    found = {
        name: {
            "tokens_per_second": statistics.median(values),
            **{
                f"over_{base}": statistics.median(a / b for a, b in zip(values, speeds[base], strict=True))
                for base in ("bf16", "fp32")
            },
        }
        for name, values in speeds.items()
    }
    if options.json:
        print(
            json.dumps({"parameters": weights, "threads": options.threads, "decode": found, "memory": memory})
        )
        return 0
    console = Console()
    table = Table(
        "weights",
        "tokens/s",
        "over bf16",
        "over fp32",
        title=f"{weights / 1e6:.0f}M parameters, {options.threads} threads",
    )
    for name, row in found.items():
        table.add_row(
            name, f"{row['tokens_per_second']:.1f}", f"{row['over_bf16']:.2f}x", f"{row['over_fp32']:.2f}x"
        )
    console.print(table)
    table = Table("opened as", "MB of the model", "MB held", "MB at the peak", title="loading an fp32 export")
    for how, sizes in memory.items():
        table.add_row(
            "stored" if how == "none" else how,
            *(f"{sizes[key] / 1e6:.0f}" for key in ("bytes", "held", "peak")),
        )
    console.print(table)
    return 0
