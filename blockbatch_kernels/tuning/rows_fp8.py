"""The fastest tiles of products in e4m3, by `python bench/fp8_tiles.py --write`."""

from blockbatch_kernels.tuning.records import DeviceKind, Fp8Row

PRODUCTS: dict[DeviceKind, tuple[Fp8Row, ...]] = {}
