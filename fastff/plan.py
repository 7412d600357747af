"""Plans: which losses the steps of a training run compute, and which blocks each loss trains.

A step is a tuple of Segments. A Segment (first, last) is the loss at the output of block `last`, which trains the blocks first to last; no
gradient of it goes further. Segments side by side, in which every block is trained once, are what local training usually is: one block each
(the paper), several blocks each (less independence, learns better), all blocks in one (end to end). Segments may overlap: with a window of w the
loss of each block trains the w - 1 blocks before it as well. Blocks in no segment only run forward, and blocks behind the last segment do not run.

A plan says which segments the t-th step has, counted from 0:

    plan.at(t, start=0, phase=0)   the segments of step t if the blocks before `start` are trained no more (frozen, or finished)
    plan.voters                    the blocks that some step has a loss for: their heads learn, and vote
    plan.chains(start=0)           successive ranges of blocks, between which no step has a gradient: asked for where ranks share the blocks
    plan.phases                    how many times fit goes through its epochs; one, but for Greedy
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fastff.arguments import plain, whole_number


class Segment(NamedTuple):
    """The blocks first to last (counted from 0, both included), trained by the loss at the output of the last.

    The minibatch goes through them in `parts`, one after the other, which need that much less memory; the gradients of all parts add up."""

    first: int
    last: int
    parts: int = 1


def ending_at(ends, parts=()):
    """Segments side by side that end at these blocks, in order, in so many parts each (1 where none are given)."""
    return tuple(map(Segment, (0, *(end + 1 for end in ends[:-1])), ends, parts or [1] * len(ends)))


def starting_at(start, segments):
    """What is left of segments where the blocks before `start` are trained no more."""
    return tuple(s._replace(first=max(s.first, start)) for s in segments if s.last >= start)


def chains_of(turns):
    """Successive ranges of blocks that are as short as they can be without dividing a segment of any of these tuples of segments."""
    crossed = {i for segments in turns for s in segments for i in range(s.first, s.last)}
    blocks = 1 + max(s.last for segments in turns for s in segments)
    return [range(s.first, s.last + 1) for s in ending_at([i for i in range(blocks) if i not in crossed])]


@dataclass(frozen=True)
class Turns:
    """Segments that are the same in every step, or several sets of them that take turns.

    Args:
        turns: a tuple of segments for each turn.
        name: what print(sff) shows."""

    turns: tuple
    name: str
    phases = 1

    @property
    def voters(self):
        return tuple(sorted({s.last for segments in self.turns for s in segments}))

    def at(self, t, start=0, phase=0):
        return starting_at(start, self.turns[t % len(self.turns)])

    def chains(self, start=0):
        return chains_of([starting_at(start, segments) for segments in self.turns])


@dataclass(frozen=True)
class Drawn:
    """A cut behind each block with probability one half, drawn anew for every step.

    Args: blocks, their number; seed of the draws, which depend on it and on t alone."""

    blocks: int
    seed: int = 0
    name = "drawn"
    phases = 1

    @property
    def voters(self):
        return tuple(range(self.blocks))

    def at(self, t, start=0, phase=0):
        draw = random.Random(f"{self.seed} {t}").random
        return starting_at(start, ending_at([i for i in range(self.blocks) if i + 1 == self.blocks or draw() < 0.5]))

    def chains(self, start=0):
        return [*(range(i, i + 1) for i in range(start)), range(start, self.blocks)]


@dataclass(frozen=True)
class Greedy:
    """One block after the other: phase p of fit trains block `frozen` + p alone, and runs no block behind it."""

    blocks: int
    frozen: int = 0
    name = "greedy"

    @property
    def voters(self):
        return tuple(range(self.blocks))

    @property
    def phases(self):
        return self.blocks - self.frozen

    def at(self, t, start=0, phase=0):
        return (Segment(self.frozen + phase, self.frozen + phase),)

    def chains(self, start=0):
        return [range(self.blocks)]  # one block trains at a time, and the others' ranks would wait


@dataclass(frozen=True)
class Budget:
    """The fewest segments of which none needs more memory than a budget; of as few, those whose parts call the fewest blocks,
    and of these the ones whose largest is smallest.

    Where the first blocks have finished, the others have all the memory, and segments become one where it suffices.

    Args:
        memory: function of (first, last, parts) that returns what a step needs at most while it trains a segment in so many parts, with the
            number of `blocks` (SegmentMemory, in bytes, or SegmentEstimate, of fastff/segment_memory.py).
        budget: in the same unit, at least `least(memory)`.
        parts: the most parts in which a segment may take the minibatch."""

    memory: object
    budget: float
    parts: int = 2
    phases = 1

    @property
    def name(self):
        return _named([self.at(0)])

    @property
    def voters(self):
        return tuple(s.last for s in self.at(0))

    def at(self, t, start=0, phase=0):
        whole = _fewest(self.memory, self.budget, self.parts, 0, tuple(range(self.memory.blocks)))
        if start == 0:
            return whole
        return _fewest(self.memory, self.budget, self.parts, start, tuple(s.last for s in whole if s.last >= start))

    def chains(self, start=0):
        return chains_of([self.at(0, start)])


def least(memory, parts=2):
    """The smallest budget: what the largest segment of one block needs, in up to so many parts."""
    return max(min(memory(i, i, n) for n in range(1, parts + 1)) for i in range(memory.blocks))


@lru_cache(256)
def _fewest(memory, budget, most, start, ends):
    """The fewest segments from block `start` on that end at some of `ends`, the last of them included, in up to `most` parts each."""
    # {block: (number of segments, calls of their blocks, memory of the largest, segments before the block)}
    best = {start: (0, 0, 0.0, ())}
    for end in ends:
        options = []
        for first, (count, calls, largest, segments) in best.items():
            for parts in range(1, most + 1):
                needed = memory(first, end, parts)
                if needed <= budget:
                    more = (*segments, Segment(first, end, parts))
                    options.append((count + 1, calls + parts * (end + 1 - first), max(largest, needed), more))
                    break
        if options:
            best[end + 1] = min(options)
    return best[ends[-1] + 1][3]


def _named(turns):
    """What print(sff) shows of turns of segments."""
    one = lambda s: str(s.last) if s.parts == 1 else f"{s.last} in {s.parts} parts"  # noqa: E731
    return f"segments end at {' | '.join(', '.join(map(one, segments)) for segments in turns)}"


def window(size, blocks):
    """The plan in which the loss of each block also trains the size - 1 blocks before it."""
    segments = tuple(Segment(max(0, last - size + 1), last) for last in range(blocks))
    return Turns((segments,), f"window {size}")


def pairs(blocks):
    """The plan of pairs of blocks that take turns: 01 23 45 ... in even steps, 0 12 34 ... in odd ones."""
    last = blocks - 1
    turns = [ending_at(sorted({*range(first, blocks, 2), last})) for first in (1, 0)]
    return Turns(tuple(turns), "pairs")


def _checked(segments, blocks):
    """These Segments as a tuple in order. Raises ValueError."""
    for s in segments:
        for name, value, low in zip(Segment._fields, s, (0, s.first, 1), strict=True):
            whole_number(f"plan: {name} of {s}", value, low)
        if s.last >= blocks:
            raise ValueError(f"plan: expected blocks below {blocks}, their number, got {s}")
    if len({s.last for s in segments}) < len(segments) or blocks - 1 not in {s.last for s in segments}:
        raise ValueError(
            f"plan: expected segments of which one ends at block {blocks - 1}, and no two at the same, got {list(segments)}"
        )
    return tuple(sorted(segments, key=lambda s: s.last))


def of(given, blocks):
    """The plan that a user names.

    Args:
        given: a plan; "pairs" or "drawn"; the blocks that end segments, such as [1, 3, 8]; several such lists, which take turns; or Segments.
        blocks: the number of blocks.

    Raises TypeError, ValueError."""
    expected = "'pairs', 'drawn', a list of the blocks that end segments, a list of such lists, Segments, or a plan"
    if hasattr(given, "at") and hasattr(given, "voters"):
        if max(given.voters, default=-1) != blocks - 1:
            text = f"one whose last loss is that of block {blocks - 1}, the network's last"
            raise ValueError(f"plan: expected {text}, got {given.name}")
        return given
    if isinstance(given, (list, tuple)) and given and all(isinstance(s, Segment) for s in given):
        return Turns((_checked(given, blocks),), _named([given]))
    if isinstance(given, str):
        if given == "pairs":
            return pairs(blocks)
        if given == "drawn":
            return Drawn(blocks)
        raise ValueError(f"plan: expected {expected}, got {given!r}")
    given = plain(given)
    if not isinstance(given, (list, tuple, range)) or not given:
        raise TypeError(f"plan: expected {expected}, got {given!r}")
    turns = [list(turn) for turn in given] if isinstance(given[0], (list, tuple, range)) else [list(given)]
    for turn in turns:
        for end in turn:
            whole_number("plan", end, 0)
        if turn != sorted(set(turn)) or not turn or turn[-1] != blocks - 1:
            text = f"blocks in ascending order, the last of them block {blocks - 1}, the network's last"
            raise ValueError(f"plan: expected {text}, got {turn}")
    turns = tuple(map(ending_at, turns))
    return Turns(turns, _named(turns))
