"""Telemetry tells the batch of a step, also after the run has left batches out."""

from rich.console import Console

from glm.commands.train import TrainCommand, train
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.model.config import ModelConfig
from glm.train.batch_rebuild import BatchDescriber
from glm.train.config import BatchConfig, MonitorConfig, TrainConfig
from stabilitylab.runs.folder import RunFolder


def test_documents_tokens_and_words_of_a_step(data_folder, tmp_path):
    config = TrainConfig(
        steps=6,
        model=ModelConfig(layers=1, hidden=32, heads=2, length=64),
        objective=ObjectiveConfig(kind="causal"),
        batch=BatchConfig(rows=4, micro_rows=1, ramp_from=1, ramp_samples=8),
        monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
    )
    train(TrainCommand(config=config, data=data_folder, out=tmp_path / "run"), console=Console(quiet=True))
    data = open_data(data_folder)
    loader = Loader(data, config.objective, config.sampling, length=64, seed=config.seed)
    describe = BatchDescriber(RunFolder(tmp_path / "run"), loader, 64)
    # The ramp's first updates see fewer rows than the later ones.
    seen = [sample for step in range(6) for sample in describe.samples(step)]
    assert seen == list(range(len(seen)))
    assert (len(describe.samples(0)), len(describe.samples(5))) == (1, 3)
    lines = describe(3)
    assert len(lines) == len(describe.samples(3))
    first = loader.samples(describe.samples(3)).provenance[0][0]
    assert f"tokens {first.first:,} to {first.first + 63:,}" in lines[0]
    assert 'row begins "' in lines[0]
    assert describe(99) == []
