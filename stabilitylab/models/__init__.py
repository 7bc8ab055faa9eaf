"""Open text models from outside, and execute nothing that lies in their files."""

from stabilitylab.model_structure import Conv1D, linear_layers, linear_weight, shared_parameters
from stabilitylab.models.loading import GROUP, open_text_model
from stabilitylab.models.text import Window
from stabilitylab.models.text_model import TextModel

__all__ = [
    "GROUP",
    "Conv1D",
    "TextModel",
    "Window",
    "linear_layers",
    "linear_weight",
    "open_text_model",
    "shared_parameters",
]
