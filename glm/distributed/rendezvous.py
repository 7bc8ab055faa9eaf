"""The processes of one attempt find each other in a store that still holds what earlier attempts left there.

A launcher that starts all processes again may hand them the same store (torchrun since 2.13 does), with the addresses of dead
processes in it. So each process signs in with a name never used before, and they settle on a roster:

    each    writes its name under its rank
    first   writes down all the names it finds as the roster, again whenever one changes, until every rank has
            confirmed the roster that stands; then declares it final, and leaves when all have seen that
    others  confirm a roster that has their own name; leave when one with their own name is final

Dead processes confirm nothing, and every roster holds the first rank's new name, so a final roster names living processes only. The
process group then keeps its addresses under the roster's digest.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_PAUSE = 0.02


def meet(store: Store, rank: int, world: int, *, timeout: float) -> str:
    """Agree with the other ranks on a name that no earlier attempt had.

    Raises:
        RuntimeError: they did not all come within ``timeout`` seconds.
    """
    me = uuid.uuid4().hex
    store.set(f"names/{rank}", me)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        agreed = _first(store, world) if rank == 0 else _other(store, rank, me)
        if agreed is not None:
            return agreed
        time.sleep(_PAUSE)
    raise RuntimeError(f"not all {world} came within {timeout:.0f} s")


def _first(store: Store, world: int) -> str | None:
    keys = [f"names/{rank}" for rank in range(world)]
    if not store.check(keys):
        return None
    roster = ",".join(store.get(key).decode() for key in keys)
    digest = _digest(roster)
    store.set("roster", roster)
    if world > 1 and not store.check([f"confirmed/{digest}/{rank}" for rank in range(1, world)]):
        return None
    store.set("final", roster)
    # This process may serve the store: if it ended now, the others would look for the store in vain.
    if world > 1 and not store.check([f"seen/{digest}/{rank}" for rank in range(1, world)]):
        return None
    return digest


def _other(store: Store, rank: int, me: str) -> str | None:
    for key in ("roster", "final"):
        if not store.check([key]):
            continue
        roster = store.get(key).decode()
        if me in roster.split(","):
            if key == "final":
                store.set(f"seen/{_digest(roster)}/{rank}", "")
                return _digest(roster)
            store.set(f"confirmed/{_digest(roster)}/{rank}", "")
    return None


def _digest(roster: str) -> str:
    return hashlib.sha256(roster.encode()).hexdigest()[:16]
