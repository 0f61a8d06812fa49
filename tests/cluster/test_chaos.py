"""Three gateways on one Redis, six agents, visitors; and each of them fails. See chaos_bench.py."""

import random

import pytest
from chaos_bench import PLAN, SHORT, Bench, table
from support import need_package

need_package("redis", "redis")

pytestmark = [
    pytest.mark.slow,
    # Python's wrap_socket() leaves its new socket open if a reset comes before the handshake.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
    ),
]


def run(folder, plan, gopeer=None):
    seed = random.SystemRandom().randrange(1 << 32)
    with Bench(folder, gopeer, seed, patient=True) as bench:
        bench.run(plan)
    print(f"seed {seed}\n{table(bench.rows)}")  # pytest shows it if the test fails
    return bench


def test_each_visit_is_whole_or_fails_visibly_while_gateways_and_agents_fail(tmp_path):
    bench = run(tmp_path, SHORT)
    assert not bench.failures()
    assert sum(visit.end == "whole" for visit in bench.visits) > 100


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_same_with_a_go_agent_and_everything_that_may_happen(tmp_path, gopeer):
    bench = run(tmp_path, PLAN, str(gopeer))
    assert not bench.failures()
