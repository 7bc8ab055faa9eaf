"""The probe of formats against what_if on the same rows; training is the same to the bit; micro-batches, compiled models."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from stabilitylab import InputError, Monitor
from stabilitylab.formats import gaussian_error, what_if, what_if_format, what_if_sums
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FORMATS, FormatProbe
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


def readings(sink):
    return {name: value for (_, name, _), value in sink.rows.items() if name.startswith("format/")}


def test_with_every_row_it_is_what_if():
    torch.manual_seed(0)
    model, sink = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 24, bias=False)), Recording()
    x = torch.randn(6, 5, 48) * torch.logspace(-3, 2, 48)
    probe = FormatProbe(("int8-tensor", "int4-tile16", "e4m3", *FORMATS[1:]), rows=1000)
    with Monitor(model, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
        y = model(x)
        y.square().sum().backward()
        monitor.step(0)
    hidden = nn.functional.gelu(model[0](x)).detach()
    operands = {"0:input": x, "0:weight": model[0].weight, "2:input": hidden, "2:gradient": 2 * y.detach()}
    found = readings(sink)
    assert len(found) == 2 * 3 * 7 * 3
    for site, tensor in operands.items():
        for name in ("int8-tensor", "int4-tile16", "e4m3", "mxfp4", "nvfp4", "fp8-e4m3-tensor"):
            right = what_if(tensor, name)
            assert found[f"format/{site}/{name}_error"] == pytest.approx(right.error, rel=1e-5)
            assert found[f"format/{site}/{name}_underflow"] == pytest.approx(right.underflow, abs=1e-7)
            assert found[f"format/{site}/{name}_overflow"] == pytest.approx(right.overflow, abs=1e-7)


def test_integers_against_float64():
    torch.manual_seed(1)
    x = torch.randn(7, 96) * 10.0 ** torch.randint(-2, 3, (7, 1))
    for name, top, largest in (
        ("int8-tensor", 127, x.abs().amax().double()),
        ("int8-row", 127, x.abs().amax(1, keepdim=True).double()),
        ("int4-tile32", 7, x.view(7, 3, 32).abs().amax(2, keepdim=True).double()),
    ):
        wide = x.double().view(7, 3, 32) if "tile" in name else x.double()
        scale = largest / top
        rounded = (wide / scale).round() * scale
        right = float((rounded - wide).norm() / wide.norm())
        assert what_if(x, name).error == pytest.approx(right, rel=1e-5)
        assert what_if(x, name).overflow == 0


def test_a_sample_knows_the_whole_tensors_scale():
    """No sampled row holds the massive first token, yet its scale rounds the others."""
    torch.manual_seed(2)
    x = torch.randn(64, 32)
    x[0, 3] = 500.0
    sums = what_if_sums(x[1:][None], what_if_format("int8-tensor"), torch.tensor([500.0]))
    scale = 500.0 / 127
    wide = x[1:].double()
    assert float(sums[0, 0]) == pytest.approx(
        float(((wide / scale).round() * scale - wide).square().sum()), rel=1e-4
    )
    sink = Recording()
    model = nn.Linear(32, 8)
    probe = FormatProbe(("int8-tensor", "nvfp4"))
    with Monitor(model, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
        model(x).sum().backward()
        monitor.step(0)
    assert readings(sink)["format/:input/int8-tensor_error"] > 0.9


def test_several_tensors_at_once_are_as_one_by_one():
    torch.manual_seed(3)
    x = torch.randn(4, 6, 64) * torch.tensor([1e-4, 1.0, 30.0, 0.0]).view(4, 1, 1)
    for name in (*FORMATS, "mxfp8-e4m3", "fp8-e5m2-tile32", "fp16"):
        kind = what_if_format(name)
        together = what_if_sums(x, kind)
        alone = torch.cat([what_if_sums(one[None], kind) for one in x])
        assert torch.equal(together, alone)


def trained(probes):
    torch.manual_seed(0)
    model, sink = GPT(), Recording()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with Monitor(model, optimizer, every=2, probes=probes, sinks=[sink], detector=None) as monitor:
        for step in range(3):
            next_token_loss(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    return model, sink


def test_training_is_the_same_to_the_bit():
    plain, before = trained(all_probes())
    watched, sink = trained([*all_probes(), FormatProbe()])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    theirs = {key: value for key, value in sink.rows.items() if not key[1].startswith("format/")}
    assert theirs.keys() == before.rows.keys()
    np.testing.assert_array_equal(list(theirs.values()), list(before.rows.values()))
    steps = {step for step, name, _ in sink.rows if name.startswith("format/")}
    assert steps == {0, 2}
    assert not any(module._forward_hooks for module in watched.modules())
    copy.deepcopy(watched)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_and_in_micro_batches():
    found = []
    for compiled, batches in ((False, 1), (True, 1), (False, 2)):
        torch.manual_seed(0)
        model, sink = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)), Recording()
        x = torch.randn(12, 32)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with Monitor(run, every=1, probes=[FormatProbe(("mxfp4",))], sinks=[sink], detector=None) as monitor:
            for _ in range(batches):
                run(x).square().sum().backward()
                x = torch.zeros_like(x)
            monitor.step(0)
        found.append(readings(sink))
    eager, compiled, first_of_two = found
    assert len(eager) == 2 * 3 * 3
    assert compiled == eager
    assert first_of_two == eager


def test_what_is_not_finite_is_overflow():
    sink, model = Recording(), nn.Linear(4, 4)
    x = torch.ones(2, 4)
    x[1, 2] = torch.inf
    with Monitor(model, every=1, probes=[FormatProbe(("e4m3",))], sinks=[sink], detector=None) as monitor:
        model(x)
        monitor.step(0)
    assert readings(sink)["format/:input/e4m3_overflow"] == 1 / 8
    assert readings(sink)["format/:input/e4m3_error"] == 0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="choose one of int8"):
        FormatProbe(("int3",))
    with pytest.raises(InputError, match="span 128 rows"):
        FormatProbe(("fp8-e4m3-block128",))
    with pytest.raises(InputError, match="a row at least"):
        FormatProbe(rows=0)


def test_a_gaussian_loses_what_theory_says():
    # Uniform rounding of step s has error s / sqrt(12); a row of 1,024 reaches about 3.2 sigma.
    assert 2.9 < gaussian_error(what_if_format("int8-row")) * 127 * 12**0.5 < 3.6
    assert 0.024 < gaussian_error(what_if_format("fp8-e4m3-tensor")) < 0.029
