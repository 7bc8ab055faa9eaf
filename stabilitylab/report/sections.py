"""What every report shows of runs. Runs come as label -> its runs, one a seed; every function returns one section."""

from stabilitylab.report.episodes_section import (
    diagnoses,
    diagnosis_section,
    episode_section,
    key_message,
    overview,
)
from stabilitylab.report.layers_section import (
    attention,
    embedding_site,
    gradients,
    outliers,
    ranges,
    residual_stream,
    updates,
)
from stabilitylab.report.run_labels import Runs

__all__ = [
    "Runs",
    "attention",
    "diagnoses",
    "diagnosis_section",
    "embedding_site",
    "episode_section",
    "gradients",
    "key_message",
    "outliers",
    "overview",
    "ranges",
    "residual_stream",
    "updates",
]
