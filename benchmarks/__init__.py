"""Benchmarks of attnx against plain attention and against other ways to extract attention maps."""
