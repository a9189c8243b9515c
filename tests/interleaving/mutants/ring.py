"""Broken rules of the ring."""

from __future__ import annotations

from ..mutation import Mutant

RING = (
    Mutant(
        "unsigned compare",
        "tail may lag behind head: the distance is signed",
        "shared.ring:push",
        (
            (
                "if tail - load(ring + RING_HEAD) >= (1 << bits):",
                "if ((tail - load(ring + RING_HEAD)) & ((1 << 64) - 1)) >= (1 << bits):",
            ),
        ),
        ("ring-two-producers", "ring-of-one"),
    ),
    Mutant(
        "no tail help",
        "whoever finds a published entry behind the tail moves the tail along",
        "shared.ring:push",
        (("            cas(ring + RING_TAIL, tail, tail + 1)\n            continue", "            continue"),),
        ("ring-two-producers",),
    ),
    Mutant(
        "claim, then publish",
        "claim and publish are one CAS",
        "shared.ring:push",
        (
            (
                "        if cas(address, entry, signed((cycle << CYCLE_SHIFT) | int(request))):"
                "  # linearization point\n"
                "            cas(ring + RING_TAIL, tail, tail + 1)  # whoever fails here was helped\n",
                "        if cas(ring + RING_TAIL, tail, tail + 1):\n"
                "            cas(address, entry, signed((cycle << CYCLE_SHIFT) | int(request)))\n",
            ),
        ),
        ("ring-two-producers", "ring-of-one"),
    ),
    Mutant(
        "tail before entry",
        "the entry is published by a CAS from the entry that was read, not by a store",
        "shared.ring:push",
        (
            (
                "        if cas(address, entry, signed((cycle << CYCLE_SHIFT) | int(request))):",
                "        cas(address, load(address), signed((cycle << CYCLE_SHIFT) | int(request)))\n        if True:",
            ),
        ),
        ("ring-two-producers", "ring-of-one"),
    ),
    Mutant(
        "EMPTY by cursors",
        "whether there is work is read from the entry, never from head and tail",
        "shared.ring:pop",
        (
            ("        elif ((high32(entry) + 1) & LOW32) == cycle:", "        elif head == load(ring + RING_TAIL):"),
            (
                "        if high32(entry) == cycle:",
                "        if head != load(ring + RING_TAIL) and high32(entry) == cycle:",
            ),
        ),
        ("ring-two-consumers", "ring-pair"),
    ),
    Mutant(
        "work by cursors",
        "the same, when asked whether there is work",
        "shared.ring:ring_has_work",
        (("        if high32(entry) == ((head >> bits) & LOW32):", "        if head != load(ring + RING_TAIL):"),),
        ("ring-two-consumers",),
    ),
    Mutant(
        "pop without CAS",
        "an entry is taken by the CAS of head",
        "shared.ring:pop",
        (
            (
                "            if cas(ring + RING_HEAD, head, head + 1):  # linearization point",
                "            cas(ring + RING_HEAD, head, head + 1)\n            if True:",
            ),
        ),
        ("ring-two-consumers", "ring-of-one"),
    ),
    Mutant(
        "laps not modulo 2^32",
        "laps are compared modulo 2^32",
        "shared.ring:push",
        (("        if ((high32(entry) + 1) & LOW32) != cycle:", "        if high32(entry) + 1 != cycle:"),),
        ("ring-of-one",),
    ),
    Mutant(
        "head before tail",
        "head is read after the tail that it is compared with",
        "shared.ring:push",
        (
            (
                "        tail = load(ring + RING_TAIL)\n",
                "        head = load(ring + RING_HEAD)\n        tail = load(ring + RING_TAIL)\n",
            ),
            ("tail - load(ring + RING_HEAD) >=", "tail - head >="),
        ),
        ("ring-two-producers", "ring-of-one"),
    ),
)
