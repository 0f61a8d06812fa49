"""Several gateways as one (CLUSTER, PROCESSES): what they share, and how they find each other.

A *member* is one gateway. The *board* is the one place that all members read and write: a Redis
server, or the supervisor of PROCESSES. The modules, in the order in which to read them:

    cluster.py          composes the others, starts and stops them
    settings.py         CLUSTER and its companions, read and checked

  Claims: which agent has a hostname (leases with fencing numbers)
    board.py            the interface of a board, and the values that members exchange with it
    leases.py           a board's rules as a pure table: leases, and when a hostname is free
    tenure.py           the holder's half of these rules, pure: how long a member may serve
    redis_board.py      the rules once more, as Lua scripts on Redis
    engine.py           the connection to Redis
    bounded.py          bounds its answers, in bytes and in time
    members.py          a member's two threads: one calls the board, one watches the tenure
    claims.py           a hostname is claimed on the board first, then in this gateway's registry
    former_member.py    after a crash: the hostnames of the process before are free at once

  Visits that one member passes on to another one
    peers.py            one connection to each other member, and one from each
    secret.py           their mutual TLS, with certificates made of the cluster's key
    peer_session.py     the connection that this member dials: it acts as an agent
    peer_tunnel.py      the connection that it accepts: routes to the other member's agents
    origin.py           what is told of an agent, as register messages
    passage.py          copies a visit between two streams
    watched.py          streams that need no thread while nothing comes

  What else the members share
    certificates.py     composes the next five
    storage.py          the files of ACME_CACHE, on Redis
    sealed.py           encrypts private keys before they go there
    local_copy.py       keeps a copy in ACME_CACHE, so that a gateway starts without Redis
    locker.py           locks on Redis, with a lease
    proofs.py           every member answers a CA's validations
    folder_changes.py   with PROCESSES alone: the processes share the folder itself
    counts.py           rates, wrong passwords, bad tokens and blocked addresses

docs/cluster.md is the operator's page, docs/protocol.md 12 has the wire between members. Nothing
here is imported by a gateway that is alone (membership.py in the hall).
"""
