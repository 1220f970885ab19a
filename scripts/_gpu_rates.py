"""The operations and bytes per second of a GPU, from its clocks."""

from __future__ import annotations

import math

# Compute capabilities whose multiprocessors have 64 lanes for float32; the others of today, 128.
LANES_64 = ("60", "70", "72", "75", "80")


def card_rates() -> tuple[float, float]:
    """Return operations in float32, and bytes to or from memory, that this GPU does a second."""
    import cupy

    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime

    def attribute(name: str) -> int:
        """Return an attribute; since CUDA 13, some are no longer among the device's properties."""
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), device.id))

    # A multiplication and an addition a cycle in each; kHz; two edges a cycle, and bits.
    lanes = attribute("MultiProcessorCount") * (
        64 if device.compute_capability in LANES_64 else 128
    )
    operations = lanes * 2 * attribute("ClockRate") * 1e3
    bandwidth = 2 * attribute("MemoryClockRate") * 1e3 * attribute("GlobalMemoryBusWidth") / 8
    # A card that shares the computer's memory may name no clock: then that sets no limit here.
    return operations, bandwidth or math.inf
