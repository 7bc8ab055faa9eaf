"""Outliers in activations: criteria, each named by its source, and the scan of a model over text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names

if TYPE_CHECKING:
    from stabilitylab.outliers.channels import ChannelStatistics as ChannelStatistics
    from stabilitylab.outliers.criteria import CRITERIA as CRITERIA
    from stabilitylab.outliers.criteria import Criterion as Criterion
    from stabilitylab.outliers.criteria import MarkedShare as MarkedShare
    from stabilitylab.outliers.criteria import reading as reading
    from stabilitylab.outliers.criteria import register_criterion as register_criterion
    from stabilitylab.outliers.page import outlier_page as outlier_page
    from stabilitylab.outliers.scan import OutlierScan as OutlierScan
    from stabilitylab.outliers.scan import WorstChannel as WorstChannel
    from stabilitylab.outliers.scan import scan_outliers as scan_outliers
    from stabilitylab.outliers.scan_sites import Site as Site
    from stabilitylab.outliers.telemetry_outliers import RunOutliers as RunOutliers
    from stabilitylab.outliers.telemetry_outliers import run_outliers as run_outliers
    from stabilitylab.outliers.telemetry_outliers import run_page as run_page

# Name -> the module that has it, imported on first use: what counts outliers must not load what draws them.
_PUBLIC = {
    "CRITERIA": "stabilitylab.outliers.criteria",
    "ChannelStatistics": "stabilitylab.outliers.channels",
    "Criterion": "stabilitylab.outliers.criteria",
    "MarkedShare": "stabilitylab.outliers.criteria",
    "OutlierScan": "stabilitylab.outliers.scan",
    "RunOutliers": "stabilitylab.outliers.telemetry_outliers",
    "Site": "stabilitylab.outliers.scan_sites",
    "WorstChannel": "stabilitylab.outliers.scan",
    "outlier_page": "stabilitylab.outliers.page",
    "reading": "stabilitylab.outliers.criteria",
    "register_criterion": "stabilitylab.outliers.criteria",
    "run_outliers": "stabilitylab.outliers.telemetry_outliers",
    "run_page": "stabilitylab.outliers.telemetry_outliers",
    "scan_outliers": "stabilitylab.outliers.scan",
}
__all__ = [
    "CRITERIA",
    "ChannelStatistics",
    "Criterion",
    "MarkedShare",
    "OutlierScan",
    "RunOutliers",
    "Site",
    "WorstChannel",
    "outlier_page",
    "reading",
    "register_criterion",
    "run_outliers",
    "run_page",
    "scan_outliers",
]

__getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)
