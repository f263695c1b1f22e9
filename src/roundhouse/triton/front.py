"""The front: one thread that carries the streams of one model instance between Triton and the engine.

`execute` hands jobs over and returns. The thread does everything else in one loop: takes the engine's outputs, sends
responses at the pace, notices clients that have gone, keeps count. Streams with tokens pending stand in one queue,
oldest first, so that none starves; what arrives while a stream waits travels together. The first chunk of an answer
and the last go before all others: a client waits for the one, and sends its next request after the other.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from roundhouse.bugs import described
from roundhouse.engine.protocol import Error, ErrorCode, FinishReason, Output, Request, Stats
from roundhouse.metrics import Record
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.stop_words import StopMatcher
from roundhouse.triton.mailbox import Mailbox, Passed, Post, Stop
from roundhouse.triton.metrics import Metrics
from roundhouse.triton.pacing import Pace, Passage
from roundhouse.triton.stream import Form, Job, Stream

IDLE_SECONDS = 0.25  # the longest that the loop waits for anything
SLICE = 16  # responses between two looks at what the engine has sent
MAX_UNACKNOWLEDGED = 2  # chunks of one stream on their way through postprocessing, before its last
MAX_ON_THE_WAY = 16  # chunks of all streams of all fronts: so long is the queue that a first chunk finds there
PASSAGE_SECONDS = 0.1  # after which a chunk that was not passed on holds up no other
LOST_SECONDS = 1.5  # a chunk that postprocessing did not get, while it got later ones of others
SILENT_SECONDS = 2.2  # the same, when there were none of others
LONGEST_TURN = 0.5  # of the loop, as silence counts; what is longer was our own: stopped, or the machine slept
TEXTLESS_SECONDS = 0.5  # tokens without text go to postprocessing after it, to learn whether the client is there
STEP_COST = 2.5  # responses: what a chunk on its way through postprocessing too takes of the machine
CHECKS_PER_SECOND = 400  # questions to Triton whether a client is still there; each costs about 0.1 ms
CHECK_SECONDS = 0.4  # no client is asked for more often


CANCELLED = Error(ErrorCode.CANCELLED, "the client has cancelled the request")
NOT_READ = Error(
    ErrorCode.CANCELLED,
    "the ensemble has not passed the answer on: its client has gone, or postprocessing stands still; send it again",
)
MISTAKE = Error(ErrorCode.INTERNAL, "the server made a mistake with this request; see its log")


class Client(Protocol):
    """What the loop needs of the engine client."""

    @property
    def stats(self) -> Stats | None: ...

    @property
    def restarts(self) -> int: ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def cancel(self, ids: Sequence[int]) -> None: ...

    def poll(self, timeout: float) -> list[Output]: ...

    def wake(self) -> None: ...

    def watch(self, socket: zmq.Socket[bytes]) -> None: ...

    def close(self) -> None: ...


class Front:
    def __init__(
        self,
        client: Client,
        detokenizer: Detokenizer,
        metrics: Metrics,
        *,
        folder: Path,
        number: int,
        fronts: int,
        responses_per_second: float,
        log: Callable[[str], None],
    ) -> None:
        """`number`: this front's name among those of the server. `fronts`: how many share postprocessing. `folder`: the
        server's runtime folder."""
        self._client = client
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._number = number
        self._log = log
        self._mailbox = Mailbox(folder, number)
        self._post = Post(folder)
        client.watch(self._mailbox.socket)
        self._turned = time.monotonic()
        self._paused = 0.0  # seconds that do not count: see LONGEST_TURN
        self._pace = Pace(responses_per_second, self._now())
        self._orders: deque[Job | Stop] = deque()  # from `execute`
        self._jobs: deque[Job] = deque()  # in the order in which their clients are asked for
        self._streams: dict[int, Stream] = {}
        self._urgent: deque[Stream] = deque()  # first and last chunks
        self._queue: deque[Stream] = deque()
        self._next_check = 0.0
        self._passage = Passage(max(MAX_ON_THE_WAY // fronts, 1), PASSAGE_SECONDS)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._orders.append(job)
        self._client.wake()

    def stop(self, request_id: str) -> None:
        """End the requests with this id, whichever front has them. They complete with what they have."""
        self._orders.append(Stop(request_id))
        self._client.wake()

    def close(self) -> None:
        self._closing = True
        self._client.wake()
        self._thread.join(timeout=5)

    # --- the loop: everything below runs in the thread ------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                outputs = self._client.poll(self._timeout())
                self._turn()
                for output in outputs:
                    self._take(output)
                self._take_orders()
                self._read_mail()
                self._send()
                self._look_after_clients()
                self._metrics.publish(self._client.stats, self._client.restarts)
            except Exception as error:
                self._log(f"front: ends its {len(self._streams)} streams after an error: {described(error)}")
                self._abandon()
                time.sleep(IDLE_SECONDS)  # what does not pass by itself must not fill the log
        self._mailbox.close()
        self._post.close()
        self._client.close()

    def _now(self) -> float:
        """Monotonic seconds, without those in which this process did not run."""
        return time.monotonic() - self._paused

    def _turn(self) -> None:
        """Called once a turn of the loop: what it took beyond LONGEST_TURN is no silence."""
        now = time.monotonic()
        self._paused += max(now - self._turned - LONGEST_TURN, 0.0)
        self._turned = now

    def _timeout(self) -> float:
        now = self._now()
        waits = [IDLE_SECONDS]
        if self._urgent:
            return 0.0
        if self._queue:
            waits.append(self._wait(now))
        if self._jobs:
            waits.append(max(self._next_check - now, 0.0))
        return min(waits)

    def _take_orders(self) -> None:
        opened: list[tuple[Job, list[Request]]] = []
        while self._orders:
            order = self._orders.popleft()
            if isinstance(order, Stop):
                self._post.broadcast(order)
            else:
                try:
                    opened.append((order, self._open(order)))
                except Exception as error:
                    self._break(order, error)
        if opened:
            self._submit(opened)

    def _submit(self, opened: list[tuple[Job, list[Request]]]) -> None:
        """Together, so that the engine can begin them together; if they cannot be sent so, job by job."""
        try:
            self._client.submit([request for _, requests in opened for request in requests])
        except Exception:
            for job, requests in opened:
                try:
                    self._client.submit(requests)
                except Exception as error:
                    self._break(job, error)

    def _open(self, job: Job) -> list[Request]:
        requests = []
        job.open = 1  # until it is known how many
        for batch_index, generation in enumerate(job.generations):
            if generation is None:
                continue  # refused already; its neighbours in the batch go on
            words, min_tokens = generation.stop_words, generation.request.sampling.min_tokens
            matcher = StopMatcher(words, self._detokenizer, min_tokens) if words else None
            for sequence_index, request in enumerate(generation.engine_requests()):
                id = secrets.randbits(62)  # clients of postprocessing can name a stream: they must not guess it
                own = matcher.another() if matcher is not None else None
                stream = Stream(self._number, id, job, generation, batch_index, sequence_index, self._detokenizer, own)
                job.streams.append(stream)
                self._streams[stream.id] = stream
                times = {"arrival_ns": job.arrival_ns, "deadline_ns": job.deadline_ns}
                requests.append(msgspec.structs.replace(request, id=stream.id, **times))
        job.open = len(job.streams)
        self._jobs.append(job)
        return requests

    def _read_mail(self) -> None:
        for note in self._mailbox.read():
            if isinstance(note, Stop):
                self._stop_job(note.request_id)
                continue
            stream = self._streams.get(note.stream)
            if stream is None:
                continue
            if isinstance(note, Passed):
                self._passed(stream, note)
            elif not stream.job.cancelled:
                self._cancel(stream.job)

    def _passed(self, stream: Stream, note: Passed) -> None:
        sent = stream.unacknowledged.pop(note.chunk, None)
        if sent is not None:
            self._passage.passed(sent)
        if stream.done:
            self._forget_if_settled(stream)
        elif stream.sendable():
            self._enqueue(stream)

    def _stop_job(self, request_id: str) -> None:
        for job in self._jobs:
            if job.request_id == request_id:
                live = [stream for stream in job.streams if not stream.last and not stream.stopped]
                for stream in live:
                    stream.stopped = True
                self._client.cancel([stream.id for stream in live])

    def _take(self, output: Output) -> None:
        stream = self._streams.get(output.id)
        if stream is None or stream.done:
            return
        if stream.take(output):
            self._client.cancel([stream.id])
        if stream.last and stream.job.cancelled:
            self._finish(stream)
        elif stream.sendable():
            self._enqueue(stream)

    def _enqueue(self, stream: Stream) -> None:
        """Let it stand in the queue, or, to begin or to end its answer, before all that do."""
        if stream.last:
            stream.queued = True  # it may be in the queue too, where it will be passed over
            self._urgent.append(stream)
        elif not stream.queued and len(stream.unacknowledged) < MAX_UNACKNOWLEDGED:
            stream.queued = True
            (self._queue if stream.chunks else self._urgent).append(stream)

    def _wait(self, now: float) -> float:
        """Seconds until the next stream in the queue may send; acknowledgements may shorten it."""
        passage = self._passage.wait(now) if self._queue[0].job.form is Form.STEP else 0.0
        return max(self._pace.wait(now), passage)

    def _send(self) -> None:
        now = self._now()
        for _ in range(SLICE):
            if self._urgent:
                stream = self._urgent.popleft()
            elif self._queue and not self._wait(now):
                stream = self._queue.popleft()
            else:
                return
            was_queued, stream.queued = stream.queued, False
            if was_queued and not stream.job.cancelled:
                try:
                    self._respond(stream, now)
                except Exception as error:
                    self._break(stream.job, error)

    def _respond(self, stream: Stream, now: float) -> None:
        job = stream.job
        final = stream.last and job.open == 1
        if stream.error is not None:
            job.sender.fail(stream.error, final=final)
        else:
            since = stream.textless_since or now
            tensors = stream.chunk(textless=job.form is Form.STEP and now - since > TEXTLESS_SECONDS)
            stream.textless_since = since if tensors is None else None
            if tensors is None:
                return
            self._pace.take(STEP_COST if job.form is Form.STEP else 1.0)
            if stream.chunks == 1:
                self._metrics.first_token(time.monotonic_ns() - job.arrival_ns)
            if job.form is Form.STEP:
                stream.unacknowledged[stream.chunks] = self._passage.send(now)
            job.sender.send(tensors, final=final)
        if stream.last:
            self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        """The stream has sent its last response, or nobody wants it any more."""
        job = stream.job
        stream.done = True
        job.open -= 1
        self._metrics.finished(record_of(stream, time.monotonic_ns()))
        self._forget_if_settled(stream)
        if job.cancelled and not job.open:
            job.sender.fail(NOT_READ if job.form is Form.STEP else CANCELLED, final=True)

    def _forget_if_settled(self, stream: Stream) -> None:
        if stream.job.cancelled or not stream.unacknowledged:
            self._streams.pop(stream.id, None)

    def _look_after_clients(self) -> None:
        """Ask, in turn, whether the client of a job is still there."""
        now = self._now()
        while self._jobs and now >= self._next_check:
            job = self._jobs.popleft()
            if not self._is_alive(job):
                continue  # that costs nothing: only questions are paced, or finished jobs would gather
            gone = self._is_lost(job, now) if job.form is Form.STEP else bool(job.open) and job.sender.cancelled()
            if gone:
                self._cancel(job)
            if self._is_alive(job):
                self._jobs.append(job)
            now = self._now()
            self._next_check = now + max(CHECK_SECONDS / (len(self._jobs) or 1), 1 / CHECKS_PER_SECOND)

    def _is_alive(self, job: Job) -> bool:
        return not job.cancelled and any(stream.id in self._streams for stream in job.streams)

    def _is_lost(self, job: Job, now: float) -> bool:
        """Whether the ensemble no longer passes a job's chunks on: its client is gone, and Triton does not tell."""
        oldest = min((sent for stream in job.streams for sent in stream.unacknowledged.values()), default=None)
        if oldest is None:
            return False
        return now - oldest.at > (LOST_SECONDS if self._passage.overtook(oldest) else SILENT_SECONDS)

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        self._client.cancel([stream.id for stream in job.streams if not stream.last])
        for stream in job.streams:
            if stream.done:
                self._forget_if_settled(stream)
            elif stream.last:
                self._finish(stream)

    def _abandon(self) -> None:
        """After a bug: end all streams with an error rather than leave their clients waiting."""
        for job in {id(stream.job): stream.job for stream in self._streams.values()}.values():
            self._fail(job)
        self._urgent.clear()
        self._queue.clear()
        self._jobs.clear()

    def _break(self, job: Job, error: Exception) -> None:
        """End one request after an error that is its own: of Triton, which could not take a response, or a bug."""
        self._log(f"front: ends a request after an error: {described(error)}")
        self._fail(job)

    def _fail(self, job: Job) -> None:
        """Does not raise."""
        was_open, job.open, job.cancelled = job.open, 0, True
        for stream in job.streams:
            stream.done = True
            self._streams.pop(stream.id, None)
        with suppress(Exception):
            self._client.cancel([stream.id for stream in job.streams if not stream.last])
        if was_open:
            with suppress(Exception):
                job.sender.fail(MISTAKE, final=True)


def record_of(stream: Stream, now_ns: int) -> Record:
    return Record.of(
        prompt_tokens=len(stream.generation.request.prompt),
        generated_tokens=stream.generated,
        arrival_ns=stream.job.arrival_ns,
        now_ns=now_ns,
        perf=stream.perf,
        error=stream.error,
        cancelled=stream.job.cancelled or stream.finish_reason is FinishReason.CANCELLED,
    )
