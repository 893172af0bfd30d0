import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from stepbatch.bench import servers
from stepbatch.bench.servers import free_port, running, started
from stepbatch.errors import SetupError

FAKE = [sys.executable, "-m", "stepbatch", "serve", "--backend", "fake"]

# answers 200 on one path alone, after a while; says so on standard output where it is told to
STUB = """
import http.server, sys, time
port, path, delay, printed = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == path else 404)
        self.end_headers()
    def log_message(self, *arguments):
        pass
time.sleep(delay)
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
print("loading from http://nowhere/model", flush=True)
print(printed.replace("PORT", str(server.server_port)), flush=True)
server.serve_forever()
"""


def stub(port: str = "{port}", path: str = "/health", delay: float = 0.0, printed: str = "") -> list[str]:
    return [sys.executable, "-c", STUB, port, path, str(delay), printed]


def answers(base_url: str, path: str = "/health") -> bool:
    try:
        with urllib.request.urlopen(base_url + path, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text().strip()


def test_our_server_says_where_it_listens_and_is_gone_afterwards(tmp_path: Path) -> None:
    with running([*FAKE, "--port", "0"], tmp_path / "server.log") as server:
        assert answers(server.base_url)
        server.check()
    assert not answers(server.base_url)
    with pytest.raises(SetupError, match="ended with status 0"):
        server.check()


def test_a_free_port_takes_the_placeholders_place(tmp_path: Path) -> None:
    with running([*FAKE, "--port", "{port}"], tmp_path / "server.log") as server:
        assert server.base_url in (tmp_path / "server.out").read_text()
        assert answers(server.base_url)


def test_a_given_address_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(stub(str(port), delay=0.3), tmp_path / "server.log", base_url=url) as server:
        assert server.base_url == url
        assert answers(url)


def test_a_given_addresss_port_takes_the_placeholders_place(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with running(stub(), tmp_path / "server.log", base_url=url):
        assert answers(url)


def test_a_server_without_a_health_route_is_up_when_it_lists_its_models(tmp_path: Path) -> None:
    with running(stub(path="/v1/models"), tmp_path / "server.log") as server:
        assert answers(server.base_url, "/v1/models")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_first_address_with_a_port_on_standard_output_counts(tmp_path: Path, host: str) -> None:
    with running(stub("0", printed=f"listening on http://{host}:PORT, or so"), tmp_path / "server.log") as server:
        assert answers(server.base_url)


def test_several_start_at_the_same_time(tmp_path: Path) -> None:
    with started(stub(delay=0.2), tmp_path / "1.log") as first, started(stub(delay=0.2), tmp_path / "2.log") as second:
        assert not answers(first.base_url)
        first.wait_until_ready(30)
        second.wait_until_ready(30)
        assert first.base_url != second.base_url
        assert answers(first.base_url)
        assert answers(second.base_url)


def test_the_index_takes_its_placeholders_place(tmp_path: Path) -> None:
    with running(stub("0", printed="http://127.0.0.1:PORT {index}"), tmp_path / "server.log", index=3):
        assert (tmp_path / "server.out").read_text().endswith(" 3\n")


def test_one_that_ends_is_told_with_its_last_lines(tmp_path: Path) -> None:
    code = "import sys; print('reading', file=sys.stderr); sys.exit('no such checkpoint')"
    with pytest.raises(SetupError, match=r"ended with status 1: reading\s+no such checkpoint$"):
        with running([sys.executable, "-c", code], tmp_path / "server.log"):
            pass


def test_one_that_ends_may_have_told_why_on_standard_output(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"ended with status 3: out of memory$"):
        with running(["sh", "-c", "echo out of memory; exit 3"], tmp_path / "server.log"):
            pass


def test_one_that_was_killed_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"was killed by SIGKILL; it wrote nothing$"):
        with running(["sh", "-c", "kill -KILL $$"], tmp_path / "server.log"):
            pass


def test_one_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    command = ["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 60"]
    with pytest.raises(SetupError, match=r"did not answer within 0\.5 s and did not say where it listens"):
        with running(command, tmp_path / "server.log", ready_timeout=0.5):
            pass
    assert not alive(int(wait_for(tmp_path / "pid")))


def test_what_answers_errors_is_not_up(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"did not answer within 0\.5 s at http://127\.0\.0\.1:"):
        with running(stub(path="/other"), tmp_path / "server.log", ready_timeout=0.5):
            pass


def test_another_server_at_the_address_is_not_taken_for_ours(tmp_path: Path) -> None:
    with running(stub(), tmp_path / "first.log") as server:
        with pytest.raises(SetupError, match=f"something answers at {server.base_url} already"):
            with running(stub(), tmp_path / "second.log", base_url=server.base_url):
                pass
        assert answers(server.base_url)


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"can't start no-such-program --fast: .*No such file"):
        with running(["no-such-program", "--fast"], tmp_path / "server.log"):
            pass


def test_children_are_ended_too(tmp_path: Path) -> None:
    shell = f"sleep 60 & echo $! > {tmp_path}/pid; exec {sys.executable} -c '{STUB}' {{port}} /health 0 ''"
    with running(["sh", "-c", shell], tmp_path / "server.log"):
        child = int(wait_for(tmp_path / "pid"))
        assert alive(child)
    assert not alive(child)


def test_what_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(servers, "ORPHANS_SECONDS", 0.3)
    deaf = "import signal\nfor n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
    child = f"{sys.executable} -c '{deaf}import time; print(1, flush=True); time.sleep(60)' > {tmp_path}/up"
    shell = f"{child} & echo $! > {tmp_path}/pid; exec {sys.executable} -c '{deaf}{STUB}' {{port}} /health 0 ''"
    with running(["sh", "-c", shell], tmp_path / "server.log") as server:
        wait_for(tmp_path / "up")
        pid = int(wait_for(tmp_path / "pid"))
    assert not answers(server.base_url)
    assert not alive(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_that_is_told_to_end_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import sys, time
from pathlib import Path
from stepbatch.bench.servers import running
with running({stub()!r}, Path({str(tmp_path)!r}) / "server.log") as server:
    print(server.base_url, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert answers(url)
        process.send_signal(number)
        assert process.wait(30) != 0
    assert not answers(url)
