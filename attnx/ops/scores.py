"""The scores of attention before the softmax: what every backend computes weights from."""

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """``softcap * tanh(q k^T * scale / softcap) + bias``, minus infinity where a key is masked.

    Attributes:
        q: [B, H, M, D].
        k: [B, Hk, N, D]; query head h uses key head h // (H // Hk).
        bias: [P, 1|H, 1|M, 1|N] where P divides B, float (added) or bool (True = attend); None: no bias. Item b uses
            bias[b % P].
        is_causal: row i sees the keys 0..i.
        scale: the factor of the products.
        softcap: the bound of the scores' magnitude; 0: no bound.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float
    softcap: float = 0.0

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def bias_repeats(self) -> bool:
        """True if the bias has more than one item and fewer than the batch, so that it does not broadcast."""
        return self.bias is not None and 1 < self.bias.shape[0] < self.q.shape[0]

    @property
    def is_empty(self) -> bool:
        """True if there are no queries, no keys or no features."""
        return 0 in self.q.shape or self.k.shape[2] == 0

    def at_rows(self, rows: Tensor) -> "Scores":
        """The same for the query rows `rows` [R], gathered. `is_causal` then needs `rows` for their positions."""
        bias = self.bias
        if bias is not None and bias.shape[2] > 1:
            bias = bias.index_select(2, rows)
        return self._replace(q=self.q.index_select(2, rows), bias=bias)

    def new_output(self, v: Tensor) -> Tensor:
        """Uninitialised output [B, H, M, Dv] in q's dtype, rows before heads in memory, as blocks read it."""
        B, H, M, _ = self.q.shape
        return self.q.new_empty(B, M, H, v.shape[3]).transpose(1, 2)
