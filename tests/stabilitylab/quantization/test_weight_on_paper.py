"""Models that ask a quantized weight for its format; formats of unquantized tensors in 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stabilitylab.models import open_text_model
from stabilitylab.models.half_storage import without_parameters
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.loading import open_quantized
from stabilitylab.quantization.plan import PlannedLayer
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.serialization import load_quantized, save_quantized
from tests.stabilitylab.quantization.folders import TEXT, write_tokenizer
from tests.stabilitylab.quantization.test_compressed_tensors import plan_of

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = ["int8-row", "fp8-e4m3-row", "int4-g32-had", "w8a8-token"]


def write(folder, kind):
    transformers = pytest.importorskip("transformers")
    words = write_tokenizer(folder)
    few = {"vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if kind == "mamba2":
        config = transformers.Mamba2Config(
            **few, state_size=8, num_heads=4, head_dim=16, n_groups=1, pad_token_id=0, eos_token_id=0
        )
        model = transformers.Mamba2ForCausalLM(config)
    elif kind == "mamba":
        config = transformers.MambaConfig(**few, state_size=4, pad_token_id=0, eos_token_id=0)
        model = transformers.MambaForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=words, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8
        )
        model = transformers.T5EncoderModel(config)
    else:
        config = transformers.DeepseekV3Config(
            **few, intermediate_size=48, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=4,
            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(config)
        # What training leaves there is no number of bf16.
        model.model.layers[1].mlp.gate.e_score_correction_bias.data = torch.tensor([0.1, 0.2, 0.30001, 0.4])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mamba2", "mamba", "t5", "deepseek"])
def test_what_was_written_computes_what_was_planned(tmp_path, kind):
    model = open_text_model(write(tmp_path / "model", kind))
    plan = plan_of(model, tmp_path, SCHEMES, embeddings=True)
    if kind == "mamba":  # its output, tied to the embedding, asks for the format of the weight
        assert plan.layers["backbone.embeddings"].scheme is not None
    plan = dataclasses.replace(
        plan,
        layers={
            path: PlannedLayer(
                scheme="int8-row" if "embed" in path or path == "shared" else layer.scheme, reason=""
            )
            for path, layer in plan.layers.items()
        },
    )
    save_quantized(model, plan, tmp_path / "out")
    window = next(model.windows([TEXT], 24, 24))
    narrow = open_text_model(tmp_path / "model", dtype=torch.bfloat16)
    quantize_layers(model.module, plan.schemes)
    quantize_layers(narrow.module, plan.schemes)
    for dtype, expected in ((torch.float32, model), (torch.bfloat16, narrow)):
        read = open_quantized(tmp_path / "out", dtype=dtype)
        own = dict(read.module.named_parameters()) | dict(read.module.named_buffers())
        for name, tensor in [*expected.module.named_parameters(), *expected.module.named_buffers()]:
            assert own[name].dtype == tensor.dtype, name
            torch.testing.assert_close(
                own[name].float(), tensor.float(), rtol=0, atol=0, equal_nan=True, msg=name
            )
        assert torch.equal(read.run(window), expected.run(window))


def test_buffers_keep_their_format(tmp_path):
    """A model of floats in bf16 with a buffer that it computes in fp32: the file's numbers come back unrounded."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
            self.register_buffer("running", torch.tensor([0.1, 1.00001]))

    from safetensors.torch import save_file

    torch.manual_seed(0)
    given = Own()
    save_file(
        given.state_dict(),
        tmp_path / "model.safetensors",
        metadata={"stabilitylab-quantized": '{"version": 1, "layers": {}, "shared": []}'},
    )
    with without_parameters():
        read = Own()
    read.running.zero_()
    load_quantized(read, tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert torch.equal(read.running, given.running)
    assert read.running.dtype == torch.float32
    assert read.layer.weight.dtype == torch.bfloat16


def test_whoever_multiplies_with_it_is_told_at_once():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, dtype=torch.bfloat16))
    quantize_layers(model, {"0": scheme_of("int8-row")})
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.dim()) == (torch.bfloat16, (16, 32), 2)
    assert not isinstance(layer.weight, torch.Tensor)
    model.to(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert "computes" not in layer.state_dict()
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.ones(1, 32), layer.weight)
