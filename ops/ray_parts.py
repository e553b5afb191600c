"""The parts of the local stack that run on Ray: its head node, the Serve application and the stream job."""

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from ops.jobs import RAY_SETTINGS
from ops.layout import REPOSITORY, Layout, binaries_folder
from ops.parts import ANSWER_S, Handle, PartError, answers_http, process_ended, process_id, require_free
from ops.ports import LOOPBACK, free_ports
from ops.process import DetachedProcess, tail
from streaming.report import read_views

SERVE_CONFIG = REPOSITORY / "serving" / "serve.yaml"
STREAM_ENTRYPOINT = "python ray_jobs/stream_features.py"
JOB_END_S = 30.0
SERVE_END_S = 30.0
MINIMUM_CPUS = 4


def dashboard_client(layout: Layout) -> httpx.Client:
    """Return a client of Ray's dashboard; each request carries the token that this stack has by then."""

    def authorise(request: httpx.Request) -> httpx.Request:
        with contextlib.suppress(FileNotFoundError):
            request.headers["Authorization"] = f"Bearer {layout.token_file.read_text().strip()}"
        return request

    return httpx.Client(
        base_url=layout.dashboard, timeout=httpx.Timeout(10.0, connect=ANSWER_S), auth=authorise, trust_env=False
    )


class Ray:
    """The head node: a child that blocks, so that its end takes Ray's processes along and no other Ray's."""

    name = "ray"
    ready_s = 180.0
    external = False

    def __init__(self, layout: Layout, dashboard: httpx.Client) -> None:
        self.port = layout.ports.ray
        self.log = layout.log(self.name)
        self.address = layout.dashboard
        self._layout = layout
        self._dashboard = dashboard

    def launch(self) -> Handle:
        """Start Ray in the repository's root, where jobs will run, with an environment for them."""
        require_free("ray", self._layout.ports.ray)
        require_free("dashboard", self._layout.ports.dashboard)
        _write_token(self._layout.token_file)
        folder = Path(tempfile.mkdtemp(prefix="millrace-", dir="/tmp"))  # noqa: S108 (a socket path holds 107 characters)
        logs = self._layout.log(self.name).with_suffix("")
        logs.parent.mkdir(parents=True, exist_ok=True)
        _remove(logs)
        logs.symlink_to(folder / "session_latest" / "logs")
        try:
            process = DetachedProcess.start(
                self._command(folder), self._layout.log(self.name), cwd=REPOSITORY, environ=self._environ()
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return {**process.record(), "folder": str(folder)}

    def ready(self, handle: Handle) -> bool:
        """Whether the head that we started takes jobs; its dashboard answers long before its node has registered."""
        if not DetachedProcess.from_record(handle).alive():
            return False
        return answers_http(self._dashboard, "/api/jobs/") and self._has_node()

    def ended(self, handle: Handle) -> str | None:
        """Say that the head has ended, with the end of its log."""
        return process_ended(handle, self.log)

    def pid(self, handle: Handle) -> int | None:
        """Return the pid of `ray start` while it runs."""
        return process_id(handle)

    def stop(self, handle: Handle) -> None:
        """End Ray with everything that runs on it; its logs are kept in logs/ray/."""
        DetachedProcess.from_record(handle).stop(15.0)
        folder = Path(str(handle["folder"]))
        kept = self._layout.log(self.name).with_suffix("")
        _remove(kept)
        for logs in folder.glob("session_2*/logs"):
            with contextlib.suppress(shutil.Error, OSError):
                shutil.copytree(logs, kept, symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _has_node(self) -> bool:
        try:
            answer = self._dashboard.get("/api/v0/nodes").raise_for_status().json()
            return any(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False

    def _command(self, folder: Path) -> list[str | Path]:
        inner = ["node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc"]
        inner += ["runtime-env-agent", "metrics-export", "ray-client-server"]
        taken = zip(inner, free_ports(len(inner)), strict=True)
        return [
            *(binaries_folder() / "ray", "start", "--head", "--block", "--disable-usage-stats"),
            *("--port", str(self._layout.ports.ray)),
            *("--dashboard-host", LOOPBACK, "--dashboard-port", str(self._layout.ports.dashboard)),
            *("--num-cpus", str(max(MINIMUM_CPUS, os.cpu_count() or 1))),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--temp-dir", folder),
            *(f"--{name}-port={port}" for name, port in taken),
        ]

    def _environ(self) -> dict[str, str]:
        return self._layout.variables() | {
            "PATH": os.pathsep.join([str(binaries_folder()), os.environ.get("PATH", os.defpath)]),
            "RAY_USAGE_STATS_ENABLED": "0",
            **RAY_SETTINGS,
            "RAY_JOB_STOP_WAIT_TIME_S": "20",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
            "RAY_raylet_start_wait_time_s": "120",  # 30 by default, too few on a busy machine with two cores
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }


class Serve:
    """The application of serving/serve.yaml, deployed through the dashboard."""

    name = "serve"
    ready_s = 180.0
    external = False

    def __init__(self, layout: Layout, dashboard: httpx.Client) -> None:
        self.port = layout.ports.serve
        self.log = layout.log("ray").with_suffix("") / "serve"
        self.address = layout.serve
        self._layout = layout
        self._dashboard = dashboard
        self._client = httpx.Client(base_url=layout.serve, timeout=ANSWER_S, trust_env=False)

    def launch(self) -> Handle:
        """Hand the configuration over, with the address of this stack."""
        require_free(self.name, self.port)
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        config["proxy_location"] = "HeadOnly"
        config["http_options"] = (config.get("http_options") or {}) | {
            "host": self._layout.serve_host,
            "port": self._layout.ports.serve,
        }
        _checked(
            lambda: self._dashboard.put("/api/serve/applications/", json=config, timeout=60.0),
            "deploy the Serve application",
        )
        return {"applications": [application["name"] for application in config["applications"]]}

    def ready(self, handle: Handle) -> bool:
        """Whether the server is live, models or not."""
        return answers_http(self._client, "/livez")

    def ended(self, handle: Handle) -> str | None:
        """Say what Serve says about an application that it cannot deploy."""
        for name, application in self._applications().items():
            if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                deployments = application.get("deployments", {}).values()
                messages = [application.get("message", ""), *(d.get("message", "") for d in deployments)]
                return f"application {name}: {application['status']}: " + " ".join(m for m in messages if m)
        return None

    def pid(self, handle: Handle) -> int | None:
        """Return the pid of a replica that answers requests."""
        for application in self._applications().values():
            for deployment in application.get("deployments", {}).values():
                for replica in deployment.get("replicas", []):
                    if application.get("route_prefix") and replica.get("pid"):
                        return int(replica["pid"])
        return None

    def stop(self, handle: Handle) -> None:
        """Take the applications down; nothing is left to do when Ray is gone."""
        with contextlib.suppress(httpx.HTTPError):
            self._dashboard.delete("/api/serve/applications/", timeout=SERVE_END_S)

    def _applications(self) -> dict[str, Any]:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            return dict(
                self._dashboard.get("/api/serve/applications/").raise_for_status().json().get("applications", {})
            )
        return {}


class Stream:
    """The stream job: a Ray job like any that a user submits."""

    name = "stream"
    port: int | None = None
    ready_s = 180.0
    external = False

    def __init__(self, layout: Layout, dashboard: httpx.Client) -> None:
        self.log = layout.log(self.name)
        self.address = str(layout.stream)
        self._layout = layout
        self._dashboard = dashboard

    def launch(self) -> Handle:
        """Submit the job; its output goes to the part's log, which outlives Ray's folder."""
        log = self._layout.log(self.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        identity = f"stream-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        entrypoint = f'exec {STREAM_ENTRYPOINT} >> "$MILLRACE_HOME/logs/{log.name}" 2>&1'
        body = {"entrypoint": entrypoint, "submission_id": identity, "metadata": {"part": self.name}}
        _checked(lambda: self._dashboard.post("/api/jobs/", json=body, timeout=60.0), "submit the stream job")
        return {"job": identity, "submitted_s": time.time()}

    def ready(self, handle: Handle) -> bool:
        """Whether the job runs and has said lately, since it was submitted, that it works on a view."""
        views = read_views(self._layout.stream, since_s=float(str(handle["submitted_s"])))
        return bool(views) and self._status(handle) == "RUNNING"

    def ended(self, handle: Handle) -> str | None:
        """Say how the job ended, with the end of its log."""
        status = self._status(handle)
        if status not in ("FAILED", "STOPPED", "SUCCEEDED"):
            return None
        return f"the job {handle['job']} is {status}; the end of {self.log}:\n{tail(self._layout.log(self.name))}"

    def pid(self, handle: Handle) -> int | None:
        """Return the pid of the job's driver."""
        pid = ((self._job(handle) or {}).get("driver_info") or {}).get("pid")
        return int(pid) if pid else None

    def stop(self, handle: Handle) -> None:
        """Ask the job to flush and end, and wait for that; nothing is left to do when Ray is gone."""
        deadline_s = time.monotonic() + JOB_END_S
        with contextlib.suppress(httpx.HTTPError):
            self._dashboard.post(f"/api/jobs/{handle['job']}/stop")
        while self._status(handle) in ("PENDING", "RUNNING") and time.monotonic() < deadline_s:
            time.sleep(0.3)

    def _status(self, handle: Handle) -> str | None:
        """Return Ray's word for the state of the job."""
        return (self._job(handle) or {}).get("status")

    def _job(self, handle: Handle) -> dict[str, Any] | None:
        """Return what Ray knows of the job; None if Ray does not answer or does not know it."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            return dict(self._dashboard.get(f"/api/jobs/{handle['job']}").raise_for_status().json())
        return None


def _checked(request: Callable[[], httpx.Response], purpose: str) -> httpx.Response:
    try:
        response = request()
    except httpx.HTTPError as error:
        raise PartError(f"Ray's dashboard does not answer, so it cannot {purpose}: {error}") from None
    if response.is_error:
        raise PartError(f"Ray cannot {purpose}: {response.status_code} {response.text.strip()[-1000:]}")
    return response


def _remove(path: Path) -> None:
    """Remove a link, or a folder with what is in it."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write_token(path: Path) -> None:
    """Make the token once; it exists from the first moment with its owner's rights only."""
    if path.is_file() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
