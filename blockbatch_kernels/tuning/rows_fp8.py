"""The fastest tiles of products in e4m3, by `python bench/fp8_tiles.py --write`."""

from blockbatch_kernels.tuning.records import DeviceKind, Fp8Row

PRODUCTS: dict[DeviceKind, tuple[Fp8Row, ...]] = {
    DeviceKind((9, 0), 132): (
        Fp8Row(
            result="fp8_tiles.json: llada-8b/qkv",
            out_features=12288,
            in_features=4096,
            gated=False,
            choices=(
                (32, "32x128"),
                (64, "64x128"),
                (128, "128x128"),
                (256, "256x192 multicast 2 waves"),
                (1280, "256x192 multicast 2 waves"),
            ),
        ),
        Fp8Row(
            result="fp8_tiles.json: llada-8b/out",
            out_features=4096,
            in_features=4096,
            gated=False,
            choices=(
                (32, "32x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (256, "256x64 multicast 2"),
                (1280, "320x128 multicast 2 waves"),
            ),
        ),
        Fp8Row(
            result="fp8_tiles.json: llada-8b/gate_up",
            out_features=24576,
            in_features=4096,
            gated=False,
            choices=(
                (32, "32x192"),
                (64, "64x192"),
                (128, "128x192"),
                (256, "256x192 multicast 2 waves"),
                (1280, "library"),
            ),
        ),
        Fp8Row(
            result="fp8_tiles.json: llada-8b/gate_up/gated",
            out_features=12288,
            in_features=4096,
            gated=True,
            choices=(
                (32, "apart"),
                (64, "apart"),
                (128, "apart"),
                (256, "256x192 multicast 2 waves"),
                (1280, "128x192 x_multicast 2 waves"),
            ),
        ),
        Fp8Row(
            result="fp8_tiles.json: llada-8b/down",
            out_features=4096,
            in_features=12288,
            gated=False,
            choices=(
                (32, "32x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (256, "256x64 multicast 2"),
                (1280, "160x128 x_multicast 2 waves"),
            ),
        ),
    ),
}
