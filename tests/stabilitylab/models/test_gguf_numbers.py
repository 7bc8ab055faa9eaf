"""Models as GGUF give the numbers of their safetensors, also where transformers ignores a field."""

import numpy as np
import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
LETTERS = [*(chr(c) for c in range(33, 127)), "ab", "cd"]
KINDS = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "gemma3_text": {
        "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip


def model_of(kind):
    fields = {"num_hidden_layers": 2, "initializer_range": 0.2, "pad_token_id": 0, **KINDS[kind]}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(LETTERS) + 3, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def write(file, model, kind, extra=()):
    """As llama.cpp's converter writes it: rows of q and k of llama rotated by neighbours, 1 added to gemma's norms."""
    config, name = model.config, {"gemma3_text": "gemma3"}.get(kind, kind)
    writer = gguf.GGUFWriter(str(file), name)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or 16
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    if name == "llama":
        writer.add_rope_dimension_count(16)
        plain = 1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight":
            continue
        data = tensor.float().numpy()
        heads = 4 if ".q_proj." in path else 2 if ".k_proj." in path else 0
        if name == "llama" and heads:
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if name == "gemma3" and path.endswith("norm.weight"):
            data = data + 1
        writer.add_tensor(names.get_name(path, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(data))
    for extra_name in extra:
        writer.add_tensor(extra_name, np.ones(32, dtype=np.float32))
    tokens = ["<pad>", "<eos>", "<bos>", *LETTERS]
    if name in ("gemma3",):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * len(tokens))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(["a b", "c d"])  # of one alone, transformers 5.17 makes a bare string
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * len(LETTERS)])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_it_computes_what_the_model_computes(tmp_path, kind):
    model = model_of(kind)
    read = open_text_model(write(tmp_path / "tiny.gguf", model, kind))
    ids = torch.randint(3, model.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            read.module(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_weight_without_a_place_is_refused(tmp_path):
    file = write(tmp_path / "odd.gguf", model_of("qwen2"), "qwen2", extra=["blk.0.attn_q_norm.weight"])
    with pytest.raises(InputError, match=r"no place for, among them blk.0.attn_q_norm.weight"):
        open_text_model(file)


def held_pages(path):
    """Kilobytes of a mapped file in this process's memory."""
    import re
    from pathlib import Path

    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        pytest.skip("this system does not tell what pages are held")
    found = re.findall(rf"{re.escape(str(path))}\n(?:[A-Z].*\n)*?Rss: +(\d+) kB", maps.read_text())
    return sum(map(int, found))


def test_pages_that_were_read_are_let_go(tmp_path):
    from stabilitylab.models.gguf_file import let_go

    file = tmp_path / "pages"
    file.write_bytes(bytes(range(256)) * 4096)
    mapped = np.memmap(file, mode="r", dtype=np.uint8)
    part = mapped[1000:900_000]
    before = int(part.astype(np.int64).sum())
    held = held_pages(file)
    assert held >= 800
    let_go(part, mapped)
    assert held_pages(file) <= held - 800
    assert int(part.astype(np.int64).sum()) == before
    let_go(np.zeros(4), mapped)  # of other memory: nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_of_words_is_dequantized_into_the_models_format(dtype):
    """What gguf makes of the whole and torch rounds, and copying it on the way copies nothing."""
    from stabilitylab.models import gguf_file

    rows = gguf_file._VOCABULARY + 100
    numbers = np.random.default_rng(0).standard_normal((rows, 32), dtype=np.float32)
    data = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)).to(dtype)
    with gguf_file.opened_once(dtype):
        found = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
        assert np.copy(found) is found
        read = torch.from_numpy(np.copy(found)).to(dtype)
    assert torch.equal(read, expected)
    assert read.dtype == dtype
    # As everywhere else outside.
    assert isinstance(gguf.dequantize(data[:4], gguf.GGMLQuantizationType.Q8_0), np.ndarray)
    assert torch.from_numpy.__module__ != gguf_file.__name__
