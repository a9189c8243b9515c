"""Broken rules of takeover and sweep."""

from __future__ import annotations

from ..mutation import Mutant

TAKEOVER = (
    Mutant(
        "LOADING kept over takeover",
        "what a dead pager was loading is requested again",
        "shared.experts:recover",
        (("            cas(address, word, pack_expert(REQUESTED, URGENT, 0, 0))", "            pass"),),
        ("takeover",),
    ),
    Mutant(
        "LOADING taken for RESIDENT at takeover",
        "torn bytes never become visible",
        "shared.experts:recover",
        (
            (
                "            cas(address, word, pack_expert(REQUESTED, URGENT, 0, 0))",
                "            cas(address, word, pack_expert(RESIDENT, 0, expert_slot(word), 0))",
            ),
        ),
        ("takeover",),
    ),
    Mutant(
        "free list not rebuilt",
        "a new pager takes the table for the truth about slots",
        "pager.slots:Slots.adopt",
        (
            (
                "    self._free = np.flatnonzero(self.eviction.owners < 0)[::-1].tolist()",
                "    self._free = list(range(len(self.eviction.owners)))",
            ),
        ),
        ("takeover", "takeover-of-one-slot"),
    ),
    Mutant(
        "no sweep",
        "the sweep finds requests that their worker died before pushing",
        "pager.daemon:Pager._sweep",
        (
            (
                "        for key in self._slots.scan():\n            if self._enqueue(key, now):\n"
                "                self._count(PagerCounter.SWEPT_REQUESTS)\n",
                "",
            ),
        ),
        ("routing", "shared"),
    ),
    Mutant(
        "bitmap not rebuilt",
        "takeover and sweep rebuild the bitmap",
        "pager.table:ExpertTable.rebuild_bitmaps",
        (("        for layer in range(self._layout.num_layers):", "        for layer in range(0):"),),
        ("takeover",),
    ),
    Mutant(
        "bitmap rebuilt as a whole",
        "a bit that an I/O thread sets meanwhile is kept",
        "shared.experts:rebuild_bitmap",
        (
            (
                "                show(word_address, resident_row, expert)\n",
                "                bits ^= 1 << (expert - first)\n                store(address, bits)\n",
            ),
        ),
        ("residency",),
    ),
    Mutant(
        "bit without another look",
        "whoever writes a bit looks at the word again",
        "shared.experts:show",
        (("        if shown == resident:\n            return\n", "        return\n"),),
        ("residency",),
    ),
    Mutant(
        "no reaping",
        "the dead's leases and wait words are cleared",
        "pager.reaper:Reaper.reap",
        (("            reaped += free_lane(self._segment, lane, identity)", "            pass"),),
        ("shared",),
    ),
)
