"""Implementations of the op: `triton` (GPUs), `native` (CPUs, C++), `eager` (plain torch). None imports another.

"hopper" is `triton` with the kernels for Hopper where these take the call.

`choose` picks one for a call. Each has `limits(scores, v, reduction)`, the reasons it can't take a call, and functions
named as the operators in `attnx.ops.operators`.
"""

import warnings
from typing import Literal

from torch import Tensor

from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores

BACKENDS = ("auto", "triton", "hopper", "native", "eager")
Backend = Literal["triton", "hopper", "native", "eager"]

_REPORTED: set[str] = set()  # backends already reported as missing


def choose(backend: str, scores: Scores, v: Tensor | None, reduction: Reduction | None) -> Backend:
    """The backend that takes the call. "auto": the device's own, or eager where that can't take it.

    On a GPU, auto takes eager for head dims above 256: our kernels were not timed with them.

    Args:
        backend: one of BACKENDS.
        scores, v: the call's inputs; v is None where no output and no gradient is computed.
        reduction: how the heads are reduced; None where no map is made.

    Raises:
        NotImplementedError: the named backend can't take the call; lists every reason.

    Warns:
        UserWarning: once, if the device's own backend lacks something it needs, such as a compiler.
    """
    name = backend
    if backend == "auto" and scores.softcap:
        return "eager"  # no other backend has it
    if backend == "auto":
        kind = scores.q.device.type
        name = "native" if kind == "cpu" else "triton" if kind == "cuda" else "eager"
    reasons: list[str] = []
    try:
        match name:
            case "triton" | "hopper":
                from attnx.ops.backends import hopper, triton

                device = scores.q.device
                reasons = triton.limits(scores, v, reduction)
                if name == "hopper" and hopper.missing(device):
                    reasons.append(hopper.missing(device))
                if not reasons and (backend != "auto" or not triton.in_chunks(scores, v)):
                    return "hopper" if name == "hopper" or (backend == "auto" and hopper.is_on(device)) else "triton"
            case "native":
                from attnx.ops.backends import native

                reasons = native.limits(scores, v, reduction)
                if not reasons:
                    return "native"
            case "eager":
                return "eager"
            case _:
                raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {name!r}")
    except ImportError as error:
        reasons = [str(error)]
        if backend == "auto" and name not in _REPORTED:
            _REPORTED.add(name)
            warnings.warn(
                f"attnx: plain torch answers in place of the {name} backend, more slowly: {error}", stacklevel=3
            )
    if reasons and backend != "auto":
        raise NotImplementedError(f"backend={backend!r} can't take these inputs: {'; '.join(reasons)}")
    return "eager"
