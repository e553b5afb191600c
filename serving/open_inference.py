"""Open Inference Protocol v2 over HTTP, JSON and binary: what `tritonclient.http` speaks.

Specification: https://github.com/kserve/open-inference-protocol, with Triton's extensions binary_tensor_data,
statistics and model_repository (the index and load; models are unloaded by removing their alias in the registry).
"""

import zlib
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from serving import tensors
from serving.backend import Backend, Caller, Inference, TensorSpec, answer_headers
from serving.errors import ServingError, bad_request
from serving.tensors import Tensor

NAME = "millrace"
JSON_LENGTH = "inference-header-content-length"
WINDOW_BITS = {"gzip": 31, "deflate": 15}


def error_body(error: ServingError) -> dict[str, object]:
    """The protocol's error envelope."""
    return {"error": error.message}


def inflate(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """A body without its content encoding.

    Raises:
        ServingError: 415 for an unknown encoding, 400 for a broken body, 413 for more than `limit_bytes`.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise ServingError(415, f"the content encoding {encoding!r} is unknown; use gzip or deflate", "bad_encoding")
    unpacker = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise bad_request(f"the body is no valid {encoding}: {error}") from None
    if len(plain) > limit_bytes:
        raise ServingError(413, f"the unpacked body exceeds the limit of {limit_bytes} bytes", "body_too_large")
    if not unpacker.eof:
        raise bad_request(f"the body is no valid {encoding}: it ends too early")
    return plain


def parse(body: bytes, json_length: str | None) -> tuple[dict[str, Any], list[Tensor]]:
    """The JSON part of an infer request, and its input tensors.

    Args:
        body: JSON, and the blobs of binary inputs in their order after it.
        json_length: the header Inference-Header-Content-Length; None where the body is JSON only.

    Raises:
        ServingError: status 400.
    """
    try:
        length = len(body) if json_length is None else int(json_length)
    except ValueError:
        length = -1
    if not 0 <= length <= len(body):
        raise bad_request(f"Inference-Header-Content-Length is {json_length} for a body of {len(body)} bytes")
    try:
        request = orjson.loads(body[:length])
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is no valid JSON: {error}") from None
    declared = request.get("inputs", []) if isinstance(request, dict) else None
    if not isinstance(declared, list) or not all(isinstance(each, dict) for each in declared):
        raise bad_request("the body must be a JSON object with a list `inputs` of objects", "inputs")
    inputs = []
    position = length
    for each in declared:
        size = _parameters(each).get("binary_data_size")
        if size is not None and (type(size) is not int or not 0 <= size <= len(body) - position):
            raise bad_request(f"the input {each.get('name')!r} has a binary_data_size that the body does not hold")
        inputs.append(tensors.read(each, None if size is None else body[position : position + size]))
        position += size or 0
    if position != len(body):
        raise bad_request(f"the body has {len(body) - position} bytes more than its inputs")
    return request, inputs


def _parameters(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = holder.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise bad_request("`parameters` must be an object", "parameters")
    return parameters


def respond(request: Mapping[str, Any], inference: Inference, request_id: str) -> Response:
    """The response to an infer request, with the outputs that it asks for, each as JSON or as a blob.

    Raises:
        ServingError: status 400, an output that the model does not have.
    """
    wanted = request.get("outputs")
    all_binary = bool(_parameters(request).get("binary_data_output"))
    known = {output.name: output for output in inference.outputs}
    if wanted:
        if not isinstance(wanted, list) or not all(isinstance(each, dict) for each in wanted):
            raise bad_request("`outputs` must be a list of objects", "outputs")
        chosen = [(each.get("name"), bool(_parameters(each).get("binary_data", all_binary))) for each in wanted]
    else:
        chosen = [(name, all_binary) for name in known]
    outputs: list[dict[str, object]] = []
    blobs: list[bytes] = []
    for name, binary in chosen:
        if name not in known:
            raise bad_request(f"the model has no output {name!r}; it has {', '.join(known)}", "outputs")
        output = known[name]
        described: dict[str, object] = {"name": name, "datatype": output.datatype, "shape": list(output.shape)}
        if binary:
            blobs.append(tensors.to_blob(output))
            described["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            described["data"] = tensors.to_json(output)
        outputs.append(described)
    by = inference.by
    answer = {
        "model_name": by.model,
        "model_version": str(by.version),
        "id": str(request.get("id") or request_id),
        "outputs": outputs,
    }
    headers = answer_headers(by)
    body = orjson.dumps(answer)
    if not blobs:
        return Response(body, headers=headers, media_type="application/json")
    headers[JSON_LENGTH] = str(len(body))
    return Response(b"".join([body, *blobs]), headers=headers, media_type="application/octet-stream")


def router(backend: Backend, max_body_bytes: int, server_version: str) -> APIRouter:
    """The routes under /v2."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

    @routes.get("/health/live")
    async def live() -> Response:
        return Response()

    @routes.get("/health/ready")
    async def ready() -> Response:
        health = await backend.health()
        return Response(status_code=503 if health.status == "loading" else 200)

    @routes.get("")
    async def server_metadata() -> dict[str, object]:
        extensions = ["binary_tensor_data", "statistics", "model_repository"]
        return {"name": NAME, "version": server_version, "extensions": extensions}

    @routes.get("/models/{model}/ready")
    @routes.get("/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> Response:
        await backend.metadata(model, _number(version))
        return Response()

    @routes.get("/models/{model}")
    @routes.get("/models/{model}/versions/{version}")
    async def model_metadata(model: str, version: str | None = None) -> dict[str, object]:
        found = await backend.metadata(model, _number(version))
        return {
            "name": model,
            "versions": [str(found.version)],
            "platform": found.platform,
            "inputs": [_described(each) for each in found.inputs],
            "outputs": [_described(each) for each in found.outputs],
        }

    @routes.post("/models/{model}/infer")
    @routes.post("/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Predict; the entity of a single row may come as the header `x-entity-id`, features may come as inputs."""
        encoding = request.headers.get("content-encoding", "").strip().lower()
        body = inflate(await request.body(), encoding, max_body_bytes)
        described, inputs = parse(body, request.headers.get(JSON_LENGTH))
        caller = Caller(request.state.request_id, request.headers.get("x-entity-id"))
        inference = await backend.infer(model, _number(version), inputs, caller)
        return respond(described, inference, caller.request_id)

    @routes.get("/models/{model}/stats")
    @routes.get("/models/{model}/versions/{version}/stats")
    async def statistics(model: str, version: str | None = None) -> dict[str, object]:
        found = await backend.metadata(model, _number(version))
        figures = (await backend.health()).metrics[model]
        count = int(figures["requests"] - figures["errors"])
        success = {"count": count, "ns": int(figures["mean_latency_ms"] * 1e6 * count)}
        fail = {"count": int(figures["errors"]), "ns": 0}
        stats = {"name": model, "version": str(found.version), "inference_stats": {"success": success, "fail": fail}}
        return {"model_stats": [stats]}

    @routes.post("/repository/index")
    async def index() -> list[dict[str, str]]:
        states = {"ready": "READY", "loading": "LOADING", "failed": "UNAVAILABLE"}
        return [
            {"name": each.id, "version": str(each.version), "state": states[each.state], "reason": each.error}
            for each in await backend.models()
        ]

    @routes.post("/repository/models/{model}/load")
    async def load(model: str) -> Response:
        """Look at the registry now instead of at the next poll."""
        await backend.load(model)
        return Response()

    @routes.post("/repository/models/{model}/unload")
    async def unload(model: str) -> Response:
        """Refused: what is served is what the registry's aliases name."""
        raise bad_request(f"models follow the registry: remove the alias of {model} there, and it is unloaded", "model")

    return routes


def _described(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if not version.isdecimal():
        raise ServingError(404, f"the version {version!r} is no number", "model_not_found", "version")
    return int(version)
