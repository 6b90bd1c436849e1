"""What was measured to be the fastest; written by `python bench/tuning_rows.py --write`."""

from blockbatch_kernels.tuning.records import AttentionRow, DeviceKind

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
