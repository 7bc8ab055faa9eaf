"""Other monitors on the benchmark's model, each through its public interface, each writing into its own folder.

They match ours as far as each tool can: statistics of every parameter's gradient, and also of the activations of every linear and
norm layer. The tools record different things (``RECORDS``); none records all of ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = {
    "trainscope": "trainscope",
    "msprobe": "msprobe",
    "wandb": "wandb",
    "nvdlfw-inspect": "nvdlfw_inspect",
}
RECORDS = {
    "trainscope": "per parameter gradient and weight norm, mean, std, absmax; activations mean, std, kurtosis; CUSUM",
    "msprobe gradients": "per parameter gradient norm, min, max, mean, before and after clipping; CSV",
    "msprobe modules": "the same, and norm, min, max, mean of inputs and outputs, forward and backward, of every module",
    "wandb": "64-bin histograms of every parameter and gradient, or of every gradient alone; offline file",
    "nvdlfw-inspect": "min, max, mean, std, l1, l2 of every gradient, or of activations too, through hooks of ours",
}


class Peer:
    """A tool attached to a model. Methods do nothing unless a tool needs them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, folder: Path) -> None:
        self.model, self.optimizer, self.every, self.folder = model, optimizer, every, folder

    def after_backward(self, step: int, loss: torch.Tensor) -> None:
        """Gradients are there, the optimizer has not stepped."""

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        """The optimizer has stepped."""

    def settle(self) -> None:
        """Wait until the tool's threads are done."""

    def close(self) -> None:
        """The run is over."""


class TrainScopePeer(Peer):
    """trainscope 1.8.1; ``minimal`` is its profile for least overhead."""

    def __init__(self, *args: Any, minimal: bool = False) -> None:
        super().__init__(*args)
        from trainscope import TrainScope, TrainScopeConfig
        from trainscope.core.profiles import get_profile

        options = get_profile("minimal") if minimal else {"activation_metrics_every_n_steps": self.every}
        config = TrainScopeConfig(run_dir=str(self.folder), trace_every_n_steps=self.every, **options)
        self.scope = TrainScope(self.model, self.optimizer, config).attach()

    def after_backward(self, step: int, loss: torch.Tensor) -> None:
        self.scope.step(loss.item())

    def close(self) -> None:
        self.scope.detach()


class MsprobePeer(Peer):
    """mindstudio-probe 26.2.0's TrainerMon."""

    def __init__(self, *args: Any, modules: bool = False) -> None:
        super().__init__(*args)
        os.environ["MONITOR_OUTPUT_DIR"] = str(self.folder)
        from msprobe.pytorch import TrainerMon

        config = {
            "targets": {"": {}} if not modules else {},
            "ops": ["norm", "min", "max", "mean"],
            "format": "csv",
            "step_interval": self.every,
            "wg_distribution": True,
            "xy_distribution": modules,
            "all_xy": modules,
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(config))
        self.monitor = TrainerMon(str(path), params_have_main_grad=False)
        self.monitor.set_monitor(self.model, self.optimizer, grad_acc_steps=1)


class WandbPeer(Peer):
    """wandb.watch, offline; ``log`` is its argument."""

    def __init__(self, *args: Any, log: str = "all") -> None:
        super().__init__(*args)
        import wandb

        self.run = wandb.init(mode="offline", dir=str(self.folder), settings=wandb.Settings(silent=True))
        self.run.watch(self.model, log=log, log_freq=self.every)

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        self.run.log({"loss": loss.item()})

    def close(self) -> None:
        self.run.unwatch(self.model)
        self.run.finish()


class InspectPeer(Peer):
    """nvdlfw-inspect 0.2.2's log_tensor_stats, called from hooks of ours on gradients and, with ``modules``, activations."""

    def __init__(self, *args: Any, modules: bool = False) -> None:
        super().__init__(*args)
        import nvdlfw_inspect.api as inspect

        (self.folder / "config.yaml").write_text(
            "watch:\n  enabled: True\n  layers:\n    layer_name_regex_pattern: .*\n  LogTensorStats:\n"
            "    enabled: True\n    tensors: [gradient, activation]\n"
            f"    stats: [min, max, mean, std, l1_norm, l2_norm]\n    freq: {self.every}\n"
        )
        self.inspect = inspect
        if inspect.DEBUG_MANAGER is None:
            inspect.initialize(
                str(self.folder / "config.yaml"), log_dir=str(self.folder), default_logging_enabled=True
            )
        self.handles = []
        if modules:
            for name, module in self.model.named_modules():
                if isinstance(module, (nn.Linear, nn.LayerNorm)):
                    self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._log(name, "activation", output)

        return hook

    def _log(self, name: str, tensor_name: str, tensor: torch.Tensor) -> None:
        self.inspect.log_tensor_stats(
            name, tensor_name=tensor_name, tensor=tensor.detach(), skip_reduction=True
        )

    def after_backward(self, step: int, loss: torch.Tensor) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self._log(name, "gradient", parameter.grad)

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        self.inspect.step()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.inspect.end_debug()


@contextlib.contextmanager
def quiet() -> Any:
    """Silence the tools' messages."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def peers(modules: bool) -> dict[str, Callable[..., Peer]]:
    """The tools by name, for gradients alone or with modules."""
    return {
        "trainscope": lambda *a: TrainScopePeer(*a, minimal=not modules),
        "msprobe": lambda *a: MsprobePeer(*a, modules=modules),
        "wandb": lambda *a: WandbPeer(*a, log="all" if modules else "gradients"),
        "nvdlfw-inspect": lambda *a: InspectPeer(*a, modules=modules),
    }
