"""A criterion of one's own for what counts as an outlier, beside the published ones in every report.

python examples/own_criterion.py MODEL TEXT
"""

import sys

from stabilitylab import Criterion
from stabilitylab.cli import main
from stabilitylab.outliers import register_criterion
from stabilitylab.outliers.criteria import dimensions

register_criterion(
    Criterion(
        name="fp8-range",
        marks="dimensions",
        rule="largest magnitude beyond 448, FP8 E4M3's largest number",
        source="of our own",
        measure=dimensions(lambda channels: channels.largest > 448.0),
    )
)

if __name__ == "__main__":
    sys.exit(main(["outliers", sys.argv[1], "--text", sys.argv[2]]))
