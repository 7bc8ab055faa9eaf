"""``stabilitylab outliers``: the outliers of a model on a text, or of a run over its training steps."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stabilitylab.errors import InputError
from stabilitylab.outliers.scan import OutlierScan
from stabilitylab.runs.folder import RunFolder

DEFAULT_TOKENS = 20_000


def outliers(
    model: Annotated[Path, tyro.conf.Positional],
    *,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    length: int | None = None,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Find the activations of a model that stand out, by every criterion in use; or show how they grew over a run.

    Args:
        model: with --text, a HuggingFace folder, a GGUF file, or a model that an installed package opens; without it, a run
            folder, shown over its training steps from telemetry alone.
        text: UTF-8 file to run the model on.
        tokens: read at most this many tokens; 0 for the whole text.
        length: tokens of a window; by default 512, or fewer where the model takes fewer.
        json: print one JSON object instead of tables.
        html: file to write one self-contained page to.
    """
    if html is not None and not html.parent.is_dir():
        raise InputError(f"cannot write {html}: there is no folder {html.parent}")
    if tokens < 0:
        raise InputError(f"--tokens counts tokens: 0 for the whole text, or more; got {tokens}")
    if length is not None and length < 1:
        raise InputError(f"--length counts tokens: 1 or more, got {length}")
    if text is None:
        _run(model, json=json, html=html)
    else:
        _scan(model, text, tokens=tokens or None, length=length, json=json, html=html)


def _scan(
    path: Path, text: Path, *, tokens: int | None, length: int | None, json: bool, html: Path | None
) -> None:
    from stabilitylab.models import open_text_model
    from stabilitylab.outliers.bearing import FORMATS, measure_bearing
    from stabilitylab.outliers.record import bearing_record, scan_record
    from stabilitylab.outliers.scan import scan_outliers

    model = open_text_model(path, hold=True)
    with _progress() as bar:
        task = bar.add_task("tokens read", total=tokens)
        found: OutlierScan = scan_outliers(
            model,
            text,
            length=length,
            tokens=tokens,
            progress=lambda read: bar.update(task, completed=read),
        )
    bearing = measure_bearing(model, next(model.windows(text, length, tokens)))
    if html is not None:
        from stabilitylab.outliers.bearing_section import bearing_section, decision_sentence
        from stabilitylab.outliers.page import outlier_page

        decided = decision_sentence(bearing)
        outlier_page(found, decided=decided, decision=[bearing_section(bearing)]).write(html)
    if json:
        print(dumps({**scan_record(found), "formats": bearing_record(bearing)}, allow_nan=False))
        return
    from stabilitylab.outliers.terminal import show_scan

    console = Console()
    show_scan(found, console)
    for name in FORMATS:
        console.print(f"{name}: {bearing.sentence(name)}", markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        console.print(str(html), markup=False, highlight=False, soft_wrap=True)


def _run(path: Path, *, json: bool, html: Path | None) -> None:
    from stabilitylab.outliers.telemetry_outliers import run_outliers, run_page, run_record, show_run
    from stabilitylab.runs import load_run

    if not path.exists():
        raise InputError(f"{path} does not exist: give a model's folder, a GGUF file, or a run folder")
    folder = RunFolder(path)
    if not folder.telemetry.is_dir():
        raise InputError(f"{path} is not a run folder: to read a text through a model, give --text FILE")
    found = run_outliers(load_run(path))
    if html is not None:
        run_page(found).write(html)
    if json:
        print(dumps(run_record(found), allow_nan=False))
        return
    console = Console()
    show_run(found, console)
    if html is not None:
        console.print(str(html), markup=False, highlight=False, soft_wrap=True)


def _progress() -> Progress:
    """A progress bar on stderr on a terminal; nothing in a pipe."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description} {task.completed:,}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
