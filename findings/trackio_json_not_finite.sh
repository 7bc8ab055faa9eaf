#!/usr/bin/env bash
# A loss that is NaN or infinite, out of trackio's command line as JSON.
#
# Written down before running: "trackio get metric --json" prints JSON, so such a value is null or text.
# Seen with trackio 0.43.0, Python 3.11 (2026-11-29): it prints NaN and Infinity, which are no JSON (RFC 8259, section 6). Python's
# json reads it; parsers that hold to the standard (JavaScript, Arrow, most other languages) refuse the whole answer, exactly where
# a run has broken. The script checks this with Python's parser told to refuse such words.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet trackio==0.43.0
export TRACKIO_DIR="$work/trackio"
cat > "$work/write.py" <<'PY'
import sys

import trackio

trackio.init(project=sys.argv[1], name="run")
for step, loss in enumerate([3.0, 2.0] if sys.argv[1] == "finite" else [3.0, float("nan"), float("inf")]):
    trackio.log({"loss": loss}, step=step)
trackio.finish()
PY
cat > "$work/check.py" <<'PY'
import json
import sys
from importlib.metadata import version


def refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        print("   ", error)
        return False
    return True


seen = [is_json(open(name, encoding="utf-8").read()) for name in sys.argv[1:]]
print("trackio", version("trackio"), "finite run is JSON:", seen[0], "broken run is JSON:", seen[1])
sys.exit(0 if seen == [True, False] else 1)
PY
for project in finite broken; do
  "$work/env/bin/python" "$work/write.py" "$project" > "$work/log" 2>&1
  "$work/env/bin/trackio" get metric --project "$project" --run run --metric loss --json > "$work/$project.json" 2> "$work/log"
done
"$work/env/bin/python" "$work/check.py" "$work/finite.json" "$work/broken.json" && echo "as recorded" || { echo "changed: look again"; exit 1; }
