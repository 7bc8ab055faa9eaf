"""The callback under OLMo-core's own Trainer, where it is installed: steps, losses, norms before clipping, rates."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from stabilitylab import load_run
from stabilitylab.errors import InputError
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS

with warnings.catch_warnings():  # theirs
    warnings.simplefilter("ignore")
    pytest.importorskip("olmo_core")
    from olmo_core.data.data_loader import DataLoaderBase
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig, LinearWithWarmup
    from olmo_core.train import Duration, TrainerConfig
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.train_module.transformer import (
        TransformerPipelineTrainModule,
        TransformerTrainModuleConfig,
    )

    from stabilitylab.integrations.olmo_core import MonitorCallback

pytestmark = pytest.mark.filterwarnings("default")
LENGTH, ROWS, VOCABULARY, STEPS = 16, 4, 64, 8


class Batches(DataLoaderBase):
    """Tokens drawn from the batch's number."""

    def _iter_batches(self):
        for number in range(self.total_batches):
            yield self.batch(number)

    def batch(self, number):
        random = torch.Generator().manual_seed(number)
        return {"input_ids": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=random)}

    @property
    def total_batches(self):
        return 100

    def get_mock_batch(self):
        return self.batch(0)

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        """Nothing is kept."""

    def reshuffle(self, epoch=None, **kwargs):
        self._epoch = epoch or 1

    def global_num_tokens_in_batch(self, batch):
        return batch["input_ids"].numel()


class Norms(Callback):
    """What the Trainer itself records."""

    def pre_train(self):
        self.seen = []

    def post_step(self):
        get = self.trainer.get_metric
        self.seen.append(
            [float(get(n)) for n in ("train/CE loss", "optim/total grad norm", "optim/LR (group 0)")]
        )


def test_steps_losses_norms_and_rates_are_the_trainers(tmp_path):
    model = TransformerConfig.llama_like(
        d_model=32, vocab_size=VOCABULARY, n_layers=2, n_heads=4, hidden_size_multiple_of=16
    ).build()
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=2 * LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig(lr=1e-2), max_grad_norm=0.1,
        scheduler=LinearWithWarmup(warmup=4),
    ).build(model, device=torch.device("cpu"))  # fmt: skip
    loader = Batches(work_dir=tmp_path / "work", global_batch_size=ROWS * LENGTH)
    norms = Norms()
    watch = MonitorCallback(out=str(tmp_path / "run"), every=2, options={"tensorboard": False})
    trainer = TrainerConfig(
        save_folder=str(tmp_path / "save"), max_duration=Duration.steps(STEPS), no_checkpoints=True, no_evals=True, device="cpu",
        callbacks={"stabilitylab": watch, "norms": norms},
    ).build(module, loader)  # fmt: skip
    trainer.fit()
    run = load_run(tmp_path / "run")
    recorded = [run.series(name).tolist() for name in (LOSS, GRADIENT_NORM, LEARNING_RATE)]
    for told, own in zip(recorded, zip(*norms.seen, strict=True), strict=True):
        assert told == pytest.approx(list(own), rel=1e-5)
    assert run.series(LOSS).index.tolist() == list(range(STEPS))
    gradients = run.matrix("gradient", "l2")
    assert sorted(gradients.columns) == list(range(0, STEPS, 2))
    assert gradients.pow(2).sum().pow(0.5).tolist() == pytest.approx(recorded[1][::2], rel=1e-4)


def test_a_pipeline_is_refused():
    module = TransformerPipelineTrainModule.__new__(TransformerPipelineTrainModule)  # it needs ranks
    module.model_parts, module.optimizers = [torch.nn.Linear(1, 1)], []
    watch = MonitorCallback()
    watch.trainer = SimpleNamespace(train_module=module)
    with pytest.raises(InputError, match="TransformerPipelineTrainModule is not watched"):
        watch.pre_train()
