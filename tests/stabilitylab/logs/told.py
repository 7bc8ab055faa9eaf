"""What the reader makes of a log, for the tests of formats."""

import json

from stabilitylab.logs.commands import inspect
from stabilitylab.logs.log import RowBlock
from stabilitylab.logs.recognise import open_logs
from stabilitylab.telemetry import LOSS


def many(line, count=5, **given):
    """``line`` for k = 1, 2, ...; losses fall from 9."""
    return "".join(line.format(k=k, x=9 - k / 10, **given) + "\n" for k in range(1, count + 1))


def said(capsys, *paths, **options):
    inspect(tuple(paths), json=True, **options)
    return json.loads(capsys.readouterr().out)


def losses(path, **options):
    (log,) = open_logs([path], **options)
    block = RowBlock.concatenate(list(log.blocks()))
    return log, block.steps.tolist(), block.values[LOSS][block.logged[LOSS]].tolist()
