"""Compute the operations and bytes per second of a GPU from its clocks."""

from __future__ import annotations

import math

# The compute capabilities whose multiprocessors have 64 lanes for float32. With the other compute
# capabilities of today, a multiprocessor has 128 lanes.
LANES_64 = ("60", "70", "72", "75", "80")


def card_rates() -> tuple[float, float]:
    """Return this GPU's operations per second in float32 and its bytes per second of memory."""
    import cupy

    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime

    def attribute(name: str) -> int:
        """Return an attribute of the device.

        Since CUDA 13, the device's properties no longer contain all of these attributes.
        """
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), device.id))

    # In each cycle, a lane does a multiplication and an addition, and a memory line transfers two
    # bits. The clock rates are in kHz, and the width of the memory bus is in bits.
    lanes = attribute("MultiProcessorCount") * (
        64 if device.compute_capability in LANES_64 else 128
    )
    operations = lanes * 2 * attribute("ClockRate") * 1e3
    bandwidth = 2 * attribute("MemoryClockRate") * 1e3 * attribute("GlobalMemoryBusWidth") / 8
    # A card that shares the computer's memory may give 0 as its memory clock. The bandwidth is
    # infinite then, so that memory sets no limit.
    return operations, bandwidth or math.inf
