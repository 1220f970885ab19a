"""The engine: the same mathematics as the layers, planned once into fused stages, and then stepped.

`plan` turns a model into blocks: a convolution or a linear layer with what follows it. `Engine`
allocates the work arrays of each block once and runs forward, backward and prediction in them, a
part of every batch in each of several processes. What it computes is what the layers compute,
which are its specification (``tests/engine``).

    engine = Engine(model, optimizer, (1, 28, 28), workers=2)
    loss, hits = engine.step(split, indices)

``npbn/engine/README.md`` is the log of how it was made fast, and of what did not help.
"""

from npbn.engine.engine import Engine
from npbn.engine.plan import plan

__all__ = ["Engine", "plan"]
