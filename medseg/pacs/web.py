"""One request to a DICOMweb archive: time-outs, retries, and answers that name no patient.

Addresses hold UIDs, so no message repeats one, and the libraries below are silenced: they log each address.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from medseg.errors import BatchError
from medseg.pacs import need
from medseg.pacs.address import Address
from medseg.pacs.credentials import Credentials
from medseg.pacs.multipart import CHUNK, Body, BrokenBodyError

T = TypeVar("T")
MAX_JSON = 256 * 1024 * 1024
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed a little later (RFC 9110 section 15)."""


@dataclass(frozen=True)
class Patience:
    """How long to wait.

    Attributes
    ----------
    connect, silence : seconds until a connection stands, and between two pieces of an answer.
    whole : seconds for one whole answer, so that a trickle ends too.
    attempts : of one request, when the archive does not answer or says that it is busy.
    pause : seconds before the second attempt; each further pause is twice as long, at most `longest`.
    """

    connect: float = 10
    silence: float = 60
    whole: float = 3600
    attempts: int = 5
    pause: float = 1
    longest: float = 60


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes
    ----------
    what : in words, for messages.
    path : below the address of the archive.
    accept : media types that may answer.
    search : keys and values of a search.
    body : what is sent; None only asks.
    allowed : status codes whose answer is taken.
    """

    what: str
    path: str = field(repr=False)
    accept: str
    search: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    body: Body | None = None
    allowed: tuple[int, ...] = (200, 204)


class _AgainError(Exception):
    """The request may succeed if it is made again; the text says what happened."""


@dataclass
class Web:
    """An archive that answers requests.

    Attributes
    ----------
    wait : sleeps; tests replace it.
    """

    address: Address
    credentials: Credentials = field(default_factory=Credentials)
    patience: Patience = field(default_factory=Patience)
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._session = need("requests").Session()
        # Proxies, .netrc and certificates of the environment are not asked for: what counts is in `credentials`.
        self._session.trust_env = False
        if self.credentials.authorities:
            self._session.verify = str(self.credentials.authorities)
        if self.credentials.header:
            self._session.headers["Authorization"] = self.credentials.header

    def query(self, path: str, search: Sequence[tuple[str, str]] = ()) -> list[dict[str, Any]]:
        """Search below `path`; returns one DICOM JSON object a match (PS3.18 section F), none for "no content".

        Raises
        ------
        BatchError : PACS_UNREACHABLE, PACS_REFUSED, PACS_NOT_FOUND or PACS_ANSWER.
        """
        answer = self.ask(Request("a search", path, "application/dicom+json", tuple(search)), _rows)
        if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
            raise self._error("PACS_ANSWER", "a search", "the answer is no list of DICOM JSON objects")
        return answer

    def ask(self, request: Request, take: Callable[[Answer], T]) -> T:
        """Make a request, again where that may help, and return what `take` makes of its streamed answer.

        Raises
        ------
        BatchError : PACS_UNREACHABLE, PACS_REFUSED, PACS_NOT_FOUND or PACS_ANSWER; what `take` raises, except
            BrokenBodyError, after which the request is made again.
        """
        code, reason = "", ""
        for number in range(self.patience.attempts):
            if number:
                self.wait(min(self.patience.pause * 2 ** (number - 1), self.patience.longest))
            try:
                return self._once(request, take)
            except _AgainError as error:
                code, reason = "PACS_UNREACHABLE", str(error)
            except BrokenBodyError as error:
                code, reason = "PACS_ANSWER", str(error)
        raise self._error(code, request.what, f"{reason} ({self.patience.attempts} attempts)")

    def _once(self, request: Request, take: Callable[[Answer], T]) -> T:
        requests = need("requests")
        headers = {"Accept": request.accept, "Accept-Encoding": "identity"}
        if request.body is not None:
            headers["Content-Type"] = request.body.content_type
        try:
            with (
                _silent(),
                self._session.request(
                    "GET" if request.body is None else "POST",
                    f"{self.address.base}{request.path}",
                    params=list(request.search),
                    headers=headers,
                    data=request.body,
                    stream=True,
                    allow_redirects=False,  # what is sent goes to the archive that the user named, nowhere else
                    timeout=(self.patience.connect, self.patience.silence),
                ) as answer,
            ):
                if answer.status_code not in request.allowed:
                    raise self._refusal(answer.status_code, request.what)
                return take(Answer(answer, time.monotonic() + self.patience.whole))
        except requests.exceptions.SSLError:
            raise self._error(
                "PACS_UNREACHABLE", request.what, "its certificate is not trusted; MEDSEG_DICOMWEB_CA may name others"
            ) from None
        except requests.exceptions.RequestException as error:
            raise _AgainError(_in_words(requests, error)) from None  # its own text holds the address

    def _refusal(self, status: int, what: str) -> Exception:
        if status in BUSY:
            return _AgainError(f"it answers with status {status}")
        if status in (401, 403):
            given = "the credentials that are set" if self.credentials.header else "requests without credentials"
            text = f"it refuses {given} (status {status}); set MEDSEG_DICOMWEB_USER and _PASSWORD, _TOKEN or _NETRC"
            return self._error("PACS_REFUSED", what, text)
        if status in (404, 410):
            return self._error("PACS_NOT_FOUND", what, f"there is nothing (status {status}); check path and UIDs")
        more = "; it names another address, which is not followed: give that one" if 300 <= status < 400 else ""
        return self._error("PACS_REFUSED", what, f"it refuses with status {status}{more}")

    def _error(self, code: str, what: str, text: str) -> BatchError:
        return BatchError(f"{self.address.host}: {what} failed: {text}", code=code)


@dataclass(frozen=True)
class Answer:
    """An answer whose body is read piece by piece, until `end` on the clock."""

    response: Any
    end: float

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.response.status_code)

    @property
    def content_type(self) -> str:
        """The header Content-Type."""
        return str(self.response.headers.get("Content-Type", ""))

    def chunks(self) -> Iterator[bytes]:
        """Yield the body piece by piece; raise BrokenBodyError when it takes too long."""
        for chunk in self.response.iter_content(CHUNK):
            if time.monotonic() > self.end:
                raise BrokenBodyError("the answer takes too long as a whole")
            yield chunk

    def text(self, limit: int = MAX_JSON) -> bytes:
        """Return the body; raise BrokenBodyError where it is longer than `limit`."""
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > limit:
                raise BrokenBodyError(f"the answer is longer than {limit} bytes")
        return bytes(data)


def _rows(answer: Answer) -> Any:
    return [] if answer.status == 204 else answer_json(answer)


def answer_json(answer: Answer) -> Any:
    """Return the JSON of an answer; raise BrokenBodyError where it is none."""
    if "json" not in answer.content_type.lower():
        raise BrokenBodyError("the answer is no JSON, so this may be no DICOMweb archive or another path")
    try:
        return json.loads(answer.text() or b"[]")
    except (ValueError, RecursionError):
        raise BrokenBodyError("the answer is called JSON and is none") from None


def _in_words(requests: Any, error: Exception) -> str:
    kinds = {
        requests.exceptions.ConnectTimeout: "no connection in time",
        requests.exceptions.Timeout: "no answer in time",
        requests.exceptions.ChunkedEncodingError: "the connection broke off within the answer",
        requests.exceptions.ConnectionError: "no connection, or it broke off",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), f"{type(error).__name__}")


@contextmanager
def _silent() -> Iterator[None]:
    logger = logging.getLogger("urllib3")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
