#!/usr/bin/env bash
# Two layers of one kind with different schemes: does transformers load what compressed-tensors can describe?
#
# Written down before running: each weight is decompressed by the scheme of its own group, since config_groups name layers.
# Seen with transformers 5.23.0, compressed-tensors 0.20.1, torch 2.13.0, Python 3.11 (2026-11-29): transformers uses the scheme of
# the first group for every dense layer. With one group the folder loads; with int4 in groups of 32 columns first and int4 a row
# second it loads too; with the same two groups in the other order it does not. Plans that choose a scheme per layer meet this.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1 safetensors==0.8.0
cat > "$work/mixed.py" <<'PY'
import json
import sys
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file

print("transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
torch.manual_seed(0)
shape = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)
model = transformers.LlamaForCausalLM(shape)
GROUPS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
ROWS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")


def folder(where: Path, args: dict[str, QuantizationArgs]) -> Path:
    """down_proj of both layers compressed by the library itself, everything else as it is."""
    where.mkdir()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    groups = {}
    for i, (path, weights) in enumerate(args.items()):
        scheme = QuantizationScheme(targets=[path], weights=weights, format="pack-quantized")
        weight = tensors.pop(f"{path}.weight")
        blocks = weight.unflatten(1, (-1, weights.group_size or weight.shape[1]))
        packed = PackedQuantizationCompressor.compress(
            {"weight": weight, "weight_scale": blocks.abs().amax(-1) / 7}, scheme
        )
        tensors |= {f"{path}.{name}": value.contiguous() for name, value in packed.items()}
        same = next((g for g in groups.values() if g.weights == weights), None)
        if same is None:
            groups[f"group_{i}"] = scheme
        else:
            same.targets.append(path)
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", quantization_status="compressed")
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(where)
    held = json.loads((where / "config.json").read_text())
    held["quantization_config"] = json.loads(config.model_dump_json())
    (where / "config.json").write_text(json.dumps(held))
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return where


def loads(where: Path) -> bool:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(
            where, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
        )
    except (RuntimeError, ValueError, KeyError) as error:
        print("   ", type(error).__name__, str(error).splitlines()[0][:120])
        return False
    return True


first, second = (f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
out = Path(sys.argv[1])
seen = {
    "one group for both layers": loads(folder(out / "one", {first: GROUPS, second: GROUPS})),
    "groups of 32 first, rows second": loads(folder(out / "groups", {first: GROUPS, second: ROWS})),
    "rows first, groups of 32 second": loads(folder(out / "rows", {first: ROWS, second: GROUPS})),
}
for name, loaded in seen.items():
    print(f"{name}: {'loads' if loaded else 'does not load'}")
sys.exit(0 if list(seen.values()) == [True, True, False] else 1)
PY
"$work/env/bin/python" "$work/mixed.py" "$work" 2>/dev/null && echo "as recorded" || { echo "changed: look again"; exit 1; }
