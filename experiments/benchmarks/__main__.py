"""Dispatch to the benchmark of that name."""

import importlib
import pkgutil
import sys

import experiments.benchmarks
from stabilitylab.errors import InputError, run_command


def main() -> int:
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(experiments.benchmarks.__path__)
        if not module.ispkg and not module.name.startswith("_")
    )
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m experiments.benchmarks NAME [--json]; names: {', '.join(names)}")
        return 0
    if words[0] not in names:
        raise InputError(f"there is no benchmark {words[0]!r}: choose one of {', '.join(names)}")
    code: int = importlib.import_module(f"experiments.benchmarks.{words[0]}").main(words[1:])
    return code


sys.exit(run_command(main))
