"""The rule that BlockBatch's authors published for Dream, on plain dictionaries, one branch at a time.

A **state** is a dict of

    prompt_length, gen_length, mask_token_id   ints
    eos_token_ids   set of ids that end a text; empty where no token counts as one
    winner          index of the winning branch, None while decoding goes on
    stop_reason     "eos" or "length" once there is a winner, else None
    refresh_due     whether a full forward comes before the next block denoise
    kv_copies       [(source, destination)]: branches whose K/V rows the last phase's sync copies
    events          what happened, in order: ("merge", branch, tokens), ("sync", branch, leader)
    branches        list of dicts, smallest block size first

and a branch is a dict of block_size, tokens (prompt and generation region), window (start, end), frontier
(its first MASK, from the end of the prompt), holds (decoded tokens up to the first EOS), since (tokens that
the frontier moved over since the last full forward), map {position: {token: probability}}, done, and the
counters committed, merged, synced.

A **forward** of a branch is a dict of top and confidence, {position: token} and {position: probability} with
MASK left out of the softmax, and likely {position: {token: probability}}, every token whose probability is
above 0.2 with MASK counted. Probabilities are compared as float32.
"""

import numpy as np

STORED, TAKEN = np.float32(0.2), np.float32(0.5)


def new_state(prompt, config, mask_token_id, eos_token_ids, region=None):
    """The state before the first forward; of the config it asks block_sizes, gen_length and eos_exit."""
    region = [mask_token_id] * config.gen_length if region is None else list(region)
    state = {
        "prompt_length": len(prompt),
        "gen_length": len(region),
        "mask_token_id": mask_token_id,
        "eos_token_ids": set() if config.eos_exit == "none" else set(eos_token_ids),
        "winner": None,
        "stop_reason": None,
        "refresh_due": False,
        "kv_copies": [],
        "events": [],
        "branches": [],
    }
    for size in sorted(config.block_sizes):
        branch = {
            "block_size": size,
            "tokens": list(prompt) + region,
            "since": 0,
            "map": {},
            "committed": 0,
            "merged": 0,
            "synced": 0,
        }
        realign(state, branch)
        state["branches"].append(branch)
    return state


def length_of(state):
    return state["prompt_length"] + state["gen_length"]


def first_eos(state, branch):
    """Smallest generated position that holds an EOS, None without one."""
    for position in range(state["prompt_length"], length_of(state)):
        if branch["tokens"][position] in state["eos_token_ids"]:
            return position
    return None


def realign(state, branch):
    """holds, done, frontier and window, from the tokens alone."""
    start, mask, tokens = state["prompt_length"], state["mask_token_id"], branch["tokens"]
    eos = first_eos(state, branch)
    end = length_of(state) if eos is None else eos
    counted = range(start, length_of(state) if eos is None else eos + 1)
    branch["holds"] = sum(tokens[p] != mask for p in counted)
    masks = [p for p in range(start, end) if tokens[p] == mask]
    branch["done"] = not masks
    if not masks:
        branch["frontier"] = state["gen_length"] if eos is None else eos + 1 - start
        branch["window"] = None
        return
    branch["frontier"] = masks[0] - start
    size = branch["block_size"]
    w0 = start + branch["frontier"] // size * size
    branch["window"] = (w0, min(w0 + size, end))


def advance(state, branch):
    before = branch["frontier"]
    realign(state, branch)
    branch["since"] += max(branch["frontier"] - before, 0)


def window_masks(state, branch):
    return [p for p in range(*branch["window"]) if branch["tokens"][p] == state["mask_token_id"]]


# Phases


def full_phase(state, config, forwards):
    """After init or a refresh: {branch: forward} of all branches that are not done."""
    state["kv_copies"], state["events"] = [], []
    for i, forward in forwards.items():
        branch = state["branches"][i]
        position = state["prompt_length"] + branch["frontier"]
        branch["tokens"][position] = forward["top"][position]
        branch["committed"] += 1
        branch["map"] = {}
        advance(state, branch)
        branch["since"] = 0
    state["refresh_due"] = False
    end(state)


def block_phase(state, config, forwards):
    """After a block denoise: {branch: forward} of all branches."""
    state["kv_copies"], state["events"] = [], []
    for i, forward in forwards.items():
        branch = state["branches"][i]
        window = range(*branch["window"])
        commit(state, config, branch, forward)
        for position in window:
            for token, probability in forward["likely"][position].items():
                if np.float32(probability) > STORED:
                    branch["map"].setdefault(position, {})[token] = np.float32(probability)
        advance(state, branch)
    end(state)
    if state["winner"] is not None:
        return
    merge(state)
    sync(state, config)
    end(state)
    if state["winner"] is None and config.refresh_interval is not None:
        running = [branch for branch in state["branches"] if not branch["done"]]
        state["refresh_due"] = any(branch["since"] >= config.refresh_interval for branch in running)


def commit(state, config, branch, forward):
    masks = window_masks(state, branch)
    confidence = {p: np.float32(forward["confidence"][p]) for p in masks}
    chosen = [p for p in masks if confidence[p] >= np.float32(config.threshold)]
    if not chosen:
        others = [p for p in masks if forward["top"][p] not in state["eos_token_ids"]] or masks
        chosen = [max(others, key=lambda p: confidence[p])]  # the first on a tie
    for p in chosen:
        branch["tokens"][p] = forward["top"][p]
    branch["committed"] += len(chosen)


def compatible(state, a, b):
    """No position up to the first EOS of either, that included, where both hold a token and these differ."""
    ends = [eos + 1 for eos in (first_eos(state, a), first_eos(state, b)) if eos is not None]
    mask = state["mask_token_id"]
    for p in range(state["prompt_length"], min([length_of(state), *ends])):
        if mask not in (a["tokens"][p], b["tokens"][p]) and a["tokens"][p] != b["tokens"][p]:
            return False
    return True


def merge(state):
    branches, mask = state["branches"], state["mask_token_id"]
    order = [i for i, branch in enumerate(branches) if not branch["done"]]
    order.sort(key=lambda i: -branches[i]["window"][1])  # stable: the smaller index first on a tie
    for rank, i in enumerate(order):
        destination, writes = branches[i], {}
        later = [branches[j] for j in order[rank + 1 :]]
        sources = [source for source in later if compatible(state, destination, source)]
        for p in window_masks(state, destination):
            best = np.float32(0)
            for source in sources:
                eos = first_eos(state, source)
                if source["tokens"][p] == mask or (eos is not None and p > eos):
                    continue
                value = destination["map"].get(p, {}).get(source["tokens"][p], np.float32(0))
                if value > best:
                    best, writes[p] = value, source["tokens"][p]
            if best < TAKEN:
                writes.pop(p, None)
        for p, token in writes.items():
            destination["tokens"][p] = token
        if writes:
            destination["merged"] += len(writes)
            state["events"].append(("merge", i, len(writes)))
            advance(state, destination)


def sync(state, config):
    branches = state["branches"]
    for branch in branches:
        realign(state, branch)
    holds = [branch["holds"] for branch in branches]
    leader_index = holds.index(max(holds))
    leader = branches[leader_index]
    for i, branch in enumerate(branches):
        if i == leader_index or branch["done"]:
            continue
        if config.sync_threshold is None or leader["holds"] - branch["holds"] <= config.sync_threshold:
            continue
        branch["tokens"] = list(leader["tokens"])
        branch["map"] = {p: dict(entries) for p, entries in leader["map"].items()}
        branch["since"] = leader["since"]
        branch["synced"] += 1
        state["kv_copies"].append((leader_index, i))
        state["events"].append(("sync", i, leader_index))
        realign(state, branch)


def end(state):
    """Ends the decode with a branch that is ready or complete."""
    branches, start = state["branches"], state["prompt_length"]
    if state["winner"] is not None:
        return
    ready = [i for i, b in enumerate(branches) if b["done"] and first_eos(state, b) is not None]
    complete = [i for i, b in enumerate(branches) if state["mask_token_id"] not in b["tokens"][start:]]
    if ready:
        state["winner"] = max(ready, key=lambda i: (branches[i]["holds"], branches[i]["block_size"]))
        state["stop_reason"] = "eos"
    elif complete:
        state["winner"] = max(complete, key=lambda i: branches[i]["block_size"])
        state["stop_reason"] = "length"
