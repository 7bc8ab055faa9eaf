"""Outliers in activations: criteria, each named by its source, and the scan of a model over text."""

from stabilitylab.outliers.channels import ChannelStatistics
from stabilitylab.outliers.criteria import CRITERIA, Criterion, MarkedShare, reading, register_criterion
from stabilitylab.outliers.page import outlier_page
from stabilitylab.outliers.scan import OutlierScan, WorstChannel, scan_outliers
from stabilitylab.outliers.scan_sites import Site
from stabilitylab.outliers.training import RunOutliers, run_outliers, run_page

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
