"""Runs the fault bench (tests/faults/) for as long as you like, on this machine alone.

    python3 tools/soak.py --minutes 60
    python3 tools/soak.py --minutes 60 --seed 7      a run again, as far as threads can be repeated
    python3 tools/soak.py --sabotage keeps           with a broken gateway, to see the bench fail

Lines between visitors, gateway, agents and targets are cut, delayed and corrupted, processes are
killed, stopped and restarted; each visit must be whole or fail visibly. Shows figures meanwhile,
and a report at the end. The exit status is 1 if a visit got a wrong answer or hung, if a hostname
was not served again, or if a program has logged a bug.
"""

import bootstrap


def main(arguments):
    return bootstrap.run_tests_program("faults/fault_bench.py", arguments)


if __name__ == "__main__":
    bootstrap.tool(main)
