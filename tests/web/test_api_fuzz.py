"""Whatever is sent to the two APIs, they answer: schemathesis makes requests from the OpenAPI document."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from broadsheet.feed import people
from broadsheet.web import runs

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

ROUTES = {  # the API of Hugging Face, and of ours what changes something
    ("GET", "/api/daily_papers"),
    ("GET", "/api/papers/search"),
    ("GET", "/api/papers/{paper_id}"),
    ("GET", "/papers/{paper_id}.md"),
    ("PUT", "/api/v1/papers/{paper_id}/vote"),
    ("DELETE", "/api/v1/papers/{paper_id}/vote"),
    ("POST", "/api/v1/papers/{paper_id}/comments"),
    ("POST", "/api/v1/papers/{paper_id}/runs"),
}


@pytest.fixture
def token(feed, monkeypatch):
    """An operator's, of all scopes; the runs that it queues are never started."""
    monkeypatch.setattr(runs.Supervisor, "_start", lambda *_: None)
    account = people.sign_up(feed.db, "fuzz", "fuzz@example.org", "correct horse battery", role="operator")
    yield people.create_token(feed.db, account.id, "fuzz", people.SCOPES)[1]
    for run in runs.latest(feed.db):
        runs.cancel(feed.db, account, run.id)
    people.delete_account(feed.db, account)


@pytest.mark.slow
def test_no_request_breaks_the_apis(feed, token):
    """Each route, as a stranger and with an operator's token, for any paper and for one that is there."""
    described = schemathesis.openapi.from_url(f"{feed.base}/api/openapi.json")
    operations = [operation.ok() for operation in described.get_all_operations()]
    assert {(operation.method.upper(), operation.path) for operation in operations} >= ROUTES
    answered = set()
    for operation in operations:

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), known=st.booleans(), signed_in=st.booleans())
        def ask(case, known, signed_in):
            if known and "paper_id" in case.path_parameters:
                case.path_parameters["paper_id"] = "2407.00886"
            headers = {"authorization": f"Bearer {token}"} if signed_in else None
            answer = case.call(headers=headers, timeout=60)
            assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.status_code} {answer.text[:200]}"
            answered.add((case.method.upper(), case.operation.path, answer.status_code))

        ask()
    # What is sent gets through to the store: a 403 or 422 everywhere would try nothing.
    done = {(method, path) for method, path, status in answered if status in (200, 201)}
    assert done >= ROUTES
