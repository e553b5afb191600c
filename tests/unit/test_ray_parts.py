"""What the parts on Ray ask of its dashboard, and how they read its answers; the dashboard is a fake transport."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from ops.layout import Layout, Ports
from ops.parts import PartError
from ops.ports import free_ports
from ops.ray_parts import Ray, Serve, Stream, dashboard_client
from streaming.report import SILENT_S


def dashboard(*answers: tuple[int, Any]) -> tuple[httpx.Client, list[httpx.Request]]:
    """A dashboard that gives these answers in turn, the last one for ever."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        status, body = answers[min(len(requests), len(answers)) - 1]
        return httpx.Response(status, json=body)

    return httpx.Client(base_url="http://dashboard", transport=httpx.MockTransport(answer)), requests


def silent() -> httpx.Client:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    return httpx.Client(base_url="http://dashboard", transport=httpx.MockTransport(refuse))


@pytest.fixture
def layout(home: Path) -> Layout:
    return Layout(home, Ports(*free_ports(6)))


def report(layout: Layout, views: dict[str, Any], age_s: float = 0.0, now_s: float = 0.0) -> None:
    layout.stream.mkdir(parents=True, exist_ok=True)
    (layout.stream / "status-job.json").write_text(json.dumps({"views": views}))
    if now_s:
        os.utime(layout.stream / "status-job.json", (now_s - age_s, now_s - age_s))


def test_the_token_is_its_owners_alone_stays_and_goes_with_every_request(layout: Layout) -> None:
    from ops.ray_parts import _write_token

    _write_token(layout.token_file)
    token = layout.token_file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(layout.token_file.stat().st_mode) == 0o600
    _write_token(layout.token_file)
    assert layout.token_file.read_text() == token
    client = dashboard_client(layout)
    assert client.auth is not None
    request = next(client.auth.auth_flow(httpx.Request("GET", layout.dashboard)))
    assert request.headers["Authorization"] == f"Bearer {token}"


def test_ray_starts_with_ports_of_its_own_and_never_serves_beyond_loopback_without_a_token(layout: Layout) -> None:
    ray = Ray(layout, silent())
    words = [str(word) for word in ray._command(Path("/tmp/short"))]
    assert words[words.index("--port") + 1] == str(layout.ports.ray)
    assert words[words.index("--dashboard-host") + 1] == "127.0.0.1"
    inner = [int(word.rpartition("=")[2]) for word in words if "-port=" in word]
    assert len({*inner, layout.ports.ray, layout.ports.dashboard}) == len(inner) + 2
    environ = ray._environ()
    assert environ["RAY_AUTH_MODE"] == "token"
    assert environ["RAY_AUTH_TOKEN_PATH"] == str(layout.token_file)


@pytest.mark.parametrize(("keys", "host"), [((), "127.0.0.1"), (("secret",), "0.0.0.0")])
def test_serve_is_deployed_with_the_address_of_this_stack(layout: Layout, keys: tuple[str, ...], host: str) -> None:
    client, requests = dashboard((200, {}))
    layout = Layout(layout.home, layout.ports, api_keys=keys)
    Serve(layout, client).launch()
    config = json.loads(requests[0].content)
    assert (requests[0].method, requests[0].url.path) == ("PUT", "/api/serve/applications/")
    assert config["proxy_location"] == "HeadOnly"
    assert config["http_options"] == {"host": host, "port": layout.ports.serve}
    assert config["applications"][0]["import_path"] == "serving.app:build"


def test_a_refused_configuration_is_one_clear_error(layout: Layout) -> None:
    client, _ = dashboard((400, {"msg": "bad field"}))
    with pytest.raises(PartError, match=r"Ray cannot deploy the Serve application: 400 .*bad field"):
        Serve(layout, client).launch()
    with pytest.raises(PartError, match="dashboard does not answer"):
        Serve(layout, silent()).launch()


def test_an_application_that_cannot_be_deployed_is_said_with_serves_reason(layout: Layout) -> None:
    failed = {"status": "DEPLOY_FAILED", "message": "", "deployments": {"Gateway": {"message": "ImportError: no x"}}}
    deploying = {"status": "DEPLOYING"}
    client, _ = dashboard(*((200, {"applications": {"millrace": state}}) for state in (deploying, failed)))
    serve = Serve(layout, client)
    assert serve.ended({}) is None
    assert serve.ended({}) == "application millrace: DEPLOY_FAILED: ImportError: no x"
    assert Serve(layout, silent()).ended({}) is None


def test_the_stream_is_ready_once_its_job_reports_a_view(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1_000_000.0
    monkeypatch.setattr("ops.ray_parts.time.time", lambda: now_s)
    client, _ = dashboard((200, {"status": "RUNNING"}))
    stream = Stream(layout, client)
    handle = {"job": "stream-1", "submitted_s": now_s - 100}
    assert not stream.ready(handle)  # it never reported
    report(layout, {}, now_s=now_s)
    assert not stream.ready(handle)  # its workers did not
    report(layout, {"v": {"0": {}}}, age_s=SILENT_S + 1, now_s=now_s)
    assert not stream.ready(handle)  # too long ago
    report(layout, {"v": {"0": {}}}, age_s=5, now_s=now_s)
    assert not stream.ready(handle | {"submitted_s": now_s - 1})  # that was another job
    assert stream.ready(handle)
    assert not Stream(layout, dashboard((200, {"status": "FAILED"}))[0]).ready(handle)
    assert not Stream(layout, silent()).ready(handle)


def test_the_end_of_the_stream_is_told_with_its_log(layout: Layout) -> None:
    layout.log("stream").parent.mkdir(parents=True)
    layout.log("stream").write_text("error: no broker\n")
    client, _ = dashboard((200, {"status": "FAILED"}))
    reason = Stream(layout, client).ended({"job": "stream-1"})
    assert reason is not None
    assert reason.startswith("the job stream-1 is FAILED")
    assert reason.endswith("error: no broker")


def test_stop_waits_until_the_job_has_flushed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.ray_parts.time.sleep", lambda _: None)
    client, requests = dashboard((200, {}), (200, {"status": "RUNNING"}), (200, {"status": "STOPPED"}))
    Stream(layout, client).stop({"job": "stream-1"})
    assert [(request.method, request.url.path) for request in requests] == [
        ("POST", "/api/jobs/stream-1/stop"),
        ("GET", "/api/jobs/stream-1"),
        ("GET", "/api/jobs/stream-1"),
    ]
    Stream(layout, silent()).stop({"job": "stream-1"})
