"""What must hold of a segment when all its workers have left, and of the machine when the segment is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

from shmroute.pager.waiters import awaited_by_lane
from shmroute.shared.atomic import WORD
from shmroute.shared.lanes import lane_identities
from shmroute.shared.layout import SLOT_HEADER_BYTES, SLOT_OWNER
from shmroute.shared.ring import ring_has_work
from shmroute.shared.words import LOADING, RESIDENT, expert_mask, expert_slot, expert_state, pack_wait
from stress.programs import PATIENCE, children
from stress.stage import Stage
from stress.timeline import PATIENT
from stress.truth import digest_of


def check_at_rest(stage: Stage) -> list[str]:
    """What is wrong with a segment that nobody works on any more; empty if nothing is.

    To be called when all workers have left and a pager serves. The dead are reaped within a tick of the pager, so what
    is found is looked at again until it goes, for a while.
    """
    found = _eventually_none(stage, _left_behind)
    found += _serve_everything(stage)
    return found + _eventually_none(stage, _inconsistent)


def check_removed(stage: Stage) -> list[str]:
    """What is left on the machine of a segment that was removed, its pagers ended; empty if nothing is."""
    found = [f"/dev/shm still has {path.name}" for path in stage.shared_files()]
    return found + [f"process {pid} is left" for pid in children()]


def _eventually_none(stage: Stage, look: Callable[[Stage], list[str]]) -> list[str]:
    """What `look` goes on finding."""
    deadline = time.monotonic() + PATIENCE / 4
    while found := look(stage):
        stage.pagers.step()
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return found


def _words(stage: Stage) -> dict[tuple[int, int], int]:
    segment, config = stage.segment, stage.segment.config
    return {
        (layer, expert): segment.read(segment.layout.row(segment.layout.experts, layer) + expert * WORD)
        for layer in range(config.num_layers)
        for expert in range(config.num_experts)
    }


def _left_behind(stage: Stage) -> list[str]:
    """Leases, wait words, lanes and requests of workers that are gone."""
    segment = stage.segment
    found = [
        f"expert {expert} of layer {layer} is still leased: mask {expert_mask(word):x}"
        for (layer, expert), word in _words(stage).items()
        if expert_mask(word)
    ]
    found += [f"lane {lane} still has a wait word" for lane, key in enumerate(awaited_by_lane(segment)) if key >= 0]
    found += [f"lane {lane} is still taken" for lane in lane_identities(segment)]
    if ring_has_work(segment.address + segment.layout.ring, segment.layout.ring_bits):
        found.append("the ring still has requests")
    return found


def _serve_everything(stage: Stage) -> list[str]:
    """Lease every expert once: all can be had, with the file's bytes, after whatever went before."""
    found = []
    for layer, expert in _words(stage):
        with stage.runtime.expert(layer, expert, PATIENT) as weights:
            if digest_of(weights.raw) != int(stage.truth.digests[layer, expert]):
                found.append(f"expert {expert} of layer {layer} is served with other bytes than the file's")
    return found


def _inconsistent(stage: Stage) -> list[str]:
    """Slots that two experts share or that nobody can use any more, and words that contradict each other.

    After more experts were demanded than there are slots, every slot must be in use: one that is not was leaked.
    """
    segment = stage.segment
    words = _words(stage)
    found, owner = [], dict[int, tuple[int, int]]()
    resident = 0
    for (layer, expert), word in words.items():
        if expert_state(word) not in (LOADING, RESIDENT):
            continue
        slot = expert_slot(word)
        if slot in owner:
            found.append(f"slot {slot} belongs to two experts: {owner[slot]} and {(layer, expert)}")
        owner[slot] = (layer, expert)
        if expert_state(word) == RESIDENT:
            resident += 1
            header = segment.read(segment.layout.slot_headers + slot * SLOT_HEADER_BYTES + SLOT_OWNER)
            if header != pack_wait(layer, expert):
                found.append(f"the header of slot {slot} names another expert than {(layer, expert)}")
        if expert_mask(word):
            found.append(f"expert {expert} of layer {layer} is leased by nobody: mask {expert_mask(word):x}")
    if len(words) > segment.config.slots != resident:
        found.append(f"{segment.config.slots - resident} of {segment.config.slots} slots are in nobody's use")
    for layer in range(segment.config.num_layers):
        bits = stage.runtime.resident(layer)
        truth = [e for (of, e), word in words.items() if of == layer and expert_state(word) == RESIDENT]
        if bits != truth:
            found.append(f"the bitmap of layer {layer} says {bits}, its words {truth}")
    return found
