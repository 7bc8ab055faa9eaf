"""What every report shows of runs. Runs come as label -> its runs, one a seed; every function returns one section."""

from stabilitylab.report.layers import (
    attention,
    embedding_site,
    gradients,
    main_branch,
    outliers,
    ranges,
    updates,
)
from stabilitylab.report.story import Runs, diagnosis_section, episode_section, overview

__all__ = [
    "Runs",
    "attention",
    "diagnosis_section",
    "embedding_site",
    "episode_section",
    "gradients",
    "main_branch",
    "outliers",
    "overview",
    "ranges",
    "updates",
]
