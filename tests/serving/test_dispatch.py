"""Which worker gets which job."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmroute.serving.dispatch import Dispatch


def test_the_longest_waiting_job_goes_to_the_longest_idle_worker():
    given = []
    dispatch = Dispatch(lambda worker, job: given.append((worker, job)))
    dispatch.free("a")
    dispatch.free("b")
    for job in (1, 2, 3, 4):
        dispatch.add(job)
    assert given == [("a", 1), ("b", 2)]
    dispatch.free("b")
    dispatch.free("a")
    assert given[2:] == [("b", 3), ("a", 4)]


def test_a_job_that_has_waited_before_goes_first():
    given = []
    dispatch = Dispatch(lambda worker, job: given.append((worker, job)))
    dispatch.add(1)
    dispatch.add(2, first=True)
    dispatch.free("a")
    assert given == [("a", 2)]


class Machine(RuleBasedStateMachine):
    """Workers come, die and finish; jobs come and are taken back: none is lost, and nobody idles while one waits."""

    def __init__(self):
        super().__init__()
        self.busy = {}
        self.idle, self.waiting = set(), set()
        self.numbers = iter(range(1000))
        self.dispatch = Dispatch(self.assign)

    def assign(self, worker, job):
        self.idle.remove(worker)
        self.waiting.remove(job)
        self.busy[worker] = job

    @rule()
    def worker_comes(self):
        worker = next(self.numbers)
        self.idle.add(worker)
        self.dispatch.free(worker)

    @rule()
    def job_comes(self):
        job = next(self.numbers)
        self.waiting.add(job)
        self.dispatch.add(job)

    @precondition(lambda self: self.busy)
    @rule()
    def worker_finishes(self):
        worker = min(self.busy)
        del self.busy[worker]
        self.idle.add(worker)
        self.dispatch.free(worker)

    @precondition(lambda self: self.busy)
    @rule()
    def busy_worker_dies(self):
        worker = min(self.busy)
        job = self.busy.pop(worker)
        self.dispatch.lose(worker)
        self.waiting.add(job)
        self.dispatch.add(job, first=True)

    @precondition(lambda self: self.idle)
    @rule()
    def idle_worker_dies(self):
        worker = min(self.idle)
        self.idle.remove(worker)
        self.dispatch.lose(worker)

    @precondition(lambda self: self.waiting)
    @rule()
    def waiting_job_is_taken_back(self):
        job = min(self.waiting)
        self.waiting.remove(job)
        assert self.dispatch.withdraw(job)

    @precondition(lambda self: self.busy)
    @rule()
    def assigned_job_cannot_be_taken_back(self):
        assert not self.dispatch.withdraw(min(self.busy.values()))

    @invariant()
    def counts_agree(self):
        assert self.dispatch.waiting == len(self.waiting)
        assert self.dispatch.idle == len(self.idle)
        assert not (self.waiting and self.idle)


TestDispatch = Machine.TestCase
