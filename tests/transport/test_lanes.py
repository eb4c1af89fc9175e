"""Large payloads on a socket of their own: order, ends, strangers."""

import gc
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from distgrad._codec import Frame, Outgoing, decode
from distgrad.errors import ProtocolError, TransportError
from distgrad.testing.transport_pair import Pair, expect, message, polling
from distgrad.transport._poller import Poller
from distgrad.transport._pool import SlabPool, touch
from distgrad.transport._stream import StreamConnection
from distgrad.transport.stream import TcpTransport
from distgrad.transport.warming import Warmer

LARGE = 4_000_000  # float64: far more than two sockets hold
PATIENCE_S = 20.0


def free(value: Any) -> Outgoing:
    """A message that may overtake."""
    content = message(value)
    content.overtakes = True
    return content


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(TcpTransport())
    pair.connect()
    yield pair
    pair.close()


class Raw:
    """A connection with a lane whose peer is two bare sockets in the hands of the test."""

    def __init__(self, make_pair: Any = socket.socketpair) -> None:
        self.socket, mine = make_pair()
        self.lane, other = make_pair()
        self.poller = Poller()
        self.connection = StreamConnection(
            self.poller, mine.detach(), scheme="tcp", peer_address="test", identity=None,
            lane=other.detach(),
        )  # fmt: skip
        self.events: list[Any] = []

    def poll_until_ended(self) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not any(isinstance(item, Exception | None) for item in self.events):
            assert time.monotonic() < deadline, self.events
            self.events += [item for _, item in self.poller.poll(0.01, False)]
        return self.events[-1]

    def poll(self, timeout_s: float) -> None:
        self.events += [item for _, item in self.poller.poll(timeout_s, False)]

    def bring(self, payload: bytes) -> None:
        """Send on the lane, and poll until that is taken in."""
        sender = threading.Thread(target=self.lane.sendall, args=(payload,))
        sender.start()
        while sender.is_alive():
            self.poll(0.01)
        for _ in range(10):
            self.poll(0.01)

    def close(self) -> None:
        self.poller.close()
        self.socket.close()
        self.lane.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


@pytest.fixture
def raw() -> Iterator[Raw]:
    raw = Raw()
    yield raw
    raw.close()


@pytest.fixture
def over_tcp() -> Iterator[Raw]:
    raw = Raw(tcp_pair)
    yield raw
    raw.close()


def announced(value: Any) -> tuple[bytes, bytes]:
    """What goes over the two sockets for a message."""
    head, *payload = message(value).parts()
    return b"\xfe" + bytes(63) + bytes(head), b"".join(map(bytes, payload))


# --- order


def test_messages_behind_a_large_one_keep_their_order(pair: Pair) -> None:
    pair.near.connection.send(message(0))
    assert not pair.near.connection.send(message(np.arange(LARGE, dtype=np.float64)))
    pair.near.connection.send(message(2))
    pair.near.connection.send(message(np.ones(LARGE)))
    pair.near.connection.send(message(np.ones(10_000)))
    pair.near.connection.send(message(5))
    pair.until(lambda: len(pair.far.events) == 6)
    values = pair.far.values()
    assert [values[0], values[2], values[5]] == [0, 2, 5]
    assert np.array_equal(values[1], np.arange(LARGE, dtype=np.float64))
    assert np.array_equal(values[3], np.ones(LARGE))
    assert np.array_equal(values[4], np.ones(10_000))


def test_message_that_may_overtake_arrives_before_a_large_one(pair: Pair) -> None:
    assert not pair.near.connection.send(message(np.ones(LARGE)))
    pair.near.connection.send(message("in order"))
    pair.near.connection.send(free("first"))
    for _ in range(3):  # the first is complete, the large one cannot be
        pair.far.poll(0.1)
        if pair.far.events:
            break
    assert pair.far.values() == ["first"]
    pair.until(lambda: len(pair.far.events) == 3)
    assert pair.far.values()[2] == "in order"


def test_message_that_may_overtake_keeps_its_place_where_nothing_is_large(pair: Pair) -> None:
    for number in range(100):
        pair.near.connection.send(free(number) if number % 2 else message(number))
    pair.until(lambda: len(pair.far.events) == 100)
    assert pair.far.values() == list(range(100))


def test_arrays_taken_back_while_they_are_sent_arrive_as_they_were(pair: Pair) -> None:
    connection = pair.near.connection
    with polling(pair.near), polling(pair.far):
        for number in range(20):
            array = np.full(LARGE // 8, float(number))
            content = message(array)
            if not connection.send(content):
                assert connection.detach(content) is not None
            array[:] = -1.0
    pair.until(lambda: len(pair.far.events) == 20)
    for number, received in enumerate(pair.far.values()):
        assert received.min() == received.max() == number


def test_arrays_taken_back_count_until_they_are_sent(pair: Pair) -> None:
    connection = pair.near.connection
    first, second = message(np.ones(LARGE)), message(np.ones(LARGE))
    assert not connection.send(first)
    assert not connection.send(second)
    kept = connection.detach(first)
    assert kept is not None
    assert 0 < kept < 8 * LARGE  # some of it has left
    assert connection.detach(second) == kept + 8 * LARGE
    pair.until(connection.flushed)
    assert connection.detach(second) == 0


def test_large_messages_both_ways_at_once_arrive_equal(pair: Pair) -> None:
    for number in range(3):
        for side in (pair.near, pair.far):
            side.connection.send(message(np.full(LARGE, float(number))))
            side.connection.send(message(number))
    pair.until(lambda: len(pair.far.events) == len(pair.near.events) == 6)
    for side in (pair.near, pair.far):
        values = side.values()
        assert values[1::2] == [0, 1, 2]
        assert [float(array[-1]) for array in values[::2]] == [0.0, 1.0, 2.0]


def test_threads_that_send_large_and_small_keep_each_their_order(pair: Pair) -> None:
    def send(first: int) -> None:
        for number in range(20):
            size = 50_000 if number % 3 == 0 else 1
            pair.near.connection.send(message((first, number, np.full(size, float(number)))))

    threads = [threading.Thread(target=send, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    pair.until(lambda: len(pair.far.events) == 60)
    for thread in threads:
        thread.join(PATIENCE_S)
    for first in range(3):
        mine = [(n, array) for f, n, array in pair.far.values() if f == first]
        assert [n for n, _ in mine] == list(range(20))
        assert all(np.all(array == n) for n, array in mine)


def test_connection_is_polled_only_when_it_has_its_lane() -> None:
    # A collection in the middle of its making lets another thread poll.
    first, mine = socket.socketpair()
    lane, other = socket.socketpair()
    head, payload = announced(np.arange(100_000.0))
    first.sendall(head)
    sender = threading.Thread(target=lane.sendall, args=(payload,))
    sender.start()
    poller, events = Poller(), []

    def poll() -> None:
        while not events:
            events.extend(poller.poll(PATIENCE_S, False))

    polls = threading.Thread(target=poll)
    polls.start()
    with collecting_often():
        connection = StreamConnection(
            poller, mine.detach(), scheme="tcp", peer_address="test", identity=None,
            lane=other.detach(),
        )  # fmt: skip
    polls.join(PATIENCE_S)
    sender.join(PATIENCE_S)
    assert [(ended, type(item)) for ended, item in events] == [(connection, Frame)]
    poller.close()
    first.close()
    lane.close()


@contextmanager
def collecting_often() -> Iterator[None]:
    """Let other threads run in each collection, of which there are as many as can be."""

    def pause(phase: str, info: Any) -> None:
        if threading.get_ident() == mine:
            time.sleep(1e-3)

    mine, before = threading.get_ident(), gc.get_threshold()
    gc.callbacks.append(pause)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(pause)


# --- ends


def test_end_before_the_payload_is_here_waits_for_it(raw: Raw) -> None:
    head, payload = announced(np.arange(100_000.0))
    raw.socket.sendall(head)
    raw.socket.shutdown(socket.SHUT_RDWR)
    sender = threading.Thread(target=raw.lane.sendall, args=(payload,))
    sender.start()
    assert raw.poll_until_ended() is None
    sender.join(PATIENCE_S)
    assert len(raw.events) == 2
    assert raw.events[0].payload is not None


def test_payload_that_is_here_when_the_lane_ends_is_received(raw: Raw) -> None:
    head, payload = announced(np.arange(10_000.0))
    raw.lane.sendall(payload)
    raw.lane.close()
    assert raw.poller.poll(0.0, False) == []
    raw.socket.sendall(head)
    raw.events += [item for _, item in raw.poller.poll(PATIENCE_S, False)]
    raw.socket.sendall(head)
    assert "in the middle of a message" in str(raw.poll_until_ended())
    assert [type(item) for item in raw.events[:-1]] == [Frame]


def test_message_that_overtakes_is_received_although_the_lane_ends_before(raw: Raw) -> None:
    head, payload = announced(np.arange(10_000.0))
    raw.socket.sendall(head)
    assert raw.poller.poll(0.0, False) == []
    near, mine = socket.socketpair()
    StreamConnection(raw.poller, mine.detach(), scheme="tcp", peer_address="it", identity=None)
    near.sendall(bytes(message("so that no other one is read first").parts()[0]))
    assert len(raw.poller.poll(PATIENCE_S, False)) == 1
    raw.lane.sendall(payload[:1000])
    assert raw.poller.poll(0.0, False) == []
    raw.lane.close()
    raw.socket.sendall(bytes(free("overtakes").parts()[0]))
    assert "in the middle of a message" in str(raw.poll_until_ended())
    assert [decode(item) for item in raw.events[:-1]] == ["overtakes"]
    near.close()


def test_payload_that_is_here_when_a_send_fails_is_received(raw: Raw) -> None:
    head, payload = announced(np.arange(10_000.0))
    raw.socket.sendall(head)
    assert raw.poller.poll(0.0, False) == []
    raw.lane.sendall(payload)
    raw.lane.close()
    with expect(TransportError):
        raw.connection.send(message(np.ones(100_000)))
    assert "cannot send to test" in str(raw.poll_until_ended())
    assert [type(item) for item in raw.events[:-1]] == [Frame]


def test_payload_that_is_here_when_the_socket_is_reset_is_received(raw: Raw) -> None:
    head, payload = announced(np.arange(10_000.0))
    raw.connection.send(message("not read, so that the end is a reset"))
    raw.socket.sendall(head)
    raw.lane.sendall(payload)
    raw.socket.close()
    assert "receive from test: Connection reset" in str(raw.poll_until_ended())
    assert [type(item) for item in raw.events[:-1]] == [Frame]


def test_end_waits_for_a_lane_as_long_as_it_brings_bytes(raw: Raw) -> None:
    head, payload = announced(np.arange(100_000.0))
    raw.socket.sendall(head)
    raw.socket.shutdown(socket.SHUT_RDWR)
    for start in range(0, len(payload), 100_000):
        raw.events += [item for _, item in raw.poller.poll(0.4, False)]
        raw.lane.sendall(payload[start : start + 100_000])
    assert raw.poll_until_ended() is None
    assert raw.events[0].payload is not None


def test_end_waits_for_a_lane_over_tcp_that_brings_little_at_a_time(over_tcp: Raw) -> None:
    head, payload = announced(np.arange(2_100_000.0))
    over_tcp.socket.sendall(head)
    over_tcp.bring(payload[:-400_000])
    over_tcp.socket.shutdown(socket.SHUT_WR)
    for start in range(len(payload) - 400_000, len(payload), 100_000):
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            over_tcp.poll(0.1)
        over_tcp.lane.sendall(payload[start : start + 100_000])
    assert over_tcp.poll_until_ended() is None
    assert over_tcp.events[0].payload is not None


@pytest.mark.parametrize("rest", [1, 10_000, 300_000])
def test_payload_whose_last_bytes_come_late_arrives(over_tcp: Raw, rest: int) -> None:
    array = np.arange(2_100_000.0)
    head, payload = announced(array)
    over_tcp.socket.sendall(head)
    over_tcp.bring(payload[:-rest])
    assert over_tcp.events == []
    over_tcp.bring(payload[-rest:])
    [frame] = over_tcp.events
    assert np.array_equal(decode(frame), array)


def test_messages_behind_a_payload_that_does_not_come_take_little_memory(raw: Raw) -> None:
    head, payload = announced(np.arange(100_000.0))
    behind = b"".join(map(bytes, message(bytes(60_000)).parts()))
    raw.socket.sendall(head)
    raw.socket.setblocking(False)
    sent = silent = 0
    while silent < 50:  # until it has stopped to read
        try:
            sent += raw.socket.send(behind[sent % len(behind) :])
            silent = 0
        except BlockingIOError:
            silent += 1
        raw.events += [item for _, item in raw.poller.poll(0, False)]
        assert sent < 80 << 20
    assert raw.events == []
    raw.lane.setblocking(False)
    rest = memoryview(payload)
    deadline = time.monotonic() + PATIENCE_S
    while len(raw.events) < 1 + sent // len(behind):
        assert time.monotonic() < deadline, len(raw.events)
        if rest:
            rest = rest[raw.lane.send(rest[:100_000]) :]
        raw.events += [item for _, item in raw.poller.poll(0.01, False)]
    raw.socket.close()
    assert isinstance(raw.poll_until_ended(), TransportError | None)


def test_faults_of_the_lane_name_the_peer(raw: Raw) -> None:
    head, payload = announced(np.arange(100_000.0))
    raw.socket.sendall(head)
    raw.lane.sendall(payload[:1000])
    raw.lane.close()
    assert "from test:" in str(raw.poll_until_ended())


def test_payloads_on_the_lane_count_as_waiting(raw: Raw) -> None:
    sent = [raw.connection.send(message(np.ones(LARGE))) for _ in range(3)]
    assert sent == [False] * 3
    raw.socket.recv(1 << 20)
    assert raw.connection.waiting() == 3


@pytest.mark.parametrize("first", ["socket", "lane"])
def test_end_in_the_middle_of_a_payload_is_an_error(raw: Raw, first: str) -> None:
    head, payload = announced(np.arange(100_000.0))
    raw.socket.sendall(head)
    raw.lane.sendall(payload[:1000])
    getattr(raw, first).close()
    reason = raw.poll_until_ended()
    assert "in the middle of a message" in str(reason)
    assert len(raw.events) == 1
    assert raw.connection.closed


def test_end_of_the_lane_alone_is_found_by_the_next_payload(raw: Raw) -> None:
    raw.lane.close()
    raw.socket.sendall(bytes(message("small").parts()[0]))
    while not raw.events:
        raw.events += [item for _, item in raw.poller.poll(1.0, False)]
    raw.socket.sendall(announced(np.arange(100_000.0))[0])
    assert isinstance(raw.poll_until_ended(), (ProtocolError, TransportError))


def test_end_of_the_lane_while_a_payload_is_queued_for_it_is_an_error(raw: Raw) -> None:
    assert not raw.connection.send(message(np.ones(LARGE)))
    raw.lane.close()
    assert "cannot send to test" in str(raw.poll_until_ended())
    assert raw.connection.flushed()


def test_end_of_the_lane_that_shows_in_the_middle_of_a_send_refuses_it(raw: Raw) -> None:
    content, refusal = message(np.ones(100_000)), "none"

    def poll(phase: str, info: Any) -> None:  # as another thread does
        gc.callbacks.clear()
        raw.events += [item for _, item in raw.poller.poll(0.0, False)]

    content.seal()
    raw.lane.close()
    callbacks, threshold = list(gc.callbacks), gc.get_threshold()
    gc.callbacks.append(poll)
    kept: list[list[int]] = [[] for _ in range(200)]  # so that new lists take new memory
    gc.set_threshold(1)
    try:
        raw.connection.send(content)
    except TransportError as error:
        refusal = str(error)
    finally:
        gc.set_threshold(*threshold)
        assert poll not in gc.callbacks
        gc.callbacks[:] = callbacks
    assert "cannot send to test" in refusal
    assert len(kept) == 200
    assert "cannot send to test" in str(raw.poll_until_ended())


@pytest.mark.parametrize(
    "head",
    [
        b"\xfe" + bytes(63) + b"\xfe" + bytes(63),
        b"\xfe" + bytes(63) + bytes(message("no payload").parts()[0]),
    ],
)
def test_bytes_that_announce_nonsense_end_the_connection(raw: Raw, head: bytes) -> None:
    raw.socket.sendall(head)
    assert isinstance(raw.poll_until_ended(), ProtocolError)


def resident() -> int:
    with open("/proc/self/status") as file:
        (private,) = [line.split()[1] for line in file if line.startswith("RssAnon:")]
    return int(private) * 1024


def test_announced_payload_takes_memory_only_as_its_bytes_come(raw: Raw) -> None:
    untouched = message(np.zeros(2**30, np.uint8))  # of the system's one page of zeros
    before = resident()
    raw.socket.sendall(b"\xfe" + bytes(63) + bytes(untouched.parts()[0]))
    raw.lane.setblocking(False)
    sent = 0
    while sent < 32 * 2**20:
        with suppress(BlockingIOError):
            sent += raw.lane.send(bytes(64 * 1024))
        raw.events += [item for _, item in raw.poller.poll(0.001, False)]
    assert not raw.events
    assert resident() - before < sent + 64 * 2**20


def test_fresh_memory_is_touched_by_another_thread_which_then_ends() -> None:
    warmer, slab, done = Warmer(), SlabPool().take(8 * 2**20), SimpleQueue()
    for start in (0, 4 * 2**20):
        warmer.order(slab, start, 4 * 2**20, lambda: done.put(threading.current_thread()))
    first, second = done.get(timeout=PATIENCE_S), done.get(timeout=PATIENCE_S)
    assert first is second is not threading.current_thread()
    assert not np.frombuffer(slab, np.uint8)[::4096].any()
    first.join(PATIENCE_S)
    assert not first.is_alive()
    warmer.order(slab, 0, 1, lambda: done.put(None))
    assert done.get(timeout=PATIENCE_S) is None
    with pytest.raises(ValueError, match="cannot touch bytes"):
        touch(slab, 0, 8 * 2**20 + 1)


def test_memory_is_ready_at_once_where_no_thread_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    warmer, slab, done = Warmer(), SlabPool().take(8 * 2**20), SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        warmer.order(slab, 0, 8 * 2**20, lambda: done.put(threading.current_thread()))
    assert done.get_nowait() is threading.current_thread()
    warmer.order(slab, 0, 8 * 2**20, lambda: done.put(threading.current_thread()))
    assert done.get(timeout=PATIENCE_S) is not threading.current_thread()


def test_record_without_a_lane_ends_the_connection() -> None:
    near, mine = socket.socketpair()
    poller = Poller()
    connection = StreamConnection(
        poller, mine.detach(), scheme="tcp", peer_address="test", identity=None
    )
    near.sendall(announced(np.arange(100_000.0))[0])
    [(ended, reason)] = poller.poll(PATIENCE_S, False)
    assert ended is connection
    assert isinstance(reason, ProtocolError)
    poller.close()
    near.close()


def test_end_of_a_connection_with_a_payload_on_the_way_leaves_others_alone(pair: Pair) -> None:
    other = pair.connect(7)
    assert not pair.near.connection.send(message(np.ones(LARGE)))
    pair.far.poll(0.1)
    pair.near.connection.abort()
    pair.until(lambda: bool(pair.far.ends()))
    other.send(message("fine"))
    pair.until(lambda: bool(pair.far.values()))
    assert pair.far.values() == ["fine"]
    assert len(pair.far.ends()) == 1


def test_descriptors_stay_with_the_caller_where_there_is_no_connection() -> None:
    poller = Poller()
    for ends in range(2):  # a regular file cannot be polled
        near, mine = socket.socketpair()
        with tempfile.TemporaryFile() as file:
            wrong = (file.fileno(), mine.fileno())
            with expect(TransportError):
                StreamConnection(
                    poller, wrong[ends], scheme="tcp", peer_address="test", identity=None,
                    lane=wrong[1 - ends],
                )  # fmt: skip
            gc.collect()
            file.write(b"mine")
            mine.send(b"mine")
            assert near.recv(4) == b"mine"
        near.close()
        mine.close()
    assert poller.poll(0.0, False) == []
    poller.close()
