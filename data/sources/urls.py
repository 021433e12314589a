"""URLs as sources: their form without secrets, and images fetched from them. User names, passwords and queries appear in no output."""

from __future__ import annotations

import re
import time
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPBasicAuthHandler, HTTPDigestAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request, build_opener

import numpy as np

from data.images.reading import ImageError, decode_image

ANSWER_S, DOWNLOAD_S = 10.0, 60.0  # time-outs of an answer and of a whole download
MAX_BYTES = 64 << 20  # of an image
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET_IN_PATH = re.compile(r"((?:pass\w*?|pwd|token|secret|auth|key)=)[^/]*", re.IGNORECASE)
_KEPT_IN_PATH, _KEPT_IN_QUERY = "/%:@!$&'()*+,;=~", "/%:@!$&'()*+,;=~?"


def is_url(text: str) -> bool:
    """Whether a source has the form of a URL, of any scheme."""
    return bool(_URL.match(text))


def redacted(url: str) -> str:
    """A URL without its secrets: scheme, host, port and path; ``***@`` stands for a user name and password.

    Passwords are often typed without escaping reserved characters. Everything up to the last ``@`` is therefore left out, even where that
    hides more than necessary.
    """
    scheme, mark, rest = url.partition("://") if is_url(url) else ("", "", url)
    _, at, rest = rest.rpartition("@")
    place = _SECRET_IN_PATH.sub(r"\1***", re.split("[?#]", rest, maxsplit=1)[0])
    return f"{scheme.lower()}{mark}{'***@' if at else ''}{place}"


def plain_name(text: str) -> str:
    """A name for the results of a stream: host and path of its URL, without dots and characters that are special in file names."""
    place = _URL.sub("", redacted(text)).removeprefix("***@").replace(".", "-")
    return re.sub(r"[^\w-]+", "_", place).strip("_-")[:60] or "stream"


def read_remote_image(url: str, *, channels: int = 3, dtype: type[np.generic] | None = None) -> np.ndarray:
    """Fetches and decodes an image, as ``read_image`` does with a file.

    Raises:
        ImageError: it cannot be fetched, is too large or no image; the message has no secret of the URL.
    """
    return decode_image(np.frombuffer(fetch(url), dtype=np.uint8), redacted(url), channels=channels, dtype=dtype)


def fetch(url: str) -> bytes:
    """Downloads an http(s) URL. Raises ImageError where that fails, is too large or too slow."""
    shown, deadline = redacted(url), time.monotonic() + DOWNLOAD_S
    parts, size = [], 0
    with open_url(url) as answer:
        try:
            while part := answer.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise ImageError(f"{shown}: larger than {MAX_BYTES >> 20} MiB; download it yourself and give the file")
                if time.monotonic() > deadline:
                    raise ImageError(f"{shown}: not downloaded after {DOWNLOAD_S:g} s; download it yourself and give the file")
        except (OSError, HTTPException) as error:
            raise ImageError(f"{shown}: broke off after {size} bytes ({_reason(error)})") from None
        missing = answer.length or 0  # of what the server has announced
    if missing:
        raise ImageError(f"{shown}: broke off after {size} bytes, {missing} are missing")
    return b"".join(parts)


def open_url(url: str) -> HTTPResponse:
    """The answer to a GET, after redirections and, with a user name in the URL, basic or digest authentication.

    Raises:
        ImageError: no server answers, or the answer is an error.
    """
    shown = redacted(url)
    if not url.lower().startswith(("http://", "https://")):
        raise ImageError(f"{shown}: only http:// and https:// are fetched; save the image and give its path")
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        path, query = quote(parts.path, safe=_KEPT_IN_PATH), quote(parts.query, safe=_KEPT_IN_QUERY)
        plain = urlunsplit((parts.scheme, host, path, query, ""))
        passwords = HTTPPasswordMgrWithDefaultRealm()
        if parts.username:
            passwords.add_password(None, plain, unquote(parts.username), unquote(parts.password or ""))
        opener = build_opener(HTTPBasicAuthHandler(passwords), HTTPDigestAuthHandler(passwords))
        answer: HTTPResponse = opener.open(Request(plain, headers={"User-Agent": "yolo-attention"}), timeout=ANSWER_S)
    except HTTPError as error:
        error.close()
        raise ImageError(f"{shown}: the server answers {error.code} {responses.get(error.code, '')}".rstrip()) from None
    except (OSError, HTTPException, ValueError) as error:  # a URLError is an OSError
        raise ImageError(f"{shown}: cannot be fetched ({_reason(error)})") from None
    return answer


def _reason(error: Exception) -> str:
    """The reason of an error, without any part of the URL."""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {ANSWER_S:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return "not a valid URL" if isinstance(cause, (ValueError, InvalidURL)) else type(cause).__name__
