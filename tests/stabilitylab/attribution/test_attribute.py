"""Attribution proves planted causes: the event does not come without the one thing that the test did."""

import importlib
import json

import numpy as np
import pytest
import torch

from stabilitylab.attribution import LoopState, attribute
from stabilitylab.attribution.minimization import standing_out
from stabilitylab.attribution.proof import Conclusion
from stabilitylab.errors import InputError
from stabilitylab.telemetry import Event
from tests.patience import PATIENCE
from tests.stabilitylab.attribution.loops import LENGTH, TOKENS, Loop, run

AT, BEGIN = 30, 22


def proven(loop, onset=AT, **fields):
    losses, state = [], None
    for step in range(AT + 14):
        if step == BEGIN:
            state = LoopState.of(loop, step)
        losses.append(loop.train_step(step))
    fields = {
        "original": dict(enumerate(losses)),
        "watched": 12,
        "budget": PATIENCE,
        "thorough": False,
    } | fields
    return attribute(loop, onset, begin=BEGIN, state=state, **fields)


def damaged(loop):
    loop.model.layers[1].up.weight.mul_(-30)


def test_a_damaged_weight():
    proof = proven(Loop(act=damaged))
    assert (proof.cause, proof.site, proof.repeats) == ("parameter", "layers.1.up.weight", True)
    assert proof.sentence.startswith(
        "Without changes of layers.1.up.weight between updates the spike at step 30 does not come"
    )


def test_rows_of_an_embedding_that_were_written_to():
    def rows(loop):
        loop.model.embed.weight[[3, 11]] *= -40

    proof = proven(Loop(act=rows))
    assert (proof.cause, proof.site) == ("parameter", "embed.weight rows 3, 11")
    assert proof.sentence.startswith("Without changes of embed.weight rows 3, 11 between updates the spike")


def test_rows_of_an_embedding_whose_kept_moments_are_damaged():
    """Nothing changes between updates: the search withholds updates down to the rows that move too far."""
    run(loop := Loop(), AT)
    first = loop.optimizer.state[loop.model.embed.weight]["exp_avg"]
    first[[3, 11]] = torch.randn(2, first.shape[1], generator=torch.Generator().manual_seed(2))
    state = LoopState.of(loop, AT)
    losses = [loop.train_step(step) for step in range(AT, AT + 12)]
    proof = attribute(
        loop, AT + 1, begin=AT, state=state, original=dict(enumerate(losses, start=AT)), watched=10
    )
    assert (proof.cause, proof.site, proof.repeats) == ("optimizer", "embed.weight rows 3, 11", True)
    assert proof.sentence.startswith(
        "Without updates of embed.weight rows 3, 11 the spike at step 31 does not come"
    )


def test_one_product_that_leaves_fp16():
    """A layer at another scale, undone behind it: only fp16 overflows."""

    def install(loop):
        forward, layer = torch.autocast("cpu", torch.float16)(loop.model.forward), loop.model.layers[1].down
        loop.model.forward = lambda tokens: forward(tokens).float()
        layer.register_forward_pre_hook(
            lambda module, args: (args[0].float() * 2**20,) if loop.step >= AT else None
        )
        layer.register_forward_hook(
            lambda module, args, out: (
                (out.float() - module.bias) / 2**20 + module.bias if loop.step >= AT else None
            )
        )

    proof = proven(Loop(install=install), AT)
    assert (proof.cause, proof.site) == ("overflow", "layers.1.down")
    assert proof.sentence.startswith("With layers.1.down in fp32 ")


def test_moments_and_settings():
    def moments(loop):
        for state in loop.optimizer.state.values():
            state["exp_avg"].mul_(-300)

    def rate(loop):
        loop.optimizer.param_groups[0]["lr"] *= 100

    def decay(loop):
        loop.optimizer.param_groups[0]["weight_decay"] = 60.0

    assert proven(Loop(act=moments), AT + 1).cause == "optimizer"
    assert proven(Loop(act=rate), AT + 1).cause == "learning-rate"
    assert proven(Loop(act=decay), AT + 1).cause == "optimizer"


def test_a_batch_and_a_row_of_it():
    def one_row(tokens):
        tokens = tokens.clone()
        tokens[4] = torch.arange(LENGTH + 1) * 11 % TOKENS
        return tokens

    proof = proven(Loop(spoil=one_row))
    assert proof.cause == "batch"
    assert (proof.remedy.without.kind, proof.remedy.without.rows) == ("batch rows", (AT, 4))
    assert "row 4 of batch 30" in proof.sentence
    assert json.loads(proof.event.to_json())["data"]["remedy"]["rows"] == [AT, 4]
    assert isinstance(proof.event, Event)


def test_a_layer_whose_output_grows():
    def install(loop):
        loop.model.layers[0].down.register_forward_hook(
            lambda module, args, out: out * -60 if loop.step >= AT else out
        )

    proof = proven(Loop(install=install))
    assert (proof.cause, proof.site) == ("activation", "layers.0.down")


def test_updates_are_narrowed_to_what_is_needed():
    """A weight whose gradient is noise for some updates: without its updates alone the event does not come."""
    noise = 1e5 * torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(1))

    def install(loop):
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.5)
        loop.model.head.weight.register_hook(lambda g: noise if AT <= loop.step < AT + 10 else g)

    proof = proven(Loop(install=install), AT + 2, thorough=True)
    assert (proof.cause, proof.site) == ("gradient", "head.weight")
    assert proof.needed.sites == ("head.weight",)
    assert proof.enough.label == "head"
    assert "the updates of head alone bring it" in proof.sentence


def test_it_goes_on_where_it_was_broken_off(tmp_path):
    file, told = tmp_path / "forks.jsonl", []
    first = proven(Loop(act=damaged), memory=file, tell=told.append)
    with file.open("a") as lines:
        lines.write('{"without": ')  # a kill
    again = []
    second = proven(Loop(act=damaged), memory=file, tell=again.append)
    assert told
    assert not again
    assert second.rows == first.rows
    lines = file.read_text().splitlines()
    assert all(json.loads(line) for line in lines)  # what was cut short is gone, so that lines may follow
    proven(Loop(act=damaged, dropout=0.1), memory=file, tell=again.append)
    assert again  # of another run


def test_a_budget_that_ends_before_a_wider_search(monkeypatch):
    """The result still tells what the first forks proved."""
    module = importlib.import_module("stabilitylab.attribution.search")
    original, made = module._Search._control, []

    def too_small(self, *args):
        made.append(1)
        if len(made) > 1:
            raise module.BudgetTooSmallError("spent")
        return original(self, *args)

    monkeypatch.setattr(module._Search, "_control", too_small)
    monkeypatch.setattr(module, "conclude", lambda *args, **more: Conclusion(cause="unknown"))
    proof = proven(Loop(act=damaged), before=4, thorough=True)
    assert (proof.cause, len(made), proof.repeats) == ("unknown", 2, True)
    assert proof.forks


def test_a_loop_that_raises_at_a_loss_that_is_no_number():
    class Raises(Loop):
        def train_step(self, index):
            if (loss := super().train_step(index)) != loss:
                raise KeyError("loss")
            return loss

    def act(loop):
        loop.model.layers[1].up.weight[0, 0] = float("nan")

    loop = Raises(act=act)
    losses = run(loop, BEGIN)
    state = LoopState.of(loop, BEGIN)
    losses += [loop.train_step(step) for step in range(BEGIN, AT)]
    proof = attribute(loop, AT, begin=BEGIN, state=state, original=dict(enumerate(losses)), thorough=False)
    assert (proof.cause, proof.site, proof.repeats) == ("parameter", "layers.1.up.weight", True)
    with pytest.raises(KeyError):  # before the event it is the loop's own matter
        attribute(loop, AT + 6, begin=BEGIN, state=state)


def test_a_loop_whose_data_go_on_by_themselves():
    class Iterates(Loop):
        place = 0

        def batch(self, index):
            self.place += 1
            return super().batch(self.place)

    loop = Iterates(spoil=lambda tokens: tokens.flip(1))
    losses = run(loop, BEGIN)
    state = LoopState.of(loop, BEGIN)
    losses += [loop.train_step(step) for step in range(BEGIN, AT + 4)]
    with pytest.raises(InputError, match=r"does not repeat itself.*a place in the data"):
        attribute(loop, AT, begin=BEGIN, state=state, original=dict(enumerate(losses)))


def test_a_loop_that_keeps_its_place_in_the_data_and_ignores_the_index():
    class Streams(Loop):
        place = 0

        def state_dict(self):
            return super().state_dict() | {"place": self.place}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.place = state["place"]

        def batch(self, index):
            self.place += 1
            return super().batch(self.place - 1)

    proof = proven(Streams(spoil=lambda tokens: tokens.flip(1)), thorough=True)
    assert (proof.cause, proof.ignores_index) == ("unknown", True)
    assert "No batch could be left out: train_step(index) takes the same one" in proof.sentence
    proof = proven(Streams(act=damaged))
    assert (proof.cause, proof.site) == ("parameter", "layers.1.up.weight")


def test_rows_whose_gradients_are_not_finite_stand_out():
    sizes = np.array([[6.6, 1.2], [5.3, np.inf], [5.6, 2.8], [5.1, 1.9]])
    assert standing_out(sizes)[0] == 1
    assert standing_out(np.array([[6.6, 1.2], [5.3, np.inf], [5.6, 2.8], [9.1, np.inf]]))[0] == 3
    assert standing_out(np.full((4, 2), np.nan))


def test_a_loop_without_a_loss_or_with_a_state_that_cannot_be_copied():
    loop = Loop()
    loop.train_step = lambda index: None
    with pytest.raises(InputError, match="returned a NoneType: it returns the step's loss"):
        attribute(loop, 10, begin=0)
    loop.state_dict = lambda: {"data": (i for i in range(3))}
    with pytest.raises(InputError, match=r"state_dict\(\) of Loop cannot be copied .*generator.* its place"):
        LoopState.of(loop, 0)


def test_what_is_not_in_state_or_code_is_said():
    """The test damages the run from outside its code, so the control goes on without the damage."""
    loop = Loop(act=damaged)
    losses = run(loop, AT + 14)
    loop.act = None
    clean = Loop()
    run(clean, BEGIN)
    proof = attribute(clean, AT, begin=BEGIN, original=dict(enumerate(losses)), watched=12)
    assert (proof.repeats, proof.departs) == (False, AT)
    assert "neither in the kept state nor in data or code" in proof.sentence
    run(clean := Loop(), BEGIN)
    said = {"original": dict(enumerate(losses)), "watched": 12, "otherwise": "2 threads, the run 8"}
    assert attribute(clean, AT, begin=BEGIN, **said).sentence.endswith("forks have 2 threads, the run 8.")


def test_refusals():
    loop = Loop(act=damaged)
    with pytest.raises(InputError, match="lies behind the event's onset"):
        attribute(loop, 10, begin=11)
    with pytest.raises(InputError, match=r"too small for one fork.*give at least"):
        proven(Loop(act=damaged), budget=1e-3)
    with pytest.raises(
        InputError, match=r"'attention' matches no parameter of the model: it has embed\.weight, layers"
    ):
        proven(Loop(act=damaged), groups=["attention"], thorough=True)
    with pytest.raises(InputError, match="open_loop"):
        attribute(loop, 10, begin=0, processes=2)
    restless = Loop()
    restless.train_step = lambda index: float(torch.rand(1)) + id(object()) % 97
    dice = iter(range(10**6))
    restless.train_step = lambda index: float(next(dice))
    with pytest.raises(InputError, match="does not repeat itself"):
        attribute(restless, 10, begin=0)
