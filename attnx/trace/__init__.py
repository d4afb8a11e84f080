"""Attention maps of a model's own forward pass.

`capture` installs an `interceptor` on the model. A `recorder` computes the output of each attention call and stores a
record of the call in a `trace`. `adapters` make blocks that compute their softmax themselves call SDPA.
"""
