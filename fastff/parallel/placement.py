"""Divides the blocks of a network among ranks: each gets successive blocks, so that their measured times are as equal as possible."""

import time

import torch


def balanced(seconds, parts):
    """Number of successive blocks that each of `parts` ranks gets, so that the slowest rank is as fast as possible.

    Args:
        seconds: time of each block in a step.
        parts: number of ranks.

    Raises ValueError: there are more ranks than blocks, or less than one."""
    count = len(seconds)
    if not 1 <= parts <= count:
        raise ValueError(f"block_ranks: expected at most {count}, one for each block, got {parts}")
    # Dynamic programming: {(ranks, blocks): (time of the slowest rank, blocks of each rank)} for the first `blocks` blocks.
    best = {(0, 0): (0.0, [])}
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
    """Seconds that each block takes in a step of `engine` on this minibatch (forward, goodness step, backward, update), the fastest of `rounds`.

    The steps change the parameters, so the engine should be a copy."""
    synchronize = torch.cuda.synchronize if engine.device.type == "cuda" else lambda: None
    engine.train_mode()
    measured = []
    for number in range(rounds + 1):  # the first round creates the optimizers' state and is not counted
        parts, seconds = engine.step.split(images, target), []
        for index in range(len(engine.sff.blocks)):
            synchronize()
            start = time.perf_counter()
            engine.step.train_block(index, parts)
            synchronize()
            seconds.append(time.perf_counter() - start)
        if number:
            measured.append(seconds)
    return [min(times) for times in zip(*measured, strict=True)]


def checked(placement, blocks, ranks):
    """Return the user's placement as a list. Raises ValueError unless it gives each of `ranks` ranks at least one of the `blocks` blocks."""
    placement = list(placement)
    fits = all(isinstance(n, int) and n > 0 for n in placement) and sum(placement) == blocks
    if len(placement) != ranks or not fits:
        raise ValueError(
            f"placement: expected the numbers of blocks of {ranks} ranks, {blocks} in all, got {placement}"
        )
    return placement
