"""Fixtures for the tests of an operator's commands."""

import pytest
from fake_ca import Mint
from operators import URL

from gotunnel_server.certs.folder import open_store


@pytest.fixture(scope="module")
def mint():
    return Mint()


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path, URL)
