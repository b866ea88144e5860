"""The server around its endpoints: its life, who may come in, with how much, and what it tells a monitor."""

import json
import logging
import threading
from collections.abc import Iterator

import httpx2
import openai
import pytest

from antiphon.engine import Engine
from antiphon.errors import InputError
from antiphon.serve.logs import JsonLines
from antiphon.serve.openapi import ENDPOINTS
from antiphon.serve.settings import KEYS, Settings, read_keys
from tests.serving import Served, engine, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def test_health_is_200_only_when_it_can_answer():
    ready = threading.Event()

    def make() -> Engine:
        assert ready.wait(30)
        return engine()

    with serving(make=make, wait=False) as served, served.http() as http:
        assert http.get("/health").status_code == 503
        refused = http.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        ready.set()


def test_the_model_is_listed_under_all_its_names():
    with serving(Settings(aliases=("gpt-realtime",))) as served:
        assert [model.id for model in served.client().models.list()] == ["tiny", "gpt-realtime"]
        assert served.client().models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="there is tiny, gpt-realtime"):
            served.client().models.retrieve("other")


def test_errors_have_openais_shape(server):
    with server.http() as http:
        for response, status in ((http.get("/v1/nothing"), 404), (http.delete("/v1/models"), 405)):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_key_is_asked_for_and_compared():
    with serving(Settings(keys=("one", "two"))) as served, served.http() as http:
        assert http.get("/health").status_code == 200
        assert served.client("two").models.list().data
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Basic one"},
            {"authorization": "one"},
        ):
            refused = http.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        assert http.get("/metrics").status_code == 401


def test_who_binds_to_the_world_needs_keys(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="callers need a key"):
        Settings(host="0.0.0.0")
    monkeypatch.setenv(KEYS, "from-environment, another")
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file  # of Anna\n\n")
    assert read_keys(file) == ("from-environment", "another", "from-file")
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="has no key"):
        read_keys(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),  # a name that leads here (DNS rebinding)
        ({"origin": "https://friend.example"}, 200),
    ],
)
def test_pages_of_others_may_not_speak_to_it(headers, status):
    with serving(Settings(origins=("https://friend.example",))) as served, served.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == status
        own = {"origin": served.url}
        assert http.get("/v1/models", headers=own).status_code == 200


def test_bodies_have_a_limit_whatever_their_header_says():
    with serving(Settings(body_bytes=1000)) as served, served.http() as http:

        def pieces() -> Iterator[bytes]:  # without a length
            yield from [b"x" * 600] * 3

        for body in (b"x" * 1001, pieces()):
            refused = http.post("/v1/chat/completions", content=body)
            assert refused.status_code == 413
            assert refused.json()["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_given_up():
    with serving(Settings(chunk_seconds=0.2)) as served, httpx2.Client(base_url=served.url, timeout=10) as http:

        def slow() -> Iterator[bytes]:
            yield b"{"
            threading.Event().wait(1)
            yield b"}"

        refused = http.post("/v1/chat/completions", content=slow())
        assert refused.status_code == 408
        assert http.get("/health").status_code == 200


def test_metrics_count_requests_and_refusals(server):
    with server.http() as http:
        http.get("/v1/models")
        http.get("/v1/nothing/secret")
        text = http.get("/metrics").text
    assert 'antiphon_requests_total{path="/v1/models",status="200"}' in text
    assert 'antiphon_refusals_total{reason="404"}' in text
    assert "secret" not in text


def test_the_description_names_every_endpoint(server):
    with server.http() as http:
        document = http.get("/openapi.json").json()
        page = http.get("/docs").text
    assert {one.path for one in ENDPOINTS} == set(document["paths"])
    assert all(one.path in page for one in ENDPOINTS)
    refs = json.dumps(document)
    for name in {part.split('"')[0] for part in refs.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]


def test_a_request_is_one_line_of_json_with_its_id(server, caplog):
    caplog.set_level(logging.INFO, "antiphon.serve")
    with server.http() as http:
        response = http.get("/v1/models", headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        forged = http.get("/v1/models", headers={"x-request-id": 'a"b c'})
        assert forged.headers["x-request-id"].startswith("req_")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.message == "request"]
    assert {"id": "mine-1", "path": "/v1/models", "status": 200}.items() <= lines[0].items()
