"""The file holds what llama.cpp would otherwise guess: gguf's own reader, which knows nothing of the writer, checks it."""

import json

import numpy as np
import pytest
import torch

from stabilitylab.models import open_text_model
from stabilitylab.quantization.gguf_export import _file_type, save_gguf
from tests.stabilitylab.quantization.folders import TEXT
from tests.stabilitylab.quantization.test_compressed_tensors import plan_of

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

# As Qwen 2.5's and Llama 3's own tokenizer.json have them.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**WORDS, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex, **others):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **others}


def write(folder, *, steps=(WORDS,), whole_words=False, kind="llama", **config):
    """A model with a tokenizer of bytes and merges: pieces <s> and </s> are special, <tool> was added and is not."""
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>", "</s>"])
    inner.add_tokens(["<tool>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    held["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)} if len(steps) > 1 else steps[0]
    held["model"]["ignore_merges"] = whole_words
    held["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(held))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "eos_token_id": [7, 8],
            **config,
        },
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = torch.randn_like(p)
    model.save_pretrained(folder)
    return open_text_model(folder)


def exported(model, tmp_path, out="out"):
    """Fields and tensors of the file."""
    save_gguf(model, plan_of(model, tmp_path, ["int8-g32"]), tmp_path / out)
    read = gguf.GGUFReader(str(tmp_path / out / "model.gguf"))
    fields = {key: field.contents() for key, field in read.fields.items()}
    return fields, {tensor.name: tensor for tensor in read.tensors}


@pytest.mark.parametrize(
    ("steps", "whole_words", "name"),
    [
        ((WORDS,), False, "gpt-2"),
        ((DIGITS, WORDS), False, "smollm"),
        ((split(QWEN), BYTES), False, "qwen2"),
        ((split(LLAMA3), BYTES), True, "llama-bpe"),
        # llama.cpp's llama-bpe looks whole words up first; a tokenizer that does not is not that one.
        ((split(LLAMA3), BYTES), False, "default"),
        ((split(QWEN, behavior="MergedWithNext"), BYTES), False, "default"),
        (({**DIGITS, "individual_digits": False}, WORDS), False, "default"),
        (({**WORDS, "add_prefix_space": True},), False, "default"),
    ],
)
def test_the_cut_into_words_is_named_where_it_is_known(tmp_path, steps, whole_words, name):
    model = write(tmp_path / "model", steps=steps, whole_words=whole_words)
    fields, _ = exported(model, tmp_path)
    assert fields["tokenizer.ggml.pre"] == name
    card = (tmp_path / "out" / "QUANTIZATION.md").read_text()
    assert ("llama.cpp takes its default" in card) == (name == "default")


def test_nothing_is_left_to_a_readers_guess(tmp_path):
    fields, tensors = exported(write(tmp_path / "model"), tmp_path)
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(pieces) == len(kinds) == tensors["token_embd.weight"].shape[1] == 320
    # Of the config's several ends, the one that the tokenizer names.
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    types = gguf.TokenType
    assert kinds[pieces.index("<s>")] == types.CONTROL
    assert kinds[pieces.index("<tool>")] == types.USER_DEFINED
    assert kinds[pieces.index("t")] == types.NORMAL
    assert kinds[-1] == types.UNUSED
    assert all(tensor.data_offset % gguf.GGUF_DEFAULT_ALIGNMENT == 0 for tensor in tensors.values())


def test_a_model_that_names_no_end_takes_the_configs_first(tmp_path):
    model = write(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told.pop("eos_token")
    file.write_text(json.dumps(told))
    assert exported(model, tmp_path)[0]["tokenizer.ggml.eos_token_id"] == 7


def test_a_file_without_a_tokenizer_says_so(llama_folder, tmp_path):
    """llama.cpp opens no file that has not the field."""
    fields, _ = exported(open_text_model(llama_folder), tmp_path)
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert "use tokenizer.json beside it" in (tmp_path / "out" / "QUANTIZATION.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_files_own_tokenizer_is_kept(tmp_path):
    model = write(tmp_path / "model", steps=(DIGITS, WORDS))
    first, _ = exported(model, tmp_path)
    again, _ = exported(open_text_model(tmp_path / "out" / "model.gguf"), tmp_path, "again")
    wanted = {key: value for key, value in first.items() if key.startswith("tokenizer.")}
    assert {key: value for key, value in again.items() if key.startswith("tokenizer.")} == wanted


@pytest.mark.filterwarnings("ignore")
def test_biases_go_along(tmp_path):
    """llama.cpp turns neighbours where transformers turns halves: row 2 i + h of a head is its row i + 4 h. transformers reads them
    where it is given the config, as the card says."""
    model = write(tmp_path / "model", attention_bias=True, mlp_bias=True)
    _, tensors = exported(model, tmp_path)
    state = model.module.state_dict()
    layer = "model.layers.0.self_attn"
    for name, part in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        halves = state[f"{layer}.{part}.bias"].view(-1, 2, 4)
        wanted = halves.transpose(1, 2).reshape(-1)
        assert np.array_equal(tensors[f"blk.0.{name}.bias"].data, wanted.numpy())
    assert np.array_equal(tensors["blk.0.attn_v.bias"].data, state[f"{layer}.v_proj.bias"].numpy())
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        gguf_file="model.gguf",
        dtype=torch.float32,
        config=transformers.AutoConfig.from_pretrained(tmp_path / "out"),
    )
    for name, tensor in opened.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(tensor, state[name]), name
    assert "config=AutoConfig.from_pretrained(FOLDER)" in (tmp_path / "out" / "QUANTIZATION.md").read_text()


def test_a_kind_that_is_written_as_another_opens_without_its_config(tmp_path):
    exported(write(tmp_path / "model", kind="mistral", sliding_window=None), tmp_path)
    card = (tmp_path / "out" / "QUANTIZATION.md").read_text()
    assert 'gguf_file="model.gguf"), or llama.cpp' in card


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        (("F16", "F16"), gguf.LlamaFileType.MOSTLY_F16),
        (("BF16", "F16"), gguf.LlamaFileType.MOSTLY_BF16),
        (("F32", "F16"), gguf.LlamaFileType.ALL_F32),
        (("Q8_0", "F16"), gguf.LlamaFileType.MOSTLY_Q8_0),
        (("Q4_0", "MXFP4"), gguf.LlamaFileType.MOSTLY_Q4_0),
        (("F16", "MXFP4"), gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
    ],
)
def test_a_file_says_its_matrices_type(kinds, number):
    written = {"a.weight": kinds[0], "b.weight": kinds[1], "a.bias": "F32", "norm.weight": "F32"}
    counts = {kind: list(written.values()).count(kind) for kind in ("Q8_0", "Q4_0", "MXFP4")}
    assert _file_type(written, counts) == number
