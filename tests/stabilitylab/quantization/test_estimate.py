"""Sensitivities from gradients: against a backward pass through the whole model, and against the curvature itself in float64."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from stabilitylab.models.text_model import output_of
from stabilitylab.quantization.backward import Backward
from stabilitylab.quantization.estimate import Estimated, EstimatedLayer, assembled, estimate_sensitivity
from stabilitylab.quantization.plan_checkpoint import SoFar, mark_of
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers, quantized
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.sensitivity import measure_sensitivity
from stabilitylab.quantization.sensitivity_pass import begun, layers_file, measured_layers
from stabilitylab.quantization.time_left import Pace
from tests.stabilitylab.quantization.folders import TEXT


@pytest.fixture
def layers(model):
    return quantizable_layers(model.module)


def square(_window, output, _start):
    # Half of it shared by all draws.
    half = 0.5 * output.square().sum()
    return half, lambda draw: (output * (draw + 1)).square().sum() - half


def whole_backward(model, layers, window):
    """x and gradient of every layer, from one graph through the whole model."""
    seen = {}

    def see(path, _module, arguments, output):
        seen[path] = arguments[0], output

    hooks = [layer.register_forward_hook(partial(see, path)) for path, layer in layers.items()]
    embedding = model.module.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _m, _a, y: y.requires_grad_()))
    output = output_of(model.module(**window.inputs))
    for hook in hooks:
        hook.remove()
    # An encoder's pooler leads to nothing that is looked at.
    grads = torch.autograd.grad(output.square().sum(), [y for _, y in seen.values()], materialize_grads=True)
    return {path: (x, g) for (path, (x, _)), g in zip(seen.items(), grads, strict=True)}


def test_stage_by_stage_is_the_whole_backward_pass(model, windows, layers):
    backward = Backward(model, windows, layers, square, 2)
    assert backward.stages > 2
    found = {}
    for stage in backward:
        assert not found.keys() & stage.calls.keys()
        found |= stage.calls
    # An encoder's output does not depend on its pooler.
    assert found.keys() == layers.keys() - {"pooler.dense"}
    for number, window in enumerate(windows):
        for path, (x, gradient) in whole_backward(model, layers, window).items():
            if path not in found:
                assert not gradient.any()
                continue
            (call,) = [call for call in found[path] if call.window == number]
            assert torch.equal(call.x, x)
            # The same operators on the same numbers: sums of gradients come in another order.
            scale = float(gradient.detach().abs().max())
            # And they are kept in bf16, half a step of which is 2^-9.
            for draw, factor in enumerate((1, 4)):
                kept = call.gradients[draw].float()
                assert torch.allclose(kept, factor * gradient, rtol=2**-8, atol=factor * 1e-5 * scale)
    assert not any(p.requires_grad for p in model.module.parameters())


def curvature(model, windows, path, scheme, largest):
    """1/2 sum of Var_p(J D), or |J D|^2, by central differences in float64; per target, or of the output's square."""
    layer = model.module.get_submodule(path)
    off_NK = (
        quantized(path, layer, scheme, largest[path]).stored.dequantize().double() - layer.weight.double()
    )
    exact = dataclasses.replace(model, module=model.module.double())
    total = count = 0.0
    for window in windows:
        outputs = []
        for side in (0.0, 1e-4, -1e-4):

            def push(_m, arguments, y, side=side):
                return y + side * arguments[0] @ off_NK.T

            hook = layer.register_forward_hook(push)
            outputs.append(exact.run(window))
            hook.remove()
        own, high, low = outputs
        moved = (high - low) / 2e-4
        if model.predicts:
            chosen = window.targets_BT >= 0
            p, moved = own[chosen].softmax(-1), moved[chosen]
            mean = (p * moved).sum(-1, keepdim=True)
            total += 0.5 * float((p * (moved - mean).square()).sum())
            count += int(chosen.sum())
        else:
            total += float(moved.square().sum())
            count += float(own.square().sum())
    model.module.float()
    return total / count


def test_the_sum_over_draws_tends_to_the_curvature(model, windows, layers, inputs):
    """Squares of one Gaussian-like number a window and draw: a relative deviation of sqrt(2 / (windows x draws))."""
    draws, scheme = 150, scheme_of("int4-g32-asym")
    chosen = dict(list(layers.items())[3:5])
    raw: list[EstimatedLayer] = []
    estimate_sensitivity(model, windows, [scheme], inputs.largest, chosen, draws=draws, done=raw.append)
    targets = sum(int((w.targets_BT >= 0).sum()) for w in windows) if model.predicts else 0
    square = sum(float(model.run(w).double().square().sum()) for w in windows)
    count = draws * (2 * targets if model.predicts else square)
    for layer in raw:
        expected = curvature(model, windows, layer.path, scheme, inputs.largest)
        spread = (2 / (draws * len(windows))) ** 0.5
        assert layer.schemes[scheme.name].whole / count == pytest.approx(expected, rel=4 * spread)


def test_estimates_rank_as_measurements_do(model, windows, layers, inputs, schemes):
    with torch.inference_mode():
        measured = measure_sensitivity(model, windows, schemes, inputs.largest)
    estimated = estimate_sensitivity(model, windows, schemes, inputs.largest, layers, draws=8)
    measured = [layer for layer in measured if layer.path != "pooler.dense"]  # which nothing depends on
    assert [layer.path for layer in estimated] == [layer.path for layer in measured]
    pairs = []
    for one, other in zip(estimated, measured, strict=True):
        assert one.shape == other.shape
        assert one.range == other.range
        for name, effect in one.effects.items():
            assert effect.bytes == other.effects[name].bytes
            assert effect.error == pytest.approx(other.effects[name].error, rel=1e-4)
            pairs.append((effect.harm, other.effects[name].harm))
    assert spearmanr(*zip(*pairs, strict=True))[0] > 0.9


def test_harm_keeps_the_level_of_its_kind(inputs):
    """Two layers of a kind, whose errors have half of them in common, and one of another, of which nothing is known but that."""
    span = next(iter_ranges(inputs))

    def layer(path, rows, whole):
        made = EstimatedLayer(path=path, shape=(1, 2), range=span)
        made.schemes["s"] = Estimated(rows=rows, whole=whole, off=1.0, square=4.0, bytes=3)
        return made

    layers = [layer("a.0.v", 1.0, 1.0), layer("a.1.v", 3.0, 7.0), layer("a.0.k", 2.0, 1.0)]
    found = [one.effects["s"] for one in assembled(layers, 10.0, freedom=16, predicts=True)]
    assert [one.harm for one in found] == pytest.approx([0.5 * (2 + 1) / 10, 0.5 * (6 + 7) / 10, 0.1])
    assert [one.loss for one in found] == [one.harm for one in found]
    assert found[0].error == 0.5
    # The sum over a kind is the unbiased one, whatever it is divided among.
    assert found[0].harm + found[1].harm == pytest.approx(0.8)


def ways(model, windows, inputs, names, plan, **named):
    schemes = [scheme_of(name) for name in names]
    return measured_layers(
        model,
        windows,
        schemes,
        inputs.largest,
        sensitivity="gradients",
        so_far=begun(model, windows, schemes, plan),
        rounded=RoundedWeights(plan.with_suffix(".rounded")),
        pace=Pace(named.get("console")),
    )


def test_an_interrupted_pass_is_taken_up(model, windows, inputs, tmp_path, monkeypatch):
    from rich.console import Console

    console = Console(quiet=True)
    names, plan = ("int4-g32-gptq", "int8-row"), tmp_path / "plan.json"
    whole, _ = ways(model, windows, inputs, names, tmp_path / "other.json", console=console)
    steps = []

    def stop(self):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Pace, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        ways(model, windows, inputs, names, plan, console=console)
    with layers_file(plan).open("a") as file:
        file.write('{"path": "cut o')
    again, _ = ways(model, windows, inputs, names, plan, console=console)
    assert again == whole
    # Five before and the others after: none twice.
    written = [
        json.loads(line)["path"] for line in layers_file(plan).read_text().splitlines() if '"shape"' in line
    ]
    assert len(steps) == len(written) == len(set(written)) >= len(whole)
    kept = sorted(file.name for file in (tmp_path / "plan.rounded").iterdir())
    assert kept == sorted(file.name for file in (tmp_path / "other.rounded").iterdir())


def test_a_pass_that_is_whole_is_not_run_again(model, windows, layers, inputs, monkeypatch):
    """Where only the steps after the layers are left, the backward pass does not run."""
    if not model.predicts:
        pytest.skip("its count is of the pass itself")
    schemes, raw = [scheme_of("int4-row")], []
    whole = estimate_sensitivity(model, windows, schemes, inputs.largest, layers, draws=2, done=raw.append)
    seen = {layer.path for layer in raw}
    reached = {path: layer for path, layer in layers.items() if path in seen}

    def run(self):
        raise AssertionError("run again")

    monkeypatch.setattr(Backward, "__iter__", run)
    assert estimate_sensitivity(model, windows, schemes, inputs.largest, reached, draws=2, known=raw) == whole


def test_another_text_or_menu_begins_anew(model, windows, inputs, tmp_path):
    schemes = [scheme_of("int8-row")]
    file = tmp_path / "plan.layers.jsonl"
    layer = EstimatedLayer(path="a", shape=(1, 2), range=next(iter_ranges(inputs)))
    SoFar(file, mark_of(model, windows, schemes, 4)).add(layer)
    assert SoFar(file, mark_of(model, windows, schemes, 4)).known == [layer]
    for other in (
        mark_of(model, windows[:1], schemes, 4),
        mark_of(model, windows, [scheme_of("int4-row")], 4),
        mark_of(model, windows, schemes, 5),
    ):
        assert SoFar(file, other).known == []
    anew = SoFar(file, "anew")
    anew.add(layer)
    assert json.loads(file.read_text().splitlines()[0]) == {"mark": "anew"}


def iter_ranges(inputs):
    from stabilitylab.quantization.ranges import ChannelRange

    return (ChannelRange.of(largest) for largest in inputs.largest.values())


class InPlace(nn.Module):
    """A block whose gradient torch cannot take: it changes in place what an earlier operator needs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *arguments, **named):
        output = self.inner(hidden, *arguments, **named)
        squared = output * output
        output.zero_()
        return squared.sqrt()


def test_a_model_without_gradients_is_measured_by_runs(llama_folder, tmp_path):
    from rich.console import Console

    model = open_text_model(llama_folder)
    blocks = model.module.model.layers
    blocks[1] = InPlace(blocks[1])
    windows = list(model.windows([TEXT], 32, 64))
    inputs = layer_inputs(model, windows, quantizable_layers(model.module))
    console = Console(quiet=True)
    found, notes = ways(model, windows, inputs, ("int8-row",), tmp_path / "plan.json", console=console)
    assert len(found) > 10
    assert notes[0].endswith("measured by runs")
    names = ("int8-row-gptq", "int8-row")
    found, notes = ways(model, windows, inputs, names, tmp_path / "both.json", console=console)
    assert set(found[0].effects) == {"int8-row"}
    assert notes[0].endswith("measured by runs, without int8-row-gptq, which need them")
    with pytest.raises(InputError, match="leave them out of --schemes"):
        ways(model, windows, inputs, ("int8-row-gptq",), tmp_path / "other.json", console=console)


def test_rounded_weights_are_read_back_and_belong_to_their_layer(model, windows, layers, inputs, tmp_path):
    kept = RoundedWeights(tmp_path / "plan.rounded")
    schemes = [scheme_of(n) for n in ("int4-g32-asym-gptqo", "nvfp4-awq", "int4-g32-gptq-had", "int8-row")]
    twins = {}

    def keep(path, scheme, twin):
        twins[path, scheme.name] = twin
        kept.keep(path, scheme, twin, layers[path].weight)

    estimate_sensitivity(model, windows, schemes, inputs.largest, layers, draws=1, keep=keep)
    path = list(layers)[4]
    assert kept.scheme(path, schemes[-1]) is schemes[-1]
    x = torch.randn(5, layers[path].weight.shape[1])
    for scheme in schemes[:-1]:
        again = quantized(path, layers[path], kept.scheme(path, scheme))
        assert torch.equal(again(x), twins[path, scheme.name](x))
        with pytest.raises(InputError, match="was rounded from another weight"):
            quantized(path, nn.Linear(*reversed(layers[path].weight.shape)), kept.scheme(path, scheme))
    kept.keep_only([(path, "nvfp4-awq")])
    assert len(list(kept.folder.iterdir())) == 1
    with pytest.raises(InputError, match="keep the folder beside the plan"):
        quantized(path, layers[path], kept.scheme(path, schemes[0]))
    kept.keep_only([])
    assert not kept.folder.exists()


def test_each_layer_is_seen_with_its_own_input(model, windows, layers):
    """Also where an earlier layer's input would lie in the same place: graphs of weights without gradients let it go."""
    path, layer = next(iter(layers.items()))
    backward = Backward(model, windows[:1], {path: layer}, square, 1)
    calls = []
    with torch.enable_grad(), backward._watching(calls):
        for number in range(8):
            layer(torch.full((1, 32, layer.weight.shape[1]), float(number)))
    assert [float(x.mean()) for _, x, _ in calls] == list(range(8))
