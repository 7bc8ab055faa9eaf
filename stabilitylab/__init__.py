"""stabilitylab: watch every layer of any model while it trains, know when and why it breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabilitylab.monitor import Monitor as Monitor
    from stabilitylab.schedule import Schedule as Schedule

__all__ = ["Monitor", "Schedule"]


def __getattr__(name: str) -> object:
    # Imported on first use: reading a run folder must not load torch.
    if name == "Monitor":
        from stabilitylab.monitor import Monitor

        return Monitor
    if name == "Schedule":
        from stabilitylab.schedule import Schedule

        return Schedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
