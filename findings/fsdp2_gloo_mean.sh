#!/usr/bin/env bash
# Two CPU processes, a model under FSDP2 (fully_shard) over gloo: is a gradient the mean over the processes?
#
# Written down before running: yes. fully_shard is documented as data parallelism with mean gradients, and over nccl it divides; the
# backend should only carry the numbers. Each gradient should be that of one process on the whole batch, ratio 1.
# Seen with torch 2.8.0, Python 3.11 (2026-11-29): ratio 2.0 with two processes, 3.0 with three: the sum. torch 2.9.1: 1.0. Nothing
# warns. Adam hides it in the update, as it does not see the scale; a gradient norm, a clip at 1 and SGD are wrong by the number of
# processes, and a run continued on another number of processes shows a step in the norm that no batch explains.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/mean.py" <<'PY'
import copy
import sys
from multiprocessing import Queue

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def one(rank: int, world: int, store: str, told: Queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    alone = nn.Linear(4, 2, bias=False)
    sharded = fully_shard(copy.deepcopy(alone), mesh=init_device_mesh("cpu", (world,)))
    rows = torch.arange(12.0 * world).reshape(3 * world, 4) / 10
    sharded(rows[3 * rank : 3 * rank + 3]).square().mean().backward()
    alone(rows).square().mean().backward()
    ratio = (sharded.weight.grad.full_tensor() / alone.weight.grad).mean()
    if rank == 0:
        told.put(round(float(ratio), 4))
    dist.destroy_process_group()


if __name__ == "__main__":
    ratios = []
    for world in (2, 3):
        told = mp.get_context("fork").SimpleQueue()
        mp.start_processes(one, args=(world, f"{sys.argv[1]}/{world}", told), nprocs=world, start_method="fork")
        ratios.append(told.get())
    print("torch", torch.__version__, "sharded gradient over that of the whole batch, 2 and 3 processes:", ratios)
    sys.exit(0 if ratios == [float(x) for x in sys.argv[2:]] else 1)
PY
for pair in "2.8.0 2 3" "2.9.1 1 1"; do
    read -r version two three <<< "$pair"
    "${PYTHON:-python3.11}" -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "torch==$version" numpy==2.3.5
    mkdir "$work/store-$version"
    "$work/$version/bin/python" "$work/mean.py" "$work/store-$version" "$two" "$three" 2> "$work/log" ||
        { tail -5 "$work/log"; echo "changed: look again"; exit 1; }
done
echo "as recorded"
