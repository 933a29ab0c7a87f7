"""Questions to a language model behind any OpenAI-compatible chat endpoint, in bulk.

The URL is the user's; nothing is asked unless one is given. Standard library only.

    endpoint = Endpoint("http://localhost:8000/v1", "some-model", cache_dir="answers")
    for result in endpoint.ask_all([Request(messages, schema, check), …]):
        result is an Answer (its value passed `check`) or a Failure (its kind and detail)

What a server does wrong is never taken for an answer: HTTP 429 and 5xx, timeouts, replies that
are no JSON or only half of it, answers that `check` refuses are asked again, after a pause that
doubles (and that `Retry-After` may lengthen), and end as a `Failure`. Answers that passed are kept
on disk under the whole request, each written aside and renamed; failures are never kept. So the
cache is the state of a run: stopped at any moment, the same call goes on, and a rerun asks only for
what is missing.
"""

from __future__ import annotations

import collections
import dataclasses
import email.message
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rg_jax.answer_cache import AnswerCache
from rg_jax.errors import UserError
from rg_jax.json_answers import mismatch, read_json

DETAIL = 200  # characters of a server's words that are kept
SHOWN = 4000  # characters of a refused answer that the model is shown again
HOPELESS = 20  # connection failures in a row, without any reply, that end a run
CORRECTION = "This answer cannot be used ({reason}). Answer again, in the form asked for."


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    `messages`: [{"role": …, "content": …}], which should ask for the form of the answer in words,
    as not every server knows schemas. `schema`: JSON schema of the answer, or None for plain text.
    `check(value)` returns what is to be kept of an answer (often the value itself) or raises
    ValueError with the reason in a few words, under which refusals are counted; without it an
    answer has to meet the schema. `parameters` (temperature …) go into the request as they are.
    """

    messages: Sequence[Mapping[str, Any]]
    schema: Mapping[str, Any] | None = None
    check: Callable[[Any], Any] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0})


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer that passed; `cached`: on disk, or just given to an equal request."""

    value: Any
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """No answer. `kind`: of the last try, few words to count by; `detail`: what was said.

    Kinds: "HTTP <status>", "timeout", "unreachable", "invalid reply" (not of the chat form), "empty
    answer", "not JSON" (half JSON too), "cut short" (a text that met its length limit),
    "refused answer" (`detail` is the reason `check` gave), "interrupted".
    """

    kind: str
    detail: str = ""
    tries: int = 1


class _Bad(Exception):
    """A try that failed; `wait` is what the server asked for, `again` whether to try again."""

    def __init__(self, kind: str, detail: str = "", wait: int | float = 0, again: bool = True):
        super().__init__(kind)
        self.failure = Failure(kind, detail[:DETAIL])
        self.wait = wait
        self.again = again


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirected POST becomes a GET, and would carry the key to another host.
    def redirect_request(self, *args, **kwargs):
        return None


class Endpoint:
    """A chat endpoint: where, which model, how patiently, and where answers are kept.

    `url`: the base ("http://host:8000/v1") or the whole path to …/chat/completions. `key_env`: the
    NAME of the environment variable that holds the API key; the key is never shown. `timeout`:
    seconds for a whole reply. `retries`: further tries after the first. `cache_dir`: folder of kept
    answers; None keeps none. `concurrency`: requests under way at once. `pause`: seconds before the
    first retry. `max_wait`: the longest pause that is taken. Raises UserError for settings that
    cannot work.

    `asked` (tries), `answered`, `cached` and `faults` (failed tries by kind) count over its life.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "",
        timeout: int | float = 120,
        retries: int = 5,
        cache_dir: str | os.PathLike | None = None,
        concurrency: int = 8,
        pause: int | float = 1,
        max_wait: int | float = 300,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint {url!r}: must be an address such as http://host:8000/v1")
        if parts.username or parts.password:
            raise UserError("the endpoint's address holds a password; use --key_env instead")
        if not model:
            raise UserError("an endpoint needs the name of a model")
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise UserError(
                f"endpoint: timeout {timeout}, retries {retries}, concurrency {concurrency} must"
                " be above 0 (retries: at least 0)"
            )
        self._key = os.environ.get(key_env, "") if key_env else ""
        if key_env and not self._key:
            raise UserError(f"the environment variable {key_env} is not set; it holds the API key")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        self.url = urllib.parse.urlunsplit(parts._replace(path=path))
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self._cache = AnswerCache(cache_dir)
        self.concurrency = concurrency
        self.pause = pause
        self.max_wait = max_wait
        self.asked = 0
        self.answered = 0
        self.cached = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._lock = threading.Lock()
        self._not_before = 0.0  # of the monotonic clock: a Retry-After holds for all threads
        self._schema_forms = ["json_schema", "json_object", ""]  # what the server understands
        self._unreachable = 0
        self._reached = False

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    def ask(self, request: Request) -> Answer | Failure:
        """One request; see `ask_all`."""
        return self.ask_all([request])[0]

    def ask_all(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[Answer | Failure]:
        """Ask all, `concurrency` at a time; results in the order of the requests.

        Equal requests are asked once. `progress(1)` is called after each result. Raises UserError
        where going on is of no use: the server refuses the key, the path or the model, or cannot be
        reached at all. Ctrl-C stops at once; what was answered is in the cache.
        """
        results: list[Answer | Failure] = [Failure("interrupted", tries=0)] * len(requests)
        for index, result in self.ask_each(requests):
            results[index] = result
            if progress:
                progress(1)
        return results

    def ask_each(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        """`ask_all`, but (index, result) as they come in."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self.key(request), []).append(index)
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for group in groups.items():
            todo.put(group)
        done: queue.SimpleQueue = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            try:
                while not stopped.is_set():
                    try:
                        key, indices = todo.get_nowait()
                    except queue.Empty:
                        return
                    content, result, check = self._cache.get(key), None, None
                    for index in indices:
                        request = requests[index]
                        if not isinstance(result, Failure) or request.check is not check:
                            result, content = self._resolve(request, key, content, stopped)
                            check = request.check
                        done.put((index, result))
            except BaseException as error:  # noqa: BLE001 (raised again where it is seen)
                done.put((-1, error))

        # Daemons: Ctrl-C must not wait for replies that nobody will read.
        for _ in range(min(self.concurrency, len(groups))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(len(requests)):
                index, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield index, result
        finally:
            stopped.set()

    def key(self, request: Request) -> str:
        """What an answer is kept under: all that is asked, but not where.

        Model, messages, schema and parameters decide; the address does not, so that a server may
        move. Two servers that give different models one name need two folders.
        """
        return hashlib.sha256(_canonical(self._question(request)).encode()).hexdigest()

    def _question(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(request.messages),
            "schema": request.schema,
            "parameters": dict(request.parameters),
        }

    def _resolve(
        self, request: Request, key: str, content: str | None, stopped: threading.Event
    ) -> tuple[Answer | Failure, str | None]:
        """The result, and the text it came from (for the next request of the same group)."""
        if content is not None:
            try:
                # Checked again: what is asked of an answer may have changed since.
                value = _checked(request, content)
            except _Bad:
                pass
            else:
                with self._lock:
                    self.cached += 1
                return Answer(value, cached=True), content
        failure = Failure("interrupted", tries=0)
        correction: list[dict[str, str]] = []
        for number in range(self.retries + 1):
            if stopped.is_set():
                return failure, None
            content = ""
            try:
                content = self._exchange(request, correction, stopped)
                value = _checked(request, content)
            except _Bad as bad:
                failure = dataclasses.replace(bad.failure, tries=number + 1)
                with self._lock:
                    self.faults[failure.kind] += 1
                if bad.wait > self.max_wait:
                    words = f"asks to wait {bad.wait:.0f} s, the limit is {self.max_wait:.0f} s"
                    return dataclasses.replace(failure, detail=words), None
                if not bad.again:
                    return failure, None
                if content:  # a model that is asked the same again would say the same again
                    reason = failure.detail if failure.kind == "refused answer" else failure.kind
                    correction = [
                        {"role": "assistant", "content": content[:SHOWN]},
                        {"role": "user", "content": CORRECTION.format(reason=reason)},
                    ]
                if number < self.retries:
                    self._rest(number, bad.wait, stopped)
            else:
                self._cache.put(key, content, self._question(request))
                with self._lock:
                    self.answered += 1
                return Answer(value), content
        return failure, None

    def _rest(self, number: int, wait: int | float, stopped: threading.Event) -> None:
        # Spread a little, so that threads that failed together do not come back together.
        pause = min(self.pause * 2**number, self.max_wait) * random.uniform(0.75, 1.25)
        if wait:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait)
        stopped.wait(max(pause, wait))

    def _exchange(
        self, request: Request, correction: list[dict[str, str]], stopped: threading.Event
    ) -> str:
        """The text of one reply. Raises _Bad, or UserError where no try can help."""
        messages = [*request.messages, *correction]
        while (form := self._form(request)) is not None:
            while not stopped.is_set() and (rest := self._not_before - time.monotonic()) > 0:
                stopped.wait(rest)
            body = {"model": self.model, "messages": messages, **request.parameters}
            if form == "json_schema":
                schema = {"name": "answer", "strict": True, "schema": request.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            elif form == "json_object":
                body["response_format"] = {"type": "json_object"}
            with self._lock:
                self.asked += 1
            status, reply, headers = self._post(body)
            if status in (400, 422) and form and re.search(rb"response_format|schema", reply):
                with self._lock:  # the server does not know this form: the next plainer one
                    if form in self._schema_forms:
                        self._schema_forms.remove(form)
                continue
            return self._content(request, status, reply, headers)
        raise AssertionError("the plain form is never taken away")

    def _form(self, request: Request) -> str | None:
        return "" if request.schema is None else next(iter(self._schema_forms), None)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes, email.message.Message]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        call = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            try:
                reply = self._opener.open(call, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                reply = error
            with reply:
                self._reached, self._unreachable = True, 0
                return reply.status, _read(reply, deadline), reply.headers
        except TimeoutError:
            raise _Bad("timeout", f"no whole reply in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Bad("timeout", f"no connection in {self.timeout:g} s") from None
            if isinstance(error, http.client.IncompleteRead):
                raise _Bad("invalid reply", "the reply broke off") from None
            self._lost(reason)
            raise _Bad("unreachable", self._hide(str(reason))) from None

    def _lost(self, reason: object) -> None:
        with self._lock:
            self._unreachable += 1
            hopeless = not self._reached and self._unreachable >= HOPELESS
        if hopeless or (isinstance(reason, socket.gaierror) and not self._reached):
            raise UserError(
                f"the endpoint {self.url} cannot be reached ({self._hide(str(reason))}); is it"
                " running, and is the address right?"
            )

    def _content(
        self, request: Request, status: int, reply: bytes, headers: email.message.Message
    ) -> str:
        said = self._hide(" ".join(reply[:2000].decode("utf-8", "replace").split()))[:DETAIL]
        if status in (401, 403, 404) or 300 <= status < 400:
            if 300 <= status < 400:
                said = f"it is now {self._hide(headers.get('Location', 'elsewhere'))}"
            raise UserError(
                f"the endpoint {self.url} refuses (HTTP {status}): {said or 'no reason given'}"
            )
        if status == 429 or status in (408, 425) or status >= 500:
            wait = _retry_after(headers.get("Retry-After", ""))
            raise _Bad(f"HTTP {status}", said, wait)
        if status != 200:
            raise _Bad(f"HTTP {status}", said, again=False)
        try:
            choice = json.loads(reply)["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Bad("invalid reply", said) from None
        if isinstance(content, list):  # some servers send parts
            parts = [part for part in content if isinstance(part, dict)]
            content = "".join(str(part.get("text", "")) for part in parts)
        if content is not None and not isinstance(content, str):
            raise _Bad("invalid reply", said)
        if not content or not content.strip():
            raise _Bad("empty answer", said)
        # Whether JSON is whole shows in itself; of a text only the server knows.
        if request.schema is None and choice.get("finish_reason") == "length":
            raise _Bad("cut short", content)
        return content

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _read(reply: Any, deadline: float) -> bytes:
    """The whole body. A socket's timeout starts anew with every byte, so the clock is watched."""
    parts = []
    while part := reply.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    expected = reply.headers.get("Content-Length")
    body = b"".join(parts)
    if expected and expected.isdigit() and len(body) < int(expected):
        raise http.client.IncompleteRead(body)
    return body


def _retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for (a number, or a date), 0 if it says nothing."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _checked(request: Request, content: str) -> Any:
    """What `check` makes of an answer's text. Raises _Bad."""
    value: Any = content
    if request.schema is not None:
        value = read_json(content)
        if value is None:
            raise _Bad("not JSON", " ".join(content.split()))
    try:
        if request.check is not None:
            return request.check(value)
        if request.schema is not None and (problem := mismatch(value, request.schema)):
            raise ValueError(problem)
    except ValueError as error:
        raise _Bad("refused answer", str(error)) from None
    return value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
