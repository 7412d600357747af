"""Divides the blocks of a network among ranks: each gets successive chains of blocks, so that their measured times are as equal as possible.

A chain is one block or several, between which gradients pass."""

import functools
import itertools
import time

import torch


def balanced(seconds, parts):
    """Number of successive chains that each of `parts` ranks gets, so that the slowest rank is as fast as possible.

    Args:
        seconds: time of each chain in a step.
        parts: number of ranks.

    Raises ValueError: there are more ranks than chains, or less than one."""
    count = len(seconds)
    if not 1 <= parts <= count:
        raise ValueError(f"block_ranks: expected at most {count}, one for each chain of blocks, got {parts}")

    @functools.cache
    def best(ranks, end):
        """(time of the slowest rank, chains of each rank) for the first `end` chains."""
        if ranks == 1:
            return sum(seconds[:end]), [end]
        splits = ((start, *best(ranks - 1, start)) for start in range(ranks - 1, end))
        options = [(max(slowest, sum(seconds[start:end])), [*counts, end - start]) for start, slowest, counts in splits]
        return min(options, key=lambda option: option[0])

    return best(parts, count)[1]


def chain_seconds(engine, chains, images, target, rounds=3):
    """Seconds that each of these chains takes in a step of `engine` on this minibatch (forward, goodness step, backward, update), the fastest
    of `rounds`.

    Args: chains, ranges of blocks between which no gradient passes. The steps change the parameters, so the engine should be a copy."""
    synchronize = torch.cuda.synchronize if engine.device.type == "cuda" else lambda: None
    engine.train_mode()
    route, measured = engine.step.route(engine.segments(0)), []
    for _ in range(rounds + 1):  # the first round creates the optimizers' state and is not counted
        parts, seconds = engine.step.split(images, target), [0.0] * len(chains)
        for part in route.chains:  # in this step a chain may consist of several
            synchronize()
            start = time.perf_counter()
            parts = engine.step.train(route, part, parts)
            synchronize()
            index = next(i for i, chain in enumerate(chains) if part.start in chain)
            seconds[index] += time.perf_counter() - start
        measured.append(seconds)
    return [min(times) for times in zip(*measured[1:], strict=True)]


def checked(placement, chains, ranks):
    """Return the user's placement, the number of blocks of each rank, as a list.

    Raises ValueError unless each of `ranks` ranks gets at least one block, all blocks are placed, and no chain is divided."""
    placement, allowed = list(placement), [chain.stop for chain in chains]
    counts = len(placement) == ranks and all(isinstance(n, int) and n > 0 for n in placement)
    ends = list(itertools.accumulate(placement)) if counts else [0]
    if ends[-1] != allowed[-1] or not set(ends) <= set(allowed):
        behind = ", ".join(str(end - 1) for end in allowed)
        text = (
            f"the numbers of blocks of {ranks} ranks, {allowed[-1]} in all, where a rank may end behind blocks {behind}"
        )
        raise ValueError(f"placement: expected {text}, got {placement}")
    return placement
