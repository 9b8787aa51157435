"""A server whose requests share network calls, to copy and change.

    uvicorn --app-dir bench --factory serve:app
    curl -N 127.0.0.1:8000/sample -d '{"prompts": "a fox", "seeds": [1, 2], "plan": "hybrid"}'

POST /sample takes a JSON object with the arguments of `headstart.Engine.begin` that FIELDS names.
The answer is a line of JSON for each row, {"step", "model", "sigma", "ms" since the request came},
and a last one, {"png": [base64, one an image]}, or {"error": ...} where the run failed on its way.
What cannot be served is 400 with the reason. A client that leaves cancels its run at the next row.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import headstart as hs
from headstart.traces.decoders import Decoder

FIELDS = {"prompts", "seeds", "negative", "plan", "steps", "k", "base_guidance",
          "distilled_guidance", "adapters"}  # fmt: skip
MOST_IMAGES = 16
"""In one request: its samples are not split, and others wait for its calls."""


def app(engine: hs.Engine | None = None, batch: hs.Batch | None = None) -> Starlette:
    engine = engine or hs.Engine.demo()  # yours: Engine.load(base, distilled), then attach adapters
    batch = engine.batch() if batch is None else batch  # an empty Batch is False
    draw = hs.decoder(engine, "full")

    async def sample(request: Request) -> Response:
        came = time.perf_counter()
        try:
            run = await asyncio.to_thread(begin, engine, await request.body())
        except hs.HeadstartError as error:
            return PlainTextResponse(str(error), 400)
        return StreamingResponse(lines(batch, run, draw, came), media_type="application/x-ndjson")

    return Starlette(routes=[Route("/sample", sample, methods=["POST"])])


def begin(engine: hs.Engine, body: bytes) -> hs.Run:
    """The run that a request asks for. Raises a HeadstartError for whatever is wrong with it."""
    try:
        fields: dict[str, Any] = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise hs.InputError(f"the body is no JSON ({error}): got {body[:60]!r}") from None
    if type(fields) is not dict or not {"prompts"} <= fields.keys() <= FIELDS:
        raise hs.InputError(
            "expected a JSON object with prompts, and no other names than "
            f"{', '.join(sorted(FIELDS))}; got {body[:60]!r}"
        )
    if str(fields.get("plan")).endswith(".toml"):
        raise hs.InputError("plan: give a name; a request cannot read files of the server")
    lists = [cast("list[object]", own) for own in fields.values() if isinstance(own, list)]
    counts = [len(own) for own in lists]
    if max(counts, default=1) > MOST_IMAGES:
        raise hs.InputError(f"{max(counts)} images: a request may ask for {MOST_IMAGES}")
    return engine.begin(**fields)


async def lines(batch: hs.Batch, run: hs.Run, draw: Decoder, came: float) -> AsyncIterator[str]:
    try:
        async for state in batch.run(run):
            step, ms = run.table[state.step], 1e3 * (time.perf_counter() - came)
            yield line(step=state.step, model=step.model, sigma=step.sigma, ms=round(ms, 1))
        yield line(png=await asyncio.to_thread(pngs, run, draw))
    except hs.HeadstartError as error:
        yield line(error=str(error))


def pngs(run: hs.Run, draw: Decoder) -> list[str]:
    """The pictures of a run that is done, encoded for JSON."""
    picture = draw(run.state.x * run.table.end_scale)
    if not bool(picture.finite.all()):
        raise hs.InputError("the decoder overflowed: load the engine with dtype='bfloat16'")
    files = [io.BytesIO() for _ in picture.rgb]
    for rgb, file in zip(picture.rgb.cpu().numpy(), files, strict=True):
        Image.fromarray(rgb).save(file, "PNG")
    return [base64.b64encode(file.getvalue()).decode() for file in files]


def line(**fields: object) -> str:
    return json.dumps(fields) + "\n"
