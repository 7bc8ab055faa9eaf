"""A model that reads text, wherever it came from: its module, and how to feed it.

Whoever opens one (``hugging_face.py``; other packages through entry points) says how text becomes windows. Everything else is the
same for all: the output is a tensor of logits or hidden states, and the loss is the mean negative log-likelihood of the targets,
computed in float32 from the logits whatever format the model runs in.

Shapes: B rows (always 1), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitylab.errors import InputError
from stabilitylab.model_structure import linear_layers, shared_parameters, weights_outside_layers
from stabilitylab.models.fused_experts import unsplit_experts
from stabilitylab.models.text import NO_TARGET, Window, read_text
from stabilitylab.models.weight_checks import fingerprint, first_nonfinite

DEFAULT_LENGTH = 512
_ROWS_AT_ONCE = 256
_NUMBERS_AT_ONCE = 1 << 22

CutText = Callable[[Iterator[str], int, int | None], Iterator[Window]]


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """An opened model, made by ``open_text_model``; openers use ``TextModel.of``.

    Attributes:
        module: the model, in evaluation mode, its parameters without gradients.
        name: what to call it in reports.
        path: where it was opened.
        fingerprint: 16 hexadecimal digits that tell it from other models (``weight_checks.fingerprint``).
        predicts: whether it has a language-model loss; without one, the error of the output is the criterion.
        longest: the longest window it takes; None where there is no limit.
        shared: groups of parameter names that are one tensor, such as tied embeddings.
        cut: text in parts, window length, most tokens -> windows.
        notes: what a reader must know of how it was opened, one sentence each.
    """

    module: nn.Module
    name: str
    path: Path
    fingerprint: str
    predicts: bool
    longest: int | None
    shared: tuple[tuple[str, ...], ...]
    cut: CutText
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        path: Path,
        predicts: bool,
        longest: int | None,
        cut: CutText,
        name: str = "",
        notes: tuple[str, ...] = (),
    ) -> TextModel:
        """Check a module and make it ready.

        Raises:
            InputError: it has no linear layers, or a weight that is not finite.
        """
        name = name or _name(path.resolve())
        if not linear_layers(module):
            raise InputError(f"{path} has no linear layers: there is nothing to measure or quantize")
        if (broken := first_nonfinite(module)) is not None:
            raise InputError(
                f"{path}: weight {broken} holds NaN or infinite values; use an intact checkpoint"
            )
        return cls(
            module=module.eval().requires_grad_(False),
            name=name,
            path=path,
            fingerprint=fingerprint(module),
            predicts=predicts,
            longest=longest,
            shared=shared_parameters(module),
            cut=cut,
            notes=(*notes, *_outside_layers(module)),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is; ``module.to("cuda")`` takes it elsewhere."""
        return next(self.module.parameters()).device

    def windows(
        self, text: Iterable[str] | Path, length: int | None = None, limit_tokens: int | None = None
    ) -> Iterator[Window]:
        """The text in windows, as a stream, each on the device that the model is on by then.

        Args:
            text: a UTF-8 file, or strings that follow each other.
            length: tokens a window; by default 512, or fewer where the model takes fewer.
            limit_tokens: stop after this many tokens.

        Raises:
            InputError: the text gives no tokens, or the length is more than the model takes.
        """
        longest = self.longest
        if length is not None and longest is not None and length > longest:
            raise InputError(
                f"{self.name} takes at most {longest} tokens at once, got a length of {length}: give {longest} or less"
            )
        if length is None:
            length = DEFAULT_LENGTH if longest is None else min(DEFAULT_LENGTH, longest)
        count = 0
        for window in self.cut(read_text(text), length, limit_tokens):
            count += 1
            yield window.on(self.device)
        if not count:
            source = str(text) if isinstance(text, Path) else "the text"
            within = f" within {limit_tokens} tokens" if limit_tokens is not None else ""
            raise InputError(f"{source} gives {self.name} no window of tokens{within}: give a longer text")

    def run(self, window: Window) -> Tensor:
        """The module's output: logits, or hidden states where it has none. [B, T, ...]."""
        with torch.no_grad():
            output = self.module(**window.inputs)
        return output_of(output)

    def loss(self, window: Window) -> tuple[float, int]:
        """Sum of the negative log-likelihoods of the targets in nats, and how many targets there are.

        Raises:
            InputError: the model has no language-model loss.
        """
        targets_BT = window.targets_BT
        if targets_BT is None or not self.predicts:
            raise InputError(
                f"{self.name} predicts no tokens, so it has no loss: use the error of its output"
            )
        return loss_of(self.run(window), targets_BT)


def _outside_layers(module: nn.Module) -> tuple[str, ...]:
    """A note on weights that no linear layer and no embedding holds: nothing looks at them."""
    share, names = weights_outside_layers(module)
    if not names:
        return ()
    fused = unsplit_experts(module)
    told = [
        f"{len(fused)} layers of experts, among them {path} ({kind}), are fused in a layout that is not known here and stay whole"
        for path, kind in list(fused.items())[:1]
    ]
    return (
        *told,
        f"{len(names)} weights ({share:.1%} of all), among them {names[0]}, lie in no linear layer or embedding: they are "
        "neither measured nor quantized",
    )


def _name(path: Path) -> str:
    """The file's or folder's name; with its parent's where it only says that it is a model."""
    return (
        f"{path.parent.name}/{path.name}"
        if path.name in ("model", "checkpoint", "export")
        else path.name.removesuffix(".gguf")
    )


def loss_of(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[float, int]:
    """Sum of -log softmax(logits)[target] in nats, and the number of targets. Targets below 0 do not count.

    The log-softmax is float32, the sum float64, so that the sum's rounding does not grow with the text.
    """
    with torch.no_grad():
        chosen = targets_BT != NO_TARGET
        target_N = targets_BT[chosen]
        place_N2 = chosen.nonzero()
        total = 0.0
        for part in rows_at_once(target_N.numel(), logits_BTV.shape[-1]):
            logits_NV = logits_BTV[place_N2[part, 0], place_N2[part, 1]].float()
            losses_N = F.cross_entropy(logits_NV, target_N[part], reduction="none")
            total += float(losses_N.double().sum())
        return total, target_N.numel()


def rows_at_once(count: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix as wide as the vocabulary, in parts of at most some megabytes: there may be several copies of a part."""
    size = max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, columns)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def output_of(output: object) -> Tensor:
    """Logits or hidden states of whatever a module returned. Raises InputError where there are none."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(f"the model returns {type(output).__name__}, neither logits nor hidden states")
    return output
