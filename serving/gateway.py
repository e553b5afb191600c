"""The HTTP side: a FastAPI application over a backend, with authorization, limits, request ids and metrics."""

import hmac
import logging
import time
import uuid
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import open_inference, openai_api
from serving.backend import Backend
from serving.errors import ServingError
from serving.metrics import HttpMetrics
from serving.settings import Settings

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _server_version() -> str:
    try:
        return version("millrace")
    except PackageNotFoundError:
        return "0"


def envelope(path: str, error: ServingError) -> JSONResponse:
    """An error in the form of the path's protocol."""
    if path.startswith("/v1"):
        body = openai_api.error_body(error)
    elif path.startswith("/v2"):
        body = open_inference.error_body(error)
    else:
        body = {"detail": error.message}
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, error.status, headers)


class Boundary:
    """Everything around a route: request id, authorization, body limit, errors in their envelope, metrics.

    Args:
        app: the application inside.
        settings: keys and limits.
        metrics: counts requests by route.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: HttpMetrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._limit = settings.max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._authorize(scope["path"], headers)
            bounded = await self._bounded(headers, receive)
            await self._app(scope, bounded, reply)
        except ServingError as error:
            await envelope(scope["path"], error)(scope, receive, reply)
        except Exception:
            logger.exception("request %s to %s failed", request_id, scope["path"])
            if status:
                raise
            failed = ServingError(500, f"the server failed; its log has the request {request_id}", "internal_error")
            await envelope(scope["path"], failed)(scope, receive, reply)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, scope["method"], str(status or 499)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _authorize(self, path: str, headers: Headers) -> None:
        if not self._keys or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            message = "a key is needed: send the header Authorization: Bearer <key>"
            raise ServingError(401, message, "missing_api_key")
        offered = given.strip().encode("utf-8", "surrogateescape")
        if not any([hmac.compare_digest(offered, key) for key in self._keys]):
            raise ServingError(401, "the key is not one of this server's", "invalid_api_key")

    async def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, at most the limit, and give it to the application as one message."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._limit:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _replay([message], receive)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limit:
                raise self._too_large()
            more = message.get("more_body", False)
        return _replay([{"type": "http.request", "body": b"".join(parts), "more_body": False}], receive)

    def _too_large(self) -> ServingError:
        return ServingError(413, f"the body exceeds the limit of {self._limit} bytes", "body_too_large")


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed


def _request_id(headers: Headers) -> str:
    """The caller's own id where it is short and printable, else a new one."""
    given = headers.get("x-request-id", "")
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """The application: OpenAI's routes, the Open Inference Protocol, health, metrics and /docs."""
    metrics = HttpMetrics()
    server_version = _server_version()
    app = FastAPI(
        title="Millrace",
        version=server_version,
        description="Registered models behind OpenAI's routes and the Open Inference Protocol. Features of the entity "
        "in the header `x-entity-id` are looked up; an entity that the feature store does not know gets the defaults. "
        "Answers carry `x-request-id`, `x-model-version` and `x-variant`.",
    )
    app.add_middleware(Boundary, settings=settings, metrics=metrics)
    app.include_router(openai_api.router(backend))
    app.include_router(open_inference.router(backend, settings.max_body_bytes, server_version))

    @app.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> JSONResponse:
        """200 once every registered model has been loaded or has failed to load, else 503; lists them."""
        health = await backend.health()
        models = {
            each.id: {"state": each.state, "version": each.version, "variant": each.variant, "error": each.error}
            for each in health.models
        }
        body = {"status": health.status, "queue_size": health.queue_size, "models": models}
        return JSONResponse(body, 503 if health.status == "loading" else 200)

    @app.get("/metrics", tags=["operations"])
    async def prometheus() -> Response:
        """Prometheus text of the gateway and of the models' side."""
        return PlainTextResponse(metrics.render() + await backend.metrics(), media_type=METRICS_TYPE)

    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ServingError)
    async def refused(request: Request, error: ServingError) -> Response:
        return envelope(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        message = f"the field {param!r} is not valid: {first['msg']}"
        return envelope(request.url.path, ServingError(400, message, "invalid_request", param))

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.url.path}; see /docs",
            405: f"{request.url.path} takes no {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return envelope(request.url.path, ServingError(error.status_code, message, "invalid_request"))
