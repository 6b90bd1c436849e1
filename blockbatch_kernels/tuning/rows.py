"""What was measured to be the fastest; written by `python bench/tuning_rows.py --write`."""

from blockbatch_kernels.tuning.records import AttentionRow, DeviceKind, LinearRow, LmHeadRow

PRODUCTS: dict[DeviceKind, tuple[LinearRow, ...]] = {
    DeviceKind((9, 0), 132): (
        LinearRow(
            result="gemm.json: llada-8b/qkv",
            out_features=12288,
            in_features=4096,
            gated=False,
            choices=(
                (8, "16x64"),
                (16, "16x64"),
                (32, "128x128"),
                (64, "128x128"),
                (96, "128x128"),
                (128, "128x128"),
                (160, "192x128"),
                (192, "192x128"),
                (224, "256x192 multicast 2"),
                (252, "256x192 multicast 2"),
            ),
        ),
        LinearRow(
            result="gemm.json: llada-8b/out",
            out_features=4096,
            in_features=4096,
            gated=False,
            choices=(
                (8, "16x64"),
                (16, "16x64"),
                (32, "64x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (96, "128x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (160, "cublas"),
                (192, "192x64 split_k 2"),
                (224, "cublas"),
                (252, "256x64 multicast 2"),
            ),
        ),
        LinearRow(
            result="gemm.json: llada-8b/gate_up",
            out_features=12288,
            in_features=4096,
            gated=True,
            choices=(
                (8, "16x192"),
                (16, "16x192"),
                (32, "64x192"),
                (64, "64x192"),
                (96, "128x192"),
                (128, "128x192"),
                (160, "192x192"),
                (192, "192x192"),
                (224, "256x192"),
                (252, "256x192"),
            ),
        ),
        LinearRow(
            result="gemm.json: llada-8b/down",
            out_features=4096,
            in_features=12288,
            gated=False,
            choices=(
                (8, "16x64"),
                (16, "16x64"),
                (32, "64x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (96, "128x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (160, "192x64 split_k 2"),
                (192, "192x64 split_k 2"),
                (224, "256x64 multicast 2"),
                (252, "256x64 multicast 2"),
            ),
        ),
        LinearRow(
            result="gemm.json: dream-7b/qkv",
            out_features=4608,
            in_features=3584,
            gated=False,
            choices=(
                (8, "16x64"),
                (16, "16x64"),
                (32, "64x64"),
                (64, "64x64"),
                (96, "128x64"),
                (128, "128x64"),
                (160, "cublas"),
                (192, "cublas"),
                (224, "cublas"),
                (252, "cublas"),
            ),
        ),
        LinearRow(
            result="gemm.json: dream-7b/out",
            out_features=3584,
            in_features=3584,
            gated=False,
            choices=(
                (8, "16x64"),
                (16, "16x64"),
                (32, "64x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (96, "128x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (160, "cublas"),
                (192, "192x64 split_k 2"),
                (224, "cublas"),
                (252, "cublas"),
            ),
        ),
        LinearRow(
            result="gemm.json: dream-7b/gate_up",
            out_features=18944,
            in_features=3584,
            gated=True,
            choices=(
                (8, "16x192"),
                (16, "16x192"),
                (32, "64x192"),
                (64, "64x192"),
                (96, "128x192"),
                (128, "128x192"),
                (160, "192x192 + 192x192 split_k 2"),
                (192, "192x192 + 192x192 split_k 2"),
                (224, "256x192 + 256x192 split_k 2"),
                (252, "256x192 + 256x192 split_k 2"),
            ),
        ),
        LinearRow(
            result="gemm.json: dream-7b/down",
            out_features=3584,
            in_features=18944,
            gated=False,
            choices=(
                (8, "128x64 split_k 2"),
                (16, "128x64 split_k 2"),
                (32, "64x64 split_k 2"),
                (64, "64x64 split_k 2"),
                (96, "128x64 split_k 2"),
                (128, "128x64 split_k 2"),
                (160, "192x64 split_k 2"),
                (192, "cublas"),
                (224, "cublas"),
                (252, "cublas"),
            ),
        ),
    ),
}
LM_HEADS: dict[DeviceKind, tuple[LmHeadRow, ...]] = {
    DeviceKind((9, 0), 132): (
        LmHeadRow(
            result="gemm.json: llada-8b/lm_head",
            vocab_size=126464,
            dim=4096,
            choices=(
                (8, 16),
                (16, 16),
                (32, 64),
                (64, 64),
                (96, 128),
                (128, 128),
                (160, 0),
                (192, 0),
                (224, 0),
                (252, 0),
            ),
        ),
        LmHeadRow(
            result="gemm.json: dream-7b/lm_head",
            vocab_size=152064,
            dim=3584,
            choices=(
                (8, 16),
                (16, 16),
                (32, 64),
                (64, 64),
                (96, 128),
                (128, 128),
                (160, 0),
                (192, 0),
                (224, 0),
                (252, 0),
            ),
        ),
    ),
}
ATTENTION: dict[DeviceKind, tuple[AttentionRow, ...]] = {
    DeviceKind((9, 0), 132): (
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 1280 keys, 1024 shared",
            32,
            32,
            252,
            1280,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 1280 keys, 1280 shared",
            32,
            32,
            252,
            1280,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 1280 keys, 0 shared",
            32,
            32,
            252,
            1280,
            6,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 512 keys, 256 shared",
            32,
            32,
            252,
            512,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 512 keys, 0 shared",
            32,
            32,
            252,
            512,
            6,
            "tiles",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 4352 keys, 4096 shared",
            32,
            32,
            252,
            4352,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/4+8+16+32+64+128 queries, 4352 keys, 0 shared",
            32,
            32,
            252,
            4352,
            6,
            "units",
        ),
        AttentionRow(
            "attention.json: llada-8b/32+64+128 queries, 1280 keys, 0 shared", 32, 32, 224, 1280, 3, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/64+128 queries, 1280 keys, 0 shared", 32, 32, 192, 1280, 2, "units"
        ),
        AttentionRow("attention.json: llada-8b/8 queries, 1280 keys, 0 shared", 32, 32, 8, 1280, 1, "units"),
        AttentionRow(
            "attention.json: llada-8b/128 queries, 1280 keys, 0 shared", 32, 32, 128, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/256 queries, 1280 keys, 0 shared", 32, 32, 256, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/4+4+8+16 queries, 4096 keys, 0 shared", 32, 32, 32, 4096, 4, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/1280 queries, 1280 keys, 0 shared", 32, 32, 1280, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/2 x 1280 queries, 1280 keys, 0 shared", 32, 32, 2560, 1280, 2, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/3 x 1280 queries, 1280 keys, 0 shared", 32, 32, 3840, 1280, 3, "units"
        ),
        AttentionRow(
            "attention.json: llada-8b/6 x 1280 queries, 1280 keys, 0 shared", 32, 32, 7680, 1280, 6, "tiles"
        ),
        AttentionRow(
            "attention.json: llada-8b/4096 queries, 4096 keys, 0 shared", 32, 32, 4096, 4096, 1, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 1280 keys, 1024 shared",
            28,
            4,
            252,
            1280,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 1280 keys, 1280 shared",
            28,
            4,
            252,
            1280,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 1280 keys, 0 shared",
            28,
            4,
            252,
            1280,
            6,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 512 keys, 256 shared",
            28,
            4,
            252,
            512,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 512 keys, 0 shared",
            28,
            4,
            252,
            512,
            6,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 4352 keys, 4096 shared",
            28,
            4,
            252,
            4352,
            1,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/4+8+16+32+64+128 queries, 4352 keys, 0 shared",
            28,
            4,
            252,
            4352,
            6,
            "units",
        ),
        AttentionRow(
            "attention.json: dream-7b/32+64+128 queries, 1280 keys, 0 shared", 28, 4, 224, 1280, 3, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/64+128 queries, 1280 keys, 0 shared", 28, 4, 192, 1280, 2, "units"
        ),
        AttentionRow("attention.json: dream-7b/8 queries, 1280 keys, 0 shared", 28, 4, 8, 1280, 1, "units"),
        AttentionRow(
            "attention.json: dream-7b/128 queries, 1280 keys, 0 shared", 28, 4, 128, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/256 queries, 1280 keys, 0 shared", 28, 4, 256, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/4+4+8+16 queries, 4096 keys, 0 shared", 28, 4, 32, 4096, 4, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/1280 queries, 1280 keys, 0 shared", 28, 4, 1280, 1280, 1, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/2 x 1280 queries, 1280 keys, 0 shared", 28, 4, 2560, 1280, 2, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/3 x 1280 queries, 1280 keys, 0 shared", 28, 4, 3840, 1280, 3, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/6 x 1280 queries, 1280 keys, 0 shared", 28, 4, 7680, 1280, 6, "units"
        ),
        AttentionRow(
            "attention.json: dream-7b/4096 queries, 4096 keys, 0 shared", 28, 4, 4096, 4096, 1, "units"
        ),
    ),
}
