"""A scan, and which formats the layers bear, as JSON: all that the page shows, each channel's maximum. NaN and infinity are null.

``elsewhere`` leaves the first position of every window out.
"""

from __future__ import annotations

import math
from typing import Any

from stabilitylab.outliers import words
from stabilitylab.outliers.bearing import FORMATS, Bearing
from stabilitylab.outliers.criteria import CRITERIA, MarkedShare, reading
from stabilitylab.outliers.scan import OutlierScan


def scan_record(scan: OutlierScan) -> dict[str, Any]:
    """Plain dictionaries, lists and numbers."""
    thresholds = scan.thresholds()
    return {
        "model": scan.model,
        "fingerprint": scan.fingerprint,
        "text": scan.text,
        "tokens": scan.tokens,
        "windows": scan.windows,
        "length": scan.length,
        "criteria": [
            {
                "name": criterion.name,
                "marks": criterion.marks,
                "rule": criterion.rule,
                "source": criterion.source,
                "linear_inputs": _found(found := criterion.measure(scan.inputs)),
                "residual_stream": _found(criterion.measure(scan.residual_stream)),
                "reads_like": reading(found),
            }
            for criterion in CRITERIA
        ],
        "answer": words.answer(scan),
        "reached_by": {
            name: {"0.30": number(several[0]), "0.001": number(several[1])}
            for name, several in thresholds.items()
        },
        "worst_channels": [
            {
                "site": one.site.path,
                "layer": one.site.layer,
                "channel": one.channel,
                "absmax": number(one.largest),
                "absmax_elsewhere": number(one.elsewhere),
                "over_median": number(one.times_median),
                "positions_over_6": number(one.over_6),
            }
            for one in scan.worst()
        ],
        "sites": [
            {
                "site": site.path,
                "layer": site.layer,
                "role": site.role,
                "shared_with": list(scan.shared.get(site.path, ())),
                "channels": one.channels,
                "positions": one.positions,
                "absmax": number(one.absmax),
                "median_channel": number(one.median_channel),
                "channel_max_over_median": number(float(one.times_median.max())),
                "mean": number(one.mean),
                "kurtosis": number(one.kurtosis),
                "channel_max_over_median_elsewhere": number(float(one.elsewhere_over_median.max())),
                "channel_absmax": [number(value) for value in one.largest.tolist()],
            }
            for site, one in scan.sites
        ],
        "not_reached": list(scan.skipped),
        "notes": list(scan.notes),
    }


def bearing_record(found: Bearing) -> list[dict[str, Any]]:
    """Plain data for JSON."""
    return [
        {
            "layer": layer.path,
            "formats": {
                name: {
                    "error": number(layer.plain[name]),
                    "rotated": number(layer.rotated[name]),
                    "smoothed": number(layer.smoothed[name]),
                    "borne": layer.bears(name),
                    "cause": layer.broken[name].cause if name in layer.broken else None,
                    "detail": layer.broken[name].detail if name in layer.broken else None,
                }
                for name in FORMATS
            },
        }
        for layer in found.layers
    ]


def number(value: float) -> float | None:
    """Six digits, or None for what JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _found(found: MarkedShare) -> dict[str, float | int | None]:
    return {"share": found.share, "marked": found.marked, "total": found.total}
