"""Arguments of the Hopper kernels, and tensors that they load in boxes by the tensor memory accelerator (TMA)."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """Inputs of the kernels.

    q: [B, H, M, D]. k: [B, Hk, N, D]. mask: [P, N] bool (True: attend) or float (added), of item b % P; None: no mask.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float


class Box(NamedTuple):
    """An argument of a kernel: the tensor [B, H, tokens, columns], read in boxes of [1, 1, rows, columns].

    columns may exceed the tensor's. What lies outside the tensor is read as zero.
    """

    tensor: Tensor
    rows: int
    columns: int

    def type_name(self, dtype: str) -> str:
        """Triton's name of the type of its descriptor. dtype: Triton's name, such as "bf16"."""
        layout = box_layout(self.columns, self.tensor.element_size())
        return f"tensordesc<{dtype}[1,1,{self.rows},{self.columns}],{layout!r}>"

    def descriptor(self) -> Any:
        """Triton's descriptor. The descriptors of the last tensors are kept, without the tensors."""
        return self.without_tensor().descriptor(self.tensor.data_ptr())

    def without_tensor(self) -> "BoxedTensor":
        """The properties of the tensor that its descriptor depends on, besides the address."""
        t = self.tensor
        return BoxedTensor(t.dtype, tuple(t.shape), _strides(t), self.rows, self.columns)


class BoxedTensor(NamedTuple):
    """Shape and strides of a tensor that is read in boxes of [1, 1, rows, columns]."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    rows: int
    columns: int

    def descriptor(self, address: int) -> Any:
        """Triton's descriptor of such a tensor at an address."""
        return _descriptor(address, *self)


class _Address(NamedTuple):
    """Address and dtype of a tensor, which a descriptor does not keep alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def swizzle(columns: int, itemsize: int) -> int:
    """Bytes over which the rows of a box are permuted in shared memory: those of a row, at most 128."""
    return min(128, columns * itemsize)


def box_layout(columns: int, itemsize: int) -> Any:
    """Layout of a box in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle(columns, itemsize), element_bitwidth=8 * itemsize, rank=4)


@lru_cache(1024)
def _descriptor(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, columns: int
) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = box_layout(columns, dtype.itemsize)
    return TensorDescriptor(_Address(address, dtype), list(shape), list(strides), [1, 1, rows, columns], layout)


def can_be_loaded(t: Tensor) -> bool:
    """True if the TMA can load the tensor: addresses of rows are multiples of 16 bytes, strides positive."""
    size = t.element_size()
    strides = _strides(t)
    aligned = all(stride * size % 16 == 0 and 0 < stride * size < 2**40 for stride in strides[:3])
    return aligned and strides[3] == 1 and t.data_ptr() % 16 == 0 and 0 not in t.shape


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides, with an arbitrary valid one for dimensions of size 1."""
    valid = (t.numel() + 15) // 16 * 16
    head, last = t.stride()[:3], t.stride(3) if t.shape[3] > 1 else 1
    return (*(valid if size == 1 else stride for size, stride in zip(t.shape[:3], head, strict=True)), last)
