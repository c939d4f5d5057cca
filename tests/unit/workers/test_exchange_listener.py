"""What a rank's exchange listener lets in, and that nobody can hold it up."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.mesh import GANG, join, listeners
from workers import exchange_listener
from workers.errors import UserError
from workers.exchange_hello import ANSWER_BYTES, HELLO_BYTES, Answer, Hello, gang_digest, unpack_answer
from workers.exchange_listener import ExchangeListener
from workers.ports import PortRange

HOST = "127.0.0.1"
HELLO = Hello(gang_digest(GANG), epoch=5, rank=1, incarnation=9, to_rank=0, to_incarnation=1)


@pytest.fixture
def listener() -> Iterator[ExchangeListener]:
    made = ExchangeListener(GANG, 0, 1, HOST)
    yield made
    made.close()


def call(listener: ExchangeListener, message: bytes = b"") -> socket.socket:
    sock = socket.create_connection((HOST, int(listener.address.rpartition(":")[2])), timeout=10)
    sock.sendall(message)
    return sock


def answer(sock: socket.socket) -> Answer | None:
    """None: closed without a word."""
    said = b""
    while len(said) < ANSWER_BYTES and (part := sock.recv(ANSWER_BYTES - len(said))):
        said += part
    return unpack_answer(said) if said else None


def test_a_hello_is_kept_until_its_epoch_claims_it(listener: ExchangeListener) -> None:
    with call(listener, HELLO.pack()) as caller:
        assert listener.claim(5, 2, 9, 0.0) is None
        claimed = listener.claim(5, 1, 9, 10.0)
        assert claimed is not None
        assert answer(caller) == Answer.WELCOME
        caller.sendall(b"rows")
        claimed.setblocking(True)
        assert claimed.recv(4) == b"rows"
        claimed.close()


def test_a_claim_waits_for_its_caller(listener: ExchangeListener) -> None:
    started = time.monotonic()
    assert listener.claim(5, 1, 9, 0.2) is None
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (replace(HELLO, gang=gang_digest("another")), Answer.OTHER_GANG),
        (replace(HELLO, to_rank=3), Answer.OTHER_RANK),
        (replace(HELLO, to_incarnation=2), Answer.OTHER_RANK),
        (replace(HELLO, epoch=3), Answer.OLD_EPOCH),
    ],
    ids=["gang", "rank", "incarnation", "epoch"],
)
def test_hellos_for_others_are_refused(listener: ExchangeListener, hello: Hello, expected: Answer) -> None:
    assert listener.claim(4, 1, 9, 0.0) is None
    with call(listener, hello.pack()) as caller:
        assert answer(caller) == expected
        assert caller.recv(1) == b""


def test_another_version_is_told_so(listener: ExchangeListener) -> None:
    message = bytearray(HELLO.pack())
    message[8:12] = struct.pack("<I", 99)
    with call(listener, bytes(message)) as caller:
        assert answer(caller) == Answer.OTHER_VERSION


def test_a_wrong_incarnation_is_refused_at_the_claim(listener: ExchangeListener) -> None:
    with call(listener, HELLO.pack()) as old, call(listener, replace(HELLO, incarnation=10).pack()) as new:
        claimed = None
        while claimed is None:
            claimed = listener.claim(5, 1, 10, 10.0)
        claimed.close()
        assert answer(new) == Answer.WELCOME
        # Refused at once, or when it comes after the claim.
        assert answer(old) in (Answer.OTHER_INCARNATION, Answer.TAKEN)


def test_a_new_epoch_ends_the_wait_of_older_ones(listener: ExchangeListener) -> None:
    with call(listener, HELLO.pack()) as caller:
        time.sleep(0.1)
        assert listener.claim(6, 1, 9, 0.0) is None
        assert answer(caller) == Answer.OLD_EPOCH


def test_a_second_connection_of_a_rank_takes_the_firsts_place_until_it_is_claimed(listener: ExchangeListener) -> None:
    with call(listener, HELLO.pack()) as first:
        time.sleep(0.1)
        with call(listener, HELLO.pack()) as second, call(listener) as third:
            assert first.recv(1) == b""
            claimed = listener.claim(5, 1, 9, 10.0)
            assert claimed is not None
            assert answer(second) == Answer.WELCOME
            third.sendall(HELLO.pack())
            assert answer(third) == Answer.TAKEN
            claimed.close()


def test_garbage_and_silence_hold_nobody_up(listener: ExchangeListener) -> None:
    silent = [call(listener) for _ in range(20)]
    slow = call(listener, HELLO.pack()[: HELLO_BYTES - 1])
    http = call(listener, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(HELLO_BYTES))
    noise = call(listener, os.urandom(4096))
    # A peer comes through beside them, at once.
    started = time.monotonic()
    with call(listener, HELLO.pack()) as caller:
        claimed = listener.claim(5, 1, 9, 10.0)
        assert claimed is not None
        assert answer(caller) == Answer.WELCOME
        claimed.close()
    assert time.monotonic() - started < 5
    # Whoever says no hello within a second is dropped, without a word.
    for sock in (*silent, slow):
        assert sock.recv(1) == b""
    assert time.monotonic() - started > 0.5
    for sock in (*silent, slow, http, noise):
        sock.close()


def test_a_flood_of_silent_connections_does_not_keep_a_peer_out(
    listener: ExchangeListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_listener, "MOST_SILENT", 10)
    flood = [call(listener) for _ in range(100)]
    with call(listener, HELLO.pack()) as caller:
        claimed = listener.claim(5, 1, 9, 10.0)
        assert claimed is not None
        assert answer(caller) == Answer.WELCOME
        claimed.close()
    for sock in flood:
        sock.close()


def test_connections_of_epochs_to_come_are_bounded(listener: ExchangeListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_listener, "MOST_WAITING", 3)
    callers = [call(listener, replace(HELLO, rank=rank).pack()) for rank in range(1, 4)]
    time.sleep(0.1)
    with call(listener, replace(HELLO, rank=7).pack()) as one_too_many:
        assert answer(one_too_many) == Answer.BUSY
    for caller in callers:
        caller.close()


def test_a_peer_that_gave_up_waiting_is_not_mistaken_for_one(listener: ExchangeListener) -> None:
    call(listener, HELLO.pack()).close()
    with call(listener, HELLO.pack()) as caller:
        time.sleep(0.1)
        claimed = listener.claim(5, 1, 9, 10.0)
        assert claimed is not None
        assert answer(caller) == Answer.WELCOME
        claimed.close()


def test_closing_ends_everything(listener: ExchangeListener) -> None:
    with call(listener, HELLO.pack()) as waiting, call(listener) as silent:
        time.sleep(0.1)
        listener.close()
        assert answer(waiting) is None
        assert silent.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        call(listener)
    assert listener.claim(5, 1, 9, 5.0) is None
    listener.close()


def test_ports_of_a_range() -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    if port + 1 > 65535:
        pytest.skip("the last port")
    ports = PortRange(port, port)
    listener = ExchangeListener(GANG, 0, 1, HOST, ports)
    assert listener.address == f"{HOST}:{port}"
    with pytest.raises(UserError, match=f"port {port} of {HOST} is in use; .*exchange_ports"):
        ExchangeListener(GANG, 1, 1, HOST, ports)
    listener.close()
    with listeners([HOST, HOST]) as made:
        for exchange in join(made):
            exchange.close()
