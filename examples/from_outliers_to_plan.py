"""From a model and a text to a quantization plan, in Python.

python examples/from_outliers_to_plan.py MODEL TEXT          MODEL: a HuggingFace folder, a GGUF file, a run of glm train
"""

import sys
from pathlib import Path

from stabilitylab.models import open_text_model
from stabilitylab.outliers import scan_outliers
from stabilitylab.outliers.words import answer
from stabilitylab.quantization.plan import Budget
from stabilitylab.quantization.plan_making import make_plan
from stabilitylab.quantization.schemes import scheme_of


def plan_for(folder: Path, text: Path, *, tokens: int = 256) -> None:
    """Say which activations stand out, choose schemes within half of the 16-bit bytes, and say what that costs."""
    model = open_text_model(folder)
    for sentence in answer(scan_outliers(model, text, tokens=tokens)):
        print(sentence)
    schemes = [scheme_of(name) for name in ("w8a8-token", "int8-row", "int4-g32-asym", "nvfp4")]
    plan = make_plan(
        model, text, Budget(kind="memory", value=0.5), schemes, tokens=tokens, verify_tokens=tokens
    )
    print(plan.planned.schemes, f"{plan.planned.loss:+.4f}", *plan.notes, sep="\n")


if __name__ == "__main__":
    plan_for(Path(sys.argv[1]), Path(sys.argv[2]))
