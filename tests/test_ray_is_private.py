"""A cluster that --engine ray starts is private: loopback, a token, its own folder, removed at the end."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from small_job import draw
from test_cli import fails

from attnx.jobs.engines.cluster import _connected, _private_cluster

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
OF_RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")
OF_RAY += ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",)

# Prints the listening addresses and the environment of each process of its running cluster.
SCRIPT = """
    import contextlib, json, os, stat
    from pathlib import Path
    from attnx.jobs.engines.cluster import _private_cluster

    def listening():
        found = {}
        for name in ("tcp", "tcp6"):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                _, local, _, state, *_ = fields = line.split()
                if state == "0A":
                    found[fields[9]] = local.partition(":")[0]
        return found

    def ours():
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (process / "environ").read_bytes().split(b"\\0")
                if b"ATTNX_TEST_MARK=" + os.environ["ATTNX_TEST_MARK"].encode() in environment:
                    yield process, dict(entry.decode().partition("=")[::2] for entry in environment)

    with _private_cluster() as ray:
        answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote())
        by_inode, processes = listening(), []
        for process, environment in ours():
            addresses = []
            with contextlib.suppress(OSError):
                for descriptor in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        inode = os.readlink(descriptor).removeprefix("socket:[").removesuffix("]")
                        addresses += [by_inode[inode]] if inode in by_inode else []
            command = (process / "cmdline").read_bytes().replace(b"\\0", b" ").decode()
            of_ray = {name: value for name, value in environment.items() if name.startswith("RAY_AUTH")}
            processes.append([command, addresses, of_ray])
        folders = {str(path): stat.S_IMODE(path.stat().st_mode) for path in Path(os.environ["RAY_TMPDIR"]).iterdir()}
        session = ray._private.worker._global_node.get_session_dir_path()
        dashboard = ray._private.worker._global_node.webui_url
    print(json.dumps([answer, processes, folders, session, dashboard, os.environ["RAY_AUTH_TOKEN"]]))
"""


@pytest.fixture
def no_ray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all Ray settings from the environment, and restore it after the test."""
    for name in OF_RAY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.long
def test_a_cluster_of_our_own_is_nobody_elses(tmp_path: Path) -> None:
    """A file in a folder that other users can write to must not select the cluster."""
    above = Path(f"/tmp/attnx-test-{os.getpid()}")  # short: Ray's sockets stand below it
    (above / "ray").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as planted:
        (above / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{planted.getsockname()[1]}")
        environment = {name: value for name, value in os.environ.items() if name not in OF_RAY}
        environment |= {"RAY_TMPDIR": str(above), "ATTNX_TEST_MARK": tmp_path.as_posix()}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=environment, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        planted.setblocking(False)
        with pytest.raises(BlockingIOError):
            planted.accept()
    left = sorted(path.name for path in above.iterdir())
    (above / "ray" / "ray_current_cluster").unlink()
    (above / "ray").rmdir()
    above.rmdir()
    assert done.returncode == 0, done.stderr
    answer, processes, folders, session, dashboard, token = json.loads(done.stdout.splitlines()[-1])
    assert answer == 42
    assert any("gcs_server" in command for command, *_ in processes)
    assert any("raylet" in command for command, *_ in processes)
    interceptors = {command: addresses for command, addresses, _ in processes if addresses}
    assert any("gcs_server" in command for command in interceptors)
    assert {address for addresses in interceptors.values() for address in addresses} <= LOOPBACK, interceptors
    assert len(token) == 64
    expected = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    servers = [given for command, _, given in processes if "gcs_server " in command or "raylet/raylet " in command]
    assert servers == [expected] * 2
    # A process that sets its title overwrites a part of its initial environment.
    assert all(given.items() <= expected.items() for _, _, given in processes)
    assert not dashboard
    # Ray still starts the dashboard's server, without its frontend.
    dashboards = [command for command, *_ in processes if "dashboard/dashboard.py" in command]
    assert dashboards
    assert all("--disable-frontend" in command for command in dashboards)
    (own,) = (folder for folder in folders if Path(folder).name.startswith("attnx-"))
    assert folders[own] == 0o700
    assert Path(own) in Path(session).parents
    assert left == ["ray"], "the session's folder is gone"


class AskedError(Exception):
    """Raised instead of running ray.init."""


@pytest.fixture
def asked(no_ray_settings: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of ray.init, which is replaced and starts nothing."""
    import ray

    found: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        found.update(arguments)
        raise AskedError

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return found


def test_a_cluster_of_our_own_is_asked_for_by_name(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "a folder with a name too long for sockets"))
    with pytest.raises(AskedError), _private_cluster():
        pass
    assert (asked["address"], asked["_node_ip_address"], asked["include_dashboard"]) == ("local", "127.0.0.1", False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    first = os.environ.pop("RAY_AUTH_TOKEN")
    del os.environ["RAY_AUTH_MODE"]
    with pytest.raises(AskedError), _private_cluster():
        pass
    assert os.environ["RAY_AUTH_TOKEN"] != first
    socket_of_ray = f"{asked['_temp_dir']}/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store"
    assert len(socket_of_ray) <= 107
    assert not Path(asked["_temp_dir"]).parent.exists()


def test_authentication_that_is_set_up_is_kept(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "token.txt")
    with pytest.raises(AskedError), _private_cluster():
        pass
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("by", ["option", "environment", "both"])
def test_a_cluster_that_is_named_is_joined(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    pictures = draw(tmp_path / "pictures", 2)
    if by != "option":
        monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379" if by == "environment" else "10.9.9.9:6379")
    address = [] if by == "environment" else ["--address", "10.1.2.3:6379"]
    line = fails("extract", pictures, "--out", tmp_path / "out", "--device", "cpu", "--engine", "ray", *address)
    assert "AskedError" in line
    assert asked["address"] == "10.1.2.3:6379"
    assert "_temp_dir" not in asked
    assert "RAY_AUTH_TOKEN" not in os.environ, "that cluster's own authentication is what counts"


def test_an_older_ray_is_refused_in_one_line(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.51.0")
    pictures = draw(tmp_path / "pictures", 2)
    line = fails("extract", pictures, "--out", tmp_path / "out", "--device", "cpu", "--engine", "ray")
    assert "engine ray: expected ray 2.52 or newer, which supports private clusters; got 2.51.0" in line
    assert asked == {}
    with pytest.raises(AskedError), _connected("10.1.2.3:6379"):
        pass
