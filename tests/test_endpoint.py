"""The client of chat endpoints, against a server that does everything wrong."""

import email.utils
import json
import threading
import time

import pytest
from fake_endpoint import FakeEndpoint, chat

from rg_jax.endpoint import Answer, Endpoint, Failure, Request
from rg_jax.errors import UserError
from rg_jax.json_answers import mismatch, read_json

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


def request(text="Q", schema=SCHEMA, check=None, **parameters):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": text}]
    return Request(messages, schema, check, parameters or {"temperature": 0})


def endpoint(fake, **options):
    return Endpoint(fake.url, "m", **{"pause": 0.001, "timeout": 20, "retries": 3, **options})


def test_what_is_sent_and_what_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with FakeEndpoint(lambda body, number: {"n": 7}) as fake:
        client = endpoint(fake, key_env="SOME_KEY", cache_dir=tmp_path)
        assert client.ask(request(temperature=0.5)) == Answer({"n": 7})
        assert "sk-secret" not in repr(client)
    (body,) = fake.asked
    assert body["model"] == "m" and body["temperature"] == 0.5
    assert body["messages"][-1] == {"role": "user", "content": "Q"}
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == SCHEMA
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 1 and "sk-secret" not in kept[0]


def test_plain_text_without_a_schema():
    with FakeEndpoint(lambda body, number: "Seven [7]") as fake:
        assert endpoint(fake).ask(request(schema=None)) == Answer("Seven [7]")
        assert "response_format" not in fake.asked[0] and "Authorization" not in fake.headers[0]


BAD = {
    "HTTP 500": ("status", 500, {}),
    "HTTP 503": ("status", 503, {}),
    "HTTP 429": ("status", 429, {}),
    "timeout": ("hang", 20),
    "unreachable": ("drop",),
    "invalid reply": ("raw", b"<html>proxy</html>"),
    "empty answer": ("raw", chat(None)),
    "not JSON": "I cannot answer that.",
    "refused answer": {"n": "seven"},
}
HALF = {
    "half a body": (("half", chat({"n": 1})), "invalid reply"),
    "half JSON": ('{"n": 7', "not JSON"),
    "half a list": ('[{"n": 1}, {"n": 7', "not JSON"),
    "no choices": (("raw", b'{"choices": []}'), "invalid reply"),
    "choices of another kind": (("raw", b'{"choices": 3}'), "invalid reply"),
    "not an object": (("raw", b"[]"), "invalid reply"),
    "blank": ("  \n", "empty answer"),
    "garbage bytes": (("raw", bytes(range(256))), "invalid reply"),
}
CASES = [(name, said, name) for name, said in BAD.items()]
CASES += [(name, said, kind) for name, (said, kind) in HALF.items()]


@pytest.mark.parametrize(("said", "kind"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_lasting_fault_is_a_failure_and_is_not_kept(tmp_path, said, kind):
    with FakeEndpoint(lambda body, number: said) as fake:
        patience = 0.3 if kind == "timeout" else 20
        client = endpoint(fake, cache_dir=tmp_path, retries=1, timeout=patience)
        result = client.ask(request())
        assert isinstance(result, Failure) and (result.kind, result.tries) == (kind, 2)
        assert client.faults == {kind: 2} and fake.counts["Q"] == 2
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        fake.script = lambda body, number: {"n": 1}
        assert client.ask(request()) == Answer({"n": 1})


@pytest.mark.parametrize(("said", "kind"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_passing_fault_is_got_over(said, kind):
    with FakeEndpoint(lambda body, number: said if number < 2 else {"n": 7}) as fake:
        client = endpoint(fake, timeout=3 if kind == "timeout" else 20)
        assert client.ask(request()) == Answer({"n": 7})
        assert client.faults == {kind: 2} and client.asked == 3


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_respected_by_all(date):
    # A date has whole seconds: half a second could be rounded away.
    wait = 2.0 if date else 0.4
    words = email.utils.formatdate(time.time() + wait, usegmt=True) if date else str(wait)
    script = {"slow": ("status", 429, {"Retry-After": words})}
    with FakeEndpoint(lambda b, n: {"n": 1} if n else script["slow"]) as fake:
        client = endpoint(fake, concurrency=1)
        client.ask_all([request()])
        assert fake.times[1] - fake.times[0] >= (0.4 if not date else 0.7)
        # No other thread may come sooner.
        client._not_before = time.monotonic() + 0.3
        started = time.monotonic()
        fake.counts["other"] = 1
        client.ask(request("other"))
        assert fake.times[-1] - started >= 0.3


def test_a_wait_that_is_too_long_is_a_failure():
    with FakeEndpoint(lambda b, n: ("status", 429, {"Retry-After": "3600"})) as fake:
        result = endpoint(fake).ask(request())
        assert result.kind == "HTTP 429" and "3600 s" in result.detail and result.tries == 1


def test_pauses_double():
    with FakeEndpoint(lambda body, number: ("status", 500, {})) as fake:
        endpoint(fake, pause=0.08, retries=3).ask(request())
        gaps = [b - a for a, b in zip(fake.times, fake.times[1:], strict=False)]
        for number, gap in enumerate(gaps):
            assert gap >= 0.08 * 2**number * 0.75
        assert len(gaps) == 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated(status):
    with FakeEndpoint(lambda body, number: ("status", status, {})) as fake:
        result = endpoint(fake).ask(request())
        assert (result.kind, result.tries, fake.counts["Q"]) == (f"HTTP {status}", 1, 1)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_wrong_key_or_address_ends_the_run(status, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    said = ("status", status, {"Location": "http://127.0.0.1:1/"}, b"key sk-secret is wrong")
    with FakeEndpoint(lambda body, number: said) as fake:
        with pytest.raises(UserError, match=f"HTTP {status}") as error:
            endpoint(fake, key_env="SOME_KEY").ask_all([request(str(i)) for i in range(50)])
        assert "sk-secret" not in str(error.value) and len(fake.asked) < 50
        words = "it is now http://127.0.0.1:1/" if status == 302 else "key *** is wrong"
        assert words in str(error.value)


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_failure(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with FakeEndpoint(lambda body, number: ("status", 500, {}, b"with key sk-secret")) as fake:
        result = endpoint(fake, key_env="SOME_KEY", retries=0).ask(request())
        assert result == Failure("HTTP 500", "with key ***", 1)


def test_nobody_there():
    with FakeEndpoint(lambda body, number: {"n": 1}) as fake:
        pass
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint(fake, retries=5).ask_all([request(str(i)) for i in range(50)])


@pytest.mark.parametrize("known", ["json_object", "nothing"])
def test_a_server_without_schemas_is_asked_in_a_plainer_form(known):
    refusal = ("status", 400, {}, b'{"error": "response_format json_schema is not supported"}')

    def script(body, number):
        kind = body.get("response_format", {}).get("type", "nothing")
        return {"n": 1} if kind in (known, "nothing") else refusal

    with FakeEndpoint(script) as fake:
        client = endpoint(fake, concurrency=1)
        assert client.ask_all([request("a"), request("b")]) == [Answer({"n": 1})] * 2
        # Found out once, and no fault of anybody.
        assert fake.counts["a"] == (2 if known == "json_object" else 3)
        assert fake.counts["b"] == 1 and not client.faults


def test_the_reason_of_a_refusal_is_told_to_the_model():
    def check(value):
        if value["n"] != 7:
            raise ValueError("n must be seven")
        return value["n"]

    with FakeEndpoint(lambda body, number: {"n": 5 if number == 0 else 7}) as fake:
        client = endpoint(fake)
        assert client.ask(request(check=check)) == Answer(7)
        first, second = (body["messages"] for body in fake.asked)
        assert len(first) == 2 and second[:2] == first
        assert second[2]["content"] == '{"n": 5}' and "n must be seven" in second[3]["content"]
        fake.script = lambda body, number: {"n": 5}
        result = client.ask(request("again", check=check))
        assert (result.kind, result.detail) == ("refused answer", "n must be seven")
        # Corrections do not pile up.
        assert {len(body["messages"]) for body in fake.asked} == {2, 4}


def test_a_check_that_breaks_is_a_defect_and_shows():
    def check(value):
        return value["absent"]

    with FakeEndpoint(lambda body, number: {"n": 5}) as fake, pytest.raises(KeyError):
        endpoint(fake).ask(request(check=check))


def test_a_text_that_was_cut_is_no_answer():
    cut = ("raw", chat("The liver is", finish_reason="length"))
    with FakeEndpoint(lambda body, number: cut) as fake:
        assert endpoint(fake, retries=0).ask(request(schema=None)).kind == "cut short"


def test_order_and_bounded_concurrency():
    def script(body, number):
        n = int(body["messages"][1]["content"])
        time.sleep(0.02 if n % 3 else 0.06)
        return {"n": n}

    done = []
    with FakeEndpoint(script) as fake:
        client = endpoint(fake, concurrency=4)
        results = client.ask_all([request(str(n)) for n in range(30)], progress=done.append)
        assert [result.value["n"] for result in results] == list(range(30))
        assert fake.most_at_once == 4 and sum(done) == 30


def test_equal_requests_are_asked_once():
    with FakeEndpoint(lambda body, number: {"n": 1}) as fake:
        client = endpoint(fake)
        results = client.ask_all([request("same")] * 5 + [request("other")])
        assert [result.value for result in results] == [{"n": 1}] * 6
        assert fake.counts == {"same": 1, "other": 1}
        fake.script = lambda body, number: ("status", 400, {})
        results = client.ask_all([request("bad")] * 4)
        assert {result.kind for result in results} == {"HTTP 400"} and fake.counts["bad"] == 1


def test_the_cache_is_keyed_by_the_whole_request(tmp_path):
    with FakeEndpoint(lambda body, number: {"n": len(fake.asked)}) as fake:
        client = endpoint(fake, cache_dir=tmp_path)
        other = {**SCHEMA, "description": "other"}
        different = [
            request("a"),
            request("b"),
            request("a", temperature=1),
            request("a", temperature=0, seed=3),
            request("a", schema=other),
        ]
        first = [client.ask(one).value["n"] for one in different]
        assert first == [1, 2, 3, 4, 5]
        again = endpoint(fake, cache_dir=tmp_path, concurrency=2)
        assert [one.value["n"] for one in again.ask_all(different)] == first
        assert len(fake.asked) == 5 and again.cached == 5 and again.asked == 0
        assert Endpoint(fake.url, "n", cache_dir=tmp_path).ask(different[0]).value == {"n": 6}


def test_a_rerun_asks_only_for_what_is_missing(tmp_path):
    bad = {"3", "5", "8"}

    def script(body, number):
        return ("status", 500, {}) if body["messages"][1]["content"] in bad else {"n": 1}

    requests = [request(str(n)) for n in range(10)]
    with FakeEndpoint(script) as fake:
        client = endpoint(fake, cache_dir=tmp_path, retries=0)
        results = client.ask_all(requests)
        failed = [n for n, result in enumerate(results) if isinstance(result, Failure)]
        assert failed == [3, 5, 8] and client.faults == {"HTTP 500": 3}
        fake.asked.clear()
        bad.clear()
        assert all(isinstance(one, Answer) for one in client.ask_all(requests))
        assert sorted(body["messages"][1]["content"] for body in fake.asked) == ["3", "5", "8"]


@pytest.mark.parametrize("content", ["", "{", '{"content": 3}', "[]", '{"content": "{\\"n\\""}'])
def test_damaged_cache_files_are_asked_again(tmp_path, content):
    with FakeEndpoint(lambda body, number: {"n": 1}) as fake:
        client = endpoint(fake, cache_dir=tmp_path)
        client.ask(request())
        (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
        file.write_text(content)
        assert client.ask(request()) == Answer({"n": 1})
        assert fake.counts["Q"] == 2 and json.loads(file.read_text())["content"] == '{"n": 1}'


def test_a_kept_answer_is_checked_again(tmp_path):
    def stricter(value):
        raise ValueError("no longer good enough")

    with FakeEndpoint(lambda body, number: {"n": 1}) as fake:
        client = endpoint(fake, cache_dir=tmp_path, retries=0)
        client.ask(request())
        assert client.ask(request(check=stricter)).kind == "refused answer"
        assert fake.counts["Q"] == 2


def test_stopping_in_the_middle_keeps_what_was_answered(tmp_path):
    gate = threading.Event()

    def script(body, number):
        if int(body["messages"][1]["content"]) >= 6:
            gate.wait(5)
        return {"n": 1}

    requests = [request(str(n)) for n in range(20)]
    with FakeEndpoint(script) as fake:
        client = endpoint(fake, cache_dir=tmp_path, concurrency=2)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(client.ask_each(requests), start=1):
                if number == 6:
                    raise KeyboardInterrupt
        assert time.monotonic() - started < 3  # nobody waits for replies that are under way
        assert len(fake.asked) <= 8
        gate.set()
        again = endpoint(fake, cache_dir=tmp_path)
        assert all(isinstance(one, Answer) for one in again.ask_all(requests))
        assert again.cached >= 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000"}, "http://host"),
        ({"url": "file:///etc/passwd"}, "http://host"),
        ({"url": "http://me:pw@host/v1"}, "--key_env"),
        ({"model": ""}, "name of a model"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"timeout": 0}, "timeout 0"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(UserError, match=words) as error:
        Endpoint(**{"url": "http://localhost/v1", "model": "m", **options})
    assert "pw" not in str(error.value)


def test_the_address_may_be_the_base_or_the_whole_path():
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert Endpoint(url, "m").url == "http://h/v1/chat/completions"


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure!\n```json\n{"a": [1]}\n```\nAnything else?', {"a": [1]}),
        ('As in [1]:\n```\n[{"a": 1}]\n```', [{"a": 1}]),
        ('<think>{"a": 0}? No.</think>{"a": 1}', {"a": 1}),
        ('{"a": 0} perhaps</think>\n{"a": 1}', {"a": 1}),
        ('<think>{"a": 0', None),
        ('{"a": {"b": 1}', None),
        ('[{"a": 1}, {"a":', None),
        ("nothing", None),
        ("", None),
    ],
)
def test_json_in_the_words_of_a_model(content, value):
    assert read_json(content) == value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"n": 1}, ""),
        ({}, "lacks n"),
        ({"n": "1"}, "not of type integer"),
        ({"n": True}, "not of type integer"),
        ({"n": 1, "m": 2}, "unknown field m"),
        ([], "not of type object"),
    ],
)
def test_schemas(value, problem):
    assert problem in mismatch(value, SCHEMA) and bool(problem) == bool(mismatch(value, SCHEMA))


def test_more_of_schemas():
    schema = {"type": "array", "minItems": 2, "items": {"enum": ["x", "y"], "minLength": 1}}
    assert not mismatch(["x", "y"], schema)
    assert "number of items" in mismatch(["x"], schema)
    assert "allowed values" in mismatch(["x", "z"], schema)
    assert "out of range" in mismatch(11, {"type": "number", "maximum": 10})
    with pytest.raises(ValueError, match="anyOf"):
        mismatch(1, {"anyOf": []})
