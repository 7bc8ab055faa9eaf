"""What every scheme costs a whole model, without a choice: python -m experiments.benchmarks quantization_schemes MODEL TEXT

It puts all linear layers with a weight of their own under one scheme and prints the loss increase in nats per token (relative error
of the output for encoders), on windows of 256 tokens of the text after the first --calibration tokens. From those SmoothQuant takes
its ranges and GPTQ and AWQ their moments, all of the unquantized model. Schemes are those of integers, of floating-point formats
with and without activations, after a Hadamard rotation, and rounded for their inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stabilitylab.models import Window, open_text_model
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.verification import Twins, Verification

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
    "int4-g64-asym-mse-awq",
    "int4-g64-asym-mse-gptq",
    "int4-g64-asym-mse-gptqo",
    "nvfp4-mse",
    "nvfp4-mse-gptqo",
    "mxfp4-mse",
    "mxfp4-mse-gptqo",
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks quantization_schemes")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(argv)
    model = open_text_model(chosen.model)
    seen: list[Window] = []
    told: list[Window] = []
    count = 0
    for window in model.windows(chosen.text, 256, chosen.calibration + chosen.tokens):
        count += window.tokens
        (seen if count <= chosen.calibration else told).append(window)
    found: dict[str, object] = {}
    with torch.inference_mode():
        layers = quantizable_layers(model.module)
        moments: dict[str, Moments] = {}
        hooks = [
            layer.register_forward_pre_hook(partial(_see, moments, path)) for path, layer in layers.items()
        ]
        inputs = layer_inputs(model, seen, layers)
        for hook in hooks:
            hook.remove()
        verification = Verification(model, told, Twins(model.module, inputs.largest))
        if not chosen.json:
            print(f"{model.name}: {verification.tokens} tokens, loss {verification.loss}")
        for name in chosen.schemes:
            began = time.process_time()
            twins = {
                path: quantized(path, layer, scheme_of(name), inputs.largest[path], moments[path])
                for path, layer in layers.items()
                if path in moments
            }
            with replaced(model.module, twins):
                cost = verification.of_the_model_as_it_stands()
            found[name] = cost
            if not chosen.json:
                print(f"{name:40s} {cost:+.4f}   ({time.process_time() - began:.0f} s)", flush=True)
    if chosen.json:
        print(json.dumps({"model": model.name, "loss": verification.loss, "schemes": found}))
    return 0


def _see(moments: dict[str, Moments], path: str, _module: Any, arguments: tuple[Any, ...]) -> None:
    x = arguments[0]
    moments.setdefault(path, Moments(x.shape[-1])).add(x)
