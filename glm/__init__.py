"""glm: GLM-130B's model, objective and training, from data to a trained model that fills blanks.

To train from Python as ``glm train`` does from a shell, give ``Trainer`` a ``TrainConfig``, a ``LocalEngine`` and a ``Loader`` over
``open_data``; it calls a ``Callback`` at each step. ``open_model`` and ``fill`` use the trained model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names

if TYPE_CHECKING:
    from glm.data.loader import Loader as Loader
    from glm.data.shards import open_data as open_data
    from glm.errors import InputError as InputError
    from glm.inference.generation import fill as fill
    from glm.inference.loading import open_model as open_model
    from glm.model.config import ModelConfig as ModelConfig
    from glm.model.transformer import Transformer as Transformer
    from glm.train.config import TrainConfig as TrainConfig
    from glm.train.engine import LocalEngine as LocalEngine
    from glm.train.events import Callback as Callback
    from glm.train.events import StepInfo as StepInfo
    from glm.train.loop import Trainer as Trainer
    from stabilitylab import __version__ as __version__

# Name -> the module that has it, imported on first use: the command's help must not load torch.
_PUBLIC = {
    "Callback": "glm.train.events",
    "InputError": "glm.errors",
    "Loader": "glm.data.loader",
    "LocalEngine": "glm.train.engine",
    "ModelConfig": "glm.model.config",
    "StepInfo": "glm.train.events",
    "TrainConfig": "glm.train.config",
    "Trainer": "glm.train.loop",
    "Transformer": "glm.model.transformer",
    "__version__": "stabilitylab",
    "fill": "glm.inference.generation",
    "open_data": "glm.data.shards",
    "open_model": "glm.inference.loading",
}

__all__ = [
    "Callback",
    "InputError",
    "Loader",
    "LocalEngine",
    "ModelConfig",
    "StepInfo",
    "TrainConfig",
    "Trainer",
    "Transformer",
    "__version__",
    "fill",
    "open_data",
    "open_model",
]

__getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)
