"""OpenAI's routes for models and audio, as its official client uses them.

Reference: https://platform.openai.com/docs/api-reference/audio/createTranscription
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, File, Form, Header, Request, Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serving.backend import Backend, Caller, Segment, Transcription, answer_headers
from serving.errors import ServingError, bad_request

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(error: ServingError) -> dict[str, object]:
    """OpenAI's error envelope."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind = TYPES.get(error.status, default)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(seconds * 1e3)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{comma}{milliseconds % 1000:03}"


def to_srt(segments: tuple[Segment, ...]) -> str:
    """SubRip subtitles, one cue a segment."""
    return "".join(
        f"{number}\n{_clock(each.start_s, ',')} --> {_clock(each.end_s, ',')}\n{each.text}\n\n"
        for number, each in enumerate(segments, 1)
    )


def to_vtt(segments: tuple[Segment, ...]) -> str:
    """WebVTT subtitles, one cue a segment."""
    cues = (f"{_clock(each.start_s, '.')} --> {_clock(each.end_s, '.')}\n{each.text}\n\n" for each in segments)
    return "WEBVTT\n\n" + "".join(cues)


def to_verbose(transcription: Transcription, language: str | None) -> dict[str, object]:
    """The `verbose_json` answer; figures that the model does not give are left out or null."""
    return {
        "task": "transcribe",
        "language": language or "en",
        "duration": transcription.duration_s,
        "text": transcription.text,
        "segments": [
            {
                "id": number,
                "seek": 0,
                "start": each.start_s,
                "end": each.end_s,
                "text": each.text,
                "tokens": [],
                "temperature": 0.0,
                "confidence": each.confidence,
            }
            for number, each in enumerate(transcription.segments)
        ],
    }


def to_events(transcription: Transcription) -> Iterator[bytes]:
    """Server-sent events: a delta a segment, then the whole."""
    events: list[dict[str, str]] = []
    for segment in transcription.segments:
        if segment.text:
            delta = f" {segment.text}" if events else segment.text
            events.append({"type": "transcript.text.delta", "delta": delta})
    events.append({"type": "transcript.text.done", "text": transcription.text})
    for event in events:
        yield b"data: " + orjson.dumps(event) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _rendered(transcription: Transcription, form: Format, language: str | None) -> Response:
    headers = answer_headers(transcription.by)
    if form == "json":
        return JSONResponse({"text": transcription.text}, headers=headers)
    if form == "verbose_json":
        return JSONResponse(to_verbose(transcription, language), headers=headers)
    texts = {
        "text": transcription.text + "\n",
        "srt": to_srt(transcription.segments),
        "vtt": to_vtt(transcription.segments),
    }
    return PlainTextResponse(texts[form], headers=headers)


def router(backend: Backend) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def models() -> dict[str, object]:
        """Models that answer now."""
        ready = [each for each in await backend.models() if each.state == "ready"]
        return {"object": "list", "data": [_model(each.id) for each in ready]}

    @routes.get("/models/{model}")
    async def model(model: str) -> dict[str, object]:
        """One of them."""
        await backend.metadata(model, None)
        return _model(model)

    @routes.post("/audio/transcriptions", response_model=None)
    async def transcribe(
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, OGG or MP3")],
        model: Annotated[str, Form(description="id of a speech model, such as whisper")],
        response_format: Annotated[Format, Form()] = "json",
        language: Annotated[str | None, Form(description="reported back; the model decides by itself")] = None,
        prompt: Annotated[str | None, Form(description="accepted for compatibility, not used")] = None,
        temperature: Annotated[float, Form(ge=0, le=1, description="accepted; decoding is greedy")] = 0.0,
        stream: Annotated[bool, Form(description="server-sent events instead of one answer")] = False,
        granularities: Annotated[list[str] | None, Form(alias="timestamp_granularities[]")] = None,
        x_entity_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        """Words of an audio file."""
        if unsupported := set(granularities or ()) - {"segment"}:
            message = f"the granularity {sorted(unsupported)[0]!r} is not supported; use segment"
            raise bad_request(message, "timestamp_granularities")
        audio = await file.read()
        if not audio:
            raise bad_request("the file is empty", "file", "invalid_audio")
        caller = Caller(request.state.request_id, x_entity_id)
        transcription = await backend.transcribe(model, audio, caller)
        if stream:
            headers = answer_headers(transcription.by)
            return StreamingResponse(to_events(transcription), media_type="text/event-stream", headers=headers)
        return _rendered(transcription, response_format, language)

    return routes


def _model(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "millrace"}
