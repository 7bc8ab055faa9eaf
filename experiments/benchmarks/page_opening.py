"""How heavy a page is, and how soon a headless Chromium has drawn its first screen.

    python -m experiments.benchmarks page_opening RUN/report.html ...

Prints for each page its bytes, its charts, the wall time until the load event and until the first screen's charts are drawn, and
the processor time of the page's process by then, which other work on the machine does not change. Needs chromium and chromedriver,
and a clone (it drives them as the tests do).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.stabilitylab.browser import CHROMEDRIVER, CHROMIUM, browser

TIMES = 3
DRAWN = (
    "return [...document.querySelectorAll('[data-chart]')].filter(p => p.getBoundingClientRect().top < innerHeight)"
    ".every(p => p.classList.contains('drawn'))"
)


def main(pages: list[str]) -> int:
    """Open each page three times; prints medians."""
    if not (CHROMIUM and CHROMEDRIVER):
        print("needs chromium and chromedriver")
        return 2
    print(f"{'page':40} {'MB':>6} {'charts':>6} {'load s':>7} {'drawn s':>8} {'processor s':>12}")
    for name in pages:
        page = Path(name).resolve()
        load, drawn, spent, charts = [], [], [], 0
        for _ in range(TIMES):
            with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
                window.size(1280, 900)
                window.devtools("Performance.enable", {})
                began = time.monotonic()
                window.open(page.as_uri())
                load.append(time.monotonic() - began)
                window.wait(DRAWN)
                drawn.append(time.monotonic() - began)
                metrics = window.devtools("Performance.getMetrics", {})["metrics"]
                spent.append(next(one["value"] for one in metrics if one["name"] == "ProcessTime"))
                charts = window.run("return document.querySelectorAll('[data-chart]').length")
        middle = [statistics.median(one) for one in (load, drawn, spent)]
        megabytes = page.stat().st_size / 1e6
        print(
            f"{name[-40:]:40} {megabytes:6.2f} {charts:6} {middle[0]:7.2f} {middle[1]:8.2f} {middle[2]:12.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
