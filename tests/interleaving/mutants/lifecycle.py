"""Broken rules of creating and removing segments."""

from __future__ import annotations

from ..mutation import Mutant

LIFECYCLE = (
    Mutant(
        "published half-made",
        "a segment gets its name when it is whole",
        "shared.segment:create_segment",
        (
            ("            _initialise(segment, config_json, identifier.bytes)\n", ""),
            (
                "follow_symlinks=True)\n",
                "follow_symlinks=True)\n            _initialise(segment, config_json, identifier.bytes)\n",
            ),
        ),
        ("creation",),
    ),
    Mutant(
        "a dead remover's claim stays",
        "the claim of a remover that died can be taken over",
        "shared.removal:claim_destruction",
        (("            if not is_dead(word):\n", "            if True:\n"),),
        ("removal",),
    ),
    Mutant(
        "removal without another look",
        "who removes what nobody uses looks at the lanes again after the claim (lane claim / header state)",
        "shared.removal:claim_if_unused",
        (("    if not in_use():\n        return True\n", "    return True\n"),),
        ("reclaiming",),
    ),
    Mutant(
        "lane without another look",
        "who claims a lane looks at the header's state afterwards (lane claim / header state)",
        "attachment:Attachment._claim_lane",
        (("        if segment.closing:  # (lane claim / header state)\n", "        if False:\n"),),
        ("reclaiming", "removal"),
    ),
    Mutant(
        "a semaphore made after the removal",
        "who makes a semaphore looks at the header's state afterwards",
        "attachment:Attachment.pager_semaphore",
        (("                    if self.segment.closing:  # whoever", "                    if False:  # whoever"),),
        ("removal",),
    ),
    Mutant(
        "a dead remover's files stay",
        "a pager sees a removal through if whoever claimed it dies",
        "pager.process:_see_removal_through",
        (("        if claim_destruction(segment):\n", "        if False:\n"),),
        ("owners-end",),
    ),
)
