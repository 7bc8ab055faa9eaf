"""Notifiers against a real server that answers, fails, hangs and redirects, and against real programs."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stabilitylab.errors import InputError
from stabilitylab.telemetry import Event
from stabilitylab.watching.alerts import Alert, of_event
from stabilitylab.watching.notifiers import Command, Webhook
from tests.patience import PATIENCE, wait_until

ALERT = Alert(
    id="a/1", rule="spike", text="step 7: spike: $(touch pwned) `id` <!channel> & co", path="x.log", step=7,
    facts={"signal": "loss; rm -rf /", "height": 2.0},
)  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers with ``codes`` one after the other, the last again and again; 0 is no answer."""

    daemon_threads = True

    def __init__(self, *codes, headers=None):
        self.codes, self.headers, self.taken = list(codes), headers or {}, []
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/services/T0/SECRET?token=SECRET"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.taken.append((time.monotonic(), self.headers["Content-Type"], json.loads(body)))
        code = server.codes.pop(0) if len(server.codes) > 1 else server.codes[0]
        if not code:
            server.over.wait(PATIENCE)
            return
        self.send_response(code)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args):
        """Silent."""


@pytest.fixture
def serve():
    servers = []

    def make(*codes, **options):
        servers.append(Server(*codes, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def post(server, *, seconds=PATIENCE, pauses=(0.02, 0.04, 0.08), wait=PATIENCE):
    said, done = [], []
    hook = Webhook(server.url, said.append, done.append, seconds=seconds, pauses=pauses)
    hook.tell(ALERT)
    ended = hook.close(wait)
    assert not any("SECRET" in line for line in said)
    return said, done, ended


def test_a_message_is_what_slack_takes(serve):
    server = serve(200)
    said, done, ended = post(server)
    assert (said, done, ended) == ([], [ALERT], True)
    ((_, kind, body),) = server.taken
    assert kind == "application/json"
    assert set(body) == {"text", "attachments"}
    assert "&lt;!channel&gt; &amp; co" in body["text"]
    assert "<" not in json.dumps(body)
    assert {"title": "height", "value": "2.0", "short": True} in body["attachments"][0]["fields"]


def test_a_failing_server_is_tried_again_and_a_refusing_one_is_not(serve):
    server = serve(500, 503, 200)
    said, done, _ = post(server)
    assert len(server.taken) == 3
    assert done == [ALERT]
    assert said == [f"webhook http://127.0.0.1:{server.server_address[1]}: HTTP {code}, try {n} of 4"
                    for n, code in ((1, 500), (2, 503))]  # fmt: skip
    server = serve(500)
    said, done, ended = post(server)
    assert (len(server.taken), done, ended) == (4, [], True)
    assert said[-1].endswith("HTTP 500; given up")
    server = serve(404)
    said, done, _ = post(server)
    assert (len(server.taken), done) == (1, [ALERT])


def test_what_was_given_up_is_posted_once_the_server_is_back(serve):
    server = serve(500, 500, 500, 200)
    said, done = [], []
    hook = Webhook(server.url, said.append, done.append, pauses=(), late=(0.02, 0.02))
    hook.tell(ALERT)
    wait_until(lambda: done)
    assert hook.close(PATIENCE)
    assert (done, len(server.taken), len(said)) == ([ALERT], 4, 1)


def test_what_was_given_up_follows_what_the_server_has_taken(serve):
    server = serve(500, 200)
    done = []
    hook = Webhook(server.url, [].append, done.append, pauses=(), late=(PATIENCE, PATIENCE))
    later = replace(ALERT, id="a/2")
    hook.tell(ALERT)
    hook.tell(later)
    wait_until(lambda: len(done) == 2)
    assert hook.close(PATIENCE)
    assert done == [later, ALERT]


def test_too_many_messages_wait_as_long_as_they_are_told(serve):
    server = serve(429, 200, headers={"Retry-After": "0.3"})
    post(server)
    first, second = (when for when, _, _ in server.taken)
    assert second - first >= 0.3


def test_a_redirect_is_not_followed(serve):
    elsewhere = serve(200)
    server = serve(302, headers={"Location": elsewhere.url})
    said, _, _ = post(server)
    assert elsewhere.taken == []
    assert "HTTP 302" in said[0]


def test_a_server_that_hangs_delays_nobody_and_is_given_up(serve):
    server = serve(0)
    said: list[str] = []
    waiting = Webhook(server.url, said.append, seconds=PATIENCE)
    waiting.tell(ALERT)
    wait_until(lambda: server.taken)
    assert not waiting.close(0.05)  # and we are here meanwhile
    server = serve(0)
    hook = Webhook(server.url, said.append, seconds=0.2, pauses=(0.02,))
    hook.tell(ALERT)
    assert hook.close(PATIENCE)
    assert [line.partition(": ")[2].partition(": ")[2] or line for line in said]
    assert all("no answer within 0.2 s" in line for line in said)
    wait_until(lambda: len(server.taken) == 2)


def test_nobody_listens():
    said: list[str] = []
    hook = Webhook("http://127.0.0.1:9/SECRET", said.append, pauses=(0.01,))
    hook.tell(ALERT)
    assert hook.close(PATIENCE)
    assert "cannot be reached" in said[0]
    assert "SECRET" not in "".join(said)


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "hooks.slack.com/x", "http://", "env:NOT_SET_HERE", "http://[::1"]
)
def test_what_is_no_address_is_refused_without_showing_it(url):
    with pytest.raises(InputError) as error:
        Webhook(url, print)
    assert "hooks.slack.com" not in str(error.value)


def test_an_address_from_the_environment(serve, monkeypatch):
    server = serve(200)
    monkeypatch.setenv("HOOK_URL", server.url)
    hook = Webhook("env:HOOK_URL", print)
    hook.tell(ALERT)
    assert hook.close(PATIENCE)
    assert len(server.taken) == 1


def test_a_command_gets_facts_and_no_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "said.py"
    script.write_text(
        "import json, os, sys\n"
        "said = {k: v for k, v in os.environ.items() if k.startswith('STABILITYLAB_')}\n"
        "json.dump([sys.argv[1:], said], open('said.json', 'w'))\n"
    )
    said: list[str] = []
    command = Command(f"{sys.executable} {script} '$(touch pwned)' ';' 'touch pwned'", said.append)
    command.tell(ALERT)
    assert command.close(PATIENCE)
    assert said == []
    arguments, facts = json.loads((tmp_path / "said.json").read_text())
    assert arguments == ["$(touch pwned)", ";", "touch pwned"]
    assert facts["STABILITYLAB_TEXT"] == ALERT.text
    assert (facts["STABILITYLAB_STEP"], facts["STABILITYLAB_SIGNAL"]) == ("7", "loss; rm -rf /")
    assert json.loads(facts["STABILITYLAB_JSON"])["id"] == "a/1"
    assert not (tmp_path / "pwned").exists()


def test_a_command_that_fails_or_hangs_is_one_line(tmp_path):
    said: list[str] = []
    failing = Command(f"{sys.executable} -c 'print(\"no such pager\"); raise SystemExit(5)'", said.append)
    failing.tell(ALERT)
    assert failing.close(PATIENCE)
    hanging = Command("sleep 60", said.append, seconds=0.2)
    hanging.tell(ALERT)
    assert hanging.close(PATIENCE)
    assert said == [
        f"--exec: {sys.executable} ended with 5: no such pager",
        "--exec: sleep took over 0.2 s and was ended",
    ]
    left_behind = tmp_path / "left behind"
    helped = Command(f"sh -c 'sleep {PATIENCE} & echo $! > \"{left_behind}\"; exit 3'", said.append)
    helped.tell(ALERT)
    assert helped.close(PATIENCE)
    assert said[2:] == ["--exec: sh ended with 3"]
    os.kill(int(left_behind.read_text()), signal.SIGTERM)  # it was not waited for
    left = Command("sleep 60", said.append)
    left.tell(ALERT)
    assert not left.close(0.3)
    assert left._running is not None
    assert left._running.wait(PATIENCE) < 0  # and is not left behind either
    for wrong in ("no-such-program-here x", "'", ""):
        with pytest.raises(InputError):
            Command(wrong, said.append)


def test_names_from_a_log_steer_nothing():
    event = Event(
        step=3, kind="non-finite", data={"signal": "train/-/loss", "episode": 1, "onset": 3, "value": "nan"}
    )
    name = "loss\x1b]0;owned\x07\0\n; rm -rf /"
    alert = of_event(event, path="a\x1b[2Jb", segment="run\r1", piece=0, columns={"train/-/loss": name})
    told = alert.line() + json.dumps(alert.environment()) + json.dumps(alert.slack())
    assert not any(sign in told for sign in ("\x1b", "\0", "\r", "\n", "\\u001b", "\\u0000"))
    assert all("\0" not in value for value in alert.environment().values())
    assert os.environ.keys().isdisjoint(alert.environment())
