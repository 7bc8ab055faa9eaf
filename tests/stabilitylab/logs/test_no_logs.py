"""A file that names a loss but is no training log gets a refusal in one line: a false reading is worse than a refusal."""

import json
import pickle
import zipfile

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs

NO_LOGS = {
    "traceback": "Traceback (most recent call last):\n  File 'train.py', line 55\n    loss.backward()\nRuntimeError: loss 3 of 5\n",
    "settings.yaml": "train:\n  loss: ce\n  loss_weight: 1.0\n  aux_loss: 0.01\n  z_loss: 1e-4\n  lr: 3e-4\n  steps: 1000\n",
    "settings.ini": "[train]\nlr = 0.1\nloss = mse\nloss_weight = 0.5\nsteps = 100\n",
    "settings.json": json.dumps({"loss_scale": 1.0, "aux_loss_coef": 0.01, "steps": 10}, indent=2),
    "vocabulary.json": json.dumps({"model": {"vocab": {"loss": 1, "a": 2}}}),
    "namespace": "Namespace(lr=0.0003, loss_scale=0, z_loss=0.0001, steps=1000)\nTraining starts.\n",
    "arguments": "  initial_loss_scale ........ 4294967296\n  lr .... 0.0003\n  moe_aux_loss_coeff .... 0.01\n",
    "hydra": "[main][INFO] - lr: 0.0003\n[main][INFO] - focal loss gamma: 2.0\n[main][INFO] - box_loss: 7.5\n",
    "prose.md": "We train for 300 steps; the final loss 2.31 is below the loss 2.54 of before.\nIn epoch 3 the loss was 2.9.\n",
    "source.py": "loss = 0.0\nfor step in range(100):\n    loss += model(x)\n    print(step, loss)\ntotal_loss = 0.0\n",
    "command": "+ torchrun train.py --steps 1000 --aux-loss 0.01 --z-loss 1e-4 --lr 3e-4\n",
    "ping": "64 bytes: icmp_seq=1 ttl=56 time=11.2 ms\n" * 9
    + "9 transmitted, 9 received, 0% packet loss, time 9012ms\n",
    "kernel": "[1.0] eth0: link loss 3 times\n[2.0] eth0: link loss 4 times\n[3.0] eth0: link loss 5 times\n",
    "commits": "commit 3dcea5d\n    Fix loss 2 of 3 in step 4\n",
    "evaluation": "|  Tasks  |Metric|Value |\n|---------|------|-----:|\n|hellaswag|acc   |0.5721|\n|arc_easy |acc   |0.7|\n",
    "rewards": "global_step=1, episodic_return=7.1\nSPS: 1234\n" * 9,
    "lists": "INFO:vits:Train Epoch: 1 [12%]\nINFO:vits:[2.5, 2.1, 30.1, 1.2, 3.1, 200, 0.0002]\n" * 9,
    "bill": "2 hours at a cost of 3.5 each\ntotal 7.0\n",
    "iris.csv": "sepal_length,sepal_width,species\n5.1,3.2,setosa\n4.9,3.0,setosa\n",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "model.safetensors": (60).to_bytes(8, "little")
    + b'{"loss":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   '
    + bytes(4),
    "state.pkl": pickle.dumps({"loss": [1.0, 2.0]}),
}


@pytest.mark.parametrize("name", NO_LOGS)
def test_what_is_no_log(tmp_path, name):
    path, content = tmp_path / name, NO_LOGS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refusal:
        open_logs([path])
    assert "\n" not in str(refusal.value)


class _Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_is_named_and_not_opened(tmp_path):
    path = tmp_path / "log.pkl"
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(InputError, match="pickle, which is not opened"):
        open_logs([path])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.log", "b.log"), "2 files"),
        (("archive/data.pkl", "archive/data/0"), "checkpoint of PyTorch"),
        (("loss.npy", "step.npy"), "NumPy"),
        (("[Content_Types].xml", "xl/workbook.xml"), "Excel"),
    ],
)
def test_an_archive_of_something_else_is_named(tmp_path, names, said):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "step 1 loss 2.3\n")
    with pytest.raises(InputError, match=said):
        open_logs([tmp_path / "x.zip"])
