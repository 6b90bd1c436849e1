"""What was measured to be the fastest, by kind of device."""

from blockbatch_kernels.tuning.records import DeviceKind, LinearRow, LmHeadRow

PRODUCTS: dict[DeviceKind, tuple[LinearRow, ...]] = {}
LM_HEADS: dict[DeviceKind, tuple[LmHeadRow, ...]] = {}
