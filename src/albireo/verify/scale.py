"""How a loss scale must have moved in a step. Pure."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["scale_problem"]


def scale_problem(before: Mapping[str, float], after: Mapping[str, float], *, skipped: bool) -> str | None:
    """Return what is wrong with the move of a loss scale; None if nothing is.

    Args:
        before: the scaler's state before the step; empty if there is none.
        after: its state after the step.
        skipped: the step was left out for an overflow.
    """
    if not before:
        return None
    old, new = before["scale"], after.get("scale", 0.0)
    good_steps, good_after = before.get("_growth_tracker"), after.get("_growth_tracker")
    if skipped:
        allowed = {old * before.get("backoff_factor", 0.5)}
        if "_overflow_tracker" in before or old <= 1.0:
            allowed.add(old)  # a scale that falls only after several overflows, or that stands at its least
        if new not in allowed:
            return f"after an overflow the loss scale {old:g} became {new:g}, not {min(allowed):g}"
        return None if good_after in (None, 0) else f"after an overflow {good_after:g} steps count as good, not 0"
    interval = before.get("growth_interval")
    due = None if interval is None or good_steps is None else good_steps + 1 >= interval
    grown = old * before.get("growth_factor", 2.0)
    allowed = {old, grown} if due is None else {grown if due else old}
    if new not in allowed:
        return f"after a good step the loss scale {old:g} became {new:g}, not {min(allowed):g}"
    if good_steps is not None and good_after not in (0, good_steps + 1):
        return f"after a good step {good_after} steps count as good, not {good_steps + 1:g}"
    return None
