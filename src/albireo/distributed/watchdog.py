"""Ends all ranks when one of them will never come to the collective that others wait in, and says which and where."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

from albireo.distributed.judging import Seen, Verdict, judge
from albireo.distributed.notice_board import NoticeBoard
from albireo.distributed.vital_signs import (
    Moment,
    VitalSign,
    look,
    own_sign,
    process_start,
    process_state,
    processor_seconds,
)

__all__ = ["PATIENCE_SECONDS", "SCRIPT_STUCK_SECONDS", "WATCHDOG_EXIT_CODE", "Watchdog", "end_process"]

PATIENCE_SECONDS = 25.0
# What a step of a user's own does is known to nobody, so it gets longer to be called stuck.
SCRIPT_STUCK_SECONDS = 300.0
_BEATS = 25
WATCHDOG_EXIT_CODE = 70
# A step that has never been seen before may take any time: it compiles, reserves memory, meets other machines.
_WARM_BEATS = 3
_LONGER = 3.0
_CLOSELY = 0.3


def end_process(text: str, *, speaks: bool) -> None:
    """Print the reason, if this rank is to, and end this process at once: an exit in good order would wait for others.

    Args:
        text: one line.
        speaks: on one rank.
    """
    if speaks:
        sys.stderr.write(f"albireo: {text}; all ranks are ended\n")
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(WATCHDOG_EXIT_CODE)


class Watchdog:
    """A thread that tells the others how this rank is, and reads how they are; a context manager.

    It looks at the main thread once a second from outside, so it costs a training step nothing.

    Args:
        board: where ranks leave their signs; it is closed at the end.
        rank: this rank.
        patience_seconds: how long to be sure before all ranks are ended.
        stuck_seconds: how long a rank may stand within a training step while others wait, once steps have been seen;
            and never less than three times the longest so far.
        kills_stopped: kill a rank that is stopped, which no other signal ends; a launcher may do that itself.
        end: what to do in the end, in the watchdog's thread: the reason, and whether this rank is to tell it.
    """

    def __init__(
        self,
        board: NoticeBoard,
        rank: int,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        stuck_seconds: float = PATIENCE_SECONDS,
        kills_stopped: bool = True,
        end: Callable[..., None] = end_process,
    ) -> None:
        self._board = board
        self._rank = rank
        self._patience = patience_seconds
        self._interval = patience_seconds / _BEATS
        self._own = _Own(stuck_seconds)
        self._end = end
        self._kills_stopped = kills_stopped
        self._others: dict[int, tuple[VitalSign, float]] = {}
        self._unreachable_since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Stop watching, and tell the others that this rank has left.

        Args:
            failed: by an error.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            # What it had begun when it left: whoever waits in a later one waits in vain.
            sign = replace(self._own.sign(look(), time.monotonic()), ended="failed" if failed else "left")
            self._board.post(sign.encode())
        self._board.close()

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last > 5 * self._interval + 2.0:
                # This process was stopped, or the machine slept: nobody was silent but this one.
                self._own.forget()
                self._others = {rank: (sign, now) for rank, (sign, _) in self._others.items()}
                self._unreachable_since = None
            last = now
            self._beat(now)
            if self._stop.wait(self._interval):
                return

    def _beat(self, now: float) -> None:
        sign = self._own.sign(look(closely=self._own.stands >= _CLOSELY * self._patience), now)
        try:
            self._board.post(sign.encode())
            texts = self._board.read()
        except OSError as error:
            self._lose_board(sign, now, error)
            return
        self._unreachable_since = None
        for rank, text in enumerate(texts):
            if rank != self._rank and text is not None:
                other = VitalSign.decode(text)
                if rank not in self._others or self._others[rank][0] != other:
                    self._others[rank] = (other, now)
        verdict = self._told() or judge(self._seen(sign, now), self._patience)
        if verdict is not None:
            self._finish(verdict, sign)

    def _seen(self, own: VitalSign, now: float) -> dict[int, Seen]:
        seen = {self._rank: Seen(own)}
        for rank, (sign, since) in self._others.items():
            silent = now - since
            state: str | None = "R"
            if silent > 3 * self._interval and not sign.ended:
                state = _state_of(sign, own.host)
            seen[rank] = Seen(sign, silent, state)
        return seen

    def _told(self) -> Verdict | None:
        """Return the verdict of another rank."""
        return next(
            (
                Verdict(sign.culprit, sign.verdict)
                for sign, _ in self._others.values()
                if sign.verdict and not sign.ended
            ),
            None,
        )

    def _lose_board(self, sign: VitalSign, now: float, error: OSError) -> None:
        """Bear with a store that does not answer, unless this rank waits for those who are gone with it."""
        keeper = self._others.get(0)
        if keeper is not None and keeper[0].ended:
            return  # rank 0, or the launcher beside it, has taken the store along when it was through
        if self._unreachable_since is None:
            self._unreachable_since = now
        elif sign.collective and min(now - self._unreachable_since, sign.waits_seconds) >= self._patience:
            self._end(f"{error}; rank {self._rank} waits in {sign.collective}, in {sign.place}", speaks=True)
            self._stop.set()

    def _finish(self, verdict: Verdict, sign: VitalSign) -> None:
        if not any(other.verdict for other, _ in self._others.values()):
            with suppress(OSError):
                self._board.post(replace(sign, verdict=verdict.text, culprit=verdict.culprit).encode())
            # The others read it before this rank's end breaks their connections, which would be the wrong thing to say.
            self._stop.wait(2 * self._interval)
        # The lowest rank that can; the one that is waited for may be unable to.
        able = [rank for rank, seen in self._seen(sign, time.monotonic()).items() if seen.state not in ("", "Z", "T")]
        speaks = self._rank == min((rank for rank in able if rank != verdict.culprit), default=self._rank)
        culprit = self._others.get(verdict.culprit)
        if self._kills_stopped and culprit is not None and _state_of(culprit[0], sign.host) == "T":
            with suppress(OSError):
                os.kill(culprit[0].pid, signal.SIGKILL)  # which alone ends a process that is stopped
        self._end(verdict.text, speaks=speaks)
        self._stop.set()


class _Own:
    """How long this rank's program has stood where it stands."""

    def __init__(self, stuck_seconds: float) -> None:
        self._identity = own_sign()
        self._stuck_seconds = stuck_seconds
        self._longest = 0.0
        self._steps_seen = 0
        self._counts_in_step: tuple[int, ...] = ()
        self._beat = 0
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self._last: Moment | None = None
        self._waits_since = self._stuck_since = self._processor_since = 0.0
        self._was_stepping = False
        self.stands = 0.0

    def sign(self, moment: Moment, now: float) -> VitalSign:
        """Return what is to be told.

        Args:
            moment: where the program stands now.
            now: the time.
        """
        last = self._last
        processor = processor_seconds()
        if last is None or (moment.counts, moment.position) != (last.counts, last.position):
            self._waits_since, self._processor_since = now, processor
        stood = last is not None and last.counts == moment.counts
        steps = moment.in_step and not moment.collective and not moment.excused
        if not (stood and steps):
            if last is not None and self._was_stepping:
                self._longest = max(self._longest, now - self._stuck_since)
            self._stuck_since = now
        if moment.in_step and moment.counts != self._counts_in_step:
            self._counts_in_step = moment.counts
            self._steps_seen += 1
        self._was_stepping = steps
        self._last = moment
        self._beat += 1
        waits = now - self._waits_since
        stuck = now - self._stuck_since if steps else 0.0
        self.stands = max(waits, stuck)
        limit = max(self._stuck_seconds, _LONGER * self._longest)
        return replace(
            self._identity,
            beat=self._beat,
            collective=moment.collective,
            of_all_ranks=moment.of_all_ranks,
            counts=moment.counts,
            activity=moment.activity,
            module=moment.module[-300:],
            waits_seconds=waits,
            stuck_seconds=stuck,
            stuck_limit_seconds=limit if self._steps_seen >= _WARM_BEATS else float("inf"),
            idle_share=(processor - self._processor_since) / waits if waits > 0 else 1.0,
        )


def _state_of(sign: VitalSign, host: str) -> str | None:
    """Return the kernel's letter for a rank's process; "" if it is gone; None if nobody here can tell."""
    if sign.host != host:
        return None
    try:
        state = process_state(sign.pid)
    except OSError:
        return None
    return state if process_start(sign.pid) == sign.started else ""
