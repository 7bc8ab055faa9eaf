"""Every probe's docstring table lists exactly what the probe emits, with a meaning, a unit and a source for each."""

from __future__ import annotations

import importlib
import math
import pkgutil

import pytest
import torch
from torch import nn

import stabilitylab.probes
from stabilitylab import Monitor
from stabilitylab.probes.base import Probe
from stabilitylab.probes.curvature import CurvatureProbe
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FormatProbe
from stabilitylab.probes.weights import WeightProbe
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

HEADER = "| statistic | meaning | unit | source |"


def table(module: str) -> dict[str, tuple[str, str, str]]:
    doc = importlib.import_module(f"stabilitylab.probes.{module}").__doc__ or ""
    lines = doc.splitlines()
    if HEADER not in lines:
        return {}
    rows = {}
    for line in lines[lines.index(HEADER) + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        meaning, unit, source = cells
        rows[name] = (meaning, unit, source)
    return rows


def with_tables() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(stabilitylab.probes.__path__) if table(m.name)]


def every_probe(model: nn.Module) -> list[Probe]:
    """All, and those that are asked for."""
    curvature = CurvatureProbe(lambda: next_token_loss(model, batch(0)).backward())
    return [*all_probes(), WeightProbe(), curvature, FormatProbe()]


def test_every_probe_has_a_table() -> None:
    assert set(with_tables()) == {type(probe).__module__.rpartition(".")[2] for probe in every_probe(GPT())}


@pytest.mark.parametrize("module", with_tables())
def test_every_row_is_filled_in(module: str) -> None:
    for name, cells in table(module).items():
        assert all(cells), name


@pytest.mark.parametrize("module", with_tables())
def test_table_equals_what_is_emitted(module: str) -> None:
    torch.manual_seed(0)
    model, sink = GPT(), Recording()
    probes = every_probe(model)
    mine = [p for p in probes if type(p).__module__.endswith(f".{module}")]
    used = probes if module == "precision" else mine
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, every=1, probes=used, sinks=[sink], detector=None) as monitor:
        for step in range(2):
            loss = next_token_loss(model, batch(step)) * (math.inf if step else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    families = {"embedding_rows": "gradient", "gradients": "gradient", "activations": "activation"}
    families |= {"activation_gradients": "activation_gradient", "updates": "update", "weights": "weight"}
    families |= {"formats": "format"}
    family = families.get(module, module)
    emitted = {name.rpartition("/")[2] for _, name, _ in sink.rows if name.startswith(f"{family}/")}
    assert emitted == set(table(module))


def test_the_family_and_sites_are_named_in_the_docstring() -> None:
    for module in with_tables():
        doc = importlib.import_module(f"stabilitylab.probes.{module}").__doc__ or ""
        assert "Family ``" in doc
        assert "ite" in doc


def test_a_model_without_any_site_is_no_error() -> None:
    sink = Recording()
    model = nn.Sequential()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        model(torch.ones(2))
        monitor.step(0, loss=1.0)
    assert list(sink.rows) == [(0, "train/-/loss", -1)]
