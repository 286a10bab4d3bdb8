"""Published figures of the chips that a plan can use; parallel/chips.py has the peak rates."""

import dataclasses

from moe_jax.parallel.chips import peak_tflops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind, and the network that connects such devices.

    Bandwidths are in bytes per second, one way.  `link` is one link of the torus for TPUs (which
    has one per axis and direction) and all of NVLink for GPUs; `network` connects slices or hosts.
    `island` is the number of devices that `link` connects.
    """

    kind: str  # jax.Device.device_kind
    hbm: float  # bytes that a program may use
    hbm_bandwidth: float
    link: float
    network: float
    island: int
    torus: int  # axes of the torus; 0: a switch
    per_chip: int = 1  # JAX devices per chip
    source: str = ""

    @property
    def peak_flops(self) -> float:
        """The dense bfloat16 FLOPs per second."""
        peak = peak_tflops(self.kind)
        assert peak is not None, self.kind
        return peak * 1e12


_GIB = 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

# TPUs: `hbm` is the capacity in XLA's out-of-memory message.  `link` is the page's bidirectional
# bandwidth per chip, divided by two directions and the links of a chip, which the two devices of a
# tpu7x chip share.  `island` is the largest slice.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * _GIB, 819e9, 50e9, 3.125e9, 256, 2, source=_TPU + "v5e"),
    "v5p": Chip("TPU v5", 95.74 * _GIB, 2765e9, 100e9, 6.25e9, 6144, 3, source=_TPU + "v5p"),
    "v6e": Chip("TPU v6 lite", 31.25 * _GIB, 1638e9, 100e9, 12.5e9, 256, 2, source=_TPU + "v6e"),
    "tpu7x": Chip("TPU7x", 94.75 * _GIB, 3690e9, 50e9, 6.25e9, 18432, 3, 2, _TPU + "tpu7x"),
    "a100": Chip("A100", 80e9, 2039e9, 300e9, 25e9, 8, 0, source=_NVIDIA + "a100/"),
    "h100": Chip("H100", 80e9, 3350e9, 450e9, 50e9, 8, 0, source=_NVIDIA + "h100/"),
    "h200": Chip("H200", 141e9, 4800e9, 450e9, 50e9, 8, 0, source=_NVIDIA + "h200/"),
    "b200": Chip("B200", 180e9, 8000e9, 900e9, 50e9, 8, 0, source=_NVIDIA + "dgx-b200/"),
}
