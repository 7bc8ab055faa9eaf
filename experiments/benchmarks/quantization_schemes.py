"""What every scheme costs a whole model, with no choice made: python -m experiments.benchmarks quantization_schemes MODEL TEXT

All linear layers with a weight of their own under one scheme, on windows of 256 tokens of the text after the first, from which
SmoothQuant takes its ranges; the loss increase in nats per token (relative error of the output for encoders). Schemes are those of
integers, of floating-point formats with and without activations, and after a Hadamard rotation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from stabilitylab.models import open_text_model
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.verification import Verification

SCHEMES = (
    "w8a8-tensor",
    "w8a8-token",
    "w8a8-token-had",
    "mixed",
    "smoothquant",
    "fp8-e4m3-tensor/fp8-e4m3-tensor",
    "fp8-e4m3-row/fp8-e4m3-row",
    "fp8-e4m3-block128/fp8-e4m3-tile128",
    "mxfp8-e4m3/mxfp8-e4m3",
    "mxfp8-e4m3-up/mxfp8-e4m3-up",
    "int8-row",
    "int4-row",
    "int4-g128",
    "int4-g64-asym-mse",
    "int4-g64-asym-mse-had",
    "mxfp4",
    "mxfp4-had",
    "nvfp4",
    "nvfp4-had",
    "mxfp4/mxfp4",
    "nvfp4/nvfp4",
    "nvfp4/nvfp4-had",
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks quantization_schemes")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(argv)
    model = open_text_model(chosen.model)
    windows = list(islice(model.windows(chosen.text, 256, chosen.tokens + 512), 64))
    found: dict[str, object] = {}
    with torch.inference_mode():
        inputs = layer_inputs(model, windows[:2], quantizable_layers(model.module))
        verification = Verification(model, windows[2:], inputs.largest)
        if not chosen.json:
            print(f"{model.name}: {verification.tokens} tokens, loss {verification.loss}")
        layers = [path for path in quantizable_layers(model.module) if path in inputs.largest]
        for name in chosen.schemes:
            began = time.process_time()
            cost = verification.measure(dict.fromkeys(layers, scheme_of(name)))
            found[name] = cost
            if not chosen.json:
                print(f"{name:40s} {cost:+.4f}   ({time.process_time() - began:.0f} s)", flush=True)
    if chosen.json:
        print(json.dumps({"model": model.name, "loss": verification.loss, "schemes": found}))
    return 0
