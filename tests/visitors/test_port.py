"""What a public port is made of: the room for so many, and what is said once."""

from gotunnel_server.visitors.port import Room


def test_room_is_for_so_many_of_whom_one_address_is_half():
    room = Room(4)
    assert [room.enter("a") for _ in range(3)] == [True, True, False]
    assert [room.enter("b") for _ in range(3)] == [True, True, False]
    assert not room.enter("c")
    room.leave("a")
    assert room.enter("c") and not room.enter("a")


def test_room_has_no_share_for_who_stands_for_many():
    room = Room(4, unlimited={"proxy"})
    assert [room.enter("proxy") for _ in range(5)] == [True, True, True, True, False]
    room.leave("proxy")
    assert room.enter("a")


def test_room_for_one_is_for_anybody():
    room = Room(1)
    assert room.enter("a") and not room.enter("b")
    room.leave("a")
    assert room.enter("b")
