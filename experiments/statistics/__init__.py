"""Judges two arms from a handful of runs, with a guarantee that holds while one looks.

It compares an arm's runs with a baseline's, seed by seed or as two groups, by the law that fits the numbers:

| numbers | paired by seed | two groups | module |
| --- | --- | --- | --- |
| continuous, or their logarithms | Student's t | t with pooled and with Welch's variance | ``student`` |
| infinite values, counts, coarse grids | signed ranks, signs | rank sum, order of all values | ``ranks``, ``orders`` |
| yes or no | McNemar | Fisher, two Bernoulli streams | ``proportions`` |

Each law answers in two ways. *Once*: the classical exact test and its interval, for a number of runs fixed beforehand. *At every
look*: an e-process, a non-negative process that starts at 1 and whose expectation under "no difference" stays at or below 1
whenever one stops. By Ville's inequality it passes 1 / alpha with probability alpha at most, over all looks together, so one may
add runs until it does (Ramdas, Grünwald, Vovk and Shafer, arXiv:2210.01948). The values that the e-process of a
shifted null does not reject are a confidence sequence: an interval valid after every run.

``choice`` picks the law or divides a stake among those that may come to fit (``stake``); ``decision`` looks and stops; ``multiple``
corrects for many claims; every law knows the effect that it would have detected with a power of 80 %. All functions here are pure
functions of arrays.
"""

from experiments.statistics.bootstrap import median_interval
from experiments.statistics.choice import LEAST_SEEDS, Scale
from experiments.statistics.decision import ClaimDecision, decide
from experiments.statistics.multiple import holm

__all__ = ["LEAST_SEEDS", "ClaimDecision", "Scale", "decide", "holm", "median_interval"]
