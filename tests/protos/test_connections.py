"""Which connections made no call: exact in the end, whoever comes when, and never less than before."""

from __future__ import annotations

from diptych.protos.trust import Connections, Refusals


def test_who_begins_and_calls_is_no_stranger() -> None:
    refused = Refusals("test")
    connections = Connections(refused)
    for number in range(1, 101):
        assert connections.begin() == number
        connections.call(f"ipv4:10.0.0.1:{number}")
        connections.call(f"ipv4:10.0.0.1:{number}")  # the same connection again
        connections.settle(number)
    assert refused.total == 0


def test_who_begins_and_never_calls_is_counted_once() -> None:
    refused = Refusals("test")
    connections = Connections(refused)
    numbers = [connections.begin() for _ in range(6)]
    connections.call("ipv4:10.0.0.1:1")
    for number in numbers:
        connections.settle(number)
        connections.settle(number)
    assert refused.total == 5


def test_a_late_call_is_made_up_for_by_the_next_stranger() -> None:
    refused = Refusals("test")
    connections = Connections(refused)
    connections.settle(connections.begin())
    assert refused.total == 1, "it has not called yet"
    connections.call("ipv4:10.0.0.1:1")
    connections.settle(connections.begin())
    assert refused.total == 1
    connections.settle(connections.begin())
    assert refused.total == 2
