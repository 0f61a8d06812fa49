"""Which child starts, serves, drains and is restarted, as actions of the pure Roster."""

import logging

import pytest

from gotunnel_server.processes import roster
from gotunnel_server.processes.roster import (
    Cover,
    Drain,
    Exit,
    Go,
    Kill,
    Ready,
    Roster,
    Say,
    Stage,
    Start,
)


class Played:
    """A Roster, played with a clock of its own."""

    def __init__(self, count=2):
        self.roster = Roster(count)
        self.now = 1000.0
        self.count = count

    def __getattr__(self, name):
        def call(*arguments, **more):
            return list(getattr(self.roster, name)(*arguments, self.now, **more))

        return call

    def serve(self):
        """All serve, with the ids 1 to count."""
        self.begin()
        for id in range(1, self.count + 1):
            self.said(id, "ready")
            self.said(id, "serving")
        return self

    def later(self, seconds):
        """Time passes, and all who serve say that they are alive."""
        actions = []
        for _ in range(int(seconds)):
            self.now += 1
            for process in self.roster.serving():
                self.said(process.id, "alive")
            actions += self.tick()
        return actions


def lines(actions):
    return [action.text for action in actions if isinstance(action, Say)]


def acts(actions):
    return [action for action in actions if not isinstance(action, Say)]


@pytest.fixture
def two():
    return Played().serve()


def test_the_first_child_starts_alone_and_the_others_when_it_serves():
    played = Played(3)
    assert played.begin() == [Start(1, 1)]
    assert played.said(1, "ready") == [Go(1, None)]
    assert played.said(1, "serving") == [Start(2, 2), Start(3, 3)]
    assert played.said(3, "ready") == [Go(3, None)]
    assert played.said(3, "serving") == []
    played.said(2, "ready")
    assert played.said(2, "serving") == [Ready()]


@pytest.mark.parametrize(
    ("status", "exits", "told"),
    [(2, 2, 0), (1, 1, 0), (-9, 1, 1), (0, 1, 1)],
)
def test_a_child_that_cannot_start_ends_all_with_its_status(status, exits, told):
    """One that exits with a status has said why; of a signal only the supervisor knows."""
    played = Played()
    played.begin()
    actions = played.ended(1, status)
    assert acts(actions) == [Exit(exits)] and len(lines(actions)) == told


def test_if_a_later_child_cannot_start_the_first_one_drains():
    played = Played()
    played.begin()
    played.said(1, "ready")
    played.said(1, "serving")
    assert played.ended(2, 1) == [Drain(1, True)]
    assert played.ended(1, 0) == [Exit(1)]


def test_a_child_that_dies_is_covered_and_restarted_at_once(two):
    actions = two.ended(1, -9)
    assert acts(actions) == [Cover(2, 1, True), Start(3, 1)]
    (line,) = lines(actions)
    assert "process 1 ended by signal 9 (SIGKILL)" in line and line.endswith("restarted now")
    two.said(3, "ready")
    assert two.said(3, "serving") == [Cover(2, 1, False)]


def test_a_child_that_serves_meanwhile_covers_as_well():
    played = Played(3).serve()
    played.ended(1, -9)  # 4 starts for it
    assert acts(played.ended(2, -11)) == [Cover(3, 2, True), Start(5, 2)]
    played.said(5, "ready")
    assert played.said(5, "serving") == [Cover(3, 2, False), Cover(5, 1, True)]


def test_crashes_in_a_row_are_backed_off_and_do_not_spin(two):
    waits, id = [], 1
    for _ in range(9):
        actions = two.ended(id, 1)
        began = two.now
        while not any(isinstance(action, Start) for action in actions):
            actions = two.later(1)
        (id,) = [action.id for action in actions if isinstance(action, Start)]
        waits.append(two.now - began)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_the_last_one_that_served_is_restarted_soon_however_often_it_ends(two):
    two.roster.slots[1].failures = two.roster.slots[2].failures = 9
    (line,) = lines(two.ended(2, -9))
    assert "the others take its connections" in line and line.endswith("restarted in 30 s")
    actions = two.ended(1, -9)
    (line,) = lines(actions)
    assert "no process serves now" in line and line.endswith("restarted in 1 s")
    assert Start(3, 1) in two.later(1)


def test_after_a_steady_while_the_next_crash_is_a_single_accident_again(two):
    for id in (1, 3, 4):
        actions = two.ended(id, 1)
        actions += two.later(roster.MOST_BACKOFF)
        (id,) = [action.id for action in actions if isinstance(action, Start)]
        two.said(id, "ready")
        two.said(id, "serving")
    two.later(roster.STEADY)
    assert Start(id + 1, 1) in two.ended(id, 1)


def silent(two, seconds):
    """Process 1 gives no sign of life; the actions."""
    actions = []
    for _ in range(int(seconds)):
        two.now += 1
        two.said(2, "alive")
        actions += two.tick()
    return actions


def test_a_child_that_may_hang_is_covered_until_it_moves_again(two):
    assert silent(two, roster.SUSPECT) == []
    actions = silent(two, 3)
    assert acts(actions) == [Cover(2, 1, True)] and "no sign of life for 5 s" in lines(actions)[0]
    assert two.said(1, "alive") == [Cover(2, 1, False)]
    assert two.said(1, "alive") == []


def test_a_child_that_hangs_is_killed_once_and_restarted(two):
    assert Kill(1) not in silent(two, roster.HANG)
    actions = silent(two, 1)
    assert acts(actions) == [Kill(1)] and "no sign of life for 15 s" in lines(actions)[0]
    assert two.tick() == []
    actions = two.ended(1, -9)
    assert acts(actions) == [Start(3, 1)]  # it is covered already
    two.said(3, "ready")
    assert two.said(3, "serving") == [Cover(2, 1, False)]


def test_a_supervisor_that_was_stopped_itself_kills_nobody(two):
    two.tick()
    two.now += 3600
    assert two.tick() == []
    two.now += roster.HANG / 3
    assert two.tick() == []


def test_a_child_that_does_not_get_ready_is_killed(two):
    two.ended(1, -9)
    assert two.later(roster.START_TIMEOUT) == []
    actions = two.later(1)
    assert acts(actions) == [Kill(3)] and "does not serve after 60 s" in lines(actions)[0]


def test_a_renewal_replaces_one_after_the_other_and_ends_ready(two):
    assert acts(two.renew()) == [Start(3, 1)]
    assert two.said(3, "ready") == [Go(3, 1)]
    assert two.said(3, "serving") == [Drain(1, False), Start(4, 2)]
    assert two.ended(1, 0) == []
    two.said(4, "ready")
    actions = two.said(4, "serving")
    assert acts(actions) == [Drain(2, False), Ready()]
    assert lines(actions) == ["all 2 processes are renewed"]
    assert two.ended(2, 0) == []


def test_a_renewal_that_fails_leaves_those_before(two):
    two.renew()
    actions = two.ended(3, 2)
    assert acts(actions) == [Ready()]
    assert "renewal: the new process 1 ended with status 2 before it served" in lines(actions)[0]
    assert [process.id for process in two.roster.serving()] == [1, 2]
    assert acts(two.renew()) == [Start(4, 1)]  # another try


def test_a_child_that_dies_while_its_successor_starts_is_covered_until_then(two):
    two.renew()
    actions = two.ended(1, -9)
    assert (
        acts(actions) == [Cover(2, 1, True)] and "process 1 ended by signal 9" in lines(actions)[0]
    )
    assert two.said(3, "ready") == [Go(3, None)]
    assert two.said(3, "serving") == [Cover(2, 1, False), Start(4, 2)]


@pytest.mark.parametrize("when", ["at the start", "during a renewal", "while it stops"])
def test_a_renewal_at_a_bad_time_is_one_line(when):
    played = Played()
    if when == "at the start":
        played.begin()
    else:
        played.serve()
        if when == "during a renewal":
            played.renew()
        else:
            played.stop(15)
    actions = played.renew()
    assert acts(actions) == [] and "this signal is ignored" in lines(actions)[0]


def test_a_child_that_drains_by_itself_is_covered_and_replaced(two):
    actions = two.said(1, "draining")
    assert acts(actions) == [Cover(2, 1, True)] and "a signal to it alone?" in lines(actions)[0]
    two.now += roster.MOMENT
    assert two.tick() == [Start(3, 1)]
    assert two.ended(1, 0) == []


def test_children_that_got_the_signal_of_the_service_first_are_not_replaced(two):
    """systemd sends SIGTERM to all processes, and the supervisor may be the last to see it."""
    two.said(1, "draining")
    assert acts(two.stop(15)) == [Drain(2, True)]
    two.now += 10
    assert two.tick() == []
    assert two.ended(1, 0) == []
    assert two.ended(2, 0) == [Exit(0)]


def test_a_stop_drains_all_and_kills_what_is_left_in_the_end(two):
    two.ended(2, -9)  # its successor, 3, starts
    assert two.stop(15) == [Drain(1, True), Kill(3)]
    assert two.stop(15) == []
    assert two.ended(3, -9) == []
    two.now += 15 + roster.LAST_JOBS - 1
    assert two.tick() == []
    two.now += 1
    assert acts(two.tick()) == [Kill(1)]
    assert two.ended(1, -9) == [Exit(0)]


def test_a_child_that_drains_too_long_is_killed(two):
    two.renew()
    two.said(3, "ready")
    two.said(3, "serving")
    two.roster.drains(1, two.now + 20)
    assert two.later(19) == []
    assert acts(two.later(1)) == [Kill(1)]
    assert two.ended(1, -9) == []


def test_a_child_that_cannot_be_talked_to_is_killed(two):
    actions = list(two.roster.broken(2, "no JSON"))
    assert acts(actions) == [Kill(2)] and "cannot be talked to (no JSON)" in lines(actions)[0]


def test_words_of_children_that_are_gone_or_out_of_turn_count_for_nothing(two):
    two.ended(1, -9)
    for id, word in [(1, "serving"), (99, "ready"), (2, "ready"), (2, "serving"), (2, "nonsense")]:
        assert two.said(id, word) == []
    assert two.roster.processes[2].stage is Stage.SERVING


def test_levels_are_those_of_logging(two):
    actions = [*two.said(1, "draining"), *two.ended(2, -9), *two.renew()]
    assert {logging.getLevelName(a.level.upper()) for a in actions if isinstance(a, Say)} <= {
        logging.INFO, logging.WARNING, logging.ERROR,
    }  # fmt: skip
