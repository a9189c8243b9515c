"""The pager of a run and its standby: who is which, how they end, and that there is always another."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from stress.errors import StressFailure
from stress.journal import Tail
from stress.programs import PATIENCE, Program
from stress.timeline import Fault, Timeline, Window


class PagerProgram(Program):
    """One process that is a pager, or waits to become it.

    Attributes
    ----------
    serving, standing_by : bool
        What it has said it is.
    outcome : str or None
        How it said its work ended.
    """

    def __init__(self, number: int, name: str, uuid: str, folder: Path) -> None:
        output = folder / "journals" / f"pager-{number}.out"
        self._files = [output, output.with_suffix(".err")]
        self._tail = Tail(output)
        self.serving = False
        self.standing_by = False
        self.outcome: str | None = None
        super().__init__("stress.pager", [name, uuid, "--standby"], output)

    def hear(self) -> None:
        """Take in what it has said since."""
        for line in self._tail.lines():
            if line.startswith("standing by"):
                self.standing_by = True
            elif line.startswith("serving"):
                self.serving, self.standing_by = True, False
            elif line.startswith("outcome"):
                self.outcome = line.split()[1]

    def clean_up(self) -> None:
        """End it, and remove what it wrote."""
        super().clean_up()
        self._tail.close()
        for file in self._files:
            file.unlink(missing_ok=True)


class Pagers:
    """All pagers of a run. There are two processes at any time: the one that serves, and the one that waits.

    Parameters
    ----------
    name, uuid : str
        Of the segment.
    folder : Path
    timeline : Timeline

    Attributes
    ----------
    killed, standbys_killed, refused : int
        Pagers that died of a kill; standbys that did; and those that could not open the checkpoint and said so.
    """

    def __init__(self, name: str, uuid: str, folder: Path, timeline: Timeline) -> None:
        self._name, self._uuid, self._folder = name, uuid, folder
        self._timeline = timeline
        self._numbers = itertools.count()
        self._programs: list[PagerProgram] = []
        self._outage: Window | None = None
        self._expect_refusal = False
        self._leaving: set[PagerProgram] = set()
        self._killed_serving: set[PagerProgram] = set()
        self.killed = 0
        self.standbys_killed = 0
        self.refused = 0

    @property
    def pager(self) -> PagerProgram | None:
        """The one that serves, unless it was told to end."""
        return next((p for p in self._programs if p.serving and not p.killed and p not in self._leaving), None)

    @property
    def standby(self) -> PagerProgram | None:
        """The one that waits for its turn."""
        return next((p for p in self._programs if p.standing_by and not p.killed), None)

    @property
    def complete(self) -> bool:
        """Whether one serves, and is not stopped, and one waits."""
        return self.pager is not None and not self.pager.stopped and self.standby is not None

    def step(self) -> None:
        """Hear all, see who ended, start who is missing.

        Raises
        ------
        StressFailure
            If one ended otherwise than it was made to, or two serve.
        """
        for program in list(self._programs):
            ended = not program.running
            program.hear()
            if ended:
                self._programs.remove(program)
                self._bury(program)
        serving = [p for p in self._programs if p.serving and not p.killed and p not in self._leaving]
        if len(serving) > 1:
            raise StressFailure(f"two pagers serve at once: {[p.pid for p in serving]}")
        if self._outage is not None and serving and not serving[0].stopped:
            self._outage.end()
            self._outage = None
        # While the checkpoint cannot be opened, there is no sense in starting more who cannot.
        while len(self._programs) < 2 and not self._expect_refusal:
            self._programs.append(PagerProgram(next(self._numbers), self._name, self._uuid, self._folder))

    # ---------------------------------------------------------- what is done to them

    def kill(self) -> None:
        """Kill the one that serves."""
        pager = self._outage_of_pager()
        self._killed_serving.add(pager)
        pager.kill()

    def kill_standby(self) -> None:
        """Kill the one that waits."""
        assert self.standby is not None
        self.standby.kill()

    def hand_over(self) -> None:
        """Tell the one that serves to leave its place to the standby."""
        pager = self._outage_of_pager()
        self._leaving.add(pager)
        pager.terminate()

    def stop(self) -> None:
        """Stop the one that serves: it is alive, so nobody takes over."""
        self._outage_of_pager().stop()

    def resume(self) -> None:
        """Let it go on."""
        if self.pager is not None:
            self.pager.resume()

    def expect_refusal(self, expected: bool) -> None:
        """From now on, whoever becomes the pager cannot open the checkpoint; or it can again."""
        self._expect_refusal = expected

    def _outage_of_pager(self) -> PagerProgram:
        assert self.pager is not None
        if self._outage is None:
            self._outage = self._timeline.begin(Fault.OUTAGE)
        return self.pager

    # ---------------------------------------------------------- ends

    def closed(self) -> bool:
        """After the segment was removed: whether all have ended, in good order.

        Raises
        ------
        StressFailure
            If one ended otherwise.
        """
        for program in list(self._programs):
            if program.running:
                continue
            program.hear()
            if program.outcome not in ("CLOSED", "HANDED_OVER"):
                raise self._unexpected_end(program)
            self._programs.remove(program)
            program.clean_up()
        return not self._programs

    def clean_up(self) -> None:
        """End all at once."""
        for program in self._programs:
            program.clean_up()
        self._programs.clear()

    def _bury(self, program: PagerProgram) -> None:
        if program in self._killed_serving:
            self._killed_serving.remove(program)
            self.killed += 1
        elif program.killed:
            self.standbys_killed += 1
        elif program in self._leaving and program.outcome == "HANDED_OVER":
            self._leaving.remove(program)
        elif self._expect_refusal and not program.serving and "CheckpointError" in program.messages:
            self.refused += 1
        else:
            raise self._unexpected_end(program)
        program.clean_up()

    def _unexpected_end(self, program: PagerProgram) -> StressFailure:
        return StressFailure(
            f"pager {program.pid} ended by itself, code {program.popen.returncode}, outcome {program.outcome}:\n"
            f"{program.messages}"
        )


@contextlib.contextmanager
def cleaned_up(pagers: Pagers) -> Iterator[Pagers]:
    """End all pagers when the block ends."""
    try:
        yield pagers
    finally:
        pagers.clean_up()


def wait_for_pager(pagers: Pagers) -> None:
    """Wait until one serves and one waits.

    Raises
    ------
    StressFailure
        If that does not come about.
    """
    deadline = time.monotonic() + PATIENCE
    while not pagers.complete:
        pagers.step()
        if time.monotonic() > deadline:
            raise StressFailure(f"no pager serves with a standby within {PATIENCE:g} s")
        time.sleep(0.01)
