"""Contestants of the benchmarks, and the models on which they run."""
