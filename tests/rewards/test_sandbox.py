"""The sandbox as a service: what runs, who may run it, and when it refuses to start."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from h1r_rl.config.schema import CodeConfig, HttpSandboxConfig, RewardConfig
from rewards.code_verifier import ensure_sandbox, executor_for
from rewards.ground_truth import check_ground_truths
from rewards.sandbox import seccomp
from rewards.sandbox.executor import JailExecutor
from rewards.sandbox.http_executor import HttpExecutor
from rewards.sandbox.jobs import SandboxLost
from rewards.sandbox.limits import Limits

ROOT = Path(__file__).parents[2]
LIMITS = Limits(cpu_s=5, wall_s=20)
CHAT_STUB = runpy.run_path(str(Path(__file__).with_name("chat_stub.py")))


@pytest.fixture(scope="module")
def executor(namespaces):
    made = JailExecutor()
    yield made
    made.close()


@pytest.fixture(scope="module")
def open_executor():
    made = JailExecutor(jailed=False)
    yield made
    made.close()


@pytest.fixture(params=["jailed", "open"])
def either(request):
    return request.getfixturevalue({"jailed": "executor", "open": "open_executor"}[request.param])


ORDINARY = {
    "threads": ("from threading import Thread\nfor i in range(3):\n"
                "    Thread(target=print, args=(i,)).start()", "0\n1\n2\n"),
    "deep_recursion_in_a_thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "threading.Thread(target=lambda: print(f(50_000))).start()", "50000\n"),
    "asyncio": ("import asyncio\nasync def f(): await asyncio.sleep(0); return 7\n"
                "print(asyncio.run(f()))", "7\n"),
    "fork_and_wait": ("import os, sys\nsys.stdout.flush()\nif os.fork() == 0: os._exit(3)\n"
                      "print(os.waitstatus_to_exitcode(os.wait()[1]))", "3\n"),
    "temporary_files": ("import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n"
                        "    f.write('x'); f.seek(0); print(f.read())", "x\n"),
    "library": ("import hashlib, sqlite3 as _, decimal, fractions, dataclasses, zlib, bz2, lzma\n"
                "import enum, abc, typing, itertools, xml.etree.ElementTree, unicodedata\n"
                "print(hashlib.sha256(b'').hexdigest()[:4])", "e3b0\n"),
    "unflushed_file": ("import os\nout = os.fdopen(1, 'w')\nout.write('late\\n')", "late\n"),
    "exit_function": ("import atexit\natexit.register(print, 'bye')", "bye\n"),
    "main_guard": ("if __name__ == '__main__': print(__name__)", "__main__\n"),
    "pickle_own_class": ("import pickle\nclass A: pass\n"
                         "print(type(pickle.loads(pickle.dumps(A()))) is A)", "True\n"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass(order=True)\nclass A:\n"
                  "    x: int\nprint(A(1) < A(2))", "True\n"),
    "open_zero": ("print(sum(map(int, open(0))))", "6\n"),
    "buffered_input": ("import sys\nprint(len(sys.stdin.buffer.read()))", "6\n"),
    "random_differs": ("import random\nprint(len({random.random() for _ in range(3)}))", "3\n"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_run(name, either):
    if name == "library" and either._jailed:
        pytest.skip("sqlite3 needs a library of the host")
    source, expected = ORDINARY[name]
    outcome = either.script(source, b"1\n2\n3\n", LIMITS)
    assert (outcome.stdout.decode(), outcome.state) == (expected, "finished"), outcome.stderr


def test_library_in_the_jail(executor):
    source = ORDINARY["library"][0].replace("sqlite3 as _, ", "")
    assert executor.script(source, b"", LIMITS).stdout == b"e3b0\n"


def test_programs_do_not_share_random_numbers(executor):
    source = "import random\nprint(random.random())"
    assert len({executor.script(source, b"", LIMITS).stdout for _ in range(3)}) == 3


CLONED = """
import os
from rewards.sandbox import linux
seen = []
for when in ("before", "after_in_parent", "after_in_child"):
    os.register_at_fork(**{when: lambda when=when: seen.append(when)})
child = linux.clone(0)
if child:
    os.waitpid(child, 0)
print(*seen, flush=True)
os._exit(0)
"""


def test_a_clone_is_a_fork_to_the_interpreter():
    """What has to be done after one is done: `random` takes a new seed, and so on."""
    done = subprocess.run([sys.executable, "-c", CLONED], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines == ["before after_in_child", "before after_in_parent"], done.stderr


def test_states(either):
    short = Limits(cpu_s=1, wall_s=1, output_bytes=1000)
    assert either.script("while True: pass", b"", short).state == "timeout"
    assert either.script("import time; time.sleep(9)", b"", short).state == "timeout"
    started = time.monotonic()
    sleeps = "import time\ndef f(): time.sleep(30)"
    assert either.call(sleeps, "f", [], short).state == "timeout"
    assert time.monotonic() - started < 20
    assert either.script("print('x' * 2000)", b"", LIMITS).state == "finished"
    assert either.script("print('x' * 2000)", b"", short).state == "output_limit"
    assert either.script("1/0", b"", LIMITS).state == "runtime_error"
    assert either.script("raise SystemExit(3)", b"", LIMITS).state == "runtime_error"
    assert either.script("raise SystemExit('x')", b"", LIMITS).state == "runtime_error"
    assert either.script("raise SystemExit", b"", LIMITS).state == "finished"
    assert either.script("x = [0] * 10**9", b"", LIMITS).state == "memory"
    assert "ZeroDivisionError" in either.script("1/0", b"", LIMITS).stderr
    noisy = either.script("import sys\nsys.stderr.write('x' * 100_000 + 'end')", b"", LIMITS).stderr
    assert noisy.endswith("xend") and len(noisy) == 4096


def test_cpu_limit_by_itself(executor):
    """The wall is far away: it is CPU time that ends the program."""
    outcome = executor.script("while True: pass", b"", Limits(cpu_s=1, wall_s=400))
    assert outcome.state == "timeout" and 0.9 < outcome.cpu_s < 3


def test_cpu_time_of_children_counts(executor):
    """Each keeps to the limit and the program ends well, but together they used too much."""
    source = "import os\nfor _ in range(2):\n    if os.fork() == 0:\n        while True: pass\n"
    outcome = executor.script(source + "    os.wait()\n", b"", Limits(cpu_s=1, wall_s=400))
    assert outcome.state == "timeout" and outcome.cpu_s > 1.5


def test_open_programs_leave_nothing(open_executor):
    source = (
        "import os\nopen('left', 'w').close()\nchild = os.fork()\n"
        "if child == 0:\n    import time; time.sleep(600)\nprint(os.getcwd(), child)"
    )
    folder, child = open_executor.script(source, b"", LIMITS).stdout.decode().split()
    assert Path(folder).name.startswith("h1r-code-") and not Path(folder).exists()
    deadline = time.monotonic() + 30  # whoever inherits it has yet to bury it
    while Path(f"/proc/{child}").exists() and "Z" not in _state(child):
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.01)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_many_programs_leave_no_descriptor_or_memory(executor):
    (zygote,) = Path(f"/proc/{executor.pid}/task/{executor.pid}/children").read_text().split()

    def held() -> tuple[int, int, int]:
        rss = int(Path(f"/proc/{zygote}/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{zygote}/fd")), rss

    for _ in range(20):
        executor.script("print(1)", b"", LIMITS)
    before = held()
    for _ in range(100):
        executor.script("print(1)", b"", LIMITS)
        executor.call("def f(x): return x", "f", [1], LIMITS)
    after = held()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 64  # pages


# What a container's seccomp profile does: no namespaces, whoever asks.
REFUSE = """
import ctypes, errno, struct, sys
sys.path.insert(0, {root!r})
from rewards.sandbox import linux, seccomp
column, audit = seccomp._ARCHITECTURES[linux.machine()]
unshare = (272, 97)[column]
code = [seccomp._step(0x20, 0), seccomp._step(0x15, unshare, 0, 1),
        seccomp._step(0x06, 0x00050000 | errno.EPERM), seccomp._step(0x06, 0x7FFF0000)]
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install(seccomp.prepare(b"".join(code)))
from h1r_rl.errors import ConfigError
from rewards.sandbox.executor import JailExecutor
try:
    JailExecutor()
    print("started")
except ConfigError as error:
    print(error)
"""


def test_refuses_to_start_without_namespaces():
    done = subprocess.run(
        [sys.executable, "-c", REFUSE.format(root=str(ROOT))],
        capture_output=True, text=True, timeout=60,
    )
    assert "reward.sandbox: expected a kernel that gives untrusted code namespaces" in done.stdout
    for hint in ("Kubernetes", "Docker", "{http: URL}", "none-i-trust-this-code", "unshare"):
        assert hint in done.stdout, done.stdout + done.stderr


ORDINARY_USER = """
import json, os, sys
sys.path.insert(0, {root!r})
from rewards.sandbox.executor import JailExecutor
from rewards.sandbox.limits import Limits
assert os.getuid() == os.geteuid() == 65534
limits = Limits(cpu_s=2, wall_s=3, memory_bytes=256 << 20, processes=6, output_bytes=1 << 20)
executor = JailExecutor(largest=limits)
first, results = executor.pid, {{}}
for name, source in json.load(sys.stdin):
    outcome = executor.script(source, b"5\\n", limits)
    after = executor.script("import os\\nprint(os.getuid(), os.getpid())", b"", limits)
    served = after.stdout == b"1000 1\\n" and executor.pid == first
    results[name] = (outcome.state, outcome.stdout.strip() == b"ESCAPED", served)
truth = {{"helpers": "", "test": "def check(f): assert f(1) == 2", "entry_point": "f"}}
results["check"] = executor.check("def f(x): return x + 1", truth, limits)
executor.close()
print(json.dumps(results))
"""


def interpreter_for_all() -> str | None:
    """One that a user without a home of their own may run."""
    for path in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        if path is None:
            continue
        real = Path(path).resolve()
        if all(folder.stat().st_mode & 0o001 for folder in [real, *real.parents]):
            return path
    return None


def test_attacks_by_an_ordinary_users_sandbox(namespaces):
    """The whole list again, started by a user who is not root."""
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user: all the other tests say so")
    python = interpreter_for_all()
    if python is None:
        pytest.skip("no interpreter that an ordinary user may run")
    text = (Path(__file__).parent / "attack_programs.txt").read_text()
    programs = [section.partition("\n")[::2] for section in text.split("\n### ")[1:]]
    programs = [(title.split(" |")[0], source) for title, source in programs]
    done = subprocess.run(
        [python, "-c", ORDINARY_USER.format(root=str(ROOT))], input=json.dumps(programs),
        capture_output=True, text=True, timeout=200, user=65534, group=65534, extra_groups=[],
        env={}, cwd="/",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.pop("check") == ["passed", ""]
    assert len(results) == len(programs)
    assert [name for name, (_, escaped, served) in results.items() if escaped or not served] == []


def test_numbers_of_the_filter():
    """Against the kernel's own headers, where this machine has them."""
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    rows = [row.split() for row in seccomp.ALLOWED.replace("\n", " ").split(";")]
    rows += [[name, *map(str, spec[0])] for name, spec in seccomp.SELECTED.items()]
    rows += [["clone", *map(str, seccomp.CLONE)], ["clone3", *map(str, seccomp.CLONE3)]]
    checked = 0
    for column, (machine, header) in enumerate(headers.items(), start=1):
        if not header.exists():
            continue
        text = header.read_text()
        known = dict(re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", text))
        known.setdefault("newfstatat", known.get("fstatat"))
        for row in rows:
            if row[column] != "-":
                assert known[row[0]] == row[column], (machine, row)
                checked += 1
    if not checked:
        pytest.skip("no kernel headers here")


def test_filter_for_both_machines():
    for machine, architecture in (("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)):
        program = seccomp.build_filter(machine)
        assert architecture.to_bytes(4, "little") in program[:24]
        assert len(program) // 8 < 4096
    assert platform.machine() in ("x86_64", "aarch64")


class _Fusion(BaseHTTPRequestHandler):
    """What SandboxFusion's /run_code answers, by running the program here."""

    calls: list[tuple[int, dict]] = []
    broken: set[int] = set()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        port = self.server.server_address[1]
        self.calls.append((port, body))
        if port in self.broken:
            reply = {"status": "SandboxError", "message": "no slots"}
        else:
            done = subprocess.run(
                [sys.executable, "-c", body["code"]], input=body["stdin"], capture_output=True,
                text=True, timeout=20,
            )
            result = {
                "status": "Finished", "return_code": done.returncode, "stdout": done.stdout,
                "stderr": done.stderr, "execution_time": 0.1,
            }
            if "sleep" in body["code"]:
                result |= {"status": "TimeLimitExceeded", "return_code": None}
            if "gigabytes" in body["code"]:  # more than ours, of the kind that no limit cuts
                result["stderr"] = "x" * (9 << 20)
            if "half a pair" in body["code"]:
                result["stdout"] = "\ud800"
            status = "Failed" if done.returncode else "Success"
            reply = {"status": status, "message": "", "compile_result": None, "run_result": result}
        data = json.dumps(reply).encode()
        self.send_response(200 if self.path == "/run_code" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def services():
    servers = [HTTPServer(("127.0.0.1", 0), _Fusion) for _ in range(2)]
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in servers]
    for thread in threads:
        thread.start()
    _Fusion.calls.clear()
    _Fusion.broken.clear()
    yield [f"http://127.0.0.1:{server.server_address[1]}" for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_http_service_that_trickles_costs_its_time_and_no_more(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.http_executor.OVERHEAD_S", 0.5)
    with CHAT_STUB["serving"]() as service:
        service.replies = ["trickle"]
        started = time.monotonic()
        with pytest.raises(SandboxLost, match="no answer within 1 s"):
            HttpExecutor((service.url,)).script("print(1)", b"", Limits(wall_s=0.5))
        assert time.monotonic() - started < 5


def test_http_services_in_turn(services):
    executor = HttpExecutor(tuple(services))
    for _ in range(4):
        assert executor.script("print(int(input()) + 1)", b"5\n", LIMITS).stdout == b"6\n"
    ports = [port for port, _ in _Fusion.calls]
    assert ports[0] != ports[1] and ports[:2] == ports[2:]
    assert _Fusion.calls[0][1]["language"] == "python"
    assert executor.script("1/0", b"", LIMITS).state == "runtime_error"
    assert executor.script("import time; time.sleep(0)", b"", LIMITS).state == "timeout"
    source = "class Solution:\n    def f(self, a): print('noise'); return {'x': (a, 1.5)}"
    value = executor.call(source, "f", [2], LIMITS)
    assert value.value == [("x", (2, 1.5))]
    assert executor.call("def f(a): return f", "f", [2], LIMITS).state == "runtime_error"
    assert executor.check("", {}, LIMITS) == ("unsupported", "check_needs_namespaces")


def test_http_values_and_names_are_those_of_the_jail(services, executor):
    sources = (
        "def f(a): return Counter('aa'), defaultdict(list, x=[1])",
        "P = namedtuple('P', 'x y')\ndef f(a: List[int]): return [P(a, 1.5), True]",
        "class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\n"
        "def f(a): return S('x')",
        "def f(a): return frozenset([a])",
        "def f(a): return [Fraction(a, 2) + 1, d.Decimal(1)] and Fraction(a, 2).numerator",
        "def f(a): return deque([a])",
        "def f(a):\n    v = UserList()\n    for _ in range(100_000): v = [v]\n    return v",
        "def f(a): return {frozenset([a])}",
    )
    imports = ("from fractions import Fraction", "import decimal as d", "no such statement")
    http, found = HttpExecutor(tuple(services)), []
    for source in sources:
        outcomes = [e.call(source, "f", [2], LIMITS, imports) for e in (http, executor)]
        assert outcomes[0].state == outcomes[1].state, (source, outcomes)
        assert repr(outcomes[0].value) == repr(outcomes[1].value)
        found.append(outcomes[0].value)
    assert found == [([("a", 2)], [("x", [1])]), [(2, 1.5), True], "x", [2], 1, None, None, None]
    source = "if __name__ == '__main__': print(Fraction(1, 2), *sorted(Counter(input())))"
    for one in (http, executor):
        assert one.script(source, b"ba\n", LIMITS, imports).stdout == b"1/2 a b\n"


def test_http_output_cannot_choose_to_have_no_verdict(services):
    """A reply that is too long or holds no text is the program's doing: a verdict, at once."""
    executor = HttpExecutor(tuple(services))
    small = Limits(cpu_s=5, wall_s=20, output_bytes=1000)
    assert executor.script("print(1) # gigabytes", b"", small).state == "output_limit"
    assert executor.call("def f(): return 1 # gigabytes", "f", [], small).state == "output_limit"
    assert len(_Fusion.calls) == 2
    assert executor.script("print(1) # half a pair", b"", small).stdout == "\ud800".encode(
        "utf-8", "surrogatepass"
    )
    problem = {"check": "def check(f): f(1)", "entry_point": "f"}
    http = RewardConfig(sandbox={"http": services})
    rows = [("code", json.dumps(problem)), ("code", '{"tests": [{"input": "", "output": ""}]}')]
    assert check_ground_truths(rows, http) == ["check_needs_namespaces", None]
    assert check_ground_truths(rows, RewardConfig()) == [None, None]


def test_http_service_that_fails_is_passed_over(services):
    executor = HttpExecutor((services[0], services[1], "http://127.0.0.1:1"))
    _Fusion.broken.add(int(services[0].rpartition(":")[2]))
    for _ in range(3):
        assert executor.script("print(1)", b"", LIMITS).stdout == b"1\n"
    _Fusion.broken.add(int(services[1].rpartition(":")[2]))
    with pytest.raises(SandboxLost, match="no slots"):
        executor.script("print(1)", b"", LIMITS)


def test_settings_choose_the_sandbox(services):
    http = RewardConfig(sandbox={"http": services})
    assert isinstance(http.sandbox, HttpSandboxConfig) and http.sandbox.urls == tuple(services)
    assert isinstance(executor_for(http), HttpExecutor)
    ensure_sandbox(http)
    one = RewardConfig(sandbox={"http": services[0]}, code=CodeConfig(memory_mib=100))
    assert one.sandbox.urls == (services[0],)
    trusted = executor_for(RewardConfig(sandbox="none-i-trust-this-code"))
    assert isinstance(trusted, JailExecutor) and not trusted._jailed
    assert executor_for(RewardConfig(sandbox="none-i-trust-this-code")) is trusted
    with pytest.raises(ValueError):
        RewardConfig(sandbox="none")
