"""Sensitivities against a direct recomputation: a copy of the model, one layer replaced, run whole."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models import linear_layers, open_text_model
from stabilitylab.quantization import QuantizedLinear
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.block_restart import Restart
from stabilitylab.quantization.latency import KEPT, measure_latencies
from stabilitylab.quantization.ranges import ChannelRange, layer_inputs
from stabilitylab.quantization.replacement import put, quantizable_layers, replaced
from stabilitylab.quantization.sensitivity import measure_sensitivity, reached_layers
from stabilitylab.quantization.verification import Twins, Verification
from tests.stabilitylab.quantization.folders import TEXT, write_llama


def direct(model, windows, path, scheme, largest):
    """Layer error, harm and loss increase in float64, without restarts, hooks or running sums of ours."""
    twin = copy.deepcopy(model.module)
    layer = twin.get_submodule(path)
    made = QuantizedLinear.from_linear(layer, scheme, largest=largest[path])
    parent, _, leaf = path.rpartition(".")
    off = square = harm = loss = count = 0.0
    for window in windows:
        seen = []
        hook = layer.register_forward_hook(lambda _m, a, y, seen=seen: seen.append((a[0], y)))
        own = dataclasses.replace(model, module=twin).run(window).double()
        hook.remove()
        setattr(twin.get_submodule(parent), leaf, made)
        other = dataclasses.replace(model, module=twin).run(window).double()
        setattr(twin.get_submodule(parent), leaf, layer)
        (x, y), *_ = seen
        off += float((made(x).double() - y).square().sum())
        square += float(y.double().square().sum())
        if model.predicts:
            chosen = window.targets_BT >= 0
            p, q = own[chosen].log_softmax(-1), other[chosen].log_softmax(-1)
            at = window.targets_BT[chosen][:, None]
            harm += float((p.exp() * (p - q)).sum())
            loss += float((p - q).gather(1, at).sum())
            count += len(at)
        else:
            harm += float((other - own).square().sum())
            count += float(own.square().sum())
    return (off / square) ** 0.5, harm / count, loss / count


def test_sensitivities_are_what_a_direct_computation_gives(model, windows, inputs, schemes):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with torch.inference_mode():
        found = measure_sensitivity(model, windows, schemes, inputs.largest)
    assert [layer.path for layer in found] == list(linear_layers(model.module))
    for layer in found[::5]:
        for scheme in schemes:
            error, harm, loss = direct(model, windows, layer.path, scheme, inputs.largest)
            effect = layer.effects[scheme.name]
            # Sums of squares of float32 numbers in float64: what differs is the last bits of y.
            assert effect.error == pytest.approx(error, rel=1e-5)
            # Log-softmax in float32: each logarithm, below 16 in size, is off by at most 16 * 2^-24, twice.
            assert effect.harm == pytest.approx(harm, rel=1e-4, abs=2 * 16 * 2**-24)
            assert effect.loss == pytest.approx(loss, rel=1e-4, abs=2 * 16 * 2**-24)
            weight = model.module.get_submodule(layer.path).weight
            twin = QuantizedLinear.from_linear(
                model.module.get_submodule(layer.path), scheme, largest=inputs.largest[layer.path]
            )
            assert effect.bytes == twin.nbytes
            assert layer.bytes_16 == 2 * weight.numel()
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_restarted_runs_are_whole_runs(model, windows):
    restart = Restart(model)
    for window in windows:
        whole = restart.begin(window)
        assert torch.equal(whole, model.run(window))
        assert restart.blocks > 1
        for start in range(restart.blocks):
            assert torch.equal(restart.run(start), whole)


class Gossip(nn.Module):
    """A block that also speaks to the next one through the side."""

    said = 0.0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *arguments, **named):
        output = self.inner(hidden, *arguments, **named)
        Gossip.said += 1.0
        return output + Gossip.said


def test_blocks_that_speak_through_the_side_are_run_whole(llama_folder):
    model = open_text_model(llama_folder)
    layers = model.module.model.layers
    for index, block in enumerate(layers):
        layers[index] = Gossip(block)
    model.module.model.register_forward_pre_hook(lambda *_: setattr(Gossip, "said", 0.0))
    window = next(iter(model.windows([TEXT], 32)))
    restart = Restart(model)
    whole = restart.begin(window)
    assert restart.blocks == 0
    assert torch.equal(restart.run(2), whole)


def test_ranges_are_those_of_the_whole_text(model, windows):
    layers = quantizable_layers(model.module)
    found = layer_inputs(model, windows, layers)
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in layers}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda _m, a, path=path: seen[path].append(a[0].flatten(0, -2)))
    for window in windows:
        model.run(window)
    for path, rows in seen.items():
        assert torch.equal(found.largest[path], torch.cat(rows).abs().amax(0))


def test_outlier_channels_are_counted():
    largest = torch.ones(9)
    largest[2], largest[4] = 30.0, 10.0
    seen = ChannelRange.of(largest)
    assert (seen.channels, seen.outliers, seen.ratio, seen.largest) == (9, 2, 30.0, 30.0)
    assert ChannelRange.of(torch.zeros(4)).ratio == 1.0


def test_latencies_cover_every_shape_scheme_and_batch(model, inputs, schemes):
    found = measure_latencies(
        model.module, inputs.samples, inputs.largest, schemes, batches=(1, 40), rounds=1
    )
    assert set(found) == {tuple(layer.weight.shape) for layer in linear_layers(model.module).values()}
    for times in found.values():
        assert set(times) == {KEPT, *(scheme.name for scheme in schemes)}
        assert all(set(batches) == {1, 40} and min(batches.values()) > 0 for batches in times.values())


def test_verification_is_the_loss_of_the_quantized_model(model, windows, inputs, schemes):
    verification = Verification(model, windows, Twins(model.module, inputs.largest))
    assignment = dict(zip(linear_layers(model.module), schemes * 3, strict=False))
    found = verification.measure(assignment)
    own = [model.run(window) for window in windows]
    losses = [model.loss(window) for window in windows] if model.predicts else []
    quantize_layers(model.module, assignment, inputs.largest)
    if model.predicts:
        after = [model.loss(window) for window in windows]
        change = sum(a - b for (a, _), (b, _) in zip(after, losses, strict=True)) / sum(n for _, n in after)
        assert found == pytest.approx(change, rel=1e-12, abs=1e-12)
    else:
        off = sum((model.run(w) - y).double().square().sum() for w, y in zip(windows, own, strict=True))
        assert found == pytest.approx(
            float(off / sum(y.double().square().sum() for y in own)) ** 0.5, rel=1e-6
        )


def test_tied_and_shared_layers(tmp_path):
    tied = open_text_model(write_llama(tmp_path, tied=True))
    layers = quantizable_layers(tied.module)
    assert "lm_head" in linear_layers(tied.module)
    assert "lm_head" not in layers
    # One layer under two paths is one layer, and both paths get its twin.
    first, second = tied.module.model.layers[0].mlp, tied.module.model.layers[1].mlp
    second.up_proj = first.up_proj
    assert "model.layers.0.mlp.up_proj" in quantizable_layers(tied.module)
    other = nn.Linear(32, 64)
    with replaced(tied.module, {"model.layers.0.mlp.up_proj": other}):
        assert first.up_proj is other
        assert second.up_proj is other
    assert first.up_proj is second.up_proj is not other
    put(tied.module, "model.layers.1.mlp.up_proj", other)
    assert first.up_proj is other


def test_nothing_to_quantize(llama_folder):
    model = open_text_model(llama_folder)
    with pytest.raises(InputError, match="nothing to quantize"):
        reached_layers(model.module, {})
    with pytest.raises(InputError, match="the plan is for another model"):
        quantize_layers(model.module, {"model.norm": None})
