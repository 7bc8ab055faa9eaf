"""Trends against known laws; a run's forecast, on the terminal and in the report."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from stabilitylab import InputError, Monitor, load_run
from stabilitylab.cli import main
from stabilitylab.forecast import Forecast, LayerForecast, forecast_run, trends
from stabilitylab.formats import gaussian_error, what_if_format
from stabilitylab.probes.formats import FormatProbe


def laws(slopes, steps=range(0, 400, 10), level=0.01, noise=0.0):
    rng = np.random.default_rng(0)
    t = np.array(steps) + 1.0
    rows = [level * (t / t[-1]) ** b * np.exp(noise * rng.standard_normal(len(t))) for b in slopes]
    return pd.DataFrame(rows, index=[f"{i}:input" for i in range(len(slopes))], columns=steps)


def test_a_power_law_is_found_exactly():
    found = trends(laws([0.5, 0.0, -0.3, 1.0]))
    assert [round(found[f"{i}:input"].slope, 9) for i in range(4)] == [0.5, 0.0, -0.3, 1.0]
    earliest, likely, latest = found["0:input"].reaches(0.02)
    # y = 0.01 sqrt(t / T) is 0.02 at 4 T, and laws that held give an interval without width.
    assert earliest == pytest.approx(4 * 390, rel=1e-3)
    assert likely == pytest.approx(4 * 390, rel=1e-3)
    assert latest == pytest.approx(4 * 390, rel=1e-3)
    assert found["2:input"].reaches(0.02) == (math.inf,) * 3
    assert found["0:input"].reaches(0.005) == (390.0,) * 3


def test_noise_widens_the_interval():
    slopes = np.linspace(0.1, 0.6, 40)
    calm, noisy = (trends(laws(slopes, noise=noise)) for noise in (0.01, 0.1))
    assert 0 < calm["0:input"].width < noisy["0:input"].width
    # Of laws that hold, nine of ten true slopes lie within the band, less those that the fit at half the steps errs more on.
    inside = [abs(noisy[f"{i}:input"].slope - b) <= noisy["0:input"].width for i, b in enumerate(slopes)]
    assert np.mean(inside) >= 0.9


def test_too_little_is_no_forecast():
    assert trends(pd.DataFrame()) == {}
    assert trends(laws([0.5], steps=range(0, 30, 10))) == {}
    gone = laws([0.5])
    gone[:] = np.nan
    assert trends(gone) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A layer whose input grows an outlier as the square root of the step, and one whose input does not."""
    folder = tmp_path_factory.mktemp("runs") / "grows"
    torch.manual_seed(0)
    model = nn.ModuleDict({"grows": nn.Linear(64, 8), "stays": nn.Linear(64, 8)})
    probe = FormatProbe(("int8-tensor",), rows=64)
    normal = torch.randn(64, 64)
    with Monitor(model, out=folder, every=10, probes=[probe], detector=None, tensorboard=True) as monitor:
        for step in range(201):
            x = normal.clone()
            x[:, 0] *= 0.05 * (step + 1) ** 0.5
            x[7, 1] = 0.6 * (step + 1) ** 0.5
            (model["grows"](x) + model["stays"](normal)).sum().backward()
            monitor.step(step, loss=1.0)
    return folder


def test_a_run_is_forecast(run):
    found = forecast_run(load_run(run))
    assert found is not None
    assert found.until == 804
    by_site = {one.site: one for one in found.layers}
    grows, stays = by_site["grows:input"], by_site["stays:input"]
    assert not grows.has_left
    assert grows.limit == pytest.approx(2 * gaussian_error(what_if_format("int8-tensor")))
    # The largest is 0.6 sqrt(t): with uniform rounding the error is 0.6 sqrt(t) / 127 / sqrt(12) over an RMS near 1.
    expected = (grows.limit * 127 * 12**0.5 / 0.6) ** 2
    assert grows.likely == pytest.approx(expected, rel=0.3)
    assert grows.earliest <= grows.likely <= grows.latest
    assert stays.likely == math.inf
    assert found.layers[0].site == "grows:input"
    halfway = forecast_run(load_run(run), seen=160)
    assert halfway.last == 160
    with pytest.raises(InputError, match="more than 1"):
        forecast_run(load_run(run), factor=1.0)
    with pytest.raises(InputError, match="a later step than 100"):
        forecast_run(load_run(run), until=100)


def one_of(earliest, likely, latest):
    return LayerForecast(
        site="a:input", format="f", error=1.0, limit=2.0, earliest=earliest, likely=likely, latest=latest
    )


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (
            (150.0, 200.0, 300.0),
            "1 more leave it until step 400, a:input first, at step 200 (90 %: 150 to 300).",
        ),
        ((150.0, 200.0, math.inf), "1 more may leave until step 400, a:input first, at step 150 or later"),
        ((450.0, math.inf, math.inf), "none is forecast to leave until step 400."),
    ],
)
def test_an_interval_that_holds_never_foretells_nothing(interval, said):
    found = Forecast(last=100, until=400, factor=2.0, layers=[one_of(*interval)])
    assert found.sentence("f").startswith("0 of 1 operands have left it by step 100; ")
    assert said in found.sentence("f")
    assert [len(found.leaving("f")), len(found.may_leave("f"))] == [
        interval[2] <= 400,
        interval[0] <= 400 < interval[2],
    ]


def test_the_command(run, capsys, tmp_path):
    assert main(["forecast", str(run), "--until", "4000"]) == 0
    told = capsys.readouterr().out
    assert (
        "int8-tensor: 0 of 4 operands have left it by step 200; 1 more leave it until step 4,000, grows:input first"
        in told
    )
    assert main(["forecast", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last"] == 200
    with Monitor(nn.Linear(2, 2), out=tmp_path / "none", probes=[], detector=None) as monitor:
        monitor.step(0, loss=1.0)
    assert main(["forecast", str(tmp_path / "none")]) == 2
    assert "--monitor.formats-every N" in capsys.readouterr().err


def test_the_report_and_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from stabilitylab.report import run_report

    section = next(s for s in run_report(load_run(run)).sections if s.title == "Number formats")
    assert "0 of 4 operands have left it" in section.parts[0].said[0].text
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    largest = events.Scalars("formats/int8-tensor, largest error of an operand")
    assert len(largest) == 21
    assert largest[-1].value == pytest.approx(
        load_run(run).series("format/grows:input/int8-tensor_error").iloc[-1], rel=1e-5
    )
