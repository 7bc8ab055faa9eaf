"""Under the real DeepSpeed, two processes on gloo: the monitor records what one plain process with all the data has."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.statistics.updates import SAMPLE
from tests.ports import free_port
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

# A rate so small that gradients of later steps do not depend on the sign of a rounding error, which Adam would follow.
ACCUMULATION, STEPS, RATE = 2, 3, 1e-4


CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
Rows = dict[tuple[int, str, int], float]


def _process(rank: int, out: Path) -> None:
    """All cases in one pair of processes: to import DeepSpeed takes longer than to train."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (out / "port").read_text()}
    torch.set_num_threads(1)
    import deepspeed

    # A compiler would build it at first use, and two processes that only count do not need it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    found = {case: _train(rank, *case) for case in CASES}
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def _train(rank: int, stage: int, precision: str) -> Rows:
    import deepspeed

    from stabilitylab.integrations.deepspeed import watch

    torch.manual_seed(0)
    model = GPT()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10_000,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=halved, config=config)
    sink = Recording()
    monitor = watch(engine, every=1, sinks=[sink], detector=None)
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            row = 2 * micro + rank
            engine.backward(next_token_loss(engine, _rows(step)[row : row + 1]))
            engine.step()
    monitor.close()
    assert engine.step.__func__ is type(engine).step
    return sink.rows


def _rows(step: int) -> torch.Tensor:
    return torch.cat([batch(step), batch(step + 100)])[:4]


def _plain(precision: str) -> Rows:
    torch.manual_seed(0)
    model, sink = GPT(), Recording()
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if precision == "bf16":
        model.bfloat16()
    optimizer = torch.optim.AdamW(masters.values(), lr=RATE)
    with Monitor(model, optimizer, parameters=masters, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(STEPS):
            losses = [next_token_loss(model, row[None]) for row in _rows(step)]
            (sum(losses) / 4).backward()
            gradients = {name: p.grad.float() for name, p in model.named_parameters()}
            monitor.gradients_ready(gradients=gradients)
            norm = torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
            clip = min(1.0, 0.1 / (float(norm) + 1e-6))
            for name, master in masters.items():
                master.grad = clip * gradients[name]
            optimizer.step()
            for name, parameter in model.named_parameters():
                parameter.data.copy_(masters[name].detach())
            monitor.step(step, loss=torch.stack(losses[::2]).mean(), gradient_norm=norm)
            optimizer.param_groups[0]["lr"] /= 2
            model.zero_grad()
    return sink.rows


@pytest.fixture(scope="module")
def under_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, str], Rows]]:
    """What both ranks recorded, by case."""
    out = tmp_path_factory.mktemp("deepspeed")
    (out / "port").write_text(str(free_port()))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        # Its server imports once and forks both.
        multiprocessing.set_forkserver_preload([__name__, "tests.stabilitylab.integrations.engine_imports"])
        mp.start_processes(_process, args=(out,), nprocs=2, start_method="forkserver")
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_an_engine_is_watched(
    under_deepspeed: list[dict[tuple[int, str], Rows]], stage: int, precision: str
) -> None:
    found, other = (of_rank[stage, precision] for of_rank in under_deepspeed)
    assert other == {}
    expected = _plain(precision)
    # fp32: sums in another order. bf16 (2^-9 a rounding): each rank rounds its gradients, their sum is rounded again.
    room = 1e-4 if precision == "fp32" else 2e-2
    checked = [
        key
        for key in expected
        if key[1].startswith(("gradient/", "train/"))
        and key[1].endswith(("/l2", "/share", "loss", "norm", "rate"))
    ]
    assert len(checked) == STEPS * (3 + 2 * len(list(GPT().parameters())))
    assert [expected[step, "train/-/learning_rate", -1] / RATE for step in range(STEPS)] == [1.0, 0.5, 0.25]
    for key in checked:
        assert found[key] == pytest.approx(expected[key], rel=room, abs=room / 10), key
    for key in expected:
        if key[1].startswith("activation/") and key[1].endswith("/rms"):
            assert found[key] == pytest.approx(expected[key], rel=room), key
    updates = [key for key in expected if key[1].startswith("update/")]
    if (stage, precision) == (0, "bf16"):
        # Its masters are neither the model's parameters nor ZeRO's flat ones.
        updates = []
    assert {key for key in found if key[1].startswith("update/")} == set(updates)
    small = {name for name, p in GPT().named_parameters() if p.numel() <= SAMPLE}
    for key in updates:
        _, site, statistic = key[1].split("/")
        if precision == "bf16" and site.endswith("query_key_value.bias"):
            continue  # A key's bias moves no softmax: its gradient is rounding error, whose size Adam does not mind.
        if statistic in ("rms", "weight_rms", "ratio") and site not in small:
            # Of samples of 256 elements, of which each has a standard error of 1 / sqrt(512); five of two of them.
            assert found[key] == pytest.approx(expected[key], rel=5 * (2 / 512) ** 0.5), key
        elif statistic == "below_epsilon_fraction" and precision == "bf16":
            # Counts what is nearly 0, which in bf16 is a matter of rounding: of a few elements.
            assert found[key] == pytest.approx(expected[key], abs=0.05), key
        else:
            assert found[key] == pytest.approx(expected[key], rel=room, abs=room / 1000), key


def test_what_is_no_engine_is_refused() -> None:
    from stabilitylab.integrations.deepspeed import watch

    with pytest.raises(InputError, match=r"deepspeed\.initialize"):
        watch(torch.nn.Linear(2, 2))
