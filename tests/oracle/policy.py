"""What happens to a request's branches after each forward, on plain dictionaries.

A **state** is a dict:

    prompt_length, gen_length, mask_token_id   ints
    eos_token_ids   set of ints
    prediction_offset   logits at position i predict position i + offset; open queries alone ask
    winner          index of the winning branch, None while decoding goes on
    stop_reason     "eos" or "length" once there is a winner, else None
    refresh_due     whether a refresh comes before the next block denoise
    kv_copies       [(source, destination)]: branches whose K/V rows the last phase's sync copies
    branches        list of dicts, smallest block size first

and a branch is a dict of

    block_size
    tokens          list of prompt_length + gen_length ids
    window          (start, end), never clipped at an EOS here: see `window_of`
    decoded, progress, blocks_since_refresh, needs_refresh, done
    top             {position: token} and
    confidence      {position: probability}, from the branch's latest forward of that position
    cached          {position: token that the K/V in the branch's row was computed from}
    steps           forwards committed in this window
    committed, merged, synced   counters of what this branch did itself

A **forward** of a branch is a dict of top and confidence, for the positions it predicts, probe {position:
probability of the token held there before the forward}, read only where that token is an EOS, and queries,
the positions whose K/V it computed; without queries the branch's K/V count as they were.

`init_phase`, `block_phase` and `refresh_phase` take {branch index: forward} and change the state in place.
Probabilities and thresholds are compared as float32.
"""

import numpy as np


def new_state(prompt, config, mask_token_id, eos_token_ids, prediction_offset=0, region=None):
    """The state before the first forward. config: a resolved OracleConfig; region: see `decoders.decode`."""
    region = [mask_token_id] * config.gen_length if region is None else list(region)
    start, length = len(prompt), len(prompt) + len(region)
    branches = [
        {
            "block_size": size,
            "tokens": list(prompt) + region,
            "window": (start, min(start + size, length)),
            "decoded": 0,
            "progress": 0,
            "blocks_since_refresh": 0,
            "needs_refresh": False,
            "done": False,
            "top": {},
            "confidence": {},
            "cached": {},
            "steps": 0,
            "committed": 0,
            "merged": 0,
            "synced": 0,
        }
        for size in config.block_sizes
    ]
    return {
        "prompt_length": start,
        "gen_length": len(region),
        "mask_token_id": mask_token_id,
        "eos_token_ids": set(eos_token_ids),
        "prediction_offset": prediction_offset,
        "winner": None,
        "stop_reason": None,
        "refresh_due": False,
        "kv_copies": [],
        "branches": branches,
    }


# What a branch looks like


def length_of(state):
    return state["prompt_length"] + state["gen_length"]


def first_eos(state, branch):
    """Smallest generated position that holds an EOS, None without one."""
    for position in range(state["prompt_length"], length_of(state)):
        if branch["tokens"][position] in state["eos_token_ids"]:
            return position
    return None


def horizon(state, config, branch):
    """End of the positions that count: the branch's first EOS in prefix mode, else the end of the canvas."""
    eos = first_eos(state, branch) if config.eos_exit == "prefix" else None
    return length_of(state) if eos is None else eos


def window_of(state, config, branch):
    """The window as it counts: clipped at the first EOS in prefix mode."""
    start, end = branch["window"]
    return start, min(end, horizon(state, config, branch))


def masks_between(state, branch, start, end):
    return [p for p in range(start, end) if branch["tokens"][p] == state["mask_token_id"]]


def window_masks(state, config, branch):
    return masks_between(state, branch, *window_of(state, config, branch))


def masks_that_count(state, config, branch):
    return masks_between(state, branch, state["prompt_length"], horizon(state, config, branch))


def block_rows(state, config):
    """Branches of the next block denoise: not done, with a MASK in the window."""
    return [i for i, b in enumerate(state["branches"]) if not b["done"] and window_masks(state, config, b)]


def refresh_rows(state):
    """Branches of a refresh: all that are not done."""
    return [i for i, b in enumerate(state["branches"]) if not b["done"]]


def stale_positions(state, branch):
    """Generated positions that hold a token while the cached K/V is that of another, or of MASK."""
    stale = []
    for position in range(state["prompt_length"], length_of(state)):
        token = branch["tokens"][position]
        if token != state["mask_token_id"] and token != branch["cached"].get(position):
            stale.append(position)
    return stale


def open_queries(state, config, branch):
    """Positions that a block denoise computes with open queries: what predicts, and what is stale."""
    predicting = {p - state["prediction_offset"] for p in window_masks(state, config, branch)}
    return sorted(predicting.union(stale_positions(state, branch)))


def refresh_queries(state, config):
    """Positions that a refresh computes of a branch."""
    if config.refresh_scope == "generation":
        return range(state["prompt_length"] - state["prediction_offset"], length_of(state))
    return range(length_of(state))


# Phases


def init_phase(state, config, forwards):
    """After the init forward, which `forwards` holds for every branch."""
    state["kv_copies"] = []
    for i, branch in enumerate(state["branches"]):
        remember(branch, forwards[i])
        commit(state, config, branch)
        branch["blocks_since_refresh"] = 0
    finish_prefix(state, config)
    advance_merge_sync(state, config)


def block_phase(state, config, forwards):
    """After one block denoise of the branches of `block_rows`, the keys of `forwards`. No key, no forward."""
    state["kv_copies"] = []
    held_before = {}
    for i, forward in forwards.items():
        branch = state["branches"][i]
        held_before[i] = list(branch["tokens"])
        remember(branch, forward)
        commit(state, config, branch)
    if config.eos_exit == "window":
        finish_window(state, forwards, held_before)
    else:
        finish_prefix(state, config, among=list(forwards))
    advance_merge_sync(state, config)


def refresh_phase(state, config, forwards):
    """After one full forward of the branches of `refresh_rows`, the keys of `forwards`."""
    state["kv_copies"] = []
    for i, forward in forwards.items():
        branch = state["branches"][i]
        remember(branch, forward)
        commit(state, config, branch)
        branch["blocks_since_refresh"] = 0
        branch["needs_refresh"] = False
    state["refresh_due"] = False
    finish_prefix(state, config, among=list(forwards))


def advance_merge_sync(state, config):
    """Steps 3 to 5 of the loop, up to the decision whether a refresh is due."""
    if state["winner"] is not None:
        return
    for branch in state["branches"]:
        if not branch["done"] and not window_masks(state, config, branch):
            advance(state, config, branch)
    merge(state, config)
    finish_prefix(state, config)
    if state["winner"] is not None:
        return
    sync(state, config)
    branches = state["branches"]
    state["refresh_due"] = any(b["needs_refresh"] and not b["done"] for b in branches)
    if all(b["done"] for b in branches):
        best = max(b["progress"] for b in branches)
        state["winner"] = [b["progress"] for b in branches].index(best)
        state["stop_reason"] = "length"


# Commit


def remember(branch, forward):
    branch["top"].update(forward["top"])
    branch["confidence"].update(forward["confidence"])
    for position in forward.get("queries", ()):
        branch["cached"][position] = branch["tokens"][position]


def at_least(value, threshold):
    return np.float32(value) >= np.float32(threshold)


def commit(state, config, branch):
    masks = window_masks(state, config, branch)
    if not masks:
        return
    confidence = branch["confidence"]
    # Highest confidence first; the sort is stable, so the first position leads a tie.
    ranked = sorted(masks, key=lambda p: -np.float32(confidence[p]))
    if config.commit == "threshold":
        chosen = sure_masks(config, masks, confidence)
    elif config.commit == "local_leap":
        anchors = sure_masks(config, masks, confidence)
        chosen = list(anchors)
        for p in masks:
            near = any(abs(p - anchor) <= config.leap_radius for anchor in anchors)
            if near and p not in chosen and at_least(confidence[p], config.leap_threshold):
                chosen.append(p)
    else:
        chosen = ranked[: fixed_count(config, branch, len(masks))]
    if ranked[0] not in chosen:
        chosen.append(ranked[0])
    for p in chosen:
        branch["tokens"][p] = branch["top"][p]
    branch["decoded"] += len(chosen)
    branch["committed"] += len(chosen)
    branch["steps"] += 1


def sure_masks(config, masks, confidence):
    """The masks that reach their threshold: the tail's behind the first that misses the usual one."""
    sure, threshold = [], config.threshold
    for p in sorted(masks):
        if at_least(confidence[p], threshold):
            sure.append(p)
        elif config.tail_threshold is not None:
            threshold = config.tail_threshold
    return sure


def fixed_count(config, branch, masks):
    """Tokens to commit in this step of the block, when `steps` in all are shared evenly by the blocks."""
    size = branch["block_size"]
    steps_per_block = config.steps // (config.gen_length // size)
    step = branch["steps"]
    if step >= steps_per_block:
        return masks  # only a model that predicts MASK needs more forwards than planned
    return size // steps_per_block + (1 if step < size % steps_per_block else 0)


# Advance, merge, sync


def move_window(state, config, branch):
    """Window, progress, done from the first MASK that counts. Returns whether there is one."""
    masks = masks_that_count(state, config, branch)
    branch["steps"] = 0
    if not masks:
        branch["done"] = True
        branch["progress"] = state["gen_length"]
        branch["window"] = (length_of(state), length_of(state))
        return False
    size = branch["block_size"]
    start = state["prompt_length"] + (masks[0] - state["prompt_length"]) // size * size
    branch["window"] = (start, min(start + size, length_of(state)))
    branch["progress"] = start - state["prompt_length"]
    return True


def advance(state, config, branch):
    if not move_window(state, config, branch):
        return
    branch["blocks_since_refresh"] += 1
    blocks = branch["blocks_since_refresh"]
    if config.refresh_interval is not None and blocks * branch["block_size"] >= config.refresh_interval:
        branch["needs_refresh"] = True


def compatible(state, config, a, b):
    """No position that counts for both where both hold a token and the tokens differ."""
    mask = state["mask_token_id"]
    end = min(horizon(state, config, a), horizon(state, config, b))
    for p in range(state["prompt_length"], end):
        if a["tokens"][p] != mask and b["tokens"][p] != mask and a["tokens"][p] != b["tokens"][p]:
            return False
    return True


def merge(state, config):
    branches, mask = state["branches"], state["mask_token_id"]
    if max(b["decoded"] for b in branches) == 0:
        return
    order = [i for i in range(len(branches)) if not branches[i]["done"]]
    order.sort(key=lambda i: -window_of(state, config, branches[i])[1])
    writes = {}
    for rank, i in enumerate(order):
        destination = branches[i]
        sources = [
            branches[j] for j in order[rank + 1 :] if compatible(state, config, destination, branches[j])
        ]
        for p in masks_that_count(state, config, destination):
            starts_ends = [window_of(state, config, source) for source in sources]
            if not any(start <= p < end for start, end in starts_ends):
                continue
            offered = {source["tokens"][p] for source in sources if source["tokens"][p] != mask}
            # Only the top token can have a probability above merge_threshold >= 0.5.
            token = destination["top"].get(p)
            sure = np.float32(destination["confidence"].get(p, 0.0)) > np.float32(config.merge_threshold)
            if token in offered and sure:
                writes[i, p] = token
    for (i, p), token in writes.items():
        branches[i]["tokens"][p] = token
        branches[i]["merged"] += 1
    for i in order:
        if not window_masks(state, config, branches[i]):
            advance(state, config, branches[i])


def sync(state, config):
    branches = state["branches"]
    decoded = [b["decoded"] for b in branches]
    leader_index = decoded.index(max(decoded))
    leader = branches[leader_index]
    for i, branch in enumerate(branches):
        if branch["done"] or leader["decoded"] - branch["decoded"] <= config.sync_threshold:
            continue
        branch["tokens"], branch["cached"] = list(leader["tokens"]), dict(leader["cached"])
        branch["decoded"] = leader["decoded"]
        branch["synced"] += 1
        state["kv_copies"].append((leader_index, i))
        move_window(state, config, branch)


# Finish


def finish_window(state, forwards, held_before):
    """eos_exit="window": a denoised window without MASK that holds an EOS ends decoding."""
    best = None
    for i, forward in sorted(forwards.items()):
        branch = state["branches"][i]
        start, end = branch["window"]
        eos = [p for p in range(start, end) if branch["tokens"][p] in state["eos_token_ids"]]
        if masks_between(state, branch, start, end) or not eos:
            continue
        p = eos[0]
        just_committed = held_before[i][p] == state["mask_token_id"]
        # An EOS whose position this forward did not predict has no probability in it.
        probability = forward["confidence"][p] if just_committed else forward["probe"].get(p, 0.0)
        if best is None or np.float32(probability) > best:
            best, state["winner"], state["stop_reason"] = np.float32(probability), i, "eos"


def finish_prefix(state, config, among=None):
    """eos_exit="prefix": an EOS with every generated position before it decoded ends decoding."""
    if config.eos_exit != "prefix" or state["winner"] is not None:
        return
    best = None
    for i, branch in enumerate(state["branches"]):
        if among is not None and i not in among:
            continue
        eos = first_eos(state, branch)
        if eos is None or masks_that_count(state, config, branch):
            continue
        confidence = np.float32(branch["confidence"].get(eos, 0.0))
        if best is None or confidence > best:
            best, state["winner"], state["stop_reason"] = confidence, i, "eos"
