"""HuggingFace's Trainer, watched by a callback. Needs the extra ``hf``.

python examples/hf_trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from stabilitylab.cli import main
from stabilitylab.integrations.transformers import MonitorCallback

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
)
rows = [{"input_ids": (ids := torch.randint(0, 64, (16,))), "labels": ids} for _ in range(160)]
arguments = TrainingArguments(
    output_dir="hf-output",
    max_steps=40,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    report_to=[],
    logging_steps=10,
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
)
Trainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    callbacks=[MonitorCallback(out="runs/hf", every=5)],
).train()
main(["show", "runs/hf"])
