"""Implementations of the op behind `attnx.ops`. None imports another."""
