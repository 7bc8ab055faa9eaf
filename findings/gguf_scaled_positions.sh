#!/usr/bin/env bash
# Rotary positions that a GGUF file scales, read by transformers: Llama 3.1's divisors and Gemma 3's linear factor.
#
# Written down before running: from_pretrained(..., gguf_file=...) gives the logits of the model that the file was written from, or
# says what it leaves out.
# Seen with transformers 5.23.0 and gguf 0.19.0, Python 3.11 (2026-11-29): neither. It silently drops `rope_freqs.weight`, the
# tensor in which llama.cpp keeps Llama 3.1's divisors of frequencies, and `gemma3.rope.scaling.factor`. A model of two layers
# differs from its original by more than the spread of its logits; with the file's own divisors put in by hand it is the same to the
# last digits, so the file is right. Short texts hide it: only slow rotations are divided. A quantization judged on such a model
# compares wrong with wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat > "$work/read.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

here = Path(sys.argv[1])
HEADS, WIDTH, LAYERS, PIECES, TRAINED_AT, FACTOR = 2, 64, 2, 96, 32, 8.0


def as_llama_cpp(weight: np.ndarray) -> np.ndarray:
    """Rows of queries and keys in the order of GGUF's llama: pairs of a rotation beside each other."""
    rows = weight.shape[0] // HEADS
    return weight.reshape(HEADS, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def base(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(PIECES)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=PIECES, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256, tie_word_embeddings=False,
        rms_norm_eps=1e-6, initializer_range=0.2,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": FACTOR, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED_AT,
        },
    )
).eval()
rotary = model.model.rotary_emb
plain = 1 / 10000.0 ** (torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
divisors = plain / rotary.inv_freq

writer = gguf.GGUFWriter(here / "llama.gguf", "llama")
base(writer)
writer.add_rope_dimension_count(WIDTH // HEADS)
names = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
writer.add_tensor("output_norm.weight", state["model.norm.weight"])
writer.add_tensor("output.weight", state["lm_head.weight"])
writer.add_tensor("rope_freqs.weight", divisors.numpy().astype(np.float32))
for layer in range(LAYERS):
    for theirs, ours in names.items():
        weight = state[f"model.layers.{layer}.{theirs}.weight"]
        writer.add_tensor(f"blk.{layer}.{ours}.weight", as_llama_cpp(weight) if ours in ("attn_q", "attn_k") else weight)
close(writer)

writer = gguf.GGUFWriter(here / "gemma3.gguf", "gemma3")
base(writer)
writer.add_sliding_window(16)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(FACTOR)
close(writer)

read = AutoModelForCausalLM.from_pretrained(here, gguf_file="llama.gguf", dtype=torch.float32).eval()
tokens = torch.randint(PIECES, (1, 128))
with torch.no_grad():
    meant, got = model(tokens).logits, read(tokens).logits
    spread = (meant - meant.mean(-1, keepdim=True)).std()
    off = ((got - meant).abs().amax() / spread).item()
    read.model.rotary_emb.inv_freq /= divisors
    mended = ((read(tokens).logits - meant).abs().amax() / spread).item()
gemma = AutoConfig.from_pretrained(here, gguf_file="gemma3.gguf")
scaled = "linear" in str(gemma.rope_parameters)
print("transformers", version("transformers"), "gguf", version("gguf"))
print(f"largest difference of logits over their spread: as read {off:.3f}, with the file's divisors {mended:.2e}")
print("gemma3's rotary parameters as read:", gemma.rope_parameters)
sys.exit(0 if off > 0.1 and mended < 1e-3 and not scaled else 1)
PY
"$work/env/bin/python" "$work/read.py" "$work" 2> "$work/log" && echo "as recorded" || { tail -n 3 "$work/log"; echo "changed: look again"; exit 1; }
