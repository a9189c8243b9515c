"""Broken rules of the bells."""

from __future__ import annotations

from ..mutation import Mutant

BELL = (
    Mutant(
        "mark before post",
        "a ringer posts first and marks then, since it may die in between",
        "shared.bell:ring",
        (("    semaphore.post()\n    mark(bell, word)\n", "    mark(bell, word)\n    semaphore.post()\n"),),
        ("bell",),
    ),
    Mutant(
        "no epoch",
        "each sleep has an epoch, so that a late mark misses the next one",
        "shared.bell:arm",
        (("bell_epoch(load(bell)) + 1", "bell_epoch(load(bell))"),),
        ("bell",),
    ),
    Mutant(
        "non-seq_cst arm",
        "the sleeper's arming is visible before it looks at the work (bell-A)",
        "shared.bell:arm",
        (("    store(bell,", "    store_release(bell,"),),
        ("bell-buffered",),
    ),
    Mutant(
        "non-seq_cst arm, of lanes and hungry pagers",
        "the same for (lane bell / expert word) and (mask / HUNGRY)",
        "shared.bell:arm",
        (("    store(bell,", "    store_release(bell,"),),
        ("one-slot-buffered",),
    ),
    Mutant(
        "look before arm",
        "a pager looks at the work again after arming",
        "pager.daemon:Pager._sleep",
        (
            (
                "        arm(self._bell, HUNGRY if hungry else 0)  # (bell-A)\n"
                "        if not self._has_work(hungry):\n",
                "        work = self._has_work(hungry)\n"
                "        arm(self._bell, HUNGRY if hungry else 0)\n"
                "        if not work:\n",
            ),
        ),
        ("shared", "one-slot"),
    ),
    Mutant(
        "push after the bell",
        "work is visible before the ringer listens (bell-B)",
        "leases:Leases.submit",
        (
            (
                "        with self._attachment.in_use():\n",
                "        with self._attachment.in_use():\n            self._attachment.ring_pager()\n",
            ),
            ("            if code == QUEUE:\n                self._attachment.ring_pager()\n", ""),
        ),
        ("one-slot", "shared"),
    ),
    Mutant(
        "waiters not woken",
        "a finished load wakes who waits for it",
        "pager.daemon:Pager._publish",
        (("            self._waiters.wake(woken)\n", "            pass\n"),),
        ("one-slot",),
    ),
    Mutant(
        "waiters woken before the load is published",
        "a load is published before its thread looks who waits for it",
        "pager.daemon:Pager._publish",
        (
            (
                "        woken = self._publisher.publish(",
                "        self._waiters.wake(self._waiters.lanes_in(load.layer))\n"
                "        woken = self._publisher.publish(",
            ),
            ("            self._waiters.wake(woken)\n", "            pass\n"),
        ),
        ("one-slot",),
    ),
    Mutant(
        "ended loads not told of",
        "a load's end wakes the pager's main thread if that has more to start",
        "pager.daemon:Pager._load_ended",
        (
            (
                "        if not load.good or self._wants_to_start_more():\n            self.wake()\n",
                "        pass\n",
            ),
        ),
        ("one-slot", "overtaking", "crowd"),
    ),
)
