"""Forensics names planted causes: a small real transformer trains under the monitor, and the test does one thing to it."""

import dataclasses
import json
import math
import shutil

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.nn.utils import clip_grad_norm_

from stabilitylab import Monitor
from stabilitylab.report import run_report
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes.change_onsets import ChangeOnset, Execution, find_departures
from stabilitylab.spikes.commands import spikes
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.evidence import Climb, Evidence, _climb, gather
from stabilitylab.spikes.explain import explain
from stabilitylab.spikes.forensics import diagnose, diagnose_run
from stabilitylab.spikes.suspects import disturbed, first_suspect
from stabilitylab.telemetry import Event
from tests.stabilitylab.gpt import GPT, next_token_loss

STEPS, PLANTED = 90, 80
NAMED = "layers.1.feed_forward.0.weight"


def tokens(step, rows=16, length=17):
    """Rows of a sparse Markov chain over 64 tokens: something a small model learns in a hundred steps."""
    table = torch.randint(64, (64, 4), generator=torch.Generator().manual_seed(7))
    choice = torch.randint(4, (rows, length), generator=torch.Generator().manual_seed(step))
    out = torch.empty(rows, length, dtype=torch.int64)
    out[:, 0] = torch.randint(64, (rows,), generator=torch.Generator().manual_seed(10_000 + step))
    for t in range(1, length):
        out[:, t] = table[out[:, t - 1], choice[:, t]]
    return out


def scale_head(model):
    """The query weights of head 2 in the first layer, times 40."""
    rows = slice(2 * 8, 3 * 8)
    model.layers[0].attention.query_key_value.weight.data[rows] *= 40
    model.layers[0].attention.query_key_value.bias.data[rows] *= 40


def train(folder, plant, *, tensorboard=False, every=1):
    torch.manual_seed(0)
    model = GPT()
    if plant == "gradient":  # Adam would divide the factor out again
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    with Monitor(
        model, optimizer, out=folder, every=every, gradients_every=1, tensorboard=tensorboard
    ) as monitor:
        for step in range(STEPS):
            batch = tokens(step)
            if plant == "batch" and step == PLANTED:
                batch = (
                    torch.randint(64, batch.shape, generator=torch.Generator().manual_seed(99))
                    .mul(7)
                    .remainder(64)
                )
            if plant == "head" and step == PLANTED:
                scale_head(model)
            if plant == "rate" and step == PLANTED:
                for group in optimizer.param_groups:
                    group["lr"] *= 8
            optimizer.zero_grad()
            loss = next_token_loss(model, batch)
            loss.backward()
            if plant == "gradient" and step == PLANTED:
                dict(model.named_parameters())[NAMED].grad.mul_(100)
            monitor.gradients_ready()
            norm = clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
            monitor.step(step, loss=loss, gradient_norm=norm, learning_rate=optimizer.param_groups[0]["lr"])
    return load_run(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Each run is trained once."""
    runs = {}

    def get(plant):
        if plant not in runs:
            runs[plant] = train(tmp_path_factory.mktemp(plant) / "run", plant)
        return runs[plant]

    return get


def explained(run, kind=None):
    """The diagnosis of the loss's episode at the planted step or just after it."""
    near = [one for one in diagnose_run(run) if PLANTED <= one.episode.onset <= PLANTED + 2]
    (one,) = [one for one in near if one.episode.signal == "train/-/loss"]
    assert kind is None or one.episode.kind == kind
    return one


def test_a_multiplied_gradient_is_named(planted):
    one = explained(planted("gradient"), "spike")
    assert (one.cause, one.site) == ("gradient", NAMED)
    assert (one.first_step, one.lead) == (PLANTED, one.episode.onset - PLANTED)
    assert one.lead >= 1
    assert one.leads["gradient"] == one.lead
    assert any(
        f"The gradient of {NAMED} left its baseline first, at step {PLANTED}" in s for s in one.sentences
    )


def test_a_poisoned_batch_is_named(planted):
    one = explained(planted("batch"), "hard-batch")
    assert (one.cause, one.first_step, one.lead) == ("batch", PLANTED, 0)


def test_the_documents_of_the_suspect_batches_are_told(planted):
    run = planted("batch")
    (episode,) = episodes_of(run.events)
    one = diagnose(run, episode, describe_batch=lambda step: [f"document {step}"])
    assert one.batches == {PLANTED - 1: [f"document {PLANTED - 1}"], PLANTED: [f"document {PLANTED}"]}
    assert f"Batch of step {PLANTED}: document {PLANTED}." in one.sentences


def test_a_head_with_scaled_queries_is_named(planted):
    run = planted("head")
    # Softmax bounds what one head can do to the loss of this model, so the step is given.
    episode = Episode(
        kind="spike", onset=PLANTED, peak=PLANTED, end=PLANTED, height=0.0, signal="train/-/loss"
    )
    one = diagnose(run, episode)
    weight = "layers.0.attention.query_key_value.weight"
    assert (one.cause, one.site, one.first_step) == ("parameter", weight, PLANTED)
    assert f"before step {PLANTED}, the weights of {weight}" in one.sentences[1]
    assert [(d.family, d.name) for d in one.disturbs] == [("attention", "layers.0.attention, head 2")]
    assert one.sentences[2].startswith(
        "It disturbs the attention score maximum of layers.0.attention, head 2"
    )
    # What is read off the departures alone.
    seen = dataclasses.replace(gather(run, episode, find_departures(run, PLANTED)), outside=[])
    suspect = first_suspect(episode, seen)
    assert (suspect.cause, suspect.site) == ("attention", "layers.0.attention, head 2")
    assert "parameter-changed" in {event.kind for event in run.events}


def left(family, site, ratio, *, index=-1, order=0, common=1.0, jump=1.0):
    return ChangeOnset(
        family=family,
        site=site,
        statistic="",
        index=index,
        step=3,
        since=2,
        until=9,
        ratio=ratio,
        sigmas=50.0,
        common=common,
        jump=jump,
        order=(0, order, 0),
    )


def test_what_is_not_finite_everywhere_still_has_a_first_site():
    assert left("activation", "a", math.inf, common=math.exp(700)).is_local


@pytest.mark.parametrize(("begins", "cause"), [("head", "batch"), ("block.2", "gradient")])
def test_a_backward_fault_begins_behind_the_loss_and_a_batch_at_it(begins, cause):
    """Gradients of three parameters in four, or of all, a thousand times what they were."""
    order = ["block.0", "block.1", "block.2", "head"]
    out = [
        left("gradient", f"{site}.weight", 1000.0, order=-i, common=1000.0)
        for i, site in enumerate(order)
        if i <= order.index(begins)
    ]
    seen = Evidence(
        departures=out,
        rate_change=None,
        outside=(),
        overflow=None,
        gradients=4,
        execution=Execution(order),
        nearest=frozenset({"head.weight"}),
    )
    episode = Episode(kind="site-departure", onset=3, peak=3, end=3, height=1.0, signal="x")
    suspect = first_suspect(episode, seen)
    assert suspect.cause == cause
    assert cause == "batch" or suspect.site == "block.2.weight"


def evidence(out, order, *, overflow=None, nearest=()):
    return Evidence(
        departures=out,
        rate_change=None,
        outside=(),
        overflow=overflow,
        gradients=4,
        execution=Execution(order),
        nearest=frozenset(nearest),
    )


def test_a_hard_batch_of_a_low_loss_multiplies_all_gradients_from_the_loss_on():
    """The head's own parameter is too noisy to have left; the gradient with respect to its output has."""
    order = ["block.0", "block.1", "head:input", "head"]
    out = [left("activation_gradient", "head", 74.0, order=-3, common=200.0)]
    out += [left("gradient", f"block.{i}.weight", 200.0, order=-i, common=200.0) for i in (1, 0)]
    episode = Episode(kind="hard-batch", onset=3, peak=3, end=3, height=2.7, signal="train/-/loss")
    assert first_suspect(episode, evidence(out, order, nearest=["head.weight"])).cause == "batch"
    behind = [dataclasses.replace(one, ratio=200.0, common=1.0) for one in out[1:]]
    suspect = first_suspect(episode, evidence(behind, order, nearest=["head.weight"]))
    assert (suspect.cause, suspect.site) == ("gradient", "block.1.weight")


@pytest.mark.parametrize("first", ["stem:input", "embedding"])
def test_what_a_model_is_given_is_the_batch_and_no_site_of_it(first):
    order = [first, "stem", "head"]
    out = [left("activation", first, 250.0), left("activation", "stem", 240.0, order=1, common=200.0)]
    is_given = first.endswith(":input")
    episode = Episode(kind="site-departure", onset=3, peak=3, end=3, height=5.5, signal="x")
    assert first_suspect(episode, evidence(out, order)).cause == ("batch" if is_given else "activation")
    bad = Event(step=3, kind="overflow", data={"site": first, "tensor": "activation"})
    episode = Episode(kind="non-finite", onset=3, peak=3, end=3, height=None, signal="train/-/loss")
    suspect = first_suspect(episode, evidence([], order, overflow=bad))
    assert suspect.cause == ("batch" if is_given else "overflow")


def test_what_left_with_a_nan_loss_was_not_on_its_way_before_it():
    """The loss shows it at once, the tensors at the next measured step."""
    overflow = Event(step=4, kind="overflow", data={"site": "up", "tensor": "activation"})
    episode = Episode(kind="non-finite", onset=3, peak=3, end=3, height=None, signal="train/-/loss")
    seen = evidence([left("gradient", "up.weight", 30.0)], ["up"], overflow=overflow)
    suspect = first_suspect(episode, seen)
    assert (suspect.cause, suspect.site) == ("overflow", "up")
    earlier = dataclasses.replace(left("activation", "up", 30.0), step=2, since=1)
    seen = dataclasses.replace(seen, departures=[earlier])
    assert first_suspect(episode, seen).cause == "activation"


LATER = Episode(kind="divergence", onset=5, peak=9, end=None, height=2.0, signal="train/-/loss")


def test_a_climbing_rate_moves_sites_by_degrees_and_a_fault_of_one_by_a_jump():
    climb = Climb(since=0, low=1e-3, step=3, high=8e-3)

    def cause(out, episode=LATER, **fields):
        seen = dataclasses.replace(evidence(out, ["up"]), **{"climb": climb, **fields})
        return first_suspect(episode, seen).cause

    slow = left("activation", "up", 30.0, jump=2.2)
    assert cause([slow]) == "learning-rate"
    assert cause([slow], climb=None) == "activation"
    assert cause([dataclasses.replace(slow, jump=20.0)]) == "activation"
    assert cause([]) == "learning-rate"
    # All gradients in the loss's own step are what a batch does.
    at_once = Episode(kind="spike", onset=3, peak=3, end=5, height=1.0, signal="train/-/loss")
    all_of_them = [left("gradient", f"{site}.weight", 5.0, jump=5.0, common=5.0) for site in "abcd"]
    assert cause(all_of_them, at_once) == "batch"


def test_a_rate_that_the_run_has_borne_is_no_climb(tmp_path):
    def climb(rates, first=90):
        class Rates:
            @staticmethod
            def series(metric):
                return pd.Series(rates)

        return _climb(Rates(), first)

    up = [1e-3] * 40 + [1e-3 * 1.05**i for i in range(51)]
    assert climb(up) == Climb(since=26, low=1e-3, step=90, high=pytest.approx(1e-3 * 1.05**50))
    assert climb([1e-3 * min(1, i / 50) for i in range(91)], first=70)  # a warm-up that ended a while ago
    assert climb([1e-3 * min(1, i / 20) for i in range(91)]) is None
    assert climb([1.0] * 20 + [1e-3] * 10 + up[30:]) is None  # a second warm-up, to no more than the first
    assert climb([1e-3] * 91) is None
    assert climb(up, first=45) is None


def test_a_step_up_of_the_loss_that_leaves_all_sites_where_they_were_is_other_data():
    assert first_suspect(LATER, evidence([], ["up"])).cause == "unknown"
    seen = dataclasses.replace(evidence([], ["up"]), is_sudden=True)
    assert first_suspect(LATER, seen).cause == "batch"


def test_an_update_that_grows_beyond_adam_while_its_gradient_stands_is_the_optimizers():
    update = dataclasses.replace(left("update", "head.weight", 900.0, jump=900.0), step=2, since=1)
    out = [update, left("activation", "head", 30.0)]
    assert first_suspect(LATER, evidence(out, ["up", "head"])).cause == "optimizer"
    out[0] = dataclasses.replace(update, jump=10.0)
    assert first_suspect(LATER, evidence(out, ["up", "head"])).cause == "activation"


@pytest.mark.parametrize("tensor", ["activation", "activation_gradient"])
def test_what_grew_in_the_step_of_an_overflow_led_to_it(tensor):
    order = ["ln", "query", "attention/attn", "value"]
    episode = Episode(kind="non-finite", onset=4, peak=4, end=9, height=None, signal="train/-/loss")
    overflow = Event(step=3, kind="overflow", data={"site": "value", "tensor": tensor})
    grew = left("activation", "query", math.inf, order=1, jump=1e24)
    suspect = first_suspect(episode, evidence([grew], order, overflow=overflow))
    assert (suspect.cause, suspect.site) == ("activation", "query")
    # As large a growth of most heads' scores behind it makes it attention's.
    projection = dataclasses.replace(grew, site="attn.query")
    heads = [left("attention", "attn", math.inf, index=i, order=2, jump=1e24) for i in range(2)]
    seen = evidence([projection, *heads], ["attn.query", "attention/attn", "value"], overflow=overflow)
    suspect = first_suspect(episode, dataclasses.replace(seen, heads={"attn": 2}))
    assert (suspect.cause, suspect.site) == ("attention", "attn.query")
    for other in (
        dataclasses.replace(grew, jump=math.inf),
        dataclasses.replace(grew, jump=3.0),
        dataclasses.replace(grew, site="value:input"),  # the module's own
    ):
        assert first_suspect(episode, evidence([other], order, overflow=overflow)).site == "value"


@pytest.mark.parametrize(
    ("heads_out", "site"), [([2], "b.attn, head 2"), ([0, 1, 2, 3], "b.attn.query"), ([], "b.attn.query")]
)
def test_scores_of_few_heads_are_the_place_of_most_the_projection_is(heads_out, site):
    scores = [left("attention", "b.attn", 25.0 + h, index=h, order=1) for h in heads_out]
    seen = Evidence(
        departures=[left("activation", "b.attn.query", 30.0), *scores],
        rate_change=None,
        outside=(),
        overflow=None,
        gradients=9,
        execution=Execution([]),
        heads={"b.attn": 4},
    )
    episode = Episode(kind="spike", onset=3, peak=3, end=9, height=1.0, signal="train/-/loss")
    suspect = first_suspect(episode, seen)
    assert suspect.site == site
    assert suspect.cause == ("attention" if heads_out else "activation")
    disturbs = [one.name for one in disturbed(suspect, seen)]
    assert disturbs == (["b.attn, head 3"] if len(heads_out) == 4 else [])


def test_sites_that_are_measured_seldom_tie_with_what_they_may_have_preceded(tmp_path):
    """Attention every 4th step only: the head's departure is seen late, and may have come before the gradients'."""
    run = train(tmp_path / "run", "head", every=4)
    episode = Episode(
        kind="spike", onset=PLANTED + 1, peak=PLANTED + 1, end=PLANTED + 1, height=0.0, signal="train/-/loss"
    )
    one = diagnose(run, episode)
    assert (one.cause, one.site, one.resolution) == ("attention", "layers.0.attention, head 2", 4)


def test_a_raised_learning_rate_is_named(planted):
    one = explained(planted("rate"), "spike")
    assert (one.cause, one.first_step) == ("learning-rate", PLANTED)
    assert one.learning_rate_change == (PLANTED, pytest.approx(8.0))
    assert one.departures[0].family == "update"


def test_an_undisturbed_run_has_nothing_to_explain(planted):
    run = planted("none")
    assert diagnose_run(run) == []
    episode = Episode(
        kind="spike", onset=PLANTED, peak=PLANTED, end=PLANTED, height=0.0, signal="train/-/loss"
    )
    assert diagnose(run, episode).cause == "unknown"


def test_overflow_and_loss_scale(planted, tmp_path):
    """A collapse of the loss scale, and the overflow event that the probes would have written."""
    run = planted("none")
    events = [
        Event(step=80, kind="overflow", data={"site": "layers.1", "tensor": "activation"}),
        Event(
            step=80,
            kind="loss-scale-collapse",
            data={
                "episode": 1,
                "phase": "onset",
                "signal": "x",
                "onset": 80,
                "peak": 80,
                "end": None,
                "height": 4.0,
            },
        ),
    ]
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    RunFolder(copy).append_events(events)
    (one,) = diagnose_run(load_run(copy))
    assert (one.cause, one.overflow) == ("overflow", (80, "activation of layers.1"))


def test_a_diagnosis_is_an_event_of_strict_json(planted):
    one = explained(planted("gradient"))
    body = json.loads(one.event.to_json())
    assert body["kind"] == "diagnosis"
    assert body["data"]["cause"] == "gradient"
    assert body["data"]["departures"][0]["site"] == NAMED
    assert body["data"]["sentences"] == one.sentences


def test_a_run_without_layer_telemetry_says_so(tmp_path):
    with Monitor(GPT(), None, out=tmp_path / "run", probes=[], tensorboard=False) as monitor:
        for step, loss in enumerate([2.0] * 60 + [9.0] * 6 + [2.0] * 10):
            monitor.step(step, loss=loss)
    (one,) = diagnose_run(load_run(tmp_path / "run"))
    assert (one.cause, one.departures, one.embedding_share) == ("unknown", (), None)
    assert "No site that was measured" in " ".join(one.sentences)


def test_the_monitor_writes_diagnoses_when_it_closes(planted, tmp_path):
    (written,) = [event for event in planted("batch").events if event.kind == "diagnosis"]
    assert (written.step, written.data["cause"]) == (PLANTED, "batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.stabilitylab.spikes.test_forensics.STEPS", PLANTED + 4)
        run = train(tmp_path / "run", "batch", tensorboard=True)
    texts = list(_texts(run.folder.tensorboard))
    assert any("First suspect: the batch" in text for text in texts)
    assert explain(run.folder) == []  # each episode is explained once


def test_the_report_and_the_command_show_the_cause(planted, capsys):
    run = planted("batch")
    assert "First suspect: the batch" in run_report(run).html()
    spikes((run.path,))
    assert "First suspect: the batch" in capsys.readouterr().out


def _texts(folder):
    for file in folder.rglob("*tfevents*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if "diagnoses" in value.tag:
                    yield from (text.decode() for text in value.tensor.string_val)
