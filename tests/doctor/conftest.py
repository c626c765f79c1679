"""What is tested here is measured."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _measured(measured_speeds): ...
