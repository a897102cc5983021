"""Whether ranks can go on: a decision on what they say of themselves. Pure; see docs/watchdog.md for the rules.

No rule looks at time alone. Somebody must wait for a rank of which it is known that it will not come: because it has
ended, is stopped, waits elsewhere itself, or stands still within a training step that others are done with. A rank that
does something else, however long, is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from albireo.distributed.vital_signs import VitalSign

__all__ = ["Seen", "Verdict", "judge"]

# Shares of the patience. A launcher that sees a rank die has a better message; it gets the time to say it.
_UNTIL_WAITING = 0.4
_UNTIL_STOPPED = 0.6
# A rank of another machine that is not heard of may be held up by its interpreter's lock.
_UNTIL_SILENT = 4.0
_UNTIL_DIFFERENT = 2.0
_IDLE = 0.02
_BETWEEN_TWO = frozenset({"send", "recv", "isend", "irecv", "batch_isend_irecv"})


class Seen(NamedTuple):
    """A rank as another sees it.

    Attributes:
        sign: the last that it said of itself.
        silent_seconds: how long ago that was, by the clock of who sees it.
        state: the kernel's letter for its process, "" if there is none any more; None if nobody can tell.
    """

    sign: VitalSign
    silent_seconds: float = 0.0
    state: str | None = None


class Verdict(NamedTuple):
    """Why ranks cannot go on.

    Attributes:
        culprit: the rank that is waited for in vain; the first, if ranks wait for each other.
        text: one line for people.
    """

    culprit: int
    text: str


def judge(ranks: Mapping[int, Seen], patience_seconds: float) -> Verdict | None:
    """Return why these ranks cannot go on, or None if they may.

    Args:
        ranks: all that have said something yet.
        patience_seconds: how long to be sure.
    """
    waiting = [rank for rank in sorted(ranks) if _waits(ranks[rank]) >= _UNTIL_WAITING * patience_seconds]
    for culprit in sorted(ranks):
        found = _reason(ranks[culprit], patience_seconds)
        if found is None:
            continue
        reason, may_be_within = found
        for rank in waiting:
            if rank != culprit and _waits_for(ranks[rank].sign, ranks[culprit].sign, may_be_within=may_be_within):
                text = f"rank {culprit} {reason}; rank {rank} waits for it {_where(ranks[rank].sign)}"
                return Verdict(culprit, text)
    return _deadlock(ranks, patience_seconds)


def _waits(seen: Seen) -> float:
    """Return for how long a rank has been waiting; one that is gone, stopped or through does not."""
    alive = not seen.sign.ended and seen.state not in ("", "Z", "T")
    return seen.sign.waits_seconds if alive else 0.0


def _waits_for(one: VitalSign, other: VitalSign, *, may_be_within: bool) -> bool:
    """Return True if one is in a collective that the other has not begun, or has perhaps not brought to its end."""
    if not one.of_all_ranks:
        return False
    if any(mine > theirs for mine, theirs in zip(one.counts, other.counts, strict=False)):
        return True
    return may_be_within and bool(one.collective) and one.counts == other.counts


def _reason(seen: Seen, patience_seconds: float) -> tuple[str, bool] | None:
    """Return why a rank will not come and whether it may be within the collective; or None if it may come."""
    sign, state = seen.sign, seen.state
    if sign.ended:
        return ("has left the others", False) if sign.ended == "left" else ("has failed; its message says why", True)
    if state in ("", "Z"):
        return f"has ended without a word, last seen in {sign.place}", True
    if state == "T" and seen.silent_seconds >= _UNTIL_STOPPED * patience_seconds:
        return f"is stopped by a signal, last seen in {sign.place}", True
    if state is None and seen.silent_seconds >= _UNTIL_SILENT * patience_seconds:
        return f"on {sign.host} has not been heard of for {seen.silent_seconds:.0f} s, last seen in {sign.place}", True
    if sign.stuck_seconds >= sign.stuck_limit_seconds and seen.silent_seconds < _UNTIL_WAITING * patience_seconds:
        return f"has not gone on for {sign.stuck_seconds:.0f} s, in {sign.place}", False
    return None


def _deadlock(ranks: Mapping[int, Seen], patience_seconds: float) -> Verdict | None:
    """Return a verdict if every rank waits in a collective, not all of one kind, and nothing moves."""
    signs = {rank: seen.sign for rank, seen in ranks.items()}
    if len(signs) < 2 or any(seen.silent_seconds > _UNTIL_WAITING * patience_seconds for seen in ranks.values()):
        return None
    if not all(_is_in_a_collective_of_all(sign) and sign.idle_share <= _IDLE for sign in signs.values()):
        return None
    if len({sign.collective for sign in signs.values()}) == 1:
        return None  # they are in the same one, which may be a large one over a slow network
    same_count = len({sign.counts for sign in signs.values()}) == 1
    needed = patience_seconds * (1.0 if same_count else _UNTIL_DIFFERENT)
    if min(_waits(seen) for seen in ranks.values()) < needed:
        return None
    described = "; ".join(f"rank {rank} {_where(signs[rank])}" for rank in _one_of_each(signs))
    first = min(signs, key=lambda rank: (signs[rank].counts, rank))
    return Verdict(first, f"ranks wait for each other in different collectives: {described}")


def _is_in_a_collective_of_all(sign: VitalSign) -> bool:
    return sign.collective not in ("", *_BETWEEN_TWO) and sign.of_all_ranks


def _one_of_each(signs: Mapping[int, VitalSign]) -> Iterator[int]:
    told = set()
    for rank in sorted(signs):
        if signs[rank].collective not in told:
            told.add(signs[rank].collective)
            yield rank


def _where(sign: VitalSign) -> str:
    unseen = "the reduction of gradients" if sign.activity == "backward" else "what its device does"
    return f"in {sign.collective or unseen} (collective {max(sign.counts, default=0)}), in {sign.place}"
