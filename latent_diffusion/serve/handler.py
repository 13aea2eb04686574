"""HTTP: the page, the project's JSON, and the endpoints for pictures of OpenAI's API.

| method and path | answer |
|---|---|
| GET, HEAD / | the page |
| GET /api/model | the model's conditions, options and limits |
| POST /api/jobs | queues a request; its identifier and seed |
| GET /api/jobs/ID | its state; ?after=VERSION waits up to 20 seconds for a change |
| GET /api/jobs/ID/N.png | picture N, which contains its settings |
| DELETE /api/jobs/ID | cancels it |
| POST /api/settings | the settings in a PNG |
| POST /v1/images/generations, /v1/images/edits | pictures, in the format of OpenAI's API |
| GET /metrics | numbers for Prometheus |
"""

import base64
import hmac
import ipaddress
import json
import logging
import re
import select
import socket
import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from latent_diffusion.generation.model import Model
from latent_diffusion.serve import openai
from latent_diffusion.serve.describe import describe
from latent_diffusion.serve.jobs import Busy, Job, Jobs
from latent_diffusion.serve.parameters import from_png
from latent_diffusion.serve.requests import Limits, Upload, read, with_own_mask

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
MAX_BODY = 64 * 2**20  # bytes
IDLE_SECONDS = 30  # before an idle connection is closed
PIECE = 1 << 16  # bytes that are sent at once, in at most so many seconds
LONG_POLL_SECONDS = 20
_JOB = re.compile(r"/api/jobs/([0-9a-f]{16})(?:/(\d{1,4})\.png)?")


class Refused(Exception):
    """A request that gets an error: a status, one line, and perhaps further headers."""

    def __init__(self, status: HTTPStatus, message: str, more: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.more = status, more


class Server(ThreadingHTTPServer):
    """A server of one model; a thread answers each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], jobs: Jobs, adapters: Mapping[str, Any], token: str | None
    ):
        self.jobs, self.adapters, self.token = jobs, adapters, token
        self.description = describe(jobs.model, jobs.name, jobs.limits, adapters)
        super().__init__(address, Handler)
        own = str(self.server_address[0])
        self.names: set[str] = set()  # that a request may have for this server; empty: any
        if token is None and ipaddress.ip_address(own).is_loopback:
            self.names = {"localhost", "127.0.0.1", "::1", own, address[0].lower()}

    def server_close(self) -> None:
        """Close the server and the queue."""
        super().server_close()
        self.jobs.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have left: it is no error of the server."""


def make_server(
    model: Model,
    name: str,
    address: tuple[str, int],
    limits: Limits | None = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    token: str | None = None,
) -> Server:
    """A server that answers as soon as `serve_forever` runs.

    name: the model's name. address: host and port. adapters: loaded adapters, by the names that
    requests can use. token: the bearer token that requests must have. Raises OSError for an address
    that can't be used.
    """
    limits = Limits() if limits is None else limits
    jobs = Jobs(model, name, limits, batch_size)
    try:
        return Server(address, jobs, adapters or {}, token)
    except OSError as error:
        jobs.close()
        raise OSError(f"{address[0]}:{address[1]}: {error.strerror or error}") from error
    except BaseException:
        jobs.close()
        raise


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "latent_diffusion"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """See the table above."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """See the table above."""
        self._answer(self._post)

    def do_DELETE(self) -> None:
        """See the table above."""
        self._answer(self._delete)

    def log_message(self, format: str, *args: Any) -> None:
        """Don't log requests; /metrics counts them."""

    # ---------------------------------------------------------------------------------- answers

    def _answer(self, act: Any) -> None:
        self._body: bytes | None = None
        try:
            self._check_origin()
            if urllib.parse.urlsplit(self.path).path not in FILES:
                self._check_token()
            act()
        except Refused as error:
            self._error(error.status, str(error), error.more)
        except Busy as error:
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, str(error), {"Retry-After": "2"})
        except (ValueError, OverflowError) as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error).partition("\n")[0])
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:  # other requests must be answered
            log.exception("%s %s", self.command, self.path[:200])
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why")

    def _send(
        self,
        content: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        more: Mapping[str, str] | None = None,
    ) -> None:
        unread = self._body is None and self.headers.get("Content-Length", "0") != "0"
        if unread or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # else the body would be taken for the next request
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
        )
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        view = memoryview(content)
        for start in range(0, len(view), PIECE):  # each may take the socket's timeout
            self.wfile.write(view[start : start + PIECE])

    def _json(self, data: Any, status: HTTPStatus = HTTPStatus.OK, **more: Any) -> None:
        content = json.dumps(data, ensure_ascii=False).encode(errors="replace")
        self._send(content, "application/json", status, **more)

    def _error(
        self, status: HTTPStatus, message: str, more: Mapping[str, str] | None = None
    ) -> None:
        self.server.jobs.counts[f"status_{int(status)}"] += 1
        error = {"message": message, "type": "invalid_request_error", "code": int(status)}
        try:
            self._json({"error": error}, status, more=more)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # ----------------------------------------------------------------------------------- checks

    def _check_token(self) -> None:
        token = self.server.token
        header = self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(
            header.encode(), f"Bearer {token}".encode()
        ):
            scheme = {"WWW-Authenticate": "Bearer"}
            raise Refused(HTTPStatus.UNAUTHORIZED, "this server needs its token", scheme)

    def _check_origin(self) -> None:
        """Refuse requests from pages of other sites that run in a user's browser.

        A site may also name this machine as one of its own (DNS rebinding), which its Host shows.
        """
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        if origin and urllib.parse.urlsplit(origin).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN, f"a page of {origin[:100]} may not use this server")
        names = self.server.names
        if names and host and urllib.parse.urlsplit(f"//{host}").hostname not in names:
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"without --token this server answers to {', '.join(sorted(names))}, not to "
                f"{host[:100]!r}",
            )

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request needs its Content-Length")
        if int(length) > MAX_BODY:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes, at most {MAX_BODY}"
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client left in the middle of its request")
        self._body = body
        return body

    def _read_json(self) -> Any:
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type is {kind}, not application/json"
            )
        try:
            return json.loads(self._read_body(), parse_constant=_no_number)
        except RecursionError:
            raise ValueError("the request's JSON is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"the request isn't JSON: {error}") from None

    # ------------------------------------------------------------------------------------ paths

    def _get(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path in FILES:
            name, kind = FILES[url.path]
            self._send((PAGE / name).read_bytes(), kind)
        elif url.path == "/api/model":
            self._json(self.server.description)
        elif url.path == "/metrics":
            self._send(self._metrics().encode(), "text/plain; version=0.0.4")
        elif match := _JOB.fullmatch(url.path):
            job = self._job(match[1])
            if match[2] is not None:
                self._picture(job, int(match[2]))
                return
            after = urllib.parse.parse_qs(url.query).get("after", [""])[0]
            if after.isdecimal():
                self.server.jobs.wait(job, LONG_POLL_SECONDS, int(after))
            self._json(_state(job))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        jobs = self.server.jobs
        if path == "/api/jobs":
            request = read(self._read_json(), jobs.model, jobs.limits, self.server.adapters)
            self._json(_state(jobs.submit(request)), HTTPStatus.ACCEPTED)
        elif path == "/api/settings":
            self._json(_exact(from_png(Upload(self._read_body(), "the PNG"))))
        elif path in ("/v1/images/generations", "/v1/images/edits"):
            self._openai(path.endswith("edits"))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _delete(self) -> None:
        match = _JOB.fullmatch(urllib.parse.urlsplit(self.path).path)
        if match is None or match[2] is not None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        job = self._job(match[1])
        self.server.jobs.cancel(job)
        self._json(_state(job))

    def _job(self, job_id: str) -> Job:
        job = self.server.jobs.find(job_id)
        if job is None:
            message = f"no request has the identifier {job_id}, or it made room for later ones"
            raise Refused(HTTPStatus.NOT_FOUND, message)
        return job

    def _picture(self, job: Job, number: int) -> None:
        if number >= len(job.pictures):
            raise Refused(HTTPStatus.NOT_FOUND, f"this request has {len(job.pictures)} pictures")
        name = f"{job.request.seed}-{number}.png"
        self._send(
            job.pictures[number],
            "image/png",
            more={"Content-Disposition": f'inline; filename="{name}"'},
        )

    def _openai(self, edits: bool) -> None:
        """Answer when the pictures are ready; a client that leaves cancels its request."""
        jobs = self.server.jobs
        if edits:
            fields = openai.read_form(self.headers.get("Content-Type", ""), self._read_body())
            fields = with_own_mask(fields, jobs.model, jobs.limits)
        else:
            fields = self._read_json()
        request = read(openai.request_of(fields), jobs.model, jobs.limits, self.server.adapters)
        job = jobs.submit(request)
        while not jobs.wait(job, 0.5):
            if self._client_left():
                jobs.cancel(job)
                raise ConnectionError
        if job.state != "done":
            status = HTTPStatus.BAD_REQUEST if job.error else HTTPStatus.SERVICE_UNAVAILABLE
            raise Refused(status, job.error or "the request was cancelled")
        self._json(openai.answer(job.pictures))

    def _client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _metrics(self) -> str:
        jobs = self.server.jobs
        lines = [
            f"latent_diffusion_{name}_total {count}" for name, count in sorted(jobs.counts.items())
        ]
        return "\n".join([*lines, f"latent_diffusion_waiting {jobs.num_waiting}", ""])


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _exact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a seed beyond the 53 bits of a browser's numbers as a text."""
    seed = settings.get("seed")
    large = isinstance(seed, int) and seed >= 2**53
    return {**settings, "seed": str(seed)} if large else dict(settings)


def _state(job: Job) -> dict[str, Any]:
    preview = job.preview  # looked at once, since it goes when the job ends
    return {
        "id": job.id,
        "state": job.state,
        "version": job.version,
        **_exact({"seed": job.request.seed}),
        "evaluations": round(job.evaluations),
        "seconds": round(job.seconds, 3),
        "pictures": [f"/api/jobs/{job.id}/{i}.png" for i in range(len(job.pictures))],
        "preview": None if preview is None else base64.b64encode(preview).decode(),
        "error": job.error,
    }
