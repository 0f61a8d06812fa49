"""The tables of states: each state has a step, and leads to states of its own kind."""

import pytest

from gotunnel_server.visitors import arrival, connection


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
