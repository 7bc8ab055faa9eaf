"""Reading a text one block at a time: a whole run's numbers bit for bit, with only one block's quantized layers in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from stabilitylab.models.logit_chunks import largest_stack
from stabilitylab.models.text_model import output_of
from stabilitylab.quantization import QuantizedLinear
from stabilitylab.quantization.blockwise import Blockwise
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.verification import Twins, Verification

NAMES = ("int8-row", "int4-g32-asym-mse", "w8a8-token", "int4-row")


def schemes_of(model):
    return {path: scheme_of(NAMES[at % 4]) for at, path in enumerate(quantizable_layers(model.module))}


def twins_of(model, inputs, schemes):
    layers = quantizable_layers(model.module)
    return {
        path: quantized(path, layers[path], scheme, inputs.largest.get(path))
        for path, scheme in schemes.items()
    }


def test_outputs_are_those_of_whole_runs(model, windows, inputs):
    schemes = schemes_of(model)
    reading = Blockwise(model, windows[0])
    assert len(reading.paths) == len(largest_stack(model.module)[1]) > 1
    twins = Twins(model.module, inputs.largest)
    parted = twins.by_block(schemes, reading.paths)
    with torch.no_grad():
        with replaced(model.module, twins_of(model, inputs, schemes)):
            expected = [model.run(window) for window in windows]
        with replaced(model.module, twins.of(parted.get(None, {}))):
            found = list(
                reading.outputs(
                    windows, lambda block: replaced(model.module, twins.of(parted.get(block, {})))
                )
            )
    assert [number for number, _, _ in found] == list(range(len(windows)))
    for (_, _, output), whole in zip(found, expected, strict=True):
        assert torch.equal(output, whole)


@pytest.mark.parametrize("filed", [False, True], ids=["made anew", "in files"])
def test_one_blocks_layers_are_there_at_once(model, windows, inputs, tmp_path, monkeypatch, filed):
    """Where a plan's quantized layers lie in files, the second reading takes them from there, with the same loss to the bit."""
    schemes = schemes_of(model)
    parted = Twins(model.module, inputs.largest).by_block(schemes, Blockwise(model, windows[0]).paths)
    one_block = max(len(of) for of in parted.values())
    assert one_block < len(schemes)
    # One more while a layer that was made is read back from its file.
    allowed = one_block + len(parted.get(None, {})) + filed
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most = [0]
    init = QuantizedLinear.__init__

    def counted(self, *args, **named):
        init(self, *args, **named)
        alive.add(self)
        if (
            len(alive) > allowed
        ):  # garbage may be among them; a sweep of a whole suite's objects takes a third of a second
            gc.collect()
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(QuantizedLinear, "__init__", counted)
    rounded = RoundedWeights(tmp_path / "kept") if filed else None
    losses = []
    with torch.inference_mode():
        for _ in range(2):
            twins = Twins(model.module, inputs.largest, rounded)
            losses.append(Verification(model, windows, twins).measure(schemes))
    assert losses[0] == losses[1] != 0
    assert one_block <= most[0] <= allowed
    assert len(list((tmp_path / "kept").glob("*"))) == (len(schemes) if filed else 0)


def test_a_model_whose_blocks_know_more_of_each_other_is_read_whole(model, windows, monkeypatch):
    """Here the end of the model adds what the first block returned."""
    blocks = largest_stack(model.module)[1]
    seen = []
    blocks[0].register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    forward = type(model.module).forward

    def also(self, *args, **named):
        seen.clear()
        output = forward(self, *args, **named)
        first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        output_of(output).add_(first.mean())
        return output

    monkeypatch.setattr(type(model.module), "forward", also)
    reading = Blockwise(model, windows[0])
    assert reading.paths == []
    with torch.no_grad():
        for (number, piece, output), window in zip(reading.outputs(windows), windows, strict=True):
            assert piece is window
            assert torch.equal(output, model.run(windows[number]))
