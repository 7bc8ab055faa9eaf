"""Models that compute in fp32 with their weights in the 16 bits of their file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stabilitylab.models import open_text_model
from stabilitylab.models.half_storage import computes_wide, hold, is_held, look_up, products_of_rows
from stabilitylab.models.logit_chunks import Pieces
from tests.stabilitylab.models.tiny import TEXT, bert, gemma3, gpt2, llama, save


def in_16_bits(folder, dtype):
    file = folder / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [llama, gpt2, bert, gemma3])
def test_outputs_are_those_of_the_wide_model(tmp_path, build, dtype):
    """Bit for bit; Gemma's embedding is scaled by the root of its width, which bf16 would round."""
    folder = in_16_bits(save(build(), tmp_path, framed=build is bert), dtype)
    wide, held = open_text_model(folder), open_text_model(folder, hold=True)
    assert held.fingerprint == wide.fingerprint
    assert held.shared == wide.shared
    narrow = [name for name, p in held.module.named_parameters() if p.dtype == dtype]
    assert len(narrow) > 8
    for window in wide.windows([TEXT], 32, 64):
        assert torch.equal(held.run(window), wide.run(window))
    assert {p.dtype for p in held.module.parameters()} == {dtype, torch.float32}
    # Gradients of inputs too.
    ids = torch.arange(12)[None]
    embedding = [model.module.get_input_embeddings() for model in (wide, held)]
    found = []
    for model, table in zip((wide, held), embedding, strict=True):
        x = table(ids).detach().requires_grad_()
        y = model.module(inputs_embeds=x)
        (y.logits if model.predicts else y.last_hidden_state).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))


def test_files_of_several_formats_are_widened(tmp_path):
    folder = in_16_bits(save(llama(), tmp_path), torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    assert {p.dtype for p in open_text_model(folder, hold=True).module.parameters()} == {torch.float32}


class _Rounds(nn.Module):
    """Casts a layer's input to its weight's format, as T5 and Mamba do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(self.norm(x.to(self.embed.weight.dtype)))


def test_a_model_that_rounds_by_a_weights_format_is_not_held():
    made = _Rounds().to(torch.bfloat16)
    hold(made)
    assert is_held(made.head)
    assert not computes_wide(made)


def test_rows_are_looked_up_as_the_embedding_does():
    table = nn.Embedding(10, 4, padding_idx=9)
    ids = torch.tensor([[9, 3, 3, 0]])
    assert torch.equal(look_up(table, ids, lambda rows: table.weight[rows]), table(ids))


def test_gradients_of_few_outputs_come_from_their_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9000))
    x = torch.randn(5, 8, requires_grad=True)
    chosen = torch.tensor([3, 8999, 3, 17, 0])
    with products_of_rows(model):
        y = model(x)
        (one,) = torch.autograd.grad(y.gather(1, chosen[:, None]).sum(), x, retain_graph=True)
        (all_of,) = torch.autograd.grad(torch.logsumexp(y, 1).sum(), x)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(one, model[0].weight[chosen])
    weight = model[0].weight.double()
    p = torch.softmax(x.double() @ weight.T + model[0].bias.double(), 1)
    torch.testing.assert_close(all_of.double(), p @ weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [llama, gpt2, gemma3])
def test_pieces_are_the_whole_output(tmp_path, build, monkeypatch):
    model = open_text_model(save(build(), tmp_path))
    monkeypatch.setattr("stabilitylab.models.logit_chunks._NUMBERS", 5 * 32)
    pieces = Pieces(model)
    for window in model.windows([TEXT], 32, 64):
        whole = model.run(window)
        found = list(pieces.outputs(window))
        assert len(found) > 4
        torch.testing.assert_close(torch.cat([output for _, output in found], 1), whole, rtol=1e-4, atol=1e-5)
        loss, count = pieces.loss(window)
        assert count == model.loss(window)[1]
        assert loss == pytest.approx(model.loss(window)[0], rel=1e-5)


def test_ends_that_mix_tokens_are_run_whole(tmp_path, monkeypatch):
    model = open_text_model(save(llama(), tmp_path))
    head = model.module.lm_head
    head.register_forward_pre_hook(lambda _module, arguments: (arguments[0].cumsum(1),))
    monkeypatch.setattr("stabilitylab.models.logit_chunks._NUMBERS", 5 * 32)
    window = next(model.windows([TEXT], 32, 32))
    ((same, output),) = Pieces(model).outputs(window)
    assert same is window
    assert torch.equal(output, model.run(window))
