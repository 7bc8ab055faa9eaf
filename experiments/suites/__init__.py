"""Questions, one file each. ``SUITES`` maps the name on the command line to the module that holds ``SUITE``."""

SUITES = {
    "quick": "experiments.suites.quick",
    "responder": "experiments.suites.responder",
}
