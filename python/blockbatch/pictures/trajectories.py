"""Where the K/V cache of each branch goes, seen from the prompt: paths in the tangent plane of the anchor.

The *anchor* is the state after the first forward: K and V of all layers and positions, the prompt's with a
canvas full of MASK behind it. Every branch, and every decode of the same prompt, starts there. For a later
state c and the anchor c0 with the direction u = c0 / |c0|, the step c - c0 splits in

- the *axial displacement* z = <c - c0, u>, along the anchor, and
- the *tangent vector* r = c - c0 - z u, in the space tangent at the anchor to the sphere around the origin.

The picture shows r on the two axes along which the tangent vectors of all drawn states differ most
(principal axes of r about its mean; the origin stays the anchor), and beside it z over the forwards. All
lengths are shares of |c0|. This is how the published code of BlockBatch (arXiv 2605.29233, Figure 3) forms
its coordinates, applied to the sketches that `blockbatch.tracing.kv_states` makes.

A block denoise moves a branch only by the positions of its window; a refresh renews all positions, which
shows as a jump; a sync puts a branch onto its leader.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockbatch.pictures import style

# States of two decodes of one prompt start equal but for rounding, which differs between devices and dtypes.
_SAME_ANCHOR = 0.05


class Trajectory(NamedTuple):
    """The states of one branch, in order; the first is the anchor.

    Attributes:
        block_size: of the branch.
        forwards: [points] number of the forward after which the branch was in this state; init is 0.
        states: [points, size] sketches.
        refreshed: [points] whether a full forward led here: the jump of a refresh ends here.
        synced: [points] whether the branch took over its leader's state here.
    """

    block_size: int
    forwards: np.ndarray
    states: np.ndarray
    refreshed: np.ndarray
    synced: np.ndarray


class Coordinates(NamedTuple):
    """States in the tangent coordinates of an anchor, as shares of the anchor's norm.

    Attributes:
        tangent: [points, 2] on the two principal axes of the tangent vectors.
        axial: [points] along the anchor.
        shares: how much of the tangent vectors' variance lies on each of the two axes.
    """

    tangent: np.ndarray
    axial: np.ndarray
    shares: tuple[float, float]


def trajectories(trace: dict[str, Any]) -> list[Trajectory]:
    """The trajectory of every branch of a trace, as `blockbatch.load_trace` returns it.

    Raises:
        ValueError: the trace holds no K/V, or what is there makes no sense.
    """
    records, sizes = trace["trace"], trace["block_sizes"]
    if "kv" not in records[0]:
        raise ValueError(
            "expected a trace with K/V (blockbatch generate --trace FILE --trace-kv), got one without"
        )
    for index, record in enumerate(records):
        if not _is_kv(record.get("kv"), len(sizes)):
            raise ValueError(f"record {index}: kv: expected branches and their states, got something else")
    lengths = {len(entry["state"]) for record in records for entry in record["kv"]}
    held = {branch for entry in records[0]["kv"] for branch in entry["branches"]}
    if len(lengths) != 1 or len(held) != len(sizes):
        raise ValueError("record 0: kv: expected a state of every branch, and states of one size")
    return [_trajectory(records, branch, size) for branch, size in enumerate(sizes)]


def _is_kv(entries: Any, branches: int) -> bool:
    if not isinstance(entries, list):
        return False
    for entry in entries:
        if not isinstance(entry, dict):
            return False
        rows, state = entry.get("branches"), entry.get("state")
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < branches for row in rows):
            return False
        if not isinstance(state, list) or not state:
            return False
        if not all(type(value) in (int, float) and math.isfinite(value) for value in state):
            return False
    return True


def _trajectory(records: list[dict[str, Any]], branch: int, block_size: int) -> Trajectory:
    forwards, states, refreshed, synced = [], [], [], []
    for forward, record in enumerate(records):
        held = [entry["state"] for entry in record["kv"] if branch in entry["branches"]]
        if not held:
            continue
        forwards.append(forward)
        states.append(held[-1])
        refreshed.append(record["kind"] == "refresh" and branch in record["rows"])
        # At init all branches are in one state: following the leader moves nothing.
        synced.append(forward > 0 and any(sync["branch"] == branch for sync in record["syncs"]))
    return Trajectory(
        block_size, np.array(forwards), np.array(states, dtype=float), np.array(refreshed), np.array(synced)
    )


def tangent_coordinates(anchor: np.ndarray, states: np.ndarray) -> Coordinates:
    """States [points, size] in the tangent coordinates of the anchor [size] (see the top of the file).

    An axis points to where the states are on average.

    Raises:
        ValueError: the anchor is zero.
    """
    norm = float(np.linalg.norm(anchor))
    if norm == 0:
        raise ValueError("anchor: expected a state that is not zero, got one that is")
    steps = (states - anchor) / norm
    axial = steps @ (anchor / norm)
    tangent = steps - axial[:, None] * (anchor / norm)
    centred = tangent - tangent.mean(0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, len(anchor)))])[:2]
    placed = tangent @ axes.T
    signs = np.where(placed.mean(0) < 0, -1.0, 1.0)
    total = float((lengths**2).sum()) or 1.0
    first, second = (*(float(length**2) / total for length in lengths[:2]), 0.0, 0.0)[:2]
    return Coordinates(placed * signs, axial, (first, second))


def draw(traces: Sequence[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Draws traces with K/V of one prompt as a PNG.

    Every decode with several branches has a row of its own; those with a single block size share one.

    Args:
        traces: as `blockbatch.load_trace` returns them, in the order of the rows.
        path: of the PNG.

    Returns:
        the path.

    Raises:
        ValueError: no trace, one without K/V, or traces of different prompts, lengths or models.
        RuntimeError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    path = style.check_suffix(path, ".png")
    groups = _groups(traces)
    paths = [one for _, group in groups for one in group]
    anchor = _common_anchor(paths)
    everything = tangent_coordinates(anchor, np.concatenate([one.states for one in paths]))
    with style.figure(height=1.0 + 2.7 * len(groups)) as figure:
        axes = figure.subplots(
            len(groups), 2, sharex="col", sharey="col", squeeze=False, width_ratios=(1.35, 1)
        )
        first = 0
        for (name, group), (plane, along) in zip(groups, axes):
            for one in group:
                part = slice(first, first + len(one.states))
                first = part.stop
                _draw_path(plane, one, everything.tangent[part, 0], everything.tangent[part, 1])
                _draw_path(along, one, one.forwards, everything.axial[part])
            plane.plot(0, 0, marker="*", color=style.BLACK, markersize=11, linestyle="none", zorder=5)
            style.title(plane, name)
            style.title(along, "along the anchor")
        style.note(
            figure,
            "Anchor: the K/V state of the prompt with an empty canvas, where every decode starts. Left: "
            "where a state lies across the anchor's direction, on the two axes along which states differ "
            "most. Right: how far it lies along it. Units: the anchor's length.",
        )
        _label(axes, everything)
        _legend(figure, sorted({one.block_size for one in paths}), paths)
        return style.save_png(figure, path)


def _groups(traces: Sequence[dict[str, Any]]) -> list[tuple[str, list[Trajectory]]]:
    if not traces:
        raise ValueError("traces: expected at least one, got none")
    first = traces[0]
    for trace in traces[1:]:
        for name in ("model", "prompt_tokens", "gen_length"):
            if trace[name] != first[name]:
                raise ValueError(
                    f"traces: expected decodes of one prompt and length by one model, got different {name}"
                )
    groups, alone = [], []
    for trace in traces:
        if len(trace["block_sizes"]) == 1:
            alone.append(trace)
        else:
            groups.append((f"{style.method_name(trace['method'])}: all branches", trajectories(trace)))
    if alone:
        methods = dict.fromkeys(style.method_name(trace["method"]) for trace in alone)
        several = "each block size alone" if len(alone) > 1 else "one block size alone"
        paths = [one for trace in alone for one in trajectories(trace)]
        groups.append((f"{several} ({', '.join(methods)})", paths))
    return groups


def _common_anchor(paths: list[Trajectory]) -> np.ndarray:
    anchors = [one.states[0] for one in paths]
    if len({len(anchor) for anchor in anchors}) > 1:
        raise ValueError("traces: expected states of one size, got traces of different versions")
    anchor = np.mean(anchors, axis=0)
    for one in anchors:
        apart = float(np.linalg.norm(one - anchor) / (np.linalg.norm(anchor) or 1.0))
        if apart > _SAME_ANCHOR:
            raise ValueError(
                f"traces: expected decodes that start in the same state, got one {apart:.0%} off"
            )
    return anchor


def _draw_path(axis: Any, one: Trajectory, x: np.ndarray, y: np.ndarray) -> None:
    color, marker = style.block_size_look(one.block_size)
    axis.plot(x, y, color=color, linewidth=1.1, alpha=0.85, zorder=2)
    axis.plot(x, y, color=color, marker=marker, markersize=3.2, linestyle="none", alpha=0.85, zorder=3)
    for ends, line in ((one.refreshed, "-"), (one.synced, ":")):
        for end in np.flatnonzero(ends):
            axis.plot(x[end - 1 : end + 1], y[end - 1 : end + 1], color=color, linewidth=2.2, linestyle=line)
    axis.plot(
        x[one.refreshed],
        y[one.refreshed],
        marker=marker,
        markersize=6,
        markerfacecolor="white",
        markeredgecolor=color,
        markeredgewidth=1.2,
        linestyle="none",
        zorder=4,
    )
    axis.plot(
        x[one.synced], y[one.synced], marker="x", markersize=6, color=style.BLACK, linestyle="none", zorder=4
    )


def _label(axes: np.ndarray, everything: Coordinates) -> None:
    first, second = everything.shares
    for plane, along in axes:
        plane.set_ylabel(f"tangent axis 2 / |anchor|  ({second:.0%})")
        along.set_ylabel("displacement / |anchor|")
    axes[-1][0].set_xlabel(f"tangent axis 1 / |anchor|  ({first:.0%} of variance)")
    axes[-1][1].set_xlabel("forward")
    axes[-1][1].xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Any, block_sizes: list[int], paths: list[Trajectory]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for size in block_sizes:
        color, marker = style.block_size_look(size)
        handles.append(Line2D([], [], color=color, marker=marker, markersize=4, label=f"block {size}"))
    handles.append(
        Line2D([], [], color=style.BLACK, marker="*", markersize=9, linestyle="none", label="anchor")
    )
    if any(one.refreshed.any() for one in paths):
        handles.append(
            Line2D(
                [],
                [],
                color=style.GREY,
                linewidth=2.2,
                marker="o",
                markersize=6,
                markerfacecolor="white",
                markeredgewidth=1.2,
                label="refresh",
            )
        )
    if any(one.synced.any() for one in paths):
        handles.append(
            Line2D(
                [],
                [],
                color=style.GREY,
                linewidth=2.2,
                linestyle=":",
                marker="x",
                markeredgecolor=style.BLACK,
                label="sync to the leader",
            )
        )
    style.legend(figure, handles, [handle.get_label() for handle in handles], columns=5)
