"""One rank: its next step, and what the step has done when it ends."""

import random

from bench.simulator.costs import StepCosts
from bench.simulator.dispatch import Load
from bench.simulator.job import Request
from bench.simulator.modes import RankModes, Service
from bench.simulator.rank_queue import RankQueue
from bench.simulator.report import LOCAL, PREFILL, RankReport

_LEAST = 0.1  # of a step's time, however the dice fall


class Rank:
    """`number` among all ranks, `index` in its group. `modes` is None without SiDP;
    `service` is shared by the ranks of the group."""

    def __init__(
        self,
        number: int,
        index: int,
        queue: RankQueue,
        costs: StepCosts,
        service: Service,
        modes: RankModes | None,
        load: Load,
        jitter: float,
        dice: random.Random,
    ) -> None:
        self.number = number
        self.queue = queue
        self.report = RankReport(number)
        self.load = load
        self.is_busy = False
        self._costs = costs
        self._index = index
        self._service = service
        self._modes = modes
        self._jitter = jitter
        self._dice = dice
        self._step = ""  # prefill, local, was or cas: the step under way
        self._start = 0.0

    def submit(self, request: Request) -> None:
        self.queue.submit(request)
        self._report_load()

    def _report_load(self) -> None:
        queue = self.queue
        self.load.set(queue.num_requests, queue.used + queue.waiting_tokens)

    def begin(self, now: float) -> float | None:
        """When the step that begins `now` ends; None where there is nothing to do."""
        queue, self._start = self.queue, now
        work = queue.begin_prefill()
        if work is not None:
            self._step = PREFILL
            seconds = self._costs.prefill(work)
            if self._modes is not None:
                seconds = self._modes.prefill_seconds(now, seconds)
            self.report.prefill_tokens += int(work.rows)
        elif queue.batch:
            seconds = self._begin_decode(now)
        else:
            self.is_busy = False
            self._report_load()
            return None
        self.is_busy = True
        self._report_load()
        self._service.batches[self._index] = queue.batch
        if self._jitter:
            seconds *= max(_LEAST, self._dice.gauss(1.0, self._jitter))
        return now + seconds

    def _begin_decode(self, now: float) -> float:
        batch = self.queue.begin_decode()
        kv_tokens = self.queue.running_tokens
        if self._modes is None:
            self._step = LOCAL
            return self._costs.decode(batch, kv_tokens)
        self._step, seconds = self._modes.decode_seconds(now, batch, kv_tokens)
        return seconds

    def end(self, now: float) -> list[Request]:
        """The step that was begun ends; returns the requests that are done."""
        queue, report = self.queue, self.report
        batch, seconds = queue.batch, now - self._start
        report.count(self._step, seconds, batch, queue.used)
        if self._step == PREFILL:
            got_token, done = queue.end_prefill()
            report.output_tokens += len(got_token)
            for request in got_token:
                if request.first_token < 0:
                    request.first_token = now
        else:
            done = queue.end_decode()
            report.output_tokens += batch
            if self._modes is not None:
                self._modes.end_decode(seconds, queue.batch > 0)
        for request in done:
            request.finish = now
            request.rank = self.number
        report.finished += len(done)
        self._service.batches[self._index] = queue.batch
        return done

    def close(self) -> RankReport:
        report = self.report
        report.retractions = self.queue.retractions
        report.kv_capacity = self.queue.capacity
        if self._modes is not None:
            report.mode_switches = self._modes.policy.switches
            report.batch_threshold = self._modes.threshold
        return report
