"""Checkpoints of codes: the reader takes them for the numbers that they stand for, or refuses them; never for weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from stabilitylab.models.dequantization import dequantized, understood
from stabilitylab.models.weight_files import stored_tensors
from tests.stabilitylab.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Stored = Callable[[str, Tensor], dict[str, Tensor]]


def stored_as(folder: Path, out: Path, store: Stored, config: dict[str, object] | None = None) -> Path:
    """A copy whose blocks' matrices are stored otherwise."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(file).items():
        tensors |= store(name, weight) if "layers" in name and weight.dim() == 2 else {name: weight}
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    if config is not None:
        held = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**held, "quantization_config": config}))
    return out


def spread(scale: Tensor, block: int) -> Tensor:
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)


# Each stores a weight [N, K] and says, by other means, what numbers that stands for.


def per_tensor(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = w.abs().max() / 448
    codes, static = (w / scale).to(E4M3), name.replace(".weight", ".input_scale")
    bound = name.replace(".weight", ".input_scale_ub")  # fbgemm's
    return (
        {name: codes, f"{name}_scale": scale.reshape(1), static: torch.ones(1), bound: torch.ones(1)},
        codes.float() * scale,
    )


def per_row(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = w.abs().amax(1) / 57344
    codes = (w / scale[:, None]).to(E5M2)
    return {name: codes, f"{name}_scale": scale}, torch.diag(scale) @ codes.float()


def per_block(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.full((len(w) // 16, w.shape[1] // 16), 2**-10)
    scale[0, 0] = 2**-9
    codes = (w / spread(scale, 16)).to(E4M3)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread(scale, 16)


def torchaos(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 448
    codes, layer = (w / scale).to(E4M3), name.removesuffix("weight")
    return {f"{layer}_weight_qdata": codes, f"{layer}_weight_scale": scale}, codes.float() * scale


def int8_rows(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def mx_fp8(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    exponent = torch.full((len(w), -(-w.shape[1] // 32)), 119, dtype=torch.uint8)
    codes = (w * 256).to(E4M3)
    return {name: codes, f"{name}_scale": exponent}, codes.float() / 256


STORES = {
    "fp8 a tensor": per_tensor,
    "fp8 a row": per_row,
    "fp8 a block": per_block,
    "fp8 of torchao": torchaos,
    "int8": int8_rows,
    "mxfp8": mx_fp8,
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_codes_with_scales_are_read_as_numbers(saved, tmp_path, store):
    config = {"quant_method": "modelopt"} if store is per_tensor else None
    path = stored_as(saved["llama"], tmp_path / "m", lambda n, w: store(n, w)[0], config)
    model = open_text_model(path)
    for name, weight in open_text_model(saved["llama"]).module.named_parameters():
        read = model.module.get_parameter(name)
        coded = "layers" in name and weight.dim() == 2
        assert torch.equal(read, store(name, weight)[1] if coded else weight), name
        assert torch.equal(read, weight) != coded, name
    assert any("are read as code x scale" in note for note in model.notes)


@pytest.mark.parametrize("said", ["fp8", "compressed-tensors", None])
def test_blocks_are_as_large_as_the_config_says(saved, tmp_path, said):
    """Of 48 columns 2 blocks may be of 24 to 47 numbers: by its shape a scale does not say which."""
    size = 40
    configs = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [size, size]},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [size, size]}}},
        },
    }

    def blocks(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = torch.exp2(-10 - torch.arange(-(-len(w) // size) * -(-w.shape[1] // size)).float())
        scale = scale.view(-(-len(w) // size), -1)
        whole = spread(scale, size)[: len(w), : w.shape[1]]
        codes = (w / whole).clamp(-448, 448).to(E4M3)
        return {name: codes, f"{name}_scale_inv": scale}, codes.float() * whole

    path = stored_as(saved["llama"], tmp_path / "m", lambda n, w: blocks(n, w)[0], configs.get(said or ""))
    model = open_text_model(path)
    told = [note for note in model.notes if "size its config does not say" in note]
    assert bool(told) == (said is None)
    if said is not None:
        for name, weight in open_text_model(saved["llama"]).module.named_parameters():
            if "layers" in name and weight.dim() == 2:
                assert torch.equal(model.module.get_parameter(name), blocks(name, weight)[1]), name
    else:
        assert "it is taken to be 32" in told[0]
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"does not fit .* in blocks of 16: use an intact checkpoint"):
        open_text_model(path)


def test_four_bit_codes_are_those_of_the_specification():
    """Every code of E2M1 in both halves of a byte; OCP MX 1.0, table 5, and the block scale of section 5.4.1."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    codes = torch.tensor([[low | (15 - low) << 4 for low in range(16)]], dtype=torch.uint8)
    expected = torch.tensor([[v for low in range(16) for v in (values[low], values[15 - low])]])
    files = {
        "a.weight_packed": codes,
        "a.weight_scale": torch.tensor([[130]], dtype=torch.uint8),
        "b.weight": codes.clone(),
        "b.weight_scale": torch.tensor([[1.0, 448.0]]).to(E4M3),
        "b.weight_scale_2": torch.tensor(0.25),
    }
    for name, wanted in {
        "a.weight": expected * 8,
        "b.weight": expected * torch.tensor([1.0, 448.0]).repeat_interleave(16) * 0.25,
    }.items():
        read = read_one(files, name)
        assert torch.equal(read, wanted), name


def read_one(files: dict[str, Tensor], name: str) -> Tensor:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file(files, Path(folder) / "model.safetensors")
        one = next(c for c in understood(Path(folder), stored_tensors(Path(folder))) if c.name == name)
    parts = [files[part] for part in one.parts]
    return dequantized(one, *parts)


def test_gpt_oss_files_give_what_transformers_makes_of_them(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(1)
    config = GptOssConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
        layer_types=["full_attention", "full_attention"], max_position_embeddings=64,
    )  # fmt: skip
    folder = tiny.save(GptOssForCausalLM(config), tmp_path / "plain")
    file = folder / "model.safetensors"
    tensors, expected = {}, {}
    for name, tensor in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, out, into // 32), dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    model = open_text_model(folder)
    for name, weight in expected.items():
        for expert in range(4):
            layer = model.module.get_submodule(f"{name}.{expert}")
            assert torch.equal(layer.weight, weight[expert].T), name


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (lambda n, w: {n: w.to(E4M3)}, "as F8_E4M3 codes without scales beside it"),
        (
            lambda n, w: {n: w.to(torch.int8), n.replace("weight", "SCB"): w[:, 0]},
            "as I8 codes with .*SCB beside it",
        ),
        (
            lambda n, w: {
                n.replace("weight", "qweight"): w[:, :4].int(),
                n.replace("weight", "scales"): w[:1],
            },
            "as I32 codes with .*scales beside it",
        ),
        (lambda n, w: {**int8_rows(n, w)[0], f"{n}_zero_point": torch.ones(len(w), 1)}, "zero points"),
        (lambda n, w: {n: w.to(E4M3), f"{n}_scale": torch.ones(len(w), 3)}, r"weight_scale .* does not fit"),
        (lambda n, w: {n: w, f"{n}_scale_inv": torch.ones(1)}, "transformers did not understand"),
        (lambda n, w: {n: w, n.replace("weight", "lora_A.weight"): w[:2].clone()}, "do not belong together"),
    ],
    ids=[
        "no scale",
        "bitsandbytes",
        "gptq",
        "zero points",
        "scale of another shape",
        "float codes",
        "adapter",
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(saved, tmp_path, store, said):
    with pytest.raises(InputError, match=said) as caught:
        open_text_model(stored_as(saved["llama"], tmp_path / "m", store))
    assert "\n" not in str(caught.value)


def test_an_index_leads_to_no_file_outside_its_folder(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved["llama"], folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})
    )
    with pytest.raises(InputError, match="lacks elsewhere"):
        open_text_model(folder)


def test_heads_that_are_not_opened_are_counted(saved, tmp_path):
    """A BERT with its masked-language head is opened as the bare encoder."""
    from transformers import BertForMaskedLM

    module = BertForMaskedLM(tiny.bert().config)
    model = open_text_model(tiny.save(module, tmp_path / "bert", framed=True))
    assert any("cls.predictions" in note and "no part of the opened model" in note for note in model.notes)


def test_matrices_of_indices_are_no_codes(tmp_path, saved):
    folder = shutil.copytree(saved["llama"], tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    # As checkpoints of encoders from before transformers 4.31 carry them.
    tensors["model.embed_tokens.position_ids"] = torch.arange(8)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    assert understood(folder, stored_tensors(folder)) == []
