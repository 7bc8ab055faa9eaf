"""Megatron-core's GPT under the plain Monitor, where it is installed: its blocks, attention and embedding have their own names.

Its attention asks torch for a CUDA device in two places; the test answers with the CPU.
"""

import contextlib
import types
import warnings

import pytest
import torch
import torch.distributed as dist

from stabilitylab import Monitor, load_run
from stabilitylab.telemetry import GRADIENT_NORM

with warnings.catch_warnings():  # theirs
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core")
    import megatron.core.transformer.dot_product_attention as attention
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    tracker = types.SimpleNamespace(fork=contextlib.nullcontext)
    monkeypatch.setattr(attention.tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_names_norms_and_scores(alone, tmp_path):
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    model = GPTModel(config=config, transformer_layer_spec=spec, vocab_size=64, max_sequence_length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    places, mask = torch.arange(16).expand(2, -1), torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
    norms = []
    with Monitor(model, optimizer, out=tmp_path / "run", every=1, tensorboard=False, group=None) as monitor:
        for step in range(3):
            loss = model(tokens, places, mask, labels=tokens).mean()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=loss)
    run = load_run(tmp_path / "run")
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx(norms, rel=1e-5)
    assert run.matrix("gradient", "l2").pow(2).sum().pow(0.5).tolist() == pytest.approx(norms, rel=1e-5)
    assert [run.places.block_number(f"decoder.layers.{i}") for i in (0, 1)] == [0, 1]
    assert run.places.is_embedding("embedding.word_embeddings.weight")
    scores = run.matrix("attention", "score_max", "max")
    assert [site.split(".")[2] for site in scores.index] == ["0", "1"]
    assert {f"decoder.layers.{i}.mlp.linear_fc2" for i in (0, 1)} <= set(
        run.matrix("activation", "absmax").index
    )
