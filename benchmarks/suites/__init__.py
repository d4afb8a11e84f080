"""Suites: the op, whole models, batch jobs, word maps, memory, growth with the number of tokens, block sizes."""
