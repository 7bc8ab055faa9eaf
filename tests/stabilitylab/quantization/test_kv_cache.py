"""A rounded cache against float64 written out number by number, and a model that attends to keys and values rounded by hand."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.formats import E4M3, round_to
from stabilitylab.models import open_text_model
from stabilitylab.quantization.kv_cache import (
    CACHE_FORMATS,
    CacheCost,
    CacheFormat,
    affine,
    cheapest_harm,
    mean_over_windows,
    measure_cache_formats,
    require_cache,
    symmetric,
)
from tests.stabilitylab.quantization.folders import TEXT, write_tokenizer


def half(number):
    return float(torch.tensor(number, dtype=torch.float64).to(torch.float16))


def naive_affine(row, bits):
    found = []
    for start in range(0, len(row), 32):
        group = row[start : start + 32]
        low = half(min(group))
        scale = half((max(group) - low) / (2**bits - 1)) or 1.0
        codes = [min(max(round((x - low) / scale), 0), 2**bits - 1) for x in group]
        found += [low + code * scale for code in codes]
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_those_of_the_definition(bits):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(bits)) * torch.linspace(0.1, 9, 70)
    expected = torch.tensor([naive_affine(row, bits) for row in x.double().tolist()], dtype=torch.float64)
    assert torch.allclose(affine(x, bits).double(), expected, rtol=2**-22, atol=1e-6)
    top = 2 ** (bits - 1) - 1
    scale = (x.double().abs().amax(-1, keepdim=True) / top).to(torch.float16).double()
    expected = (x.double() / scale).round().clamp(-top, top) * scale
    assert torch.allclose(symmetric(x, bits).double(), expected, rtol=2**-22, atol=1e-6)


def test_what_is_all_alike_stays():
    assert torch.equal(affine(torch.full((2, 32), 0.5), 4), torch.full((2, 32), 0.5))
    assert torch.equal(symmetric(torch.zeros(2, 8), 8), torch.zeros(2, 8))


def test_keys_by_channel_and_values_by_token():
    """A channel that is large at every token costs keys by channel nothing."""
    keys = torch.randn(1, 2, 32, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 5] += 50
    others = [c for c in range(32) if c != 5]
    by_channel, by_token = CACHE_FORMATS["int4-kivi"], CACHE_FORMATS["int4-token"]

    def error(found):
        return float((found - keys)[..., others].square().mean())

    assert error(by_channel.rounded_keys(keys)) < 0.05 * error(by_token.rounded_keys(keys))
    assert torch.equal(by_channel.rounded_values(keys), by_token.rounded_values(keys))
    assert torch.equal(CACHE_FORMATS["fp8-e4m3"].rounded_keys(keys), round_to(keys, E4M3))


def test_bytes_are_counted():
    heads, channels = 2, 64
    assert CACHE_FORMATS["fp8-e4m3"].nbytes(100, heads, channels) == 2 * 100 * heads * channels
    assert CACHE_FORMATS["int8-token"].nbytes(100, heads, channels) == 2 * 100 * heads * (channels + 2)
    # 4 bits, and 4 bytes for 32 numbers.
    assert CACHE_FORMATS["int4-token"].nbytes(96, heads, channels) == 2 * 96 * heads * (32 + 8)
    assert CACHE_FORMATS["int4-kivi"].nbytes(96, heads, channels) == 2 * 96 * heads * (32 + 8)
    more = CACHE_FORMATS["int4-kivi"].nbytes(97, heads, channels)
    assert more == 2 * 96 * heads * (32 + 8) + 2 * 2 * heads * channels
    # Values of another width: a cache of both is half of twice each.
    for one in CACHE_FORMATS.values():
        apart = one.nbytes(97, heads, channels) + one.nbytes(97, heads, 32)
        if one.keys != "channel":
            assert 2 * one.nbytes(97, heads, channels, 32) == apart
    assert CACHE_FORMATS["int4-kivi"].nbytes(96, heads, 64, 32) == 96 * heads * (32 + 8 + 16 + 4)


@pytest.mark.filterwarnings("ignore")
def test_values_may_be_narrower_than_keys_and_windows_are_refused(tmp_path):
    import transformers

    few = {
        "vocab_size": write_tokenizer(tmp_path), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    config = transformers.DeepseekV3Config(
        **few, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=8,
        num_key_value_heads=4,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    model = open_text_model(tmp_path)
    windows = list(model.windows([TEXT], 16, 16))
    whole, found = measure_cache_formats(model, windows, [CACHE_FORMATS["fp8-e4m3"]], 1000)
    # transformers 5.23 keeps what keys and values are made of, releases before it both of them.
    assert whole in (2 * 2 * 1000 * (16 + 8), 2 * 2 * 1000 * 4 * (24 + 8))
    assert found["fp8-e4m3"].bytes == whole // 2
    # Mistral says nothing of its layers but a window that all of them have.
    config = transformers.MistralConfig(**few, sliding_window=8, num_key_value_heads=2)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="layers of sliding_attention, whose cache is of another kind"):
        require_cache(open_text_model(tmp_path))


def by_hand(model, window, format):
    """Logits with rounded keys and values, token by token, through a mask of what each query sees rounded."""
    from transformers.cache_utils import DynamicCache

    tokens, rows = window.inputs["input_ids"], []
    piece = format.piece or 1
    for at in range(tokens.shape[1]):
        # Rebuild the past: whole pieces before this token's own rounded, one after another.
        cache = DynamicCache()
        done = at // piece * piece
        for start in range(0, done, piece):
            model.module(input_ids=tokens[:, start : start + piece], past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                layer.keys = torch.cat(
                    [layer.keys[..., :start, :], format.rounded_keys(layer.keys[..., start:, :])], -2
                )
                layer.values = torch.cat(
                    [layer.values[..., :start, :], format.rounded_values(layer.values[..., start:, :])], -2
                )
        out = model.module(input_ids=tokens[:, done : at + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1)


@torch.inference_mode()
def test_the_loss_is_that_of_a_model_that_sees_a_rounded_past(llama_folder):
    model = open_text_model(llama_folder)
    windows = list(model.windows([TEXT], 48, 48))
    names = ("int4-kivi", "int2-kivi")
    whole, found = measure_cache_formats(model, windows, [CACHE_FORMATS[name] for name in names], 1000)
    layers, heads, channels = 3, 2, 8
    assert whole == 2 * 2 * layers * heads * channels * 1000
    from stabilitylab.models.text_model import loss_of

    for name in names:
        total = own = count = 0.0
        for window in windows:
            loss, targets = loss_of(by_hand(model, window, CACHE_FORMATS[name]), window.targets_BT)
            total, own, count = total + loss, own + model.loss(window)[0], count + targets
        assert found[name].loss == pytest.approx((total - own) / count, abs=2e-5)
        assert found[name].bytes == layers * CACHE_FORMATS[name].nbytes(1000, heads, channels)


@torch.inference_mode()
def test_formats_that_round_at_once(llama_folder):
    """Values enter the cache as they leave their projection, so rounding them there, with keys let alone, is the same model."""
    model = open_text_model(llama_folder)
    windows = list(model.windows([TEXT], 48, 96))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ValuesOnly(CacheFormat):
        def rounded_keys(self, keys_BHTD):
            return keys_BHTD

    kept = CACHE_FORMATS["int8-token"]
    only = ValuesOnly(name="values", bits=kept.bits, keys=kept.keys)
    _, found = measure_cache_formats(model, windows, [only], 64)
    own = sum(model.loss(window)[0] for window in windows)
    for layer in model.module.model.layers:
        # [B, T, heads x 8]: a scale for the 8 channels of a head and token.
        layer.self_attn.v_proj.register_forward_hook(
            lambda _m, _a, y: symmetric(y.unflatten(-1, (-1, 8)), 8).flatten(-2)
        )
    count = sum(int((window.targets_BT >= 0).sum()) for window in windows)
    expected = (sum(model.loss(window)[0] for window in windows) - own) / count
    assert expected != 0
    assert found["values"].loss == pytest.approx(expected, abs=1e-6)


def test_a_budget_takes_the_least_loss():
    costs = {
        "a": CacheCost(loss=0.1, bytes=10),
        "b": CacheCost(loss=0.0, bytes=20),
        "c": CacheCost(loss=0.0, bytes=18),
    }
    assert cheapest_harm(costs, 20) == "c"
    assert cheapest_harm(costs, 12) == "a"
    assert cheapest_harm(costs, 5) is None


def test_models_without_a_cache_are_told(bert_folder):
    with pytest.raises(InputError, match="leave out --kv-context"):
        measure_cache_formats(open_text_model(bert_folder), [], [], 10)


def test_the_spread_over_windows_is_a_ratios():
    """Equal windows: the standard deviation of their means over the root of their number."""
    increases, counts = [3.0, -1.0, 4.0, 2.0], [10, 10, 10, 10]
    mean, error = mean_over_windows(increases, counts)
    means = [d / n for d, n in zip(increases, counts, strict=True)]
    assert mean == pytest.approx(statistics.mean(means))
    assert error == pytest.approx(statistics.stdev(means) / 2)
    assert mean_over_windows([3.0], [10]) == (0.3, None)
    # A short last window weighs little.
    assert mean_over_windows([*increases, 50.0], [*counts, 1])[0] == pytest.approx(58 / 41)
