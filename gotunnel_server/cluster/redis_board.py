"""The board on Redis: the rules of leases.py as Lua scripts.

With ``NAME`` from CLUSTER_NAME, these are the keys. ``{NAME}`` is a hash tag: in a Redis Cluster
all of them lie on one node, as the scripts need it.

    {NAME}:board       hash: clock, seen, server, turn, settled, version, number, as in leases.Table
    {NAME}:members     hash: id to a member, as JSON
    {NAME}:contact     sorted set: ids of members in contact, by the end of their lease
    {NAME}:lost        sorted set: ids of members out of contact, by the same
    {NAME}:names       hash: hostname to its owner, fencing number and holders, as JSON
    {NAME}:held:ID     set: the hostnames that a member holds
    {NAME}:to:ID, {NAME}:all    channels for messages

Redis runs one script at a time, so each is one step. Nothing here expires by itself: a key that
vanished while Redis holds the others would look like a name that is free. So Redis must not evict
keys either (maxmemory-policy noeviction).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gotunnel import spawn
from gotunnel_agent.common.one_line import on_one_line, words_on_one_line

from .board import Answer, Ask, Away, Card, Left, Message, Renewal, Renewed
from .engine import MOST_ERROR, Engine, Script
from .leases import MOST_LEFT, TIMES, Times

log = logging.getLogger("gotunnel.redis_board")

# Each is dialled, by a thread: a program that can write to Redis must not exhaust this machine.
MOST_MEMBERS = 2000
MOST_TEXT = 300  # characters of what a member says of itself
MOST_MESSAGE = 256 * 1024  # bytes of a message; longer ones are passed over
JOIN = 2  # seconds for the thread to end

# ARGV: now, server ("" for both: ask Redis; tests give them), the Times, the member's id, then
# those of the call. KEYS: as above, without the channels.
PRELUDE = """
local BOARD, MEMBERS, CONTACT, LOST, NAMES, HELD = unpack(KEYS)
local LEASE, SETTLE, FORGET, GAP =
  tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local id = ARGV[7]
local function whole(number) return string.format('%.0f', number) end

-- The board's time
local now, server = tonumber(ARGV[1]), ARGV[2]
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
  local info = redis.pcall('INFO', 'server')
  server = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
end
local state = redis.call('HMGET', BOARD, 'clock', 'seen', 'server', 'turn', 'settled', 'version',
  'number')
local clock, seen = tonumber(state[1]) or 0, tonumber(state[2])
local turn, settled = tonumber(state[4]) or 0, tonumber(state[5]) or 0
local version, number = tonumber(state[6]) or 0, tonumber(state[7]) or 0
if seen then clock = clock + math.max(0, math.min(now - seen, GAP)) end
if server ~= state[3] then
  turn = turn + 1
  settled = clock + SETTLE
end
local function save()
  redis.call('HSET', BOARD, 'clock', whole(clock), 'seen', whole(now), 'server', server,
    'turn', whole(turn), 'settled', whole(settled), 'version', whole(version),
    'number', whole(number))
end

-- Members
local function member_of(each)
  local text = redis.call('HGET', MEMBERS, each)
  return text and cjson.decode(text)
end
local function put_member(each, member)
  redis.call('HSET', MEMBERS, each, cjson.encode(member))
  redis.call('ZREM', member.out and CONTACT or LOST, each)
  redis.call('ZADD', member.out and LOST or CONTACT, whole(member.expires), each)
end
local function is_current(member, contact)
  return member.contact == contact and member.turn == turn
end
local function sweep()
  for _, each in ipairs(redis.call('ZRANGEBYSCORE', CONTACT, '-inf', '(' .. whole(clock))) do
    local member = member_of(each)
    member.out = true
    put_member(each, member)
    version = version + 1
  end
  local gone = redis.call('ZRANGEBYSCORE', LOST, '-inf', '(' .. whole(clock - FORGET))
  for _, each in ipairs(gone) do
    redis.call('HDEL', MEMBERS, each)
    redis.call('ZREM', LOST, each)
  end
  table.sort(gone)
  return gone
end

-- Names
local function name_of(hostname)
  local text = redis.call('HGET', NAMES, hostname)
  return text and cjson.decode(text)
end
local function held_by(each) return string.sub(HELD, 1, -1 - #id) .. each end
local function drop(each, hostname)
  if redis.call('SREM', held_by(each), hostname) == 0 then return false end
  local name = name_of(hostname)
  if not name then return true end
  local left = {}
  for _, holder in ipairs(name.holders) do
    if holder ~= each then left[#left + 1] = holder end
  end
  if #left == 0 then
    redis.call('HDEL', NAMES, hostname)
    return true
  end
  name.holders = left
  redis.call('HSET', NAMES, hostname, cjson.encode(name))
  for _, holder in ipairs(left) do
    if redis.call('ZSCORE', CONTACT, holder) then return false end
  end
  return true
end
"""

# ARGV: contact, knows, card.
RENEW = Script(
    PRELUDE
    + """
local contact, knows, card = tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local gone = sweep()
local member = member_of(id)
if not member then
  version = version + 1
  member = {card = card, contact = 0, turn = 0, entered = version}
elseif member.out then
  version = version + 1
  member.out, member.entered, member.contact = nil, version, 0
end
local anew = contact == 0 or not is_current(member, contact)
if anew then
  number = number + 1
  member.contact, member.turn = number, turn
  member.since, member.before, member.knows = nil, 0, 0
else
  member.before, member.knows = member.last, knows
  if not member.since then member.since = clock end
end
if member.card ~= card then
  version = version + 1
  member.card = card
end
member.last = clock
member.expires = clock + LEASE
put_member(id, member)
save()
local cards, told = {}, 0
if anew or knows ~= version then
  told = 1
  local ids = redis.call('ZRANGE', CONTACT, 0, -1)
  table.sort(ids)
  for _, each in ipairs(ids) do cards[#cards + 1] = member_of(each).card end
end
return {member.contact, anew and 1 or 0, version, told, cards, gone}
"""
)

# ARGV: contact, together (1 or 0), then name, owner, number and was of each ask.
CLAIM = Script(
    PRELUDE
    + """
local contact, together = tonumber(ARGV[8]), ARGV[9] == '1'
sweep()
local member = member_of(id)
local answers = {}
if not member or member.out or not is_current(member, contact) then
  for i = 10, #ARGV, 4 do answers[#answers + 1] = {'unknown', 0} end
  save()
  return answers
end
local function is_settled(each)
  return SETTLE == 0 or each.since and clock >= each.since + SETTLE
end
local has_promised = not is_settled(member)

local everybody
local function has_stopped(each)
  local lost = member_of(each)
  if not lost then return true end
  if not everybody then
    everybody = {}
    for _, other in ipairs(redis.call('ZRANGE', CONTACT, 0, -1)) do
      everybody[#everybody + 1] = member_of(other)
    end
  end
  for _, other in ipairs(everybody) do
    if other.turn == turn and other.entered <= lost.knows and other.before > lost.expires
        and is_settled(other) then
      return true
    end
  end
  return false
end

local function verdict(hostname, owner, asked, was)
  local free = {(asked > 0 or clock >= settled) and 'free' or 'later', 0}
  local name = name_of(hostname)
  if not name then
    local is_new = clock < settled - SETTLE + FORGET
    if has_promised and is_new and asked == 0 then return {'later', 0} end
    return free
  end
  if name.owner == owner or
      was ~= '' and name.owner == was and #name.holders == 1 and name.holders[1] == id then
    return free
  end
  if asked > name.number and name.turn ~= turn then return free end
  local living = {asked > 0 and 'lost' or 'taken', 0}
  for _, holder in ipairs(name.holders) do
    if redis.call('ZSCORE', CONTACT, holder) then living[#living + 1] = holder end
  end
  if #living > 2 then return living end
  local stopped = not has_promised
  for _, holder in ipairs(name.holders) do stopped = stopped and has_stopped(holder) end
  if stopped then return free end
  return {asked > 0 and 'lost' or 'later', 0}
end

local function grant(hostname, owner, asked)
  number = math.max(number, asked)
  local name = name_of(hostname)
  if not name or name.owner ~= owner then
    local was = name
    if name then
      for _, holder in ipairs(name.holders) do drop(holder, hostname) end
    end
    name = {owner = owner, number = asked, holders = {}}
    if asked == 0 or was then
      number = number + 1
      name.number = number
    end
  end
  local answer = {'granted', name.number}
  local there = false
  for _, holder in ipairs(name.holders) do
    if holder == id then there = true else answer[#answer + 1] = holder end
  end
  if not there then
    name.holders[#name.holders + 1] = id
    table.sort(name.holders)
    redis.call('SADD', HELD, hostname)
  end
  name.turn = turn
  redis.call('HSET', NAMES, hostname, cjson.encode(name))
  return answer
end

local refused = false
for i = 10, #ARGV, 4 do
  local answer = verdict(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3])
  refused = refused or answer[1] ~= 'free'
  answers[#answers + 1] = answer
end
if not (together and refused) then
  for n, answer in ipairs(answers) do
    local i = 6 + 4 * n
    if answer[1] == 'free' then
      answers[n] = grant(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]))
    end
  end
end
save()
return answers
"""
)

# ARGV: contact, then names.
RELEASE = Script(
    PRELUDE
    + """
local member = member_of(id)
local freed = {}
if member and is_current(member, tonumber(ARGV[8])) then
  for i = 9, #ARGV do
    if drop(id, ARGV[i]) then freed[#freed + 1] = ARGV[i] end
  end
end
save()
return freed
"""
)

HELD = Script(
    PRELUDE
    + """
save()
return redis.call('SMEMBERS', HELD)
"""
)

# ARGV: most names.
LEAVE = Script(
    PRELUDE
    + """
if redis.call('HDEL', MEMBERS, id) == 1 then
  if redis.call('ZREM', CONTACT, id) == 1 then version = version + 1 end
  redis.call('ZREM', LOST, id)
end
local hostnames = redis.call('SRANDMEMBER', HELD, ARGV[8])
table.sort(hostnames)
local freed = {}
for _, hostname in ipairs(hostnames) do
  if drop(id, hostname) then freed[#freed + 1] = hostname end
end
save()
return {redis.call('EXISTS', HELD), freed}
"""
)


class RedisBoard:
    """A board.Board. ``now`` and ``server`` replace Redis's own, for tests."""

    now: int | None = None
    server = ""

    def __init__(self, engine: Engine, name: str, times: Times | None = None):
        self.on_message: Callable[[Message], object] = lambda message: None
        self._engine = engine
        self._prefix = f"{{{name}}}"
        self._times = TIMES if times is None else times
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    # Life

    def start(self, id: str) -> None:
        channels = (f"{self._prefix}:to:{id}", f"{self._prefix}:all")
        self._thread = spawn(
            "cluster messages", self._engine.hear, channels, self._hear, self._over
        )

    def stop(self) -> None:
        self._over.set()
        self._engine.close()
        if self._thread is not None:
            self._thread.join(JOIN)

    # Calls

    def renew(self, id: str, renewal: Renewal) -> Renewed:
        card = json.dumps(renewal.card._asdict(), separators=(",", ":"))
        found = self._run(RENEW, id, renewal.contact, renewal.knows, card)
        with self._understanding():
            contact, anew, version, told, cards, gone = found
            if told and len(cards) > MOST_MEMBERS:
                raise ValueError(f"{len(cards)} members, expected at most {MOST_MEMBERS}")
            members = tuple(map(_card, cards)) if told else None
            return Renewed(_whole(contact), bool(anew), _whole(version), members, _texts(gone))

    def claim(
        self, id: str, contact: int, asks: Sequence[Ask], together: bool
    ) -> tuple[Answer, ...]:
        flat = [part for ask in asks for part in ask]
        found = self._run(CLAIM, id, contact, int(together), *flat)
        with self._understanding():
            answers = tuple(
                Answer(verdict.decode(), _whole(number), _texts(holders))
                for verdict, number, *holders in found
            )
            if len(answers) != len(asks):
                raise ValueError(f"{len(answers)} answers to {len(asks)} claims")
            return answers

    def release(self, id: str, contact: int, names: Sequence[str]) -> tuple[str, ...]:
        found = self._run(RELEASE, id, contact, *names)
        with self._understanding():
            return _texts(found)

    def held(self, id: str) -> tuple[str, ...]:
        found = self._run(HELD, id)
        with self._understanding():
            return tuple(sorted(_texts(found)))

    def leave(self, id: str) -> Left:
        found = self._run(LEAVE, id, MOST_LEFT)
        with self._understanding():
            more, freed = found
            return Left(_texts(freed), bool(more))

    @contextlib.contextmanager
    def _understanding(self) -> Iterator[None]:
        """An answer that is none of our scripts' is raised as Away: another program has written to
        the keys, or it is another server."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            text = on_one_line(str(error), MOST_ERROR)
            raise Away(
                f"what Redis has in {self._prefix}:* cannot be understood ({text}); does another "
                "program write there? CLUSTER_NAME must differ then"
            ) from None

    def _run(self, script: Script, id: str, *arguments: str | int) -> Any:
        p = self._prefix
        keys = (f"{p}:board", f"{p}:members", f"{p}:contact", f"{p}:lost", f"{p}:names",
                f"{p}:held:{id}")  # fmt: skip
        now = "" if self.now is None else self.now
        return self._engine.run(script, keys, (now, self.server, *self._times, id, *arguments))

    # Messages

    def publish(self, to: str, message: Message) -> None:
        channel = f"{self._prefix}:to:{to}" if to else f"{self._prefix}:all"
        self._engine.call("PUBLISH", channel, json.dumps(message, separators=(",", ":")))

    def _hear(self, data: bytes) -> None:
        if len(data) > MOST_MESSAGE:
            return
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            log.debug("a message of another gateway is no JSON object; it is ignored")
            return
        self.on_message(message)


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    if not isinstance(values, (list, set)):
        raise TypeError("no list of texts")
    return tuple(value.decode() for value in values)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError("no whole number")
    return value


def _card(text: bytes) -> Card:
    """A newer version may have more fields, an older one fewer. Raises ValueError, TypeError,
    RecursionError."""
    found = json.loads(text)
    card = Card(**{name: found[name] for name in Card._fields if name in found})
    for name, value in zip(Card._fields, card):
        if type(value) is not type(_SAMPLE[name]):
            raise TypeError(f"{name} of a member is a {type(value).__name__}")
        if isinstance(value, str) and len(value) > MOST_TEXT:
            raise ValueError(f"{name} of a member has {len(value)} characters")
    if not _ID.fullmatch(card.id) or not 0 <= card.since < 1 << 40:
        raise ValueError("a member's id or start is none")
    return card._replace(  # they are shown
        agents=words_on_one_line(card.agents), peer=words_on_one_line(card.peer),
        host=words_on_one_line(card.host), version=words_on_one_line(card.version),
    )  # fmt: skip


_SAMPLE = Card("")._asdict()
_ID = re.compile("[0-9A-Za-z._-]{1,64}")
