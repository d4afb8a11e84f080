"""Attention maps of a model's own forward pass.

`capture` installs an `interceptor` on the model; a `recorder` answers each attention call and stores a record of it
in a `trace`. `adapters` make blocks that compute their softmax themselves call SDPA.
"""
