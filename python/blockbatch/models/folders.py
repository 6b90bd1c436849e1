"""Folders and files that users mistake for a model folder, and what to give instead."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


def hint(folder: Path) -> str:
    """What a folder without config.json or weights seems to be, as the end of a message; else empty."""
    if next(folder.glob("*.gguf"), None):
        return "; GGUF files are not read: load the safetensors checkpoint that they were made from"
    if (folder / "snapshots").is_dir():
        return "; this is a folder of the HuggingFace cache: give the hub id, or snapshots/COMMIT in it"
    if (folder / "model_index.json").is_file():
        return "; this is a pipeline of diffusers, whose models are not read"
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; its folder {inside[0]} holds one" if inside else ""
