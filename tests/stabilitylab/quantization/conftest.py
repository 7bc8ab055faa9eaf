"""Opened models and measurements that several tests look at."""

from __future__ import annotations

import pytest

from stabilitylab.models import open_text_model
from stabilitylab.quantization import Scheme
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers
from tests.stabilitylab.quantization.folders import TEXT, write_bert, write_llama

SCHEMES = ("w8a8-token", "mixed", "smoothquant", "int8-row", "int4-g32-asym")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(params=["llama", "bert"])
def model(request, llama_folder, bert_folder):
    return open_text_model(llama_folder if request.param == "llama" else bert_folder)


@pytest.fixture
def schemes():
    return [Scheme.parse(name) for name in SCHEMES]


@pytest.fixture
def windows(model):
    return list(model.windows([TEXT], 32, 64))


@pytest.fixture
def inputs(model, windows):
    return layer_inputs(model, windows, quantizable_layers(model.module))
