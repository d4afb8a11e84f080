"""What attnx is compared with, and the networks that whole-model benchmarks run."""
