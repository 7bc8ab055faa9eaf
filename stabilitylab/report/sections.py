"""What every report shows of runs. Runs come as label -> its runs, one a seed; every function returns one section."""

from stabilitylab.report.episodes_section import Runs, diagnosis_section, episode_section, overview
from stabilitylab.report.layers_section import (
    attention,
    embedding_site,
    gradients,
    outliers,
    ranges,
    residual_stream,
    updates,
)

__all__ = [
    "Runs",
    "attention",
    "diagnosis_section",
    "embedding_site",
    "episode_section",
    "gradients",
    "outliers",
    "overview",
    "ranges",
    "residual_stream",
    "updates",
]
