"""The engine: the same mathematics as the layers, planned once into fused stages, and then stepped.

`plan` turns a model into blocks: a convolution or a linear layer with what follows it. `Engine`
allocates all work arrays of a block once and runs forward, backward and prediction in them, a
part of every batch on each core. What it computes is what the layers compute, which are its
specification (``tests/engine``); how it is put together is said in `npbn.engine.numpy_stages`.

    engine = Engine(model, optimizer, (1, 28, 28), workers=2)
    loss, hits = engine.step(split, indices)

It is under way: it equals the layers, and is not yet as fast as it is to be (``scripts/README.md``
has the measurement). What it does to be faster, in the order in which that was put in:

- batch-last memory, as the layers have it;
- tiles of outputs (`npbn.engine.plan.tile_of`), for products of shapes that BLAS likes;
- σ by tanh, batch norm as one factor and one summand, work arrays that are allocated once, and
  pieces of them that fit a core's cache;
- pooling that adds whole planes of the tiles; no gradient by the images;
- a part of every batch on each core, with BLAS on one thread inside.

Not put in yet: gathering the next batch while a step is under way, waiting for one another with
less delay, fewer passes in the backward pass of batch norm.
"""

from npbn.engine.engine import Engine
from npbn.engine.plan import plan

__all__ = ["Engine", "plan"]
