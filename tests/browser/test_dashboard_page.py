"""The gateway's dashboard, in a browser."""

import pytest
from support import APP, agent_here, gateway_here


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def test_the_page_shows_what_agents_serve(gateway, page, tmp_path, origin):
    with agent_here(gateway, tmp_path, http={APP: origin.port}):
        page.open(f"http://localhost:{gateway.dashboard_port}/")
        page.until_it_says(APP)
