"""Ways of choosing a scheme for every layer at equal bytes: python -m experiments.benchmarks plan_peers MODEL TEXT [--other TEXT]

From one menu, under one budget of bytes, by one knapsack:

    single           the best scheme that fits everywhere, by its loss on the calibration text
    ends             the dearest scheme in the first and last block, else the cheapest, as far as bytes go
    output error     the layers' own relative error squared as harm
    gradient score   |first-order change of the loss|, sum |dL/dy . D| over tokens, as ModelOpt's auto_quantize scores
    runs             divergence, from one run per layer and scheme
    gradients        the curvature (stabilitylab.quantization.estimate), as in ``stabilitylab quantize``

The benchmark prints the loss increase (relative error of the output for encoders) of each on text that chose nothing, and on
another text, perhaps in another language; beside them the processor time of their sensitivities.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stabilitylab.models import TextModel, Window, open_text_model
from stabilitylab.quantization.backward import Backward
from stabilitylab.quantization.estimate import estimate_sensitivity
from stabilitylab.quantization.knapsack import choose
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers, quantized
from stabilitylab.quantization.schemes import LinearScheme, scheme_of
from stabilitylab.quantization.sensitivity import LayerSensitivity, measure_sensitivity
from stabilitylab.quantization.verification import Twins, Verification

MENU = ("int8-row", "smoothquant", "int4-g64-asym-mse", "int4-g128", "int4-row", "nvfp4")
Harms = list[list[float]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks plan_peers")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--schemes", nargs="+", default=list(MENU))
    parser.add_argument("--share", type=float, default=0.3, help="of the 16-bit bytes")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--told", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--without", nargs="*", default=[], help="ways to leave out, such as runs")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(argv)
    model = open_text_model(chosen.model)
    windows, told = _parts(model, chosen.text, chosen.tokens, chosen.told, chosen.length)
    schemes = [scheme_of(name) for name in chosen.schemes]
    layers = quantizable_layers(model.module)
    with torch.no_grad():
        largest = layer_inputs(model, windows, layers).largest
    layers = {path: layer for path, layer in layers.items() if path in largest}
    began = time.process_time()
    estimated = estimate_sensitivity(model, windows, schemes, largest, layers)
    seconds = {"gradients": time.process_time() - began}
    harms = {"gradients": _of(estimated, "harm"), "output error": _of(estimated, "error")}
    if "gradient score" not in chosen.without:
        began = time.process_time()
        harms["gradient score"] = _scores(model, windows, schemes, largest)
        seconds["gradient score"] = time.process_time() - began
    if "runs" not in chosen.without:
        began = time.process_time()
        with torch.inference_mode():
            harms["runs"] = _of(measure_sensitivity(model, windows, schemes, largest), "harm")
        seconds["runs"] = time.process_time() - began
    costs = [[float(effect.bytes) for effect in layer.effects.values()] for layer in estimated]
    limit = chosen.share * sum(layer.bytes_16 for layer in estimated)
    choices = {name: choose(costs, of, limit) for name, of in harms.items()}
    choices["ends"] = _ends(estimated, costs, limit)
    choices["single"] = _single(harms["gradients"], costs, limit)
    texts = {"told": told}
    if chosen.other is not None:
        texts["other"] = _parts(model, chosen.other, 1, chosen.told, chosen.length)[1]
    with torch.inference_mode():
        twins = Twins(model.module, largest)
        measures = {name: Verification(model, of, twins) for name, of in texts.items()}
        found: dict[str, dict[str, float]] = {}
        for name, choice in choices.items():
            if choice is None:
                continue
            plan = {layer.path: schemes[at] for layer, at in zip(estimated, choice, strict=True)}
            found[name] = {text: measure.measure(plan) for text, measure in measures.items()}
            found[name]["bytes"] = sum(row[at] for row, at in zip(costs, choice, strict=True))
            found[name]["seconds"] = seconds.get(name, 0.0)
            if not chosen.json:
                said = "  ".join(f"{text} {found[name][text]:+.4f}" for text in texts)
                print(
                    f"{name:16s} {found[name]['bytes'] / 1e6:7.2f} MB  {said}  {found[name]['seconds']:6.1f} s",
                    flush=True,
                )
    if chosen.json:
        losses = {name: measure.loss for name, measure in measures.items()}
        print(json.dumps({"model": model.name, "loss": losses, "ways": found}))
    return 0


def _parts(
    model: TextModel, text: Path, tokens: int, told: int, length: int
) -> tuple[list[Window], list[Window]]:
    first: list[Window] = []
    then: list[Window] = []
    for window in model.windows(text, length, tokens + told):
        (first if sum(w.tokens for w in first) < tokens else then).append(window)
    return first, then


def _of(layers: Sequence[LayerSensitivity], what: str) -> Harms:
    power = 2 if what == "error" else 1
    return [[getattr(effect, what) ** power for effect in layer.effects.values()] for layer in layers]


def _scores(
    model: TextModel, windows: list[Window], schemes: Sequence[LinearScheme], largest: Mapping[str, Tensor]
) -> Harms:
    """Sum over tokens of |dL/dy . D|: the loss on the text's own tokens, or the output's squared size for encoders."""

    def loss(window: Window, output: Tensor, _start: int) -> tuple[None, Callable[[int], Tensor]]:
        def once(_draw: int) -> Tensor:
            if not model.predicts or window.targets_BT is None:
                return 0.5 * output.square().sum()
            chosen = window.targets_BT >= 0
            return torch.nn.functional.cross_entropy(
                output[chosen].float(), window.targets_BT[chosen], reduction="sum"
            )

        return None, once

    layers = {path: layer for path, layer in quantizable_layers(model.module).items() if path in largest}
    found: dict[str, list[float]] = {}
    for stage in Backward(model, windows, layers, loss, 1):
        for path, calls in stage.calls.items():
            row = []
            with torch.inference_mode():
                for scheme in schemes:
                    twin = quantized(path, layers[path], scheme, largest[path])
                    row.append(
                        sum(
                            float(((twin(c.x) - layers[path](c.x)) * c.gradients[0]).sum(-1).abs().sum())
                            for c in calls
                        )
                    )
            found[path] = row
    return [found[path] for path in layers]


def _ends(layers: Sequence[LayerSensitivity], costs: Harms, limit: float) -> list[int] | None:
    """Give layers from both ends inward the dearest scheme, until the bytes are used up."""
    cheapest = [min(range(len(row)), key=row.__getitem__) for row in costs]
    dearest = [max(range(len(row)), key=row.__getitem__) for row in costs]
    choice = list(cheapest)
    used = sum(row[at] for row, at in zip(costs, choice, strict=True))
    if used > limit:
        return None
    order = sorted(range(len(layers)), key=lambda at: min(at, len(layers) - 1 - at))
    for at in order:
        more = costs[at][dearest[at]] - costs[at][choice[at]]
        if used + more > limit:
            break
        choice[at], used = dearest[at], used + more
    return choice


def _single(harms: Harms, costs: Harms, limit: float) -> list[int] | None:
    options = range(len(costs[0]))
    fitting = [at for at in options if sum(row[at] for row in costs) <= limit]
    if not fitting:
        return None
    best = min(fitting, key=lambda at: sum(row[at] for row in harms))
    return [best] * len(costs)
