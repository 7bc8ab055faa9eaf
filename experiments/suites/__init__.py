"""Questions, one file each. ``SUITES`` maps the name on the command line to the module that holds ``SUITE``."""

SUITES = {
    "quick": "experiments.suites.quick",
    "collapse": "experiments.suites.collapse",
    "depth": "experiments.suites.depth",
    "embedding": "experiments.suites.embedding",
    "formats": "experiments.suites.formats",
    "positions": "experiments.suites.positions",
    "responder": "experiments.suites.responder",
}
