"""Whatever is sent to the two APIs, they answer: schemathesis makes requests from the OpenAPI document."""

import pytest
from hypothesis import HealthCheck, Phase, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture
def described(feed):
    return schemathesis.openapi.from_url(f"{feed.base}/api/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_api(case):
    case.call_and_validate(checks=[schemathesis.checks.not_a_server_error], timeout=60)
