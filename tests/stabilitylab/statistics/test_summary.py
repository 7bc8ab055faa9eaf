"""The one-pass summary against float64, in its implementations: the compiled kernel and its torch twins.

Tolerances. Counts and largest magnitudes are exact. The kernel rounds x - c, its powers and partial sums of 4,096 elements to
float32: a relative error of a few 2^-24 per operation on sums of like sign, 1e-5 with room. A sum of cancelling terms has that
error relative to the sum of magnitudes, which is what is compared for odd powers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from stabilitylab.statistics import native, on_device, power_sums
from stabilitylab.statistics import summary as summary_module
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.summary import COLUMN, FIELDS, Summary, add_all, measurable
from stabilitylab.statistics.tails import (
    EDGES,
    TAIL_BINS,
    TAIL_SHARES,
    channel_kurtosis,
    max_over_median,
    tail_quantiles,
)


@pytest.fixture(params=["kernel", "torch", "accelerator"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "kernel":
        monkeypatch.setattr(native, "kernel", lambda: None)
        if request.param == "accelerator":  # where nothing is looked at on the way
            monkeypatch.setattr(summary_module, "_summarise_at_hand", lambda *_, **__: None)
    elif native.kernel() is None:
        pytest.skip("no C compiler")
    return request.param


def summary_of(*parts: Tensor, full: bool = True) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    buffer = Buffer()
    summary = Summary(buffer, full=full)
    for part in parts:
        summary.add(part)
    assert summary.row is not None
    row = dict(zip(FIELDS, buffer.view(summary.row).tolist(), strict=True))
    extra = {
        name: buffer.view(slots).numpy()
        for name, slots in (("bits", summary.bits), ("squares", summary.squares), ("tail", summary.tail))
        if slots is not None
    }
    return row, extra


def samples() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(37, 96, generator=g)
    heavy = torch.from_numpy(scipy.stats.t.rvs(2, size=(64, 200), random_state=1)).float()
    return {
        "normal": normal,
        "shifted": normal * 0.01 + 3,
        "heavy tails": heavy,
        "huge": normal * 1e37,
        "tiny": normal * 1e-30,
        "subnormal": normal * 1e-41,
        "sparse": torch.relu(normal - 1),
        "constant": torch.full((5, 7), 2.5),
        "zero": torch.zeros(8, 16),
        "massive": torch.where(torch.rand(64, 200, generator=g) < 1e-3, 500.0, heavy * 0.1),
        "one": torch.tensor([[3.0]]),
        "scalar": torch.tensor(-2.0),
        "vector": normal[0],
        "wide": torch.randn(3, 9001, generator=g),
        "long": torch.randn(70_001, 3, generator=g),
        "transposed": normal.t(),
        "bfloat16": normal.bfloat16(),
        "float16": (normal * 1e-4).half(),
        "float64": normal.double() * 1e-50,
    }


@pytest.mark.parametrize("name", samples())
def test_row_equals_float64(implementation: str, name: str) -> None:
    x = samples()[name]
    row, _ = summary_of(x)
    x64 = x.double().numpy()
    size = np.abs(x64)
    smallest = torch.finfo(x.dtype).smallest_normal
    assert row["count"] == x.numel()
    assert row["zero"] == np.sum(size == 0)
    assert row["nonfinite"] == 0
    assert row["subnormal"] == np.sum((size > 0) & (size < smallest))
    assert row["fp16_lost"] == np.sum((size > 0) & (size <= 2.0**-25))
    assert row["fp8_lost"] == np.sum((size > 0) & (size <= 2.0**-10))
    assert row["over_6"] == np.sum(size >= 6)
    assert row["absmax"] == size.max()
    for k in (1, 2, 3, 4):
        scale = float(np.sum(size**k))
        assert row[f"s{k}"] == pytest.approx(float(np.sum(x64**k)), rel=0, abs=1e-5 * scale + 1e-320)
    # A threshold near an element may fall on either side of it by the rounding of the RMS.
    rms = math.sqrt(np.mean(x64**2))
    low, high = (int(np.sum(size >= 6 * rms * (1 + e))) if rms else 0 for e in (1e-5, -1e-5))
    assert low <= row["over_6rms"] <= high


def test_massive_activations_are_those_above_100_and_1000_medians(implementation: str) -> None:
    x = samples()["massive"]
    size = x.double().abs()
    # Few distinct regimes: the median of any sample is far below 0.1, and 500 far above all else.
    assert summary_of(x)[0]["massive"] == int(((size > 100) & (size >= 1000 * size.median())).sum())
    assert summary_of(x + 1)[0]["massive"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_show(implementation: str, bad: float) -> None:
    x = samples()["normal"].clone()
    x[3, 4] = bad
    x[9, 4] = math.inf
    row, extra = summary_of(x)
    assert row["nonfinite"] == 2
    assert math.isnan(row["absmax"]) if math.isnan(bad) else row["absmax"] == math.inf
    assert not math.isfinite(row["s2"])
    largest = extra["bits"].view(np.float32)
    assert not np.isfinite(largest[4])
    assert np.isfinite(np.delete(largest, 4)).all()


@pytest.mark.parametrize("name", ["normal", "heavy tails", "wide", "long", "bfloat16", "transposed"])
def test_channels_equal_float64(implementation: str, name: str) -> None:
    x = samples()[name]
    _, extra = summary_of(x)
    flat = x.double().reshape(-1, x.shape[-1]).numpy()
    assert np.array_equal(extra["bits"].view(np.float32), np.abs(flat).max(0))
    assert extra["squares"] == pytest.approx(
        np.sum(flat**2, axis=0), rel=1e-4
    )  # float32 sums over up to 70,000 rows
    s = np.sqrt(np.mean(flat**2, axis=0))
    expected = np.mean(s**4) / np.mean(s**2) ** 2
    assert channel_kurtosis(extra["squares"][None].astype(np.float64))[0] == pytest.approx(expected, rel=1e-4)
    largest = np.abs(flat).max(0)
    got = max_over_median(extra["bits"].view(np.float32)[None].astype(np.float64))[0]
    assert got == pytest.approx(largest.max() / np.median(largest), rel=1e-6)


@pytest.mark.parametrize("name", ["normal", "heavy tails", "wide", "long", "sparse", "massive", "float16"])
def test_tail_quantiles_are_within_a_bin(implementation: str, name: str) -> None:
    x = samples()[name]
    row, extra = summary_of(x)
    size = np.sort(x.double().abs().numpy().ravel())
    got = tail_quantiles(
        extra["tail"][None], *(np.array([row[k]]) for k in ("count", "absmax", "tail_from"))
    )[0]
    for share, value in zip(TAIL_SHARES, got, strict=True):
        rank = max(1, math.ceil(share * len(size)))  # the rank-th largest
        exact = size[-rank]
        assert exact / 1.126 <= value <= exact * 1.126


def test_histogram_counts_what_lies_above_its_threshold(implementation: str) -> None:
    x = samples()["long"]
    row, extra = summary_of(x)
    size = x.double().abs().numpy().ravel()
    complete = EDGES[:-1] >= row["tail_from"]
    expected = np.histogram(np.clip(size, EDGES[0], EDGES[-1] * (1 - 1e-9)), EDGES)[0]
    assert np.array_equal(extra["tail"][complete], expected[complete])
    assert extra["tail"].sum() >= 1e-3 * len(size)


def test_parts_combine_to_the_whole(implementation: str) -> None:
    x = samples()["heavy tails"]
    whole, whole_extra = summary_of(x)
    parts, parts_extra = summary_of(x[:10], x[10:11], x[11:])
    assert whole["absmax"] == parts["absmax"]
    for field in ("count", "nonfinite", "zero", "subnormal", "fp16_lost", "fp8_lost", "over_6"):
        assert whole[field] == parts[field]
    for k in (1, 2, 3, 4):
        scale = float((x.double().abs() ** k).sum())
        assert abs(whole[f"s{k}"] - parts[f"s{k}"]) <= 1e-5 * scale
    assert np.array_equal(whole_extra["bits"], parts_extra["bits"])
    first = int(np.searchsorted(EDGES, max(whole["tail_from"], parts["tail_from"])))
    assert np.array_equal(whole_extra["tail"][first:], parts_extra["tail"][first:])


def test_threads_do_not_change_counts() -> None:
    if native.kernel() is None:
        pytest.skip("no C compiler")
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(3))
    one, one_extra = summary_of(x)
    torch.set_num_threads(3)
    try:
        three, three_extra = summary_of(x)
    finally:
        torch.set_num_threads(1)
    assert {k: one[k] for k in FIELDS[:9]} == {k: three[k] for k in FIELDS[:9]}
    assert one["s4"] == pytest.approx(three["s4"], rel=1e-12)
    assert all(np.array_equal(one_extra[k], three_extra[k]) for k in ("bits", "tail"))


def test_many_tensors_in_one_call_equal_one_by_one(implementation: str) -> None:
    xs = [x for x in samples().values() if measurable(x)]
    buffer = Buffer()
    together = [Summary(buffer) for _ in xs]
    add_all(list(zip(together, xs, strict=True)))
    for x, summary in zip(xs, together, strict=True):
        assert summary.row is not None
        alone = summary_of(x, full=False)[0]
        assert buffer.view(summary.row).tolist() == list(alone.values())


def test_a_second_step_forgets_the_first(implementation: str) -> None:
    buffer = Buffer()
    summary = Summary(buffer, full=True)
    summary.add(torch.full((4, 8), 100.0))
    buffer.advance()
    assert not summary.seen
    summary.add(torch.ones(4, 8))
    assert summary.row is not None
    assert buffer.view(summary.row)[COLUMN["absmax"]] == 1
    assert buffer.view(summary.row)[COLUMN["count"]] == 32
    assert summary.tail is not None
    assert buffer.view(summary.tail).sum() == 32


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_complex_and_sparse_tensors(implementation: str) -> None:
    z = torch.tensor([[3 + 4j, 0 - 7j]])
    row, _ = summary_of(z, full=False)
    assert (row["count"], row["zero"], row["absmax"], row["s2"]) == (4, 1, 7, pytest.approx(74))
    dense = torch.zeros(6, 5)
    dense[2, 3], dense[4, 0] = -8, 2
    for x in (dense.to_sparse(), dense.to_sparse_csr()):
        row, _ = summary_of(x, full=False)
        assert (row["count"], row["zero"], row["absmax"], row["over_6"]) == (30, 28, 8, 1)
        assert row["s2"] == pytest.approx(68)
    row, _ = summary_of(torch.zeros(6, 5).to_sparse(), full=False)
    assert (row["count"], row["zero"], row["absmax"]) == (30, 30, 0)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(3),
        torch.ones(2, dtype=torch.bool),
        torch.empty(0, 4),
        torch.empty(2, device="meta"),
        None,
        "x",
    ],
)
def test_what_holds_no_numbers_is_not_measurable(x: object) -> None:
    assert not measurable(x)


def test_moments_equal_scipy(implementation: str) -> None:
    for name in ("normal", "shifted", "heavy tails", "tiny", "bfloat16"):
        x = samples()[name]
        row, _ = summary_of(x)
        n, *sums = (np.array([row[k]]) for k in ("count", "s1", "s2", "s3", "s4"))
        x64 = x.double().numpy().ravel()
        assert power_sums.rms(n, sums[1])[0] == pytest.approx(np.sqrt(np.mean(x64**2)), rel=1e-6)
        # "shifted" has |mean|/std = 300: its fourth moment loses 300^4 of float64's precision, 2e-6 is left.
        assert power_sums.variance(n, *sums[:2])[0] == pytest.approx(np.var(x64), rel=1e-5)
        expected = scipy.stats.kurtosis(x64, fisher=False)
        assert power_sums.kurtosis(n, *sums)[0] == pytest.approx(expected, rel=1e-4)


def test_edges_cover_fp16_in_eighths_of_an_octave() -> None:
    assert EDGES[0] == 2.0**-24
    assert EDGES[-1] == 2.0**16
    assert len(EDGES) == TAIL_BINS + 1
    assert np.all(EDGES[1:] / EDGES[:-1] <= 1.125)


@pytest.mark.parametrize(("variable", "value"), [("STABILITYLAB_NATIVE", "0"), ("CC", "/nowhere/cc")])
def test_that_there_is_no_kernel_is_said_once(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    native.kernel.cache_clear()
    try:
        for _ in range(3):
            assert summary_of(torch.ones(4))[0]["count"] == 4
    finally:
        native.kernel.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "measured steps take longer" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_small_ones_together_are_each_by_itself(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where a hundred small tensors cost what one does."""
    monkeypatch.setattr(native, "kernel", lambda: None)
    monkeypatch.setattr(summary_module, "_summarise_at_hand", lambda *_, **__: None)
    monkeypatch.setattr(on_device, "is_small", lambda x: x.numel() <= 100)
    monkeypatch.setattr(on_device, "TOGETHER", 200)
    g = torch.Generator().manual_seed(0)
    tensors = [
        (torch.randn(n, generator=g) * 10**k).to(dtype) for k, n in enumerate((64, 64, 8, 64, 64, 900))
    ]
    tensors += [torch.zeros(64, dtype=dtype), torch.tensor([1.0, math.nan]).to(dtype)]
    tensors += [torch.tensor([math.inf, 0.0]).to(dtype), torch.randn(8, 8, generator=g).to(dtype).T]
    rows = []
    for together in (True, False):
        buffer = Buffer()
        made = [Summary(buffer) for _ in tensors]
        pairs = list(zip(made, tensors, strict=True))
        if together:
            add_all([*pairs, (made[2], tensors[2])])  # what comes twice is added twice
        else:
            for one, x in [*pairs, pairs[2]]:
                one.add(x)
        rows.append(torch.stack([buffer.view(one.row) for one in made if one.row is not None]))
    assert torch.allclose(rows[0], rows[1], rtol=1e-12, atol=0, equal_nan=True)


def test_a_large_tensor_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)) * 50
    whole = on_device.summarise(x, full=True)
    monkeypatch.setattr(on_device, "PART", 130)
    for one, other in zip(on_device.summarise(x, full=True), whole, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_places_among_limits_are_comparisons(dtype: torch.dtype) -> None:
    """The accelerator's way to count, beside comparisons with each limit."""
    limits_71, *_, one, ascending, place = on_device._constants(torch.device("cpu"), dtype)
    exact = limits_71[:, 0].to(dtype)  # the limits themselves, rounded; some leave the format
    x = torch.cat([exact, exact * 0.999, exact * 1.001, torch.tensor([math.nan, 1, 1e-6]).to(dtype)]).abs()
    assert torch.equal(on_device.at_most(x, ascending, one)[place], (x <= limits_71).sum(1))
