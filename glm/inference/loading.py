"""A trained model from disk, ready for use: weights, tokenizer, and the configuration that says what it was trained to do.

``open_model`` opens three kinds of folder:

    a run            config.json, tokenizer.model, checkpoints/     its newest whole checkpoint
    a checkpoint     RUN/checkpoints/step-00000100                  with the run's config.json and tokenizer.model
    an export        config.json, tokenizer.model, model.safetensors

It executes nothing in them: weights are safetensors, and it refuses a pickled file. It also refuses weights that are not finite,
since their results are worthless.

Limits: a run made before runs kept their tokenizer opens with that of its data folder, as long as that folder is in its place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from glm.data.tokenizer import Tokenizer
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.model.transformer import Transformer
from glm.precision.policy import DTYPES, Precision, cast_parameters
from glm.train import checkpoint as checkpoints
from glm.train.config import TrainConfig, from_json
from stabilitylab.runs.folder import RunFolder

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
_PICKLED_NAMES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# How a zip archive (torch.save) and a bare pickle begin.
_PICKLED_BYTES = (b"PK\x03\x04", b"\x80")

_log = logging.getLogger("glm")


class OpenedModel(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the configuration it was trained with."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig


class Files(NamedTuple):
    """Where the parts of a model lie."""

    config: Path
    weights: Path
    tokenizer: Path


class Prepared(NamedTuple):
    """Configuration and tokenizer of a model, and where its weights lie."""

    config: TrainConfig
    tokenizer: Tokenizer
    weights: Path


def open_model(
    path: str | Path, *, precision: Precision | None = None, device: torch.device | str = "cpu"
) -> OpenedModel:
    """Open a run, a checkpoint or an export.

    Args:
        path: the folder.
        precision: format of the weights and of computing with them; None: as stored.
        device: where the model goes.

    Raises:
        InputError: there is no model, or it is pickled, incomplete, damaged, not finite, or has another vocabulary.
    """
    config, tokenizer, weights = prepare(Path(path))
    model = build(config.model, read_weights(weights), source=weights)
    if precision is not None:
        cast_parameters(model, DTYPES[precision])
    return OpenedModel(model.to(device), tokenizer, config)


def prepare(path: Path) -> Prepared:
    """Read what a model needs before its weights. Raises InputError as ``open_model``."""
    files = find_files(path)
    config = from_json(files.config.read_text(encoding="utf-8"), source=files.config)
    tokenizer = Tokenizer(files.tokenizer)
    _check_vocabulary(config.model, tokenizer, files)
    _refuse_pickled(files.weights)
    return Prepared(config, tokenizer, files.weights)


def find_files(path: Path) -> Files:
    """The parts of the model in a folder. Raises InputError if there is none."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a run folder, a checkpoint in it, or an export")
    if not path.is_dir():
        _refuse_pickled(path)
        raise InputError(f"{path} is a file: give a run folder, a checkpoint in it, or an export")
    if (path / "manifest.json").is_file():
        checkpoints.verify(path)
        return _of_run(path.resolve().parent.parent, path / WEIGHTS)
    if (path / WEIGHTS).is_file():
        return _of_export(path)
    if (path / "checkpoints").is_dir() or (path / CONFIG).is_file():
        return _of_run(path, _newest_checkpoint(path) / WEIGHTS)
    for file in sorted(path.iterdir()):
        _refuse_pickled(file)
    raise InputError(
        f"{path} holds no model (neither checkpoints/ nor {WEIGHTS}): give a run that has saved a checkpoint, or an export"
    )


def trained_on(path: Path) -> str | None:
    """The training data of the model in a folder, as ``Loader.fingerprint`` names them; None where it does not say."""
    weights = find_files(path).weights
    state = weights.with_name("state.json")
    if state.is_file():
        found = json.loads(state.read_text()).get("data")
    else:
        with safe_open(weights, framework="pt") as file:
            found = (file.metadata() or {}).get("data")
    return str(found) if found else None


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError where it is damaged, pickled, or not finite."""
    _refuse_pickled(file)
    tensors: dict[str, Tensor] = {}
    try:
        for part in parts_of(file):
            tensors |= load_file(part)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}): export the model again") from None
    for name, tensor in tensors.items():
        refuse_not_finite(name, tensor, file)
    return tensors


def parts_of(file: Path) -> list[Path]:
    """The files of a model's weights. A checkpoint of several processes has several, each with some of the tensors."""
    return [file] if file.is_file() else sorted(file.parent.glob(f"{file.stem}-*{file.suffix}")) or [file]


def refuse_not_finite(name: str, tensor: Tensor, file: Path) -> None:
    """Raises InputError where a weight is NaN or infinite."""
    # The extremes show it without a copy of the tensor: a NaN makes both NaN.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise InputError(
            f"{file}: {bad:,} of {tensor.numel():,} weights of {name} are not finite: "
            "take a checkpoint from before the run broke"
        )


def build(config: ModelConfig, tensors: Mapping[str, Tensor], *, source: Path) -> Transformer:
    """The model with these weights, in their format and in evaluation mode. Raises InputError where they do not fit."""
    with torch.device("meta"):
        model = Transformer(config)
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, {missing[0]} the first: it is cut short or of another model"
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{source} holds {extra[0]}, which the model of its {CONFIG} has not")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{source}: {name} is {list(tensor.shape)}, but {CONFIG} makes it {list(expected[name].shape)}"
            )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint; logs newer ones that are not whole."""
    found = checkpoints.list_checkpoints(run / "checkpoints")
    if not found:
        raise InputError(f"{run} has no checkpoint yet: train it to its first one (--checkpoint.every)")
    for _, path in reversed(found):
        try:
            checkpoints.verify(path)
        except InputError as error:
            _log.warning("%s; an older one is used", error)
        else:
            return path
    raise InputError(f"{run} has no undamaged checkpoint among its {len(found)}")


def _of_run(run: Path, weights: Path) -> Files:
    config = run / CONFIG
    if not config.is_file():
        raise InputError(
            f"{run} has no {CONFIG}: a checkpoint is opened where its run left it (RUN/checkpoints/step-...)"
        )
    tokenizer = run / TOKENIZER
    return Files(config, weights, tokenizer if tokenizer.is_file() else _tokenizer_of_data(run))


def _tokenizer_of_data(run: Path) -> Path:
    for event in reversed(RunFolder(run).read_events()):
        if event.kind == "run-start" and "data" in event.data:
            file = Path(event.data["data"]) / TOKENIZER
            if file.is_file():
                return file
    raise InputError(f"{run} has no {TOKENIZER}: copy that of its data folder there")


def _of_export(path: Path) -> Files:
    files = Files(path / CONFIG, path / WEIGHTS, path / TOKENIZER)
    for file in files:
        if not file.is_file():
            raise InputError(f"{path} lacks {file.name}: export the model again with glm export")
    return files


def _refuse_pickled(file: Path) -> None:
    if not file.is_file():
        return
    with file.open("rb") as stream:
        begins = stream.read(4)
    if file.suffix in _PICKLED_NAMES or begins.startswith(_PICKLED_BYTES):
        raise InputError(
            f"{file} is a pickled file, and reading one can run whatever its maker put in: "
            "give safetensors, as glm export writes them"
        )


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, files: Files) -> None:
    if model.vocabulary is None or tokenizer.vocabulary > model.vocabulary:
        raise InputError(
            f"{files.tokenizer} has {tokenizer.vocabulary:,} pieces but the model of {files.config} "
            f"{model.vocabulary or 0:,}: it is not the tokenizer that the model was trained with"
        )
