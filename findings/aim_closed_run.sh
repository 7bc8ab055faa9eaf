#!/usr/bin/env bash
# A run that has just been closed, asked for by its hash: does Aim give its metrics?
#
# Written down before running: Repo.get_run(hash) gives the run and metrics() its 50 values, since close() is the documented end of
# a run.
# Seen with aim 3.29.1, Python 3.11 (2026-11-29): get_run gives None, although list_all_runs names the run; Run(hash,
# read_only=True) opens it without a metric. After "aim storage reindex" both are there. Readers ask an index that no one writes
# until Aim's page is started or the index is made; the run's own database holds everything, and request_tree("meta", hash) reads
# it. A script that trains, closes and compares finds empty runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet aim==3.29.1
cat > "$work/write.py" <<'PY'
import sys

import aim

run = aim.Run(repo=sys.argv[1], system_tracking_interval=None, capture_terminal_logs=False)
for step in range(50):
    run.track(9 - step / 10, name="loss", step=step)
run.close()
PY
cat > "$work/read.py" <<'PY'
import logging
import sys
from importlib.metadata import version

from aim import Repo, Run

logging.disable(logging.WARNING)
repo = Repo.from_path(sys.argv[1])
(run_hash,) = repo.list_all_runs()
metrics = [metric.name for metric in Run(run_hash=run_hash, repo=repo, read_only=True).metrics()]
found = repo.get_run(run_hash) is not None
print("aim", version("aim"), "get_run:", "the run" if found else None, "metrics:", metrics)
sys.exit(0 if (found, metrics) == ((True, ["loss"]) if sys.argv[2] == "indexed" else (False, [])) else 1)
PY
mkdir "$work/repo"
"$work/env/bin/python" "$work/write.py" "$work/repo" > "$work/log" 2>&1
"$work/env/bin/python" "$work/read.py" "$work/repo" closed || { echo "changed: look again"; exit 1; }
yes | "$work/env/bin/aim" storage --repo "$work/repo" reindex > "$work/log" 2>&1 || true
"$work/env/bin/python" "$work/read.py" "$work/repo" indexed && echo "as recorded" || { echo "changed: look again"; exit 1; }
