"""Reads a text through a model and keeps, of every activation that passes, its channels' statistics.

The text is a stream of windows; hooks add each activation to its site's ``ChannelStatistics`` and let it go. Memory is the model's
own for one window plus about 64 bytes a channel and site, whatever the length of the text. The first window shows which layers read
the same tensor (query, key and value); it is measured once, under the first one's name.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel
from stabilitylab.outliers.channels import ChannelStatistics
from stabilitylab.outliers.criteria import GLM_SHARE, OPT_SHARE
from stabilitylab.outliers.scan_sites import Site, sites_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class WorstChannel:
    """A channel that stands out at its site.

    Attributes:
        site: where.
        channel: its number.
        largest: its largest magnitude.
        elsewhere: the same without the windows' first positions.
        times_median: ``largest`` over the median channel's.
        over_6: share of positions with |x| >= 6 there.
    """

    site: Site
    channel: int
    largest: float
    elsewhere: float
    times_median: float
    over_6: float


@dataclass(frozen=True, kw_only=True)
class OutlierScan:
    """What a scan found.

    Attributes:
        model: name of the model.
        fingerprint: of the model.
        text: where the text came from.
        tokens: how many were read.
        windows: how many they made.
        length: tokens of the longest window.
        sites: what was reached, in the model's order, and its statistics.
        shared: site -> further linear layers that read the same tensor.
        skipped: linear layers that the text never reached.
        notes: what to know of how the model was opened, such as weights that no layer holds.
    """

    model: str
    fingerprint: str
    text: str
    tokens: int
    windows: int
    length: int
    sites: tuple[tuple[Site, ChannelStatistics], ...]
    shared: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[tuple[Site, ChannelStatistics]]:
        """Inputs of linear layers: what quantized activations are made from."""
        return [(site, one) for site, one in self.sites if site.is_input]

    @property
    def residual_stream(self) -> list[tuple[Site, ChannelStatistics]]:
        """Outputs of the blocks."""
        return [(site, one) for site, one in self.sites if site.is_residual_stream]

    def roles(self) -> dict[str, list[tuple[Site, ChannelStatistics]]]:
        """Sites of one place in the block, by layer; each site outside blocks for itself."""
        found: dict[str, list[tuple[Site, ChannelStatistics]]] = {}
        for site, one in self.sites:
            found.setdefault(site.role, []).append((site, one))
        return found

    def by_depth(self, statistic: Callable[[ChannelStatistics], float]) -> dict[str, pd.Series[float]]:
        """Role -> the statistic by layer, for places that recur."""
        import pandas as pd

        found = {}
        for role, seen in self.roles().items():
            if len(seen) > 1:
                layers = [site.layer for site, _ in seen]
                found[role] = pd.Series([statistic(one) for _, one in seen], index=layers, name=role)
        return found

    def worst(self, count: int = 20) -> list[WorstChannel]:
        """The channels of linear inputs that stand out most, by multiples of their site's median channel."""
        found = []
        for site, one in self.inputs:
            times_C = np.nan_to_num(one.times_median, nan=0.0, posinf=np.inf)
            for channel in np.argsort(times_C)[::-1][:count]:
                found.append(
                    WorstChannel(
                        site=site,
                        channel=int(channel),
                        largest=float(one.largest[channel]),
                        elsewhere=float(one.elsewhere_C[channel]),
                        times_median=float(times_C[channel]),
                        over_6=float(one.over_6_C[channel] / one.positions),
                    )
                )
        return sorted(found, key=lambda channel: -channel.times_median)[:count]

    def thresholds(self) -> dict[str, tuple[float, float]]:
        """The magnitude, and the multiple of the median channel, that 30 % and 0.1 % of the linear inputs' dimensions reach."""
        largest = np.concatenate([one.largest for _, one in self.inputs])
        times = np.nan_to_num(
            np.concatenate([one.times_median for _, one in self.inputs]), nan=0.0, posinf=np.inf
        )
        return {
            name: (_reached_by(every, GLM_SHARE), _reached_by(every, OPT_SHARE))
            for name, every in (("magnitude", largest), ("times_median", times))
        }

    @property
    def nbytes(self) -> int:
        """Memory of all statistics."""
        return sum(one.nbytes for _, one in self.sites)


def _reached_by(values: NDArray[np.float64], share: float) -> float:
    """The largest value that at least this share of the values reaches."""
    return float(np.sort(values)[-math.ceil(share * len(values))])


def scan_outliers(
    model: TextModel,
    text: Iterable[str] | Path,
    *,
    length: int | None = None,
    tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> OutlierScan:
    """Read a text through a model and measure its activations.

    Args:
        text: a UTF-8 file, or strings.
        length: tokens a window.
        tokens: read at most this many.
        progress: called after every window with the number of tokens read so far.

    Raises:
        InputError: the text gives no tokens, or an activation is not finite.
    """
    read = count = longest = 0
    with ChannelWatch(model.module) as watch:
        for window in model.windows(text, length, tokens):
            model.run(window)
            watch.next_window()
            read, count, longest = read + window.tokens, count + 1, max(longest, window.tokens)
            if progress is not None:
                progress(read)
    return OutlierScan(
        model=model.name,
        fingerprint=model.fingerprint,
        text=str(text) if isinstance(text, Path) else "text given in memory",
        tokens=read,
        windows=count,
        length=longest,
        sites=tuple(watch.seen()),
        shared={site: tuple(others) for site, others in watch.shared.items()},
        skipped=tuple(watch.skipped()),
        notes=model.notes,
    )


class ChannelWatch:
    """Hooks on every site of a model, for as long as the context lasts."""

    def __init__(self, module: nn.Module) -> None:
        self._sites = sites_of(module)
        self._statistics: dict[str, ChannelStatistics] = {}
        self._handles: list[RemovableHandle] = []
        self._first = True
        # The linear inputs of the first window by the tensor's id: a layer that reads the same one is not measured again.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._alias: set[str] = set()
        self.shared: dict[str, list[str]] = {}

    def __enter__(self) -> ChannelWatch:
        for site, module in self._sites:
            if site.is_input:
                self._handles.append(
                    module.register_forward_pre_hook(self._on_input(site.path), with_kwargs=True)
                )
            else:
                self._handles.append(module.register_forward_hook(self._on_output(site.path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._known.clear()

    def next_window(self) -> None:
        """Ends a window: after the first it is known which layers share a tensor."""
        self._first = False
        self._known.clear()

    def seen(self) -> Iterator[tuple[Site, ChannelStatistics]]:
        """The sites that were reached."""
        for site, _ in self._sites:
            if site.path in self._statistics:
                yield site, self._statistics[site.path]

    def skipped(self) -> Iterator[str]:
        """Linear layers that the text never reached."""
        for site, _ in self._sites:
            if site.path not in self._statistics and site.path not in self._alias:
                yield site.path.removesuffix(":input")

    def _on_input(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and path not in self._alias and not self._same(path, x):
                self._add(path, x)

        return hook

    def _on_output(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(x, Tensor):
                self._add(path, x)

        return hook

    def _same(self, path: str, x: Tensor) -> bool:
        """In the first window: whether another layer has already read this very tensor."""
        if not self._first:
            return False
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version and known[2] != path:
            self._alias.add(path)
            self.shared.setdefault(known[2], []).append(path.removesuffix(":input"))
            return True
        self._known[id(x)] = (weakref.ref(x), x._version, path)
        return False

    def _add(self, path: str, x: Tensor) -> None:
        if path not in self._statistics:
            self._statistics[path] = ChannelStatistics(x.shape[-1])
        if not self._statistics[path].add(x):
            raise InputError(
                f"{path} holds NaN or infinite activations: open the model in float32, or repair its weights"
            )
