"""npbn: batch normalization, and the network around it, with gradients derived by hand.

Where to start: `npbn.functional` is the mathematics, `npbn.layers` the state around it,
`npbn.models` the networks, `npbn.training` the loop.
"""

__version__ = "0.1.0"
