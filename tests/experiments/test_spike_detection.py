"""The benchmark of spike detectors: its scoring, its folder of labelled logs, its one JSON object."""

import json

import numpy as np
import pytest

from experiments.benchmarks._spike_curves import Curve, Labelled, real_curves
from experiments.benchmarks._spike_peers import RULES, olmo_core
from experiments.benchmarks.spike_detection import Score, alarms_of, main, our_alarms
from stabilitylab.errors import InputError
from tests.stabilitylab.spikes.curves import bump, falling


@pytest.fixture
def folder(tmp_path):
    spiky, healthy = falling(600), falling(600, 1)
    bump(spiky, 400, 1.0)
    for name, curve in (("a.csv", spiky), ("b.csv", healthy)):
        rows = "".join(f"{5 * i},{x}\n" for i, x in enumerate(curve.tolist()))
        (tmp_path / name).write_text("step,loss\n" + rows)
    (tmp_path / "events.csv").write_text(
        "file,kind,first_step,last_step,height\na.csv,spike,2000,2100,1.0\nb.csv,healthy,,,\n"
    )
    return tmp_path


def test_a_folder_is_scored_and_printed_as_one_json_object(folder, capsys):
    assert main([str(folder), "--seeds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours = result["scores"]["real"]["stabilitylab"]["all"]
    assert (ours["events"], ours["recall"], ours["false_alarms"], ours["healthy_values"]) == (1, 1.0, 0, 600)
    assert result["scores"]["synthetic"].keys() == {"stabilitylab", *RULES}


def test_a_folder_without_labels_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match=r"no events\.csv"):
        real_curves(tmp_path / "nowhere")
    (folder / "events.csv").write_text("file,kind\na.csv,spike\n")
    with pytest.raises(InputError, match="lacks the column 'first_step'"):
        real_curves(folder)
    (folder / "events.csv").write_text("file,kind,first_step,last_step\na.csv,spike,9000,9001\n")
    with pytest.raises(InputError, match="no step between 9000 and 9001"):
        real_curves(folder)


def test_scoring_by_hand():
    losses = np.zeros(10_000)
    events = [Labelled(kind="spike", first=100, last=110), Labelled(kind="spike", first=300, last=300)]
    events.append(Labelled(kind="hard-batch", first=500, last=500))
    score = Score()
    score.add(
        Curve(name="x", family="x", steps=np.arange(10_000), losses=losses, events=events),
        np.array([97, 502]),
    )
    score.add(
        Curve(name="y", family="y", steps=np.arange(10_000), losses=losses, healthy=True), np.array([5, 6])
    )
    result = score.to_json()
    assert (result["recall"], result["median_delay_values"]) == (0.5, -3)
    assert (result["false_alarms_per_10k"], result["hard_batches_not_called_spikes"]) == (2.0, 0.0)


def test_flags_within_ten_values_are_one_alarm():
    flags = np.zeros(100, dtype=bool)
    flags[[3, 5, 15, 26]] = True
    assert alarms_of(flags).tolist() == [3, 26]


def test_one_nan_blinds_a_rolling_window_and_not_us():
    curve = falling(2000)
    curve[1000] = np.nan
    curve[1050:1060] += 2.0
    flags = olmo_core(curve)
    assert flags[1000:1129].all()  # 129 skipped steps in a row: NaN, and the 128 windows that hold it
    alarms = our_alarms(Curve(name="x", family="x", steps=np.arange(2000), losses=curve))
    assert alarms.tolist() == [1000, 1052]
