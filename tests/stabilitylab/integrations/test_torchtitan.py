"""torchtitan's own train_step around a small model, where it is installed.

Its Trainer is made for an accelerator: here it is put together without ``__init__``, with what ``train_step`` needs.
"""

import contextlib
import types
import warnings

import pytest
import torch
from torch import nn

from stabilitylab import load_run
from stabilitylab.errors import InputError
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS

with warnings.catch_warnings():  # theirs
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtitan")
    pytest.importorskip("triton")
    from torchtitan.distributed.cudagraph import wrap_with_cuda_graph
    from torchtitan.trainer import Trainer

    from stabilitylab.integrations.torchtitan import watch

pytestmark = pytest.mark.filterwarnings("default")
STEPS, VOCABULARY = 6, 32
Namespace = types.SimpleNamespace


class Optimizers:
    def __init__(self, model):
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2)]

    def zero_grad(self, set_to_none=True):
        self.optimizers[0].zero_grad(set_to_none)

    def step(self):
        self.optimizers[0].step()


def made():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, VOCABULARY)
    )
    trainer = Trainer.__new__(Trainer)
    trainer.model_parts, trainer.model_config = [model], None
    trainer.optimizers = Optimizers(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizers.optimizers[0], lambda step: 1 / (step + 1)
    )
    trainer.lr_schedulers = Namespace(step=schedule.step, get_metrics=dict)
    trainer.seen = []
    log = lambda step, loss, largest, norm, **more: trainer.seen.append((step, loss, norm))  # noqa: E731
    trainer.metrics_processor = Namespace(should_log=lambda step: True, log=log)
    trainer.parallel_dims = Namespace(
        pp_enabled=False, dp_enabled=False, cp_enabled=False, ep_enabled=False, dp_cp_enabled=False,
        get_optional_mesh=lambda name: None,
    )  # fmt: skip
    trainer.config = Namespace(
        training=Namespace(max_norm=0.05, disable_cuda_graphs=True),
        parallelism=Namespace(spmd_backend="default"),
    )
    trainer.checkpointer = Namespace(maybe_wait_for_staging=lambda: None)
    trainer.device, trainer.gradient_accumulation_steps = torch.device("cpu"), 2
    trainer.num_pipeline_parallel_microbatches, trainer.ntokens_seen, trainer.step = 1, 0, 0
    trainer.train_context = contextlib.nullcontext
    trainer.fwd_bwd_fn = trainer._forward_backward_body
    entropy = nn.functional.cross_entropy
    trainer.loss_fn = lambda pred, labels, tokens: (
        entropy(pred.flatten(0, 1), labels.flatten(), reduction="sum") / tokens, None)  # fmt: skip
    return trainer


def batches():
    random = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCABULARY, (4, 9), generator=random)
        yield {"input": tokens[:, :-1]}, tokens[:, 1:]


def train(trainer):
    data = batches()
    for _ in range(STEPS):
        trainer.step += 1
        trainer.train_step(data)


def test_steps_losses_and_norms_are_the_trainers(tmp_path):
    alone = made()
    train(alone)
    trainer = made()
    with watch(trainer, out=tmp_path / "run", every=1, tensorboard=False):
        train(trainer)
    assert trainer.seen == alone.seen  # a watched run is the run
    assert "train_step" not in trainer.__dict__
    run = load_run(tmp_path / "run")
    steps, losses, norms = zip(*trainer.seen, strict=True)
    assert run.series(LOSS).index.tolist() == [step - 1 for step in steps] == list(range(STEPS))
    assert run.series(LOSS).tolist() == pytest.approx(losses, rel=1e-6)
    assert run.series(LEARNING_RATE).tolist() == pytest.approx([1e-2 / (k + 1) for k in range(STEPS)])
    gradients = run.matrix("gradient", "l2").pow(2).sum().pow(0.5)
    assert gradients.tolist() == pytest.approx(norms, rel=1e-5)  # before clipping
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx(norms, rel=1e-5)


def test_what_is_not_watched_is_refused():
    with pytest.raises(InputError, match="give a torchtitan Trainer"):
        watch(nn.Linear(1, 1))
    trainer = made()
    trainer.parallel_dims.pp_enabled = True
    with pytest.raises(InputError, match="pipeline"):
        watch(trainer)
    trainer = made()
    trainer.fwd_bwd_fn = wrap_as_a_graph(trainer.fwd_bwd_fn)
    with pytest.raises(InputError, match=r"give it --training\.disable_cuda_graphs"):
        watch(trainer)


def wrap_as_a_graph(function):
    """What wrap_with_cuda_graph gives on a GPU; elsewhere it gives the function back, and that is watched."""
    assert wrap_with_cuda_graph(function) == function
    return lambda *arguments: function(*arguments)
