"""The tables of steps are complete, and connections wait in the right place."""

import types

import pytest

from gotunnel import NoThread
from gotunnel_server.net.listener import FREE_WAITS, TRICKLE, Listener
from gotunnel_server.visitors import arrival, connection
from gotunnel_server.visitors.steps import Step, Stepwise


@pytest.mark.parametrize(
    ("steps", "states"),
    [
        (arrival.Arrival.STEPS, arrival.State),
        (connection.HttpConnection.STEPS, connection.State),
        (connection.HttpConnection.IN_EXCHANGE, connection.State),
    ],
)
def test_each_state_has_a_step_and_leads_to_another(steps, states):
    assert set(steps) == set(states)
    for state, step in steps.items():
        assert step.time_up in {None, *states} - {state}
        assert step.first_byte in {None, *states} - {state}


@pytest.mark.parametrize("steps", [arrival.Arrival.STEPS, connection.HttpConnection.STEPS])
def test_time_that_is_up_again_and_again_closes_the_connection(steps):
    for state in steps:
        for _ in steps:
            state = state and steps[state].time_up
        assert state is None


class Waiting(Stepwise):
    """Counts how it waits: ``lingered`` in its thread, or ``parked`` with the listener."""

    def __init__(self, crowded):
        self.lingered = self.parked = 0
        listener = types.SimpleNamespace(
            crowded=crowded, park=self._park, call_later=self._call_later, stopping=False
        )
        listener.await_more = types.MethodType(Listener.await_more, listener)
        self.called_later = 0
        self.listener = listener
        duplex = types.SimpleNamespace(wait_readable=self._linger)
        visitor = types.SimpleNamespace(duplex=duplex, listener=listener, address=("192.0.2.1", 1))
        super().__init__(types.SimpleNamespace(is_draining=lambda: False), visitor, "waiting")

    def _linger(self, timeout):
        self.lingered += 1
        raise TimeoutError

    def _park(self, connection, timeout):
        assert connection is self and 0 < timeout <= 10
        self.parked += 1

    def _call_later(self, connection, function, timeout):
        assert connection is self and function == self.ready and 0 < timeout <= TRICKLE
        self.called_later += 1

    def _wait_for_more(self):
        return self._wait(10)

    STEPS = {"waiting": Step(_wait_for_more)}


def test_visit_without_a_thread_is_reset_and_said(caplog):
    """A mere close would look like an empty, complete visit."""
    done = []

    def relay(self):
        raise NoThread("no thread to be had: raise the limit (ulimit -u)")

    waiting = Waiting(crowded=False)
    waiting.STEPS = {"waiting": Step(relay)}
    waiting.duplex.reset = lambda: done.append("reset")
    waiting._visitor.close = lambda: done.append("close")
    waiting._visitor.fail_visit = lambda error, status: done.append(status)
    waiting.ready()
    assert done == [503, "reset", "close"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("(ulimit -u); the visit is reset")


@pytest.mark.parametrize("crowded", [False, True])
def test_a_visitor_that_goes_on_at_once_is_waited_for_unless_others_wait_for_a_thread(crowded):
    connection = Waiting(crowded)
    connection.ready()
    assert (connection.lingered, connection.parked) == (0 if crowded else 1, 1)


def test_an_exchange_thread_waits_for_the_next_request_also_while_others_wait_for_steps():
    """A parked visitor needs a step thread again, which would add to the crowd."""
    connection = Waiting(crowded=True)
    connection._take_steps({"waiting": Step(Waiting._wait_for_more)})
    assert (connection.lingered, connection.parked) == (1, 1)


def test_a_visitor_that_trickles_takes_few_steps():
    """Otherwise each byte would take a step. While the listener stops, it only parks."""
    waiting = Waiting(crowded=True)
    for _ in range(FREE_WAITS + 1):
        waiting.ready()
    assert (waiting.parked, waiting.called_later) == (FREE_WAITS + 1, 0)
    for _ in range(10):
        waiting.ready()
    assert waiting.called_later == 10
    waiting.listener.stopping = True
    waiting.ready()
    assert waiting.parked == FREE_WAITS + 2
    waiting._go_to("waiting")  # a new state
    waiting.listener.stopping = False
    waiting.ready()
    assert (waiting.parked, waiting.called_later) == (FREE_WAITS + 3, 10)
