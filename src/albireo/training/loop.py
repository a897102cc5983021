"""THE training loop. Everything else in this room prepares what it needs or keeps what it leaves.

A step is: the plugin's forward, backward, clip and optimizer step; then its numbers are sent on their way to the host.
They are read some steps late, so that the loop never waits for the device; and because every rank reads the same
numbers at the same step, all agree on when to stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from albireo.training.session import Session

__all__ = ["train_loop"]


def train_loop(session: Session) -> Literal["finished", "interrupted"]:
    """Train from where the session stands to its last step.

    Args:
        session: the model, its data and everything around them, ready.

    Returns:
        "finished", or "interrupted" if the user asked for a stop, which has then been saved.
    """
    if session.step == 0:
        session.evaluate()
    for micro_batches in session.batches():
        session.begin_step()
        output = session.booster.train_step(
            session.model,
            session.optimizer,
            [session.recipe.inputs(batch) for batch in micro_batches],
            [batch.tokens for batch in micro_batches],
            lr_scheduler=session.scheduler,
            max_norm=session.config.optimizer.clip,
        )
        stopped = session.record(output) and session.step < session.steps
        # What is due where the run is stopped is done too: the run that goes on from there begins with the next step.
        if session.due(session.config.schedule.eval_every):
            session.evaluate()
        if stopped or session.due(session.config.schedule.save_every):
            session.save()
        if stopped:
            return "interrupted"
    return "finished"
