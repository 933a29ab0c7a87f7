"""A chat endpoint on this machine that misbehaves as told."""

import collections
import contextlib
import http.server
import json
import threading
import time


def chat(content, **choice):
    """The body of a good reply that says `content`."""
    text = content if isinstance(content, str | None) else json.dumps(content, ensure_ascii=False)
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, **choice}]}).encode()


class FakeEndpoint:
    """`script(body, number)` decides each reply; `number` counts the tries of one question.

    It returns what the model says (str, dict or list), or a tuple: ("status", code, headers),
    ("raw", bytes), ("half", bytes: the reply breaks off in the middle), ("hang", seconds),
    ("drop",): the connection is closed without a word. `asked` are the bodies in order, `counts`
    how often each question came; a question is the first user message.
    """

    def __init__(self, script):
        self.script = script
        self.asked = []
        self.times = []
        self.headers = []
        self.counts = collections.Counter()
        self.under_way = 0
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                fake.answer(self)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):  # clients that gave up are part of the tests
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        # The default polls twice a second, which would be most of a test's time at closing.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = next(m["content"] for m in body["messages"] if m["role"] == "user")
        with self.lock:
            number = self.counts[question]
            self.counts[question] += 1
            self.asked.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers))
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            said = self.script(body, number)
        finally:
            # Before the reply leaves: a client may ask again before this thread runs again.
            with self.lock:
                self.under_way -= 1
        with contextlib.suppress(OSError):
            self.send(handler, said)

    def send(self, handler, said):
        code, headers, content, length = 200, {}, None, None
        match said:
            case ("status", code, headers):
                content = json.dumps({"error": {"message": f"status {code}"}}).encode()
            case ("status", code, headers, content):
                pass
            case ("raw", content):
                pass
            case ("half", whole):
                content, length = whole[: len(whole) // 2], len(whole)
            case ("hang", seconds):
                self.closing.wait(seconds)
                content = chat("too late")
            case ("drop",):
                handler.close_connection = True
                return
            case _:
                content = chat(said)
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True
