"""Questions, one file each. ``SUITES`` maps the name on the command line to the module that holds ``SUITE`` or ``STUDY``."""

SUITES = {
    "quick": "experiments.suites.quick",
    "collapse": "experiments.suites.collapse",
    "depth": "experiments.suites.depth",
    "embedding": "experiments.suites.embedding",
    "formats": "experiments.suites.formats",
    "positions": "experiments.suites.positions",
    "responder": "experiments.suites.responder",
    "lead": "experiments.suites.lead",
    "cause": "experiments.suites.cause",
    "policies": "experiments.suites.policies",
    "egs": "experiments.suites.egs",
    "depth-init": "experiments.suites.depth_init",
    "depth-trained": "experiments.suites.depth_trained",
    "scores": "experiments.suites.scores",
    "survival": "experiments.suites.survival",
    "embedding-norm": "experiments.suites.embedding_norm",
}
