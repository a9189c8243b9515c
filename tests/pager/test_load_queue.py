"""`LoadQueue`: by priority, then in order of arrival."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shmroute.pager.queue import SLACK, LoadQueue
from shmroute.shared.words import NORMAL, PREFETCH, URGENT


def drain(queue: LoadQueue) -> list[int]:
    order = []
    while (head := queue.peek()) is not None:
        order.append(head[0])
        queue.remove(head[0])
    return order


def test_the_most_wanted_goes_first_and_equals_in_order_of_arrival() -> None:
    queue = LoadQueue()
    for key, priority in ((1, PREFETCH), (2, URGENT), (3, NORMAL), (4, URGENT), (5, PREFETCH), (6, NORMAL)):
        assert not queue.push(key, priority, 0.0)
    assert len(queue) == 6
    assert drain(queue) == [2, 4, 3, 6, 1, 5]
    assert len(queue) == 0


def test_peeking_takes_nothing_out() -> None:
    queue = LoadQueue()
    queue.push(1, NORMAL, 0.0)
    assert queue.peek() == queue.peek() == (1, NORMAL)
    assert 1 in queue


def test_a_higher_priority_upgrades_and_a_lower_one_changes_nothing() -> None:
    queue = LoadQueue()
    queue.push(1, PREFETCH, 0.0)
    queue.push(2, NORMAL, 0.0)
    assert queue.push(1, URGENT, 1.0)
    assert not queue.push(1, PREFETCH, 2.0)
    assert not queue.push(1, URGENT, 2.0)
    assert len(queue) == 2
    assert queue.peek() == (1, URGENT)
    assert drain(queue) == [1, 2]


def test_a_load_that_was_removed_comes_back_at_the_end_of_the_line() -> None:
    queue = LoadQueue()
    for key in (1, 2, 3):
        queue.push(key, NORMAL, 0.0)
    queue.remove(1)
    queue.remove(99)
    assert 1 not in queue
    queue.push(1, NORMAL, 1.0)
    assert drain(queue) == [2, 3, 1]


def test_a_load_that_is_put_back_has_its_former_place() -> None:
    queue = LoadQueue()
    for key in (1, 2, 3):
        queue.push(key, NORMAL, 0.0)
    entry = queue.remove(1)
    assert entry is not None
    assert 1 not in queue
    assert queue.peek() == (2, NORMAL)
    queue.put_back(1, entry)
    assert drain(queue) == [1, 2, 3]


def test_only_old_prefetches_are_stale() -> None:
    queue = LoadQueue()
    queue.push(1, PREFETCH, 1.0)
    queue.push(2, PREFETCH, 3.0)
    queue.push(3, NORMAL, 1.0)
    queue.push(4, PREFETCH, 1.0)
    queue.push(4, URGENT, 1.5)
    assert queue.stale_prefetches(2.0) == [1]
    queue.push(1, PREFETCH, 5.0)  # asking again makes it no younger
    assert queue.stale_prefetches(2.0) == [1]


def test_the_places_of_removed_loads_do_not_pile_up() -> None:
    queue = LoadQueue()
    queue.push(0, URGENT, 0.0)  # on top for ever, so that nothing under it is ever popped
    for _ in range(10 * SLACK):
        queue.push(1, PREFETCH, 0.0)
        queue.remove(1)
    assert len(queue._heap) <= 2 * len(queue) + SLACK + 2


@given(
    st.lists(st.tuples(st.sampled_from(["push", "remove"]), st.integers(0, 4), st.sampled_from([1, 2, 3])), max_size=40)
)
def test_it_behaves_like_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    queue = LoadQueue()
    model: dict[int, tuple[int, int]] = {}
    for arrival, (step, key, priority) in enumerate(steps):
        if step == "remove":
            queue.remove(key)
            model.pop(key, None)
        else:
            upgrade = key in model and model[key][0] > -priority
            assert queue.push(key, priority, 0.0) == upgrade
            if upgrade or key not in model:
                model[key] = (-priority, arrival)
    assert drain(queue) == sorted(model, key=lambda key: model[key])
