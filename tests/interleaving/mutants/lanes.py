"""Broken rules of lanes and reaping."""

from __future__ import annotations

from ..mutation import Mutant

LANES = (
    Mutant(
        "second reaper",
        "only the holder of the pager's lock reaps",
        "pager_lock:PagerLock.try_acquire",
        (("                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "                pass\n"),),
        ("lanes-inherited", "lanes-reaped"),
    ),
    Mutant(
        "reap by lane, not by identity",
        "a lane is freed only if it still bears the dead worker's very identity",
        "shared.lanes:free_lane",
        (("    if segment.read(layout.lane(lane) + LANE_IDENTITY) != identity:\n        return False\n", ""),),
        ("lanes-reaped",),
    ),
    Mutant(
        "free before clear",
        "a lane is cleared first and freed last",
        "shared.lanes:vacate",
        (
            (
                "    clear_lane(experts, row_bytes, num_layers, bit)\n",
                "    _free(lane_address + LANE_IDENTITY)\n    clear_lane(experts, row_bytes, num_layers, bit)\n",
            ),
            ("LANE_SHARD_WORDS)\n    _free(lane_address + LANE_IDENTITY)\n", "LANE_SHARD_WORDS)\n"),
        ),
        ("lanes", "lanes-reaped"),
    ),
    Mutant(
        "claim without CAS",
        "a lane is claimed by a CAS of its identity word",
        "shared.lanes:claim",
        (
            (
                "        if cas(address, word, mine):  # linearization point",
                "        if cas(address, load(address), mine):",
            ),
        ),
        ("lanes",),
    ),
    Mutant(
        "the lock's file opened twice",
        "closing any descriptor of the lock's file drops the lock: a process opens it once",
        "pager_lock:PagerLock.try_acquire",
        (
            (
                "            self._fd = fd\n",
                "            self._fd = fd\n            os.close(os.open(path, os.O_RDWR))\n",
            ),
        ),
        ("takeover",),
    ),
)
