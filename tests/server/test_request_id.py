from __future__ import annotations

import httpx
import pytest


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models/none"])
def test_a_callers_id_comes_back(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers={"x-request-id": "trace 42/a"}).headers["x-request-id"] == "trace 42/a"


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"\xe9", b"a\tb"])
def test_an_id_that_is_not_sane_is_replaced(http: httpx.Client, given: bytes) -> None:
    assert http.get("/health", headers={b"x-request-id": given}).headers["x-request-id"].startswith("req_")


def test_ids_of_ours_are_all_different(http: httpx.Client) -> None:
    assert len({http.get("/health").headers["x-request-id"] for _ in range(3)}) == 3
