"""Private interfaces of torch, each in one place: what it gives, since when, and which test would notice its end.

    interface                                    gives                                        noticed by (tests of monitoring)
    torch._C._current_graph_task_id              whether a backward pass is running           test_passes.py
    torch._C.DisableTorchFunction                hooks that no tensor subclass can answer     test_lives.py
    torch._C._functorch.is_functorch_wrapped_    tensors inside vmap and grad, left alone     test_lives.py
    torch._dynamo.eval_frame.OptimizedModule,
    its _initialize                              what torch.compile returns, all of them      test_compiled.py
    torch._dynamo.utils.counters                 how many frames have been compiled           test_compiled.py
    torch._dynamo.external_utils.wrap_inline     what stands for a container's forward pass   test_compiled.py
    torch._C._dynamo.eval_frame.reset_code       a frame is traced again                      test_compiled.py
    torch._dynamo.config.recompile_limit         a graph a layer                              glm's test_presets.py
    torch.utils._python_dispatch                 TorchDispatchMode: operators as they run     probes' test_attention.py
    torch.distributed.tensor.DTensor             public; here since it is slow to import      test_ranks.py
    torch.optim.Optimizer.*.__wrapped__          an optimizer without torch's compiler        glm's test_startup.py

All of them exist from torch 2.9.1, the oldest supported, to 2.15. Two of the modules take as long to import as the rest of torch
together, so ``compat`` looks at them only where other code has imported them: what nobody imported, nobody uses.

torch's own internal operators stand where they compute numbers, each with a twin in public operations:

    operator                                     used in                                      compared in
    torch._foreach_*                             statistics, probes, glm/train/update_rules   test_updates.py, test_formulas.py
    torch._fused_adamw_                          glm/train/update_rules/fused.py              test_formulas.py
    torch._int_mm                                quantization/kernels/cuda.py                 test_cuda.py, and before use
    aten._weight_int4pack_mm,
    aten._convert_weight_to_int4pack             quantization/kernels/cuda.py                 the same
    aten._weight_int8pack_mm,
    aten._weight_int4pack_mm_for_cpu,
    aten._convert_weight_to_int4pack_for_cpu     quantization/kernels/packed.py               test_linear.py, and before use
    torch._make_per_channel_quantized_tensor     quantization/kernels/fbgemm.py               the same
    mkldnn._linear_pointwise                     glm/precision/matmul.py                      test_fp32_products.py
    torch._softmax_backward_data                 glm/precision/matmul.py                      test_matmul.py
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._safe_softmax, aten._softmax            probes/attention_calls.py                    probes' test_attention.py

So do attributes of its objects, which are plain dicts and numbers; we read them where a call would cost too much or say too little:

    attribute                                    used in                                      noticed by
    Module._parameters, _buffers, _modules       models, quantization, model_structure.py,    test_half_storage.py,
                                                 glm/inference/quantized_model.py             test_fused_experts.py,
                                                                                              test_model_structure.py
    Module._non_persistent_buffers_set           models/half_storage.py                       test_half_storage.py
    Module._apply                                quantization/linear.py, format_scheme.py     test_linear.py, test_schemes.py
    Module._compiled_call_impl                   probes/compiled.py                           test_compiled.py
    Module._forward_hooks, _forward_pre_hooks    glm/model/attention.py                       glm's test_loop.py
    Tensor._version                              probes/activations.py, outliers/scan.py,     test_odd_tensors.py,
                                                 monitoring/clipping.py,                      test_loop_values.py,
                                                 quantization/backward.py                     test_sensitivity.py
    Optimizer._optimizer_step_pre_hooks          monitoring/optimizers.py                     test_optimizers.py
    GradScaler._scale, _init_scale,
    _per_optimizer_states                        monitoring/grad_scaler.py                    test_grad_scaler.py

A test fails where any other private interface stands.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
from collections.abc import Iterable
from types import CodeType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

DisableTorchFunction = torch._C.DisableTorchFunction


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, like a forward pass of activation recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_functorch_wrapped(x: Tensor) -> bool:
    """Whether ``x`` lives inside ``torch.func``'s transformations, where nobody can read its numbers."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def compiler() -> Any:
    """``torch._dynamo`` where something has imported it; else None, and nothing can have been compiled."""
    return sys.modules.get("torch._dynamo")


def optimized_module() -> type | None:
    """The type of ``torch.compile``'s wrapper of a module; None where nothing can have been compiled."""
    found = compiler()
    return None if found is None else found.eval_frame.OptimizedModule


# torch.compile's wrappers of modules that still exist, from the first call on.
_made: WeakSet[Any] = WeakSet()
_asked = False
_making = threading.RLock()


def optimized_modules() -> list[Any]:
    """All of ``torch.compile``'s wrappers of modules that still exist.

    torch does not list them. The first call searches all objects of the process, tenths of a second in a large one; from then on it
    notes each as torch makes it.
    """
    global _asked
    kind = optimized_module()
    if kind is None:
        return []
    with _making:
        if not _asked:
            _asked = _note_what_is_made(kind)
            # By type alone: reading attributes of foreign objects may run their code.
            there = [x for x in gc.get_objects() if type(x) is kind]
            if not _asked:
                return there
            _made.update(there)
        return list(_made)


def _note_what_is_made(kind: Any) -> bool:
    """Have each wrapper noted when torch sets it up, newly or from a pickle. False where torch sets it up in another way."""
    own = getattr(kind, "_initialize", None)
    if own is None:
        return False

    @functools.wraps(own)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _making:
            _made.add(self)
        return own(self, *args, **kwargs)

    kind._initialize = initialize
    return True


def compiled_frames() -> int:
    """The number of frames compiled in this process."""
    found = compiler()
    return 0 if found is None else int(found.utils.counters["frames"]["total"])


def trace_again(codes: Iterable[CodeType | None]) -> None:
    """Have frames of these codes, and PyTorch's own containers, traced anew at their next call."""
    if compiler() is None:
        return
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.external_utils import wrap_inline

    # torch.compile calls this in place of the forward pass of nn.Sequential and its kin.
    inlined = [x for x in inspect.unwrap(wrap_inline).__code__.co_consts if isinstance(x, CodeType)]
    for code in (*codes, *inlined):
        if code is not None:
            reset_code(code)


def allow_graphs(count: int) -> None:
    """Let torch compile a function this many times: one graph per module that it belongs to."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a ``DTensor``, like FSDP2's parameters."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def plain(method: Any) -> Any:
    """A method of ``torch.optim.Optimizer`` without its decorator, which imports the compiler to keep it from tracing the method.

    That import takes as long as a small model's first steps. Where nothing compiles an optimizer, the method alone does the same.
    """
    return inspect.unwrap(method)
