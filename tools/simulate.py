"""What a cluster of gateways costs Redis, measured here; and what a large one would, simulated.

    python3 tools/simulate.py                             3, 30 and 1000 gateways, 1 M hostnames
    python3 tools/simulate.py --measure                   measure a redis-server here first
    python3 tools/simulate.py --gateways 300 --sessions 3
    python3 tools/simulate.py --gateways 1000 --told 64 --shards 16

The simulation runs the rules of leases (gotunnel_server/cluster/leases.py) in simulated time, with
what each call costs Redis, as measured. All gateways start, one dies, one of a hundred dies, ten
are replaced, Redis loses its data. docs/scaling.md explains the figures. --measure needs
redis-server; a simulation of 1000 gateways takes minutes.
"""

import bootstrap


def main(arguments):
    return bootstrap.run_tests_program("cluster/scale.py", arguments)


if __name__ == "__main__":
    bootstrap.tool(main)
