"""Run the Hopper kernels, which are written in Gluon, on a CPU: Triton's interpreter doesn't know Gluon.

The groups of warps of a program run in turn, in an order that a seed decides. Loads land and products read their
operands as early or as late as the hardware allows. What no barrier orders raises a
`HazardError`, whatever the order was: a stage that is loaded while it is read, a product whose operands may not have
arrived, a result that is used before the wait, a deadlock.
"""

from attnx.testing.gluon.machine import HazardError
from attnx.testing.gluon.run import emulated, run

__all__ = ["HazardError", "emulated", "run"]
