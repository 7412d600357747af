"""Which rank gets which blocks: runs of successive blocks whose measured times are as equal as can be."""

import time

import torch


def balanced(seconds, parts):
    """How many successive blocks each of `parts` ranks gets, so that the slowest rank takes the least. Raises ValueError."""
    count = len(seconds)
    if not 1 <= parts <= count:
        raise ValueError(f"block_ranks: expected at most {count}, one for each block, got {parts}")
    best = {(0, 0): (0.0, [])}  # (ranks, blocks): (time of the slowest, blocks of each rank)
    for ranks in range(1, parts + 1):
        for end in range(ranks, count + 1):
            options = [
                (max(best[ranks - 1, start][0], sum(seconds[start:end])), best[ranks - 1, start][1] + [end - start])
                for start in range(ranks - 1, end)
                if (ranks - 1, start) in best
            ]
            best[ranks, end] = min(options, key=lambda option: option[0])
    return best[parts, count][1]


def block_seconds(engine, images, target, rounds=3):
    """Seconds of each block in a step of `engine` on this minibatch (forward, goodness step, backward, update): the fastest of `rounds`.

    Trains: give it a copy."""
    synchronize = torch.cuda.synchronize if engine.device.type == "cuda" else lambda: None
    engine.train_mode()
    found = []
    for number in range(rounds + 1):  # the first makes the optimisers' state
        parts, seconds = engine.step.split(images, target), []
        for index in range(len(engine.sff.blocks)):
            synchronize()
            start = time.perf_counter()
            engine.step.train_block(index, parts)
            synchronize()
            seconds.append(time.perf_counter() - start)
        if number:
            found.append(seconds)
    return [min(times) for times in zip(*found, strict=True)]


def checked(placement, blocks, ranks):
    """The user's placement. Raises ValueError."""
    placement = list(placement)
    fits = all(isinstance(n, int) and n > 0 for n in placement) and sum(placement) == blocks
    if len(placement) != ranks or not fits:
        raise ValueError(
            f"placement: expected the numbers of blocks of {ranks} ranks, {blocks} in all, got {placement}"
        )
    return placement
