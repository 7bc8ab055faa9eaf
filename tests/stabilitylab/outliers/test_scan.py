"""Scans of real small models: they find planted outliers, streaming equals the whole, and the model stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, open_text_model
from stabilitylab.outliers import scan_outliers
from stabilitylab.outliers.criteria import three_part_mask
from stabilitylab.outliers.record import scan_record
from tests.stabilitylab.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEXT = [tiny.TEXT]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """Channel 3 is large at the input of every layer's expansion, channel 17 of layer 2's contraction stands alone."""
    module = tiny.llama()
    with torch.no_grad():
        for layer in module.model.layers:
            layer.post_attention_layernorm.weight[3] = 40.0
            # Nothing is made of it, so that it stays where it is.
            layer.mlp.gate_proj.weight[:, 3] = layer.mlp.up_proj.weight[:, 3] = 0.0
        module.model.layers[2].mlp.up_proj.weight[17] *= 5000.0
        module.model.layers[2].mlp.down_proj.weight[:, 17] = 0.0
    return open_text_model(tiny.save(module, tmp_path_factory.mktemp("planted") / "m"))


def test_planted_channels_are_found(planted):
    scan = scan_outliers(planted, TEXT, length=20, tokens=400)
    worst = scan.worst(5)
    assert (worst[0].site.role, worst[0].site.layer, worst[0].channel) == ("mlp.down_proj", 2, 17)
    assert {(one.site.role, one.channel) for one in worst[1:]} == {("mlp.gate_proj", 3)}
    assert sorted(one.site.layer for one in worst[1:]) == [0, 1, 2, 3]
    assert np.flatnonzero(three_part_mask(scan.inputs)).tolist() == [3]
    assert scan.by_depth(lambda one: float(one.times_median.argmax()))["mlp.gate_proj"].tolist() == [3.0] * 4


def test_a_stream_is_the_whole(planted):
    """The statistics of many windows are those of all activations caught at once."""
    caught: dict[str, list[torch.Tensor]] = {}
    handles = []
    for layer in range(4):
        module = planted.module.model.layers[layer].mlp.down_proj
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, name=f"model.layers.{layer}.mlp.down_proj:input": caught.setdefault(
                    name, []
                ).append(args[0])
            )
        )
    scan = scan_outliers(planted, TEXT, length=24, tokens=500)
    for handle in handles:
        handle.remove()
    statistics = {site.path: one for site, one in scan.sites}
    for name, parts in caught.items():
        whole = torch.cat([part[0] for part in parts]).double().numpy()
        one = statistics[name]
        assert one.positions == len(whole) == scan.tokens == 500
        np.testing.assert_array_equal(one.largest, np.abs(whole).max(0))
        np.testing.assert_array_equal(
            one.elsewhere_C, np.abs(torch.cat([p[0, 1:] for p in parts]).numpy()).max(0)
        )
        np.testing.assert_array_equal(one.over_6_C, (np.abs(whole) >= 6).sum(0))
        np.testing.assert_allclose(one.channel_rms, np.sqrt((whole**2).mean(0)), rtol=1e-5)


def test_layers_that_read_one_tensor_are_measured_once(planted):
    scan = scan_outliers(planted, TEXT, length=20, tokens=40)
    assert scan.shared["model.layers.0.self_attn.q_proj:input"] == (
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    )
    assert scan.shared["model.layers.1.mlp.gate_proj:input"] == ("model.layers.1.mlp.up_proj",)
    # Four sites and the residual stream in each of 4 layers, and the projection to the vocabulary.
    assert len(scan.sites) == 4 * 5 + 1
    assert scan.skipped == ()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_architectures(kind, tmp_path):
    model = open_text_model(tiny.save(getattr(tiny, kind)(), tmp_path / kind, framed=kind == "bert"))
    scan = scan_outliers(model, TEXT, length=20, tokens=100)
    assert len(scan.residual_stream) == 2
    expected = {
        "bert": [
            "attention.output.dense",
            "attention.self.query",
            "intermediate.dense",
            "output.dense",
            "pooler.dense",
            "residual stream",
        ],
        "gpt2": ["attn.c_attn", "attn.c_proj", "lm_head", "mlp.c_fc", "mlp.c_proj", "residual stream"],
    }
    assert sorted(scan.roles()) == expected[kind]
    assert {one.positions for site, one in scan.sites if site.layer is not None} == {scan.tokens}


def test_reading_changes_nothing_and_leaves_no_hooks(planted):
    window = next(planted.windows(TEXT, 20))
    before = planted.run(window)
    scan_outliers(planted, TEXT, length=20, tokens=60)
    torch.testing.assert_close(planted.run(window), before, rtol=0, atol=0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in planted.module.modules())


def test_memory_is_that_of_the_statistics(planted):
    short = scan_outliers(planted, TEXT, length=20, tokens=40)
    long = scan_outliers(planted, TEXT, length=20, tokens=800)
    assert long.nbytes == short.nbytes
    assert long.windows == 40


def test_thresholds_are_reached_by_the_shares_they_name(planted):
    scan = scan_outliers(planted, TEXT, length=20, tokens=200)
    every = np.concatenate([one.largest for _, one in scan.inputs])
    for share, value in zip((0.3, 0.001), scan.thresholds()["magnitude"], strict=True):
        # At least that share reaches it, and of what lies above at most that share.
        assert (every >= value).mean() >= share
        assert (every > value).mean() <= share


def test_activations_that_are_not_finite_are_refused(tmp_path):
    module = tiny.llama()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    model = open_text_model(tiny.save(module, tmp_path / "m"))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj:input holds NaN or infinite"):
        scan_outliers(model, TEXT, length=20, tokens=40)


def test_a_record_is_plain_and_complete(planted):
    scan = scan_outliers(planted, TEXT, length=20, tokens=100)
    record = scan_record(scan)
    assert [one["name"] for one in record["criteria"]][:2] == ["llm.int8", "over-6"]
    assert record["criteria"][0]["linear_inputs"]["marked"] == 1
    assert record["tokens"] == 100
    assert len(record["sites"]) == len(scan.sites)
    assert Path(record["text"]).name == "text given in memory"
