"""The state of a model that a recorded pass depends on, so that it is not replayed after a change."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.trace.adapters.sharding import is_sharded
from attnx.trace.structure import structure_of

_PLAIN = (Tensor, nn.Parameter)


def model_state(model: nn.Module) -> tuple[Any, ...]:
    """The model's modules, their modes and forwards, and the addresses of its parameters and buffers.

    Values that were written in place do not change the state: a recorded pass reads them.

    Raises:
        ValueError: a replayed pass would leave something out: hooks, or the gathering of sharded weights.
    """
    structure = structure_of(model)
    if is_sharded(structure):
        raise ValueError("expected weights on one GPU; got a sharded model")
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        raise ValueError("expected no hooks, which a graph would not run; got global forward hooks")
    marks: list[Any] = []
    for name, module in structure.named_modules():
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"expected modules of Python; got the scripted {name or type(module).__name__}")
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            raise ValueError(f"expected no hooks, which a graph would not run; got hooks of {name or 'the model'}")
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                marks += [t.data_ptr() if type(t) in _PLAIN else id(t) for t in tensors.values()]
        marks += (own["training"], id(own.get("forward")))
    return structure, tuple(marks)
