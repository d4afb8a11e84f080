"""Options of a run that do not determine the maps."""

from dataclasses import dataclass

from attnx.limits import WORKERS

__all__ = ["RunOptions"]

_LONGEST = 1_000_000  # seconds


@dataclass(frozen=True)
class RunOptions:
    """Options of a run. They don't change the maps, except that the batch size may change how sums are rounded.

    Args:
        batch_size: images per batch.
        workers: decoder processes, see `Decoders`.
        timeout: seconds per image for decoding.
        tries: failures of a shard before it is made in pieces.
        shard_timeout: seconds per batch of the model, see `Watch`.

    Raises:
        ValueError: an option is out of range.
    """

    batch_size: int = 16
    workers: int | None = None
    timeout: float = 120.0
    tries: int = 3
    shard_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch-size: expected at least 1, got {self.batch_size}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")
        if self.workers is not None and self.workers > WORKERS:
            raise ValueError(f"workers: expected at most {WORKERS}, got {self.workers}")
        if self.tries < 1:
            raise ValueError(f"tries: expected at least 1, got {self.tries}")
        if self.shard_timeout is not None and not 0 < self.shard_timeout <= _LONGEST:
            message = f"expected seconds above 0, at most {_LONGEST:,}; got {self.shard_timeout:g}"
            raise ValueError(f"shard-timeout: {message}")
        if not 0 < self.timeout <= _LONGEST:
            raise ValueError(f"decode-timeout: expected seconds above 0, at most {_LONGEST:,}; got {self.timeout:g}")
