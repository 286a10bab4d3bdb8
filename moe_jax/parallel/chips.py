"""Published peak bfloat16 FLOP rates of accelerators."""

# Dense bfloat16 TFLOP/s of one JAX device, from the vendors' datasheets.  The first key that is
# contained in `device.device_kind` wins, so longer names come first.
PEAK_BF16_TFLOPS = {
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU v5p": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "TPU7x": 1153.5,  # a chip is two JAX devices
    "H200": 989.5,
    "H100": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def peak_tflops(device_kind: str) -> float | None:
    """The peak dense bfloat16 TFLOP/s of a device; None if unknown (CPUs)."""
    for name, peak in PEAK_BF16_TFLOPS.items():
        if name.lower() in device_kind.lower():
            return peak
    return None
