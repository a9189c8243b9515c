"""Broken rules of leases, waiting and eviction."""

from __future__ import annotations

from ..mutation import Mutant

LEASES = (
    Mutant(
        "eviction ignores the mask",
        "only an expert with an empty mask is evicted",
        "shared.experts:evict",
        (
            (
                "    if not cas(word_address, pack_expert(RESIDENT, 0, slot, 0), pack_expert(ABSENT, 0, 0, 0)):",
                "    if not cas(word_address, load(word_address), pack_expert(ABSENT, 0, 0, 0)):",
            ),
        ),
        ("leases",),
    ),
    Mutant(
        "eviction ignores wait words",
        "eviction passes over what a worker waits for",
        "pager.eviction.victims:is_awaited",
        (("        found |= waiting[i] == key", "        pass"),),
        ("one-slot", "crowd"),
    ),
    Mutant(
        "lease without re-check",
        "a lease is a CAS from the very word that said RESIDENT",
        "shared.experts:lease",
        (
            (
                "        if cas(word_address, word, word | bit):  # linearization point",
                "        fetch_or(word_address, bit)\n        if True:",
            ),
        ),
        ("leases",),
    ),
    Mutant(
        "wait word after the look",
        "the wait word is stored before the expert word is read again",
        "leases:Leases.wait",
        (("            self._set_wait_word(pack_wait(layer, experts[0]))\n", ""),),
        ("one-slot", "shared", "crowd"),
    ),
    Mutant(
        "lane bell armed after the look",
        "a waiter arms its bell before it looks at the word",
        "leases:Leases._wait_armed",
        (
            (
                "                arm(self._lane.bell, 0)\n            found = self.lease_any(layer, experts)\n",
                "                pass\n"
                "            found = self.lease_any(layer, experts)\n"
                "            arm(self._lane.bell, 0)\n",
            ),
        ),
        ("shared", "one-slot", "crowd"),
    ),
    Mutant(
        "no HUNGRY",
        "a pager without a slot arms its bell for releases too",
        "pager.daemon:Pager._sleep",
        (("arm(self._bell, HUNGRY if hungry else 0)", "arm(self._bell, 0)"),),
        ("one-slot", "crowd"),
    ),
    Mutant(
        "hungry without another look",
        "a hungry pager looks at masks and wait words again after arming",
        "pager.daemon:Pager._has_work",
        (("            or (hungry and self._loader.idle and self._slots.can_evict(self._waiters.keys()))\n", ""),),
        ("one-slot", "crowd"),
    ),
    Mutant(
        "publish before the load is done",
        "RESIDENT is written after the last byte",
        "pager.daemon:Pager._begin_load",
        (
            (
                "        return bool(begin_load(self._table.address(load.key), load.slot))",
                "        begin_load(self._table.address(load.key), load.slot)\n"
                "        self._publisher.publish(load.key, load.slot, 1, 0, False)\n"
                "        return True",
            ),
        ),
        ("shared", "one-slot"),
    ),
    Mutant(
        "what was taken back is loaded",
        "a load that is taken back is no thread's any more: its slot is another's",
        "pager.loader:Loader.take_back",
        (("            load = self._waiting.pop()", "            load = self._waiting[-1]"),),
        ("overtaking",),
    ),
    Mutant(
        "what was overtaken is forgotten",
        "a load that is taken back is queued again",
        "pager.daemon:Pager._make_way",
        (
            (
                "        self._queue.put_back(load.key, load.entry)\n"
                "        self._enqueue(load.key, time.monotonic())  # at its word's priority, should that have risen\n",
                "",
            ),
        ),
        ("overtaking",),
    ),
    Mutant(
        "a demanded prefetch is cancelled",
        "a prefetch is cancelled only while nobody demands it",
        "shared.experts:cancel",
        (
            (
                "        if expert_state(word) != REQUESTED or expert_priority(word) > PREFETCH:",
                "        if expert_state(word) != REQUESTED:",
            ),
        ),
        ("cancellation",),
    ),
    Mutant(
        "the reason after the word",
        "why a load failed is stored before the word says FAILED",
        "shared.experts:fail",
        (
            ("    store(failure_address, failure)\n", ""),
            ("pack_expert(FAILED, 0, 0, 0))", "pack_expert(FAILED, 0, 0, 0))\n    store(failure_address, failure)"),
        ),
        ("failing",),
    ),
    Mutant(
        "the pager grants leases",
        "only a worker sets its bit: one that has given up would keep its slot for ever",
        "pager.daemon:Pager._publish",
        (
            (
                "            self._waiters.wake(woken)\n",
                "            from shmroute.shared.atomic import fetch_or\n"
                "            fetch_or(self._table.address(load.key), woken)\n"
                "            self._waiters.wake(woken)\n",
            ),
        ),
        ("impatient",),
    ),
    Mutant(
        "a bit for each holder",
        "a lease's bit goes when its last holder goes, not when one of them does",
        "shared.lease_table:give_back",
        (("    if table[count] > 0:\n        return 0\n", ""),),
        ("threads",),
    ),
    Mutant(
        "a lease count without its mutex",
        "one mutex covers the count of a process's leases and their bit",
        "leases:Leases.release",
        (("        with self._mutex:\n", "        if True:\n"),),
        ("threads",),
    ),
)
