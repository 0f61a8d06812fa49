"""PROCESSES: several gateways on the same ports of one machine, and their supervisor (prefork).

The processes are the members of a cluster (cluster/) whose board is in the supervisor. The modules,
in the order in which to read them:

  The supervisor
    supervisor.py       its one thread: signals, messages of the children, the time
    roster.py           its decisions, pure: which child starts, serves, drains, is killed
    sockets.py          opens the ports of all children, and keeps them
    shared_state.py     answers the children's calls: hostnames, and ports of TCP_PORTS
    board.py            the board itself; and the children's end of it

  Between the two
    channel.py          JSON messages over a socket pair

  A child: an ordinary gateway
    child.py            its end of the channel
    child_life.py       its life, by the supervisor's orders: in place of life.py
    shared_ports.py     asks the supervisor before it opens a port of TCP_PORTS
    together.py         dashboard, metrics and `status` of all processes, by any one of them
    merged.py           adds up their documents, pure
"""
