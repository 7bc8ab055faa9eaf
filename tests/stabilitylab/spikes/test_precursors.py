"""Precision, recall and lead of precursors, on runs with alarms and episodes written by hand."""

import json

import numpy as np
import pytest

from stabilitylab.errors import InputError
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.spikes.commands import precursors
from stabilitylab.spikes.precursors import find_runs, judge
from stabilitylab.telemetry import Event, Key, Samples

STEPS = 400


def make_run(folder, *, episodes=(), norm_alarms=(), head_alarms=(), scale=None, record_events=True):
    """Noise, with rises of three steps at the alarms, and an episode of four steps at each onset."""
    rng = np.random.default_rng(0)
    loss = 3 + 0.02 * rng.standard_normal(STEPS)
    norm, head = np.exp(0.1 * rng.standard_normal((2, STEPS)))
    for at in episodes:
        loss[at : at + 4] += 2.0
    for at in norm_alarms:
        norm[at : at + 3] *= 20
    for at in head_alarms:
        head[at : at + 3] *= 20
    columns = {
        Key("train", "-", "loss"): loss,
        Key("train", "-", "gradient_norm"): norm,
        Key("attention", "layers.0.attention", "score_max", 0): np.ones(STEPS),
        Key("attention", "layers.0.attention", "score_max", 1): head,
        Key("gradient", "embedding.weight", "l2"): np.ones(STEPS),
    }
    if scale is not None:
        columns[Key("precision", "-", "loss_scale")] = scale
    sink = ParquetSink(folder / "telemetry")
    rows = [(step, key, float(column[step])) for key, column in columns.items() for step in range(STEPS)]
    sink.write(Samples.of(rows), [])
    sink.close()
    if record_events:
        data = {"phase": "end", "signal": "train/-/loss", "peak": 0, "height": 2.0}
        RunFolder(folder).append_events(
            [
                Event(step=at + 5, kind="spike", data={**data, "episode": i, "onset": at, "end": at + 3})
                for i, at in enumerate(episodes)
            ]
        )
    return load_run(folder)


def record_of(runs, name, **options):
    (record,) = [one for one in judge(runs, **options) if one.precursor == name]
    return record


def test_counts_by_hand(tmp_path):
    # Two episodes warned of by 5 and 9 steps, one without warning; an alarm on its own, and one that is a result.
    run = make_run(
        tmp_path / "a", episodes=(100, 200, 300), norm_alarms=(95, 191, 250, 302), head_alarms=(90,)
    )
    norm = record_of([run], "gradient norm", horizon=20)
    assert (norm.episodes, norm.warned, norm.right, norm.wrong) == (3, 2, 2, 1)
    assert norm.precision == pytest.approx(2 / 3)
    assert norm.recall == pytest.approx(2 / 3)
    assert norm.median_lead == 7.0
    heads = record_of([run], "attention maximum", horizon=20)
    assert (heads.right, heads.wrong, heads.recall, heads.median_lead) == (1, 0, pytest.approx(1 / 3), 10.0)
    silent = record_of([run], "embedding gradient")
    assert (silent.right, silent.wrong, silent.precision, silent.recall) == (0, 0, None, 0.0)


def test_a_site_is_measured_against_itself_and_forks_are_no_runs(tmp_path):
    """A quiet head rises thirtyfold and stays far below another that is always large."""
    run = make_run(tmp_path / "runs" / "a", episodes=(200,))
    rng = np.random.default_rng(1)
    quiet, large = np.exp(0.05 * rng.standard_normal((2, STEPS)))
    quiet[185:] *= 30
    sink = ParquetSink(run.path / "telemetry")
    columns = {("a", 0): quiet, ("b", 0): 1000 * large}
    rows = [
        (s, Key("update", site, "rms_t"), float(v[s]))
        for (site, _), v in columns.items()
        for s in range(STEPS)
    ]
    sink.write(Samples.of(rows), [])
    sink.close()
    make_run(run.path / "replays" / "event-1" / "unchanged", episodes=(200,))
    found = find_runs(tmp_path / "runs")
    assert [one.path for one in found] == [run.path]
    record = record_of(found, "update RMS / Adam's scale", horizon=20)
    assert (record.warned, record.wrong, record.median_lead) == (1, 0, 15.0)


def test_runs_are_added_up_and_episodes_found_where_none_were_recorded(tmp_path):
    one = make_run(tmp_path / "a", episodes=(200,), norm_alarms=(195,))
    two = make_run(tmp_path / "b", episodes=(300,), norm_alarms=(100,), record_events=False)
    norm = record_of([one, two], "gradient norm", horizon=20)
    assert (norm.runs, norm.episodes, norm.right, norm.wrong, norm.recall) == (2, 2, 1, 1, 0.5)


def test_the_loss_scale_warns_after_two_halvings(tmp_path):
    scale = np.full(STEPS, 2.0**16)
    scale[180:] = 2.0**15
    scale[190:] = 2.0**14
    run = make_run(tmp_path / "a", episodes=(200,), scale=scale)
    assert record_of([run], "loss scale").median_lead == 20.0  # where the fall began


def test_the_command(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", episodes=(200,), norm_alarms=(195,))
    make_run(tmp_path / "runs" / "b")
    precursors(tmp_path / "runs")
    out = capsys.readouterr().out
    assert "over 2 runs" in out
    assert "1 / 1" in out
    precursors(tmp_path / "runs" / "b")
    assert "nothing to warn of" in capsys.readouterr().out
    precursors(tmp_path / "runs", json=True, horizon=10)
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["precursor"], first["recall"], first["median_lead"]) == ("gradient norm", 1.0, 5.0)


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no runs"):
        precursors(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        precursors(tmp_path / "nowhere")
    make_run(tmp_path / "run")
    with pytest.raises(InputError, match="--horizon"):
        precursors(tmp_path / "run", horizon=0)
