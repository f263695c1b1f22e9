"""The front's loop on a client and senders of the test's own: order, pacing, stop words, clients that go away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from roundhouse.engine.protocol import Error, ErrorCode, FinishReason, Output, Request, Submit, encode
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.triton import front as fronts
from roundhouse.triton.front import Front
from roundhouse.triton.generation import Generation
from roundhouse.triton.mailbox import Passed, Post
from roundhouse.triton.stream import Form, Job

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "models/tiny")
DETOKENIZER = Detokenizer(TOKENIZER)


class QueueClient:
    """An engine client whose outputs the test decides."""

    stats = None
    restarts = 0

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self._outputs: list[Output] = []
        self._lock = threading.Lock()
        self._event = threading.Event()

    def give(self, *outputs: Output) -> None:
        with self._lock:
            self._outputs += outputs
        self._event.set()

    def wait_taken(self) -> None:
        """Until the front has taken what was given: it deals with it before it looks at its mailbox again."""
        deadline = time.monotonic() + 5
        while self._outputs and time.monotonic() < deadline:
            time.sleep(0.001)

    def submit(self, requests: Sequence[Request]) -> None:
        self.submitted += requests

    def cancel(self, ids: Sequence[int]) -> None:
        self.cancelled += ids
        self.give(*(Output(id=id, tokens=[], finish_reason=FinishReason.CANCELLED) for id in ids))

    def poll(self, timeout: float) -> list[Output]:
        self._event.wait(min(timeout, 0.01))  # short, for it does not watch the mailbox
        self._event.clear()
        with self._lock:
            outputs, self._outputs = self._outputs, []
        return outputs

    def wake(self) -> None:
        self._event.set()

    def watch(self, socket: object) -> None:
        pass

    def close(self) -> None:
        pass


class ListSender:
    """A response sender that remembers."""

    def __init__(self) -> None:
        self.responses: list[dict[str, np.ndarray]] = []
        self.errors: list[Error] = []
        self.finished = threading.Event()
        self.gone = False

    def send(self, tensors: Any, *, final: bool) -> None:
        self.responses.append(dict(tensors))
        if final:
            self.finished.set()

    def fail(self, error: Error, *, final: bool) -> None:
        self.errors.append(error)
        if final:
            self.finished.set()

    def cancelled(self) -> bool:
        return self.gone

    @property
    def texts(self) -> list[str]:
        return [response["text_output"][0].decode() for response in self.responses]


class NoMetrics:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def client() -> QueueClient:
    return QueueClient()


def start(client: QueueClient, folder: Path, *, rate: float = 1e6, fronts: int = 1, log: Any = pytest.fail) -> Front:
    return Front(
        client,
        DETOKENIZER,
        NoMetrics(),  # type: ignore[arg-type]
        folder=folder,
        number=1,
        fronts=fronts,
        responses_per_second=rate,
        log=log,
    )


@pytest.fixture
def front(client: QueueClient, tmp_path: Path) -> Iterator[Front]:
    front = start(client, tmp_path)
    yield front
    front.close()


def job(*, form: Form = Form.TEXT, stream: bool = True, **settings: Any) -> tuple[Job, ListSender]:
    request = Request(id=0, prompt=(5,), max_tokens=100)
    sender = ListSender()
    return Job([Generation(request=request, stream=stream, **settings)], sender, form, time.monotonic_ns()), sender


def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def submit(front: Front, client: QueueClient, made: Job) -> int:
    before = len(client.submitted)
    front.submit(made)
    until(lambda: len(client.submitted) > before)
    return client.submitted[-1].id


def test_tokens_become_text_and_the_last_response_is_final(front: Front, client: QueueClient) -> None:
    made, sender = job()
    id = submit(front, client, made)
    ids = TOKENIZER.encode("hello, 🚂 world", False)
    for token in ids[:-1]:
        client.give(Output(id=id, tokens=[token]))
    client.give(Output(id=id, tokens=ids[-1:], finish_reason=FinishReason.LENGTH))
    assert sender.finished.wait(5)
    assert "".join(sender.texts) == "hello, 🚂 world"
    assert "" not in sender.texts[:-1]
    assert sender.responses[-1]["finish_reason"][0] == b"length"


def test_a_stop_word_ends_the_answer_and_cancels_the_engine(front: Front, client: QueueClient) -> None:
    made, sender = job(stop_words=(tuple(TOKENIZER.encode("stop", False)),))
    id = submit(front, client, made)
    for token in TOKENIZER.encode("now stop here", False):
        client.give(Output(id=id, tokens=[token]))
    assert sender.finished.wait(5)
    assert "".join(sender.texts) == "now stop"
    assert client.cancelled == [id]
    assert sender.responses[-1]["finish_reason"][0] == b"stop"


def test_stop_words_are_decoded_once_for_all_samples(
    front: Front, client: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Sequence[int]] = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda *given: (decoded.append(given[1]), decode(*given))[1])
    word = tuple(TOKENIZER.encode("stop", False))
    made, sender = job(stop_words=(word,), sequences=3)
    submit(front, client, made)
    first, *others = (request.id for request in client.submitted)
    for token in TOKENIZER.encode("now stop here", False):
        client.give(Output(id=first, tokens=[token]), *(Output(id=id, tokens=[10]) for id in others))
    client.give(*(Output(id=id, tokens=[], finish_reason=FinishReason.LENGTH) for id in others))
    assert sender.finished.wait(5)
    assert client.cancelled == [first]
    assert [list(ids) for ids in decoded].count(list(word)) == 1


def test_a_client_that_goes_away_frees_its_stream(front: Front, client: QueueClient) -> None:
    made, sender = job()
    id = submit(front, client, made)
    client.give(Output(id=id, tokens=[10]))
    sender.gone = True
    assert sender.finished.wait(2)
    assert client.cancelled == [id]
    assert sender.errors[0].code is ErrorCode.CANCELLED


def test_a_stop_order_completes_the_request_with_what_it_has(front: Front, client: QueueClient) -> None:
    made, sender = job(stream=False)
    made.request_id = "seven"
    id = submit(front, client, made)
    client.give(Output(id=id, tokens=TOKENIZER.encode("half", False)))
    client.wait_taken()
    front.stop("six")
    front.stop("seven")
    assert sender.finished.wait(2)
    assert sender.texts == ["half"]
    assert not sender.errors


def test_an_engine_error_ends_only_its_own_stream(front: Front, client: QueueClient) -> None:
    (bad, bad_sender), (good, good_sender) = job(), job()
    bad_id, good_id = submit(front, client, bad), submit(front, client, good)
    client.give(
        Output(id=bad_id, tokens=[], error=Error(ErrorCode.UNAVAILABLE, "gone")),
        Output(id=good_id, tokens=TOKENIZER.encode("fine", False), finish_reason=FinishReason.STOP),
    )
    assert bad_sender.finished.wait(5)
    assert good_sender.finished.wait(5)
    assert bad_sender.errors[0].message == "gone"
    assert good_sender.texts == ["fine"]


def test_beyond_the_pace_tokens_travel_together_and_first_tokens_do_not_wait(
    client: QueueClient, tmp_path: Path
) -> None:
    front = start(client, tmp_path, rate=20)
    try:
        made = [job() for _ in range(10)]
        ids = [submit(front, client, one) for one, _ in made]
        letters = TOKENIZER.encode("a", False)
        for _ in range(50):
            client.give(*(Output(id=id, tokens=letters) for id in ids))
            time.sleep(0.01)
        assert all(sender.responses for _, sender in made)  # ten first tokens, at a pace of 20 a second
        client.give(*(Output(id=id, tokens=[], finish_reason=FinishReason.LENGTH) for id in ids))
        for _, sender in made:
            assert sender.finished.wait(10)
            assert "".join(sender.texts) == "a" * 50
        assert sum(len(sender.responses) for _, sender in made) <= 10 + 10 + 20
    finally:
        front.close()


def test_last_chunks_go_before_those_that_wait(client: QueueClient, tmp_path: Path) -> None:
    front = start(client, tmp_path, rate=0.5)
    try:
        made = [job() for _ in range(5)]
        ids = [submit(front, client, one) for one, _ in made]
        letters = TOKENIZER.encode("a", False)
        for _ in range(2):  # the second ones wait: five first ones have used up the pace for ten seconds
            client.give(*(Output(id=id, tokens=letters) for id in ids))
            client.wait_taken()
        sender = made[-1][1]
        client.give(Output(id=ids[-1], tokens=letters, finish_reason=FinishReason.LENGTH))
        assert sender.finished.wait(5)
        assert sender.texts == ["a", "aa"]
        assert [len(other.responses) for _, other in made[:-1]] == [1] * 4
    finally:
        front.close()


class TestEnsembleStep:
    def test_chunks_wait_for_postprocessing(self, front: Front, client: QueueClient, tmp_path: Path) -> None:
        made, sender = job(form=Form.STEP)
        id = submit(front, client, made)
        letter = TOKENIZER.encode("a", False)
        post = Post(tmp_path)
        for number in range(1, 5):
            client.give(Output(id=id, tokens=letter))
            until(lambda number=number: len(sender.responses) == min(number, 2))
        post.send(1, Passed(id, 1))
        until(lambda: len(sender.responses) == 3)
        assert sender.responses[-1]["sequence_length"].item() == 2  # what gathered meanwhile
        assert [r["chunk"][0, :4].tolist() for r in sender.responses] == [[1, id, n, 0] for n in (1, 2, 3)]
        client.give(Output(id=id, tokens=letter, finish_reason=FinishReason.LENGTH))
        assert sender.finished.wait(1)  # the last one waits for nobody
        assert [r["chunk"][0, :4].tolist() for r in sender.responses[3:]] == [[1, id, 4, 1]]
        post.close()

    def test_a_chunk_carries_what_its_text_depends_on(self, front: Front, client: QueueClient, tmp_path: Path) -> None:
        made, sender = job(form=Form.STEP)
        id = submit(front, client, made)
        post = Post(tmp_path)
        text = "a 🚂, ein Zug"
        *ids, last = TOKENIZER.encode(text, False)
        for token in ids:
            before = len(sender.responses)
            client.give(Output(id=id, tokens=[token]))
            client.wait_taken()
            time.sleep(0.01)
            for number in range(before, len(sender.responses)):  # none, in the middle of a character
                post.send(1, Passed(id, number + 1))
        client.give(Output(id=id, tokens=[last], finish_reason=FinishReason.LENGTH))
        assert sender.finished.wait(1)
        texts = []
        for response in sender.responses:
            *_, is_last = response["chunk"][0, :4].tolist()
            window, tokens = response["chunk"][0, 4:].tolist(), response["output_ids"].reshape(-1).tolist()
            texts.append(DETOKENIZER.chunk_text(window, tokens, bool(is_last)))
        assert "".join(texts) == text
        assert len(texts) > 3
        post.close()

    @pytest.mark.parametrize(("fronts", "on_the_way"), [(1, 16), (4, 4), (64, 1)])
    def test_all_fronts_together_keep_so_many_on_their_way(
        self, client: QueueClient, tmp_path: Path, fronts: int, on_the_way: int
    ) -> None:
        front = start(client, tmp_path, fronts=fronts)
        try:
            made = [job(form=Form.STEP) for _ in range(10)]
            ids = [submit(front, client, one) for one, _ in made]
            post, letter = Post(tmp_path), TOKENIZER.encode("a", False)
            client.give(*(Output(id=id, tokens=letter) for id in ids))
            until(lambda: all(sender.responses for _, sender in made))  # first ones wait for nobody
            post.send(1, Passed(ids[-1], 1))
            client.give(*(Output(id=id, tokens=letter) for id in ids))
            client.wait_taken()
            time.sleep(0.05)  # less than the patience
            assert sum(len(sender.responses) for _, sender in made) == 10 + min(on_the_way, 10)
            post.close()
        finally:
            front.close()

    def test_a_chunk_takes_more_of_the_pace_than_a_response_of_one_model(
        self, client: QueueClient, tmp_path: Path
    ) -> None:
        front = start(client, tmp_path, rate=4)
        try:
            counts = []
            for form in (Form.TEXT, Form.STEP):
                time.sleep(1)  # the bucket is full again
                (made, sender), letter = job(form=form), TOKENIZER.encode("a", False)
                id, post, passed = submit(front, client, made), Post(tmp_path), 0
                ends = time.monotonic() + 2.5
                while time.monotonic() < ends:
                    client.give(Output(id=id, tokens=letter))
                    time.sleep(0.02)
                    for passed in range(passed + 1, len(sender.responses) + 1):  # noqa: B020
                        post.send(1, Passed(id, passed))
                client.cancel([id])
                assert sender.finished.wait(5)
                counts.append(len(sender.responses))
                post.close()
            assert 10 <= counts[0] <= 13
            assert 4 <= counts[1] <= 6
        finally:
            front.close()

    def test_tokens_without_text_tell_too_whether_the_client_is_gone(self, front: Front, client: QueueClient) -> None:
        made, sender = job(form=Form.STEP)
        id = submit(front, client, made)
        began = time.monotonic()
        while not sender.finished.is_set() and time.monotonic() - began < 5:
            client.give(Output(id=id, tokens=[TOKENIZER.eos_token_id]))
            time.sleep(0.02)
        assert client.cancelled == [id]
        (chunk, *_) = sender.responses
        assert chunk["sequence_length"].item() > 1, "they have waited for text"
        assert 0.5 < time.monotonic() - began < 3.5

    @pytest.mark.parametrize("silence", ["LOST_SECONDS", "SILENT_SECONDS"])
    def test_a_pause_of_the_whole_machine_loses_nothing(
        self, client: QueueClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silence: str
    ) -> None:
        monkeypatch.setattr(fronts, silence, 1.0)
        front = start(client, tmp_path)
        (made, sender), post, poll = job(form=Form.STEP), Post(tmp_path), client.poll
        id = submit(front, client, made)
        letter = TOKENIZER.encode("a", False)
        for number in (1, 2):
            client.give(Output(id=id, tokens=letter))
            until(lambda number=number: len(sender.responses) == number)
        if silence == "LOST_SECONDS":
            post.send(1, Passed(id, 2))

        def stopped(timeout: float) -> list[Output]:
            time.sleep(2)
            client.poll = poll  # type: ignore[method-assign]
            return poll(timeout)

        client.poll = stopped  # type: ignore[method-assign]
        until(lambda: client.poll == poll)
        time.sleep(0.1)
        assert not client.cancelled
        post.send(1, Passed(id, 1))
        client.give(Output(id=id, tokens=letter, finish_reason=FinishReason.LENGTH))
        assert sender.finished.wait(1)
        assert not sender.errors
        post.close()
        front.close()

    def test_a_lost_chunk_means_that_the_client_is_gone(self, front: Front, client: QueueClient) -> None:
        made, sender = job(form=Form.STEP)
        id = submit(front, client, made)
        client.give(Output(id=id, tokens=[10]))
        assert sender.finished.wait(3)
        assert client.cancelled == [id]
        assert sender.errors[0].code is ErrorCode.CANCELLED  # were the client still there, it would have half an answer


def test_refused_neighbours_of_a_batch_keep_their_index(front: Front, client: QueueClient) -> None:
    made, sender = job(stream=False)
    made.generations = [None, made.generations[0]]
    id = submit(front, client, made)
    client.give(Output(id=id, tokens=TOKENIZER.encode("x", False), finish_reason=FinishReason.LENGTH))
    assert sender.finished.wait(5)
    assert sender.responses[0]["batch_index"].item() == 1


class TestMistakes:
    """A bug, or a Triton that cannot take a response, ends what it concerns with an error, and nothing else."""

    @pytest.fixture
    def log(self) -> list[str]:
        return []

    @pytest.fixture
    def front(self, client: QueueClient, tmp_path: Path, log: list[str]) -> Iterator[Front]:
        front = start(client, tmp_path, log=log.append)
        yield front
        front.close()

    def test_a_response_that_triton_does_not_take(self, front: Front, client: QueueClient, log: list[str]) -> None:
        (bad, bad_sender), (good, good_sender) = job(), job()
        bad_id, good_id = submit(front, client, bad), submit(front, client, good)

        def full(tensors: Any, *, final: bool) -> None:
            raise RuntimeError("Failed to increase the shared memory pool for 'the prompt'")

        bad_sender.send = full  # type: ignore[method-assign]
        for _ in range(2):
            client.give(*(Output(id=id, tokens=TOKENIZER.encode("a", False)) for id in (bad_id, good_id)))
            client.wait_taken()
        client.give(Output(id=good_id, tokens=[], finish_reason=FinishReason.STOP))
        assert bad_sender.finished.wait(5)
        assert good_sender.finished.wait(5)
        assert [error.code for error in bad_sender.errors] == [ErrorCode.INTERNAL]
        assert client.cancelled == [bad_id]
        assert "".join(good_sender.texts) == "aa"
        assert "RuntimeError" in log[0]
        assert "prompt" not in log[0]

    def test_a_request_that_cannot_be_opened(self, front: Front, client: QueueClient, log: list[str]) -> None:
        bad, bad_sender = job(stop_words=((-1,),))  # ids that no tokenizer takes; requests with them are refused before
        front.submit(bad)
        assert bad_sender.finished.wait(5)
        assert bad_sender.errors[0].code is ErrorCode.INTERNAL
        good, good_sender = job()
        client.give(Output(id=submit(front, client, good), tokens=[10], finish_reason=FinishReason.STOP))
        assert good_sender.finished.wait(5)

    def test_a_request_that_cannot_be_sent(self, front: Front, client: QueueClient, log: list[str]) -> None:
        live, live_sender = job()
        live_id = submit(front, client, live)
        (bad, bad_sender), (good, good_sender) = job(), job()
        bad.deadline_ns = 2**64
        take = client.submit

        def send(requests: Sequence[Request]) -> None:
            encode(Submit(list(requests)))
            take(requests)

        client.submit = send  # type: ignore[method-assign]
        front._orders += [bad, good]  # both in one turn
        client.wake()
        assert bad_sender.finished.wait(5)
        assert bad_sender.errors[0].code is ErrorCode.INTERNAL
        assert "OverflowError" in log[0]
        until(lambda: len(client.submitted) == 2)
        client.give(
            *(Output(id=id, tokens=[10], finish_reason=FinishReason.STOP) for id in (live_id, client.submitted[1].id))
        )
        for sender in (live_sender, good_sender):
            assert sender.finished.wait(5)
            assert not sender.errors

    def test_a_client_that_fails(self, front: Front, client: QueueClient, log: list[str]) -> None:
        made, sender = job()
        submit(front, client, made)
        poll, sender.fail = client.poll, _raises(sender.fail)  # type: ignore[method-assign]
        client.poll = _raises(poll)  # type: ignore[method-assign]
        until(lambda: log)
        assert len(log) < 3  # it does not fill the log
        client.poll = poll  # type: ignore[method-assign]
        again, sender = job()
        client.give(Output(id=submit(front, client, again), tokens=[10], finish_reason=FinishReason.STOP))
        assert sender.finished.wait(5)

    def test_an_unreadable_note(self, front: Front, client: QueueClient, tmp_path: Path, log: list[str]) -> None:
        made, sender = job()
        id = submit(front, client, made)
        with zmq.Context.instance().socket(zmq.PUSH) as socket:
            socket.connect(f"ipc://{tmp_path / 'mailbox-1'}")
            for note in (b"", b"\xc1", b"\x81\xa4type\xa6Passed"):
                socket.send(note)
            time.sleep(0.1)
        client.give(Output(id=id, tokens=[10], finish_reason=FinishReason.STOP))
        assert sender.finished.wait(5)
        assert not sender.errors
        assert not log


def _raises(then: Any) -> Any:
    def call(*args: object, **settings: object) -> None:
        then(*args, **settings)
        raise OSError("no luck")

    return call


class TestTimeouts:
    def test_the_engine_gets_the_deadline(self, front: Front, client: QueueClient) -> None:
        made, _ = job()
        made.deadline_ns = made.arrival_ns + 10**9
        submit(front, client, made)
        assert client.submitted[0].deadline_ns == made.arrival_ns + 10**9

    def test_expired_without_a_token_is_an_error(self, front: Front, client: QueueClient) -> None:
        made, sender = job()
        client.give(Output(id=submit(front, client, made), tokens=[], finish_reason=FinishReason.TIMEOUT))
        assert sender.finished.wait(5)
        assert sender.errors[0].code is ErrorCode.UNAVAILABLE
        assert "timeout expired" in sender.errors[0].message

    def test_expired_with_tokens_is_an_answer_that_says_so(self, front: Front, client: QueueClient) -> None:
        made, sender = job(stream=False)
        client.give(Output(id=submit(front, client, made), tokens=[10], finish_reason=FinishReason.TIMEOUT))
        assert sender.finished.wait(5)
        assert sender.responses[0]["finish_reason"][0] == b"timeout"


def test_finished_jobs_do_not_gather(front: Front, client: QueueClient) -> None:
    """More requests than clients are asked for: what is refused at once must not be remembered."""
    client.submit = lambda requests: client.give(  # type: ignore[method-assign]
        *(Output(id=one.id, tokens=[], error=Error(ErrorCode.QUEUE_FULL, "full")) for one in requests)
    )
    senders = []
    for _ in range(2000):
        made, sender = job()
        front.submit(made)
        senders.append(sender)
    assert all(sender.finished.wait(10) for sender in senders)
    until(lambda: not front._jobs, 1.0)


def test_stream_ids_cannot_be_guessed(front: Front, client: QueueClient) -> None:
    """Whoever calls postprocessing can name one, and so tell a front that a client is gone."""
    ids = [submit(front, client, job()[0]) for _ in range(20)]
    assert len({id >> 40 for id in ids}) == 20


def test_notes_for_nobody_open_no_sockets(tmp_path: Path) -> None:
    post = Post(tmp_path)
    for number in range(2000):
        post.send(number, Passed(1, 1))
    assert post._sockets == {}
    post.close()
