"""accelerate's loop with the plain Monitor, and TRL's SFTTrainer with the Trainer's callback, with the real libraries."""

import math
import warnings

import pytest
import torch
from torch import nn

from stabilitylab import Monitor, load_run
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS

pytestmark = pytest.mark.filterwarnings("default")


def test_accelerate_with_accumulation_clipping_and_a_schedule(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    losses, norms, step = [], [], 0
    monitor = Monitor(model, optimizer, out=tmp_path / "run", every=1, tensorboard=False)  # 1
    for _ in range(5):
        seen = []
        for _ in range(2):
            with accelerator.accumulate(model):
                loss = model(torch.randn(8, 4)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.01)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                seen.append(loss.item())
            if accelerator.sync_gradients:
                monitor.step(step, loss=sum(seen) / 2)  # 2
                step += 1
        losses.append(sum(seen) / 2)
    monitor.close()  # 3
    run = load_run(tmp_path / "run")
    assert run.series(LOSS).tolist() == pytest.approx(losses)
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx(norms, rel=1e-5)
    assert run.series(LEARNING_RATE).tolist() == pytest.approx([1e-2 * 0.5**k for k in range(5)])
    assert all(site.split(".")[0] in "02" for site in run.matrix("gradient", "l2").index)


def test_trl_sft(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from stabilitylab.integrations.transformers import MonitorCallback
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": ["a b c d e f g"] * 32})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_grad_norm=0.05, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
        callbacks=[MonitorCallback(out=tmp_path / "run", every=1, tensorboard=False)],
    )  # fmt: skip
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "loss" in entry]
    run = load_run(tmp_path / "run")
    assert run.series(LOSS).index.tolist() == list(range(6))
    assert run.series(LOSS).tolist() == pytest.approx([entry["loss"] for entry in told], rel=1e-3)
    assert run.series(GRADIENT_NORM).tolist() == pytest.approx(
        [float(entry["grad_norm"]) for entry in told], rel=1e-3
    )
    assert all(math.isfinite(x) for x in run.matrix("activation", "absmax").to_numpy().ravel())
