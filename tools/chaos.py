"""Runs three gateways on one Redis, with agents and visitors, and has each of them fail in turn.

    python3 tools/chaos.py                    everything that may happen, once
    python3 tools/chaos.py --short            only what CI does
    python3 tools/chaos.py --step "gateway is killed" --rounds 10
    python3 tools/chaos.py --go PROGRAM       with the Go agent of tests/gopeer as well

Prints for each fault how long visits were not well, beside the goal, and how many visits were
whole, failed, got a wrong answer or hung. Needs redis-server. The exit status is 1 if a goal was
missed, if a visit got a wrong answer or hung, or if one was lost through an announced restart.
"""

import bootstrap


def main(arguments):
    return bootstrap.run_tests_program("cluster/chaos_bench.py", arguments)


if __name__ == "__main__":
    bootstrap.tool(main)
