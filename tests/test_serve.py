"""The server around its endpoints: its life, who may come in, with how much, and what it tells a monitor."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import pytest
from starlette.requests import Request
from starlette.responses import Response
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from antiphon.engine import Engine
from antiphon.errors import InputError
from antiphon.serve.logs import JsonLines, to_standard_error
from antiphon.serve.openapi import ENDPOINTS
from antiphon.serve.run import place_of, run
from antiphon.serve.settings import KEYS, Settings, read_keys
from tests.serving import Served, engine, serving, until


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


def test_a_model_that_cannot_be_made_ready_ends_the_server(monkeypatch, caplog):
    def make() -> Engine:
        raise MemoryError("too large")

    monkeypatch.setattr("antiphon.serve.run.to_standard_error", lambda: None)
    with pytest.raises(InputError, match="could not be made ready"):
        run(Settings(), place_of(Settings(), 0), make)
    assert "warming failed" in caplog.messages


def test_an_address_that_cannot_be_had_is_told():
    taken = place_of(Settings(), 0)
    taken.listen()
    with pytest.raises(InputError, match="give another --host or --port"):
        place_of(Settings(), taken.getsockname()[1])
    taken.close()
    with pytest.raises(InputError, match=r"nowhere\.invalid:0 cannot be had"):
        place_of(Settings(host="nowhere.invalid", keys=("one",)), 0)


def test_the_container_is_healthy_only_when_it_can_answer():
    dockerfile = (Path(__file__).parent.parent / "Dockerfile").read_text()
    check = json.loads(dockerfile.partition("HEALTHCHECK")[2].partition("CMD ")[2].splitlines()[0])
    ready = threading.Event()

    def make() -> Engine:
        assert ready.wait(60)
        return engine()

    with serving(make=make, wait=False) as served, served.http() as http:
        words = [sys.executable, "-c", check[2].replace("127.0.0.1:8000", served.host)]
        assert subprocess.run(words, stderr=subprocess.DEVNULL).returncode != 0
        ready.set()
        until(lambda: http.get("/health").status_code == 200)
        assert subprocess.run(words).returncode == 0


def test_the_model_is_listed_under_all_its_names():
    with serving(Settings(aliases=("gpt-realtime",))) as served:
        assert [model.id for model in served.client().models.list()] == ["tiny", "gpt-realtime"]
        assert served.client().models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="there is tiny, gpt-realtime"):
            served.client().models.retrieve("other")


def test_errors_have_openais_shape(server):
    with server.http() as http:
        for response, status, words in (
            (http.get("/v1/nothing"), 404, "/docs lists"),
            (http.post("/v1/audio/translations"), 404, "/docs lists"),
            (http.delete("/v1/models"), 405, "use GET or HEAD"),
            (http.put("/v1/audio/voices"), 405, "use GET or HEAD or POST"),
            (http.post("/index.html"), 404, "/docs lists"),
            (http.get("/v1/realtime"), 426, "connect to ws://"),
        ):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert words in response.json()["error"]["message"]
    with pytest.raises(InvalidStatus, match="404") as refused:
        connect(f"ws://{server.host}/v1/realtime/calls")
    assert b"there is no /v1/realtime/calls" in (refused.value.response.body or b"")


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


def drip(host: str, began: bytes) -> float:
    """Seconds until a server hangs up on who sends a header's bytes one by one."""
    address, _, port = host.partition(":")
    with socket.create_connection((address, int(port))) as line:
        line.sendall(began)
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < begun + 10:
                line.sendall(b"x")
                line.settimeout(0.1)
                with suppress(TimeoutError):
                    while line.recv(4096):
                        pass
                    break
        return time.monotonic() - begun


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_comes_byte_by_byte_is_given_up(before):
    with serving(Settings(head_seconds=1)) as served, served.http() as http:
        assert 0.8 < drip(served.host, before + b"GET /health HTTP/1.1\r\nx: ") < 5
        assert http.get("/health").status_code == 200


def test_a_connection_that_says_nothing_is_given_up_and_a_slow_answer_is_not(monkeypatch):
    async def slow(request: Request) -> Response:
        await asyncio.sleep(1.5)
        return Response()

    monkeypatch.setattr("antiphon.serve.app.health", slow)
    with serving(Settings(head_seconds=1), wait=False) as served, served.http() as http:
        address, _, port = served.host.partition(":")
        with socket.create_connection((address, int(port)), timeout=5) as silent:
            assert http.get("/health").status_code == 200
            assert silent.recv(1) == b""


def test_the_log_holds_no_query_and_calls_no_refusal_an_error(server, capfd, monkeypatch):
    for name in ("antiphon.serve", "uvicorn.error"):  # put back as they were
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
        logger.handlers = []
    to_standard_error()
    secret = "who-can-come-back"
    with server.http() as http:
        http.get(f"/v1/models?resume_token={secret}")
    with pytest.raises(InvalidStatus):
        connect(f"ws://{server.host}/v1/realtime?session_id=x&resume_token={secret}")
    time.sleep(0.2)  # uvicorn may have something to add
    told = [json.loads(text) for text in capfd.readouterr().err.splitlines()]
    assert [(one["event"], one["path"], one["level"]) for one in told] == [
        ("request", "/v1/models", "info"),
        ("request", "/v1/realtime", "info"),
    ]
    assert secret not in str(told)


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
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
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
