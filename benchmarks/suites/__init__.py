"""What is measured: the op, whole models, batch jobs, word maps, memory, growth with the tokens, block sizes."""
