"""Implementations of the op: `triton` (GPUs), `native` (CPUs, C++), `eager` (plain torch). None imports another."""
