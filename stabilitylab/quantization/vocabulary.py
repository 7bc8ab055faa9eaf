"""Embeddings: one matrix [V, C] for looking rows up, and for the output too where it is tied.

    lookup      rows of the quantized matrix, dequantized; whatever else the embedding does (scales, say) stays
    output      the same codes and scales as a linear layer of V outputs

One decision covers all uses, and its harm is measured with all of them in place. A lookup has no inputs to round for, no
activations, no channels whose range could be moved. A tied output has inputs, and what GPTQ adds to the rows' own error matters
less than what it takes off the logits' (SmolLM2-135M: experiments/RESULTS.md). So a plan's schemes mean for a matrix

    ...-gptq, -gptqo        where an output is tied to it, rounded for the output's inputs; else the scheme that they round to
    ...-awq, -had           the scheme that they round to, unrotated
    mixed, smoothquant      w8a8-token
    of other packages       nothing: the matrix stays as it is

A plan takes a matrix only where embeddings and linear layers alone hold it, and only where the model runs without their weights
being there: one that multiplies with ``embedding.weight`` itself would keep using the numbers that the plan counts as gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.formats import dequantize
from stabilitylab.model_structure import token_embeddings
from stabilitylab.models.half_storage import is_held, look_up, multiplies
from stabilitylab.quantization.calibrated import CalibratedScheme, needs_moments
from stabilitylab.quantization.format_scheme import FormatLinear, FormatScheme
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.replacement import replaced
from stabilitylab.quantization.rounded_weights import RoundedScheme
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.schemes import LinearScheme, RotatedScheme, nearest
from stabilitylab.quantization.weight_on_paper import WeightOnPaper


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a quantized matrix.

    Args:
        table: the embedding that it replaces; its weight is not kept.
        matrix: the rows, as a quantized layer that is never called.
    """

    def __init__(self, table: nn.Embedding, matrix: QuantizedLinear | FormatLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.matrix = matrix
        self.dtype = torch.float32 if is_held(table) else table.weight.dtype
        shell = object.__new__(type(table))
        shell.__dict__.update(table.__dict__)
        shell.__dict__["_parameters"] = {"weight": None}
        # No submodule: it has nothing to move or save beyond what the matrix has.
        object.__setattr__(self, "_table", shell)
        self.eval()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        return self.matrix.nbytes

    @property
    def weight(self) -> WeightOnPaper:
        """For models that ask for its format."""
        shape = torch.Size((self.num_embeddings, self.embedding_dim))
        return WeightOnPaper(dtype=self.dtype, device=self.matrix.weight.device, shape=shape)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows, as the embedding gives them.

        Args:
            ids: numbers of rows.
        """
        table: Any = self._table
        return look_up(table, ids, lambda rows: rows_of(self.matrix, rows).to(self.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.matrix.scheme.name}"


def rows_of(matrix: QuantizedLinear | FormatLinear, rows: Tensor) -> Tensor:
    """Rows of a quantized layer's weight, [n, K] float32.

    Args:
        matrix: without factors of its columns.
        rows: their numbers, [n].
    """
    if isinstance(matrix, QuantizedLinear):
        some: Any = rows
        return matrix.stored.dequantize(torch.float32, some)
    return dequantize(matrix.rows(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingMatrix:
    """A matrix in which embeddings look rows up.

    Attributes:
        path: of the first embedding that holds it; plans call it by that.
        embeddings: path -> module.
        outputs: path -> linear layer that multiplies with it.
    """

    path: str
    embeddings: dict[str, nn.Embedding]
    outputs: dict[str, nn.Linear]

    @property
    def weight(self) -> Tensor:
        """[V, C]."""
        return self.embeddings[self.path].weight

    def scheme(self, scheme: LinearScheme) -> LinearScheme | None:
        """What a scheme means for this matrix; None leaves it as it is. See the head of the module."""
        if isinstance(scheme, RoundedScheme):
            return scheme
        if isinstance(scheme, CalibratedScheme) and scheme.method != "awq" and self.outputs:
            inner: Any = self.scheme(scheme.inner)
            return replace(scheme, inner=inner)
        found = nearest(scheme)
        if isinstance(found, RotatedScheme):
            found = found.inner
        if isinstance(found, Scheme):
            columns = found.threshold is not None or found.smooth is not None
            return Scheme(activations="token") if columns else found
        if not isinstance(found, FormatScheme):
            return None
        return found if self.outputs else replace(found, activations=None)

    def twins(self, scheme: LinearScheme) -> dict[str, nn.Module]:
        """Path -> the quantized layer to put there; ``scheme`` is one that ``scheme()`` returned."""
        return self.places(self.made(scheme))

    def made(self, scheme: LinearScheme, moments: Moments | None = None) -> Any:
        """The quantized matrix, as a linear layer; ``moments`` of the output's inputs, for schemes that round for them."""
        if needs_moments(scheme):
            calibrated: Any = scheme
            return calibrated.layer(self.weight, name=self.path, moments=moments)
        return scheme.layer(self.weight, name=self.path)

    def places(self, made: QuantizedLinear | FormatLinear) -> dict[str, nn.Module]:
        """As ``twins``, from the quantized matrix."""
        found: dict[str, nn.Module] = {
            path: QuantizedEmbedding(table, made) for path, table in self.embeddings.items()
        }
        return found | {path: _beside(made, layer.bias) for path, layer in self.outputs.items()}


def _beside(made: QuantizedLinear | FormatLinear, bias: Tensor | None) -> nn.Module:
    """Another layer of the same numbers."""
    if isinstance(made, QuantizedLinear):
        return QuantizedLinear(made.stored, made.scheme, bias=bias)
    return made.beside(bias)


def embedding_matrices(module: nn.Module) -> dict[str, EmbeddingMatrix]:
    """The matrices of a model's token embeddings that can be quantized, by path."""
    paths = {id(found): path for path, found in token_embeddings(module).items()}
    owners: dict[int, dict[str, Any]] = {}
    for path, owner in module.named_modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {})[path] = owner
    found = {}
    for weight, of_it in owners.items():
        embeddings = {path: owner for path, owner in of_it.items() if id(owner) in paths and _looks_up(owner)}
        outputs = {path: owner for path, owner in of_it.items() if _multiplies(owner)}
        if embeddings and len(embeddings) + len(outputs) == len(of_it):
            path = next(iter(embeddings))
            matrix = EmbeddingMatrix(path=path, embeddings=embeddings, outputs=outputs)
            if id(matrix.weight) == weight and _runs_without(module, matrix):
                found[path] = matrix
    return found


def _looks_up(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Embedding) and owner.max_norm is None


def _multiplies(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Linear) and multiplies(owner)


class _Weightless(nn.Module):
    """Calls a module of the model; of its attributes it has only what its weight looks like."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", inner)
        like: Any = inner.weight
        dtype = torch.float32 if is_held(inner) else like.dtype
        self.weight = WeightOnPaper(dtype=dtype, device=like.device, shape=like.shape)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        inner: Any = self._inner
        return inner(*arguments, **named)


def _runs_without(module: nn.Module, matrix: EmbeddingMatrix) -> bool:
    """Whether a model runs on a few tokens with nothing to read a weight from where the matrix was."""
    ids = (torch.arange(4, device=matrix.weight.device) % len(matrix.weight))[None]
    places = {**matrix.embeddings, **matrix.outputs}
    try:
        with torch.no_grad(), replaced(module, {path: _Weightless(one) for path, one in places.items()}):
            module(input_ids=ids)
    except (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return False
    return True
