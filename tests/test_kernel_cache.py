"""The cache of the CPU kernel: damaged files, other users, killed compilations, and broken or new compilers.

Most tests use a fake compiler that only writes a file. Nothing is loaded in these tests.
"""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import attnx
from attnx.kernels.cpu import build
from attnx.ops.backends import native

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo fake {version}; exit; fi
echo once >> {log}
for last; do :; done
echo "a library of {version}" > "$last"
"""
root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNX_CACHE_DIR", str(tmp_path / "cache"))
    build._version.cache_clear()
    yield tmp_path / "cache"
    build._version.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A fast fake compiler. The fixture is a function that changes its version or script."""
    path = tmp_path / "compiler"

    def write(version="1", script=COMPILER):
        path.write_text(script.format(version=version, log=tmp_path / "log"))
        path.chmod(0o755)
        build._version.cache_clear()

    write()
    monkeypatch.setenv("CXX", str(path))
    return write


def compilations(tmp_path):
    return len((tmp_path / "log").read_text().splitlines())


def test_a_file_is_taken_again(cache, compiler, tmp_path):
    assert build.compiled("DEFAULT") == build.compiled("DEFAULT")
    assert compilations(tmp_path) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b + b"more"]
)
def test_a_damaged_file_is_removed_and_compiled_again(cache, compiler, tmp_path, damage):
    made = build.compiled("DEFAULT")
    good = made.read_bytes()
    made.write_bytes(damage(good))
    assert build.compiled("DEFAULT").read_bytes() == good
    assert len(list(cache.iterdir())) == 1
    assert compilations(tmp_path) == 2


def test_a_damaged_file_is_never_loaded(cache, compiler, monkeypatch):
    """Loading a truncated library would raise SIGBUS."""
    build.compiled("DEFAULT").write_bytes(b"half")
    loaded = []
    monkeypatch.setattr(native, "loaded", lambda path: loaded.append(path.read_text()))
    native._cached("DEFAULT")
    assert loaded == ["a library of 1\n"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes_do_not_depend_on_the_umask(cache, compiler, monkeypatch, umask):
    inner = cache / "parent" / "attnx"
    monkeypatch.setenv("ATTNX_CACHE_DIR", str(inner))
    before = os.umask(umask)
    try:
        made = build.compiled("DEFAULT")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (inner, inner.parent, cache)] == [0o700] * 3
    assert stat.S_IMODE(made.stat().st_mode) & 0o722 == 0o700


def refused(tmp_path, match):
    """Check that the cache raises, and that the kernel is compiled for this process only, with one warning."""
    with pytest.raises(build.CacheError, match=match):
        build.compiled("DEFAULT")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        path, mode = native._cached("DEFAULT")
    assert tmp_path / "cache" not in path.parents
    assert mode == 0o700
    assert not path.parent.exists()
    (warning,) = warned
    assert "compiled for this process alone" in str(warning.message)
    assert len(str(warning.message).splitlines()) == 1


@pytest.fixture
def not_loaded(monkeypatch):
    """Replace loading by the path of the library and the mode of its folder."""
    monkeypatch.setattr(native, "loaded", lambda path: (path, stat.S_IMODE(path.parent.stat().st_mode)))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to(cache, compiler, not_loaded, tmp_path, mode):
    build.compiled("DEFAULT")
    cache.chmod(mode)
    refused(tmp_path, "other users can write to it .*cache;")
    for path in cache.iterdir():
        path.unlink()
    refused(tmp_path, "other users can write to it .*cache;")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_file_that_others_can_write_to(cache, compiler, not_loaded, tmp_path, mode):
    build.compiled("DEFAULT").chmod(mode)
    refused(tmp_path, "other users can write to it .*cpu-default-")


@root_only
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_or_folder_of_another_user(cache, compiler, not_loaded, tmp_path, what):
    made = build.compiled("DEFAULT")
    os.chown(made if what == "file" else cache, 1234, 1234)
    refused(tmp_path, "belongs to another user")


def test_a_link_or_a_pipe_in_place_of_a_file(cache, compiler, not_loaded, tmp_path):
    made = build.compiled("DEFAULT")
    made.rename(tmp_path / "elsewhere")
    made.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, "symbolic links")
    made.unlink()
    os.mkfifo(made, 0o600)
    refused(tmp_path, "no regular file")


def test_a_folder_that_is_a_link_is_judged_by_what_it_leads_to(cache, compiler, not_loaded, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "real")
    assert build.compiled("DEFAULT").parent == tmp_path / "real"
    (tmp_path / "real").chmod(0o777)
    refused(tmp_path, "other users can write to it .*real;")


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc/attnx"])
def test_a_folder_that_cannot_be_made(cache, compiler, not_loaded, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("ATTNX_CACHE_DIR", folder)
    refused(tmp_path, "set ATTNX_CACHE_DIR")


def test_a_full_disk(cache, compiler, not_loaded, tmp_path, monkeypatch):
    real = build.shutil.disk_usage
    usage = real(tmp_path)._replace(free=1000)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage if path == cache else real(path))
    refused(tmp_path, "No space left")


def test_no_home(cache, compiler, not_loaded, tmp_path, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ATTNX_CACHE_DIR")
    monkeypatch.setattr(Path, "expanduser", no_home)
    refused(tmp_path, "home directory")


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNX_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("relative", "", "~/x"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert build.cache_folder() == tmp_path / ".cache" / "attnx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "attnx"


def test_another_version_of_the_compiler_compiles_again(cache, compiler, tmp_path):
    first = build.compiled("DEFAULT")
    compiler(version="2")
    second = build.compiled("DEFAULT")
    assert second.read_text() == "a library of 2\n"
    compiler(version="1")
    assert build.compiled("DEFAULT") == first
    assert compilations(tmp_path) == 2


def test_without_a_compiler_one_of_any_version_is_taken(cache, compiler, tmp_path):
    made = build.compiled("DEFAULT")
    (tmp_path / "compiler").unlink()
    build._version.cache_clear()
    assert build.compiled("DEFAULT") == made
    made.write_bytes(b"damaged")
    with pytest.raises(ImportError, match="CXX"):
        build.compiled("DEFAULT")
    assert not made.exists()


def test_what_killed_compilations_left_is_removed(cache, compiler):
    cache.mkdir(mode=0o700)
    (cache / "tmp-killed").mkdir()
    (cache / "tmp-killed" / "half.so").write_text("half")
    for name, age in (("tmpearlier", 3600), ("tmpunderway", 0)):  # by a version without locks
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    made = build.compiled("DEFAULT")
    assert {path.name for path in cache.iterdir()} == {made.name, "tmpunderway"}


def test_a_compilation_under_way_is_left_alone(cache, compiler):
    cache.mkdir(mode=0o700)
    (cache / "tmp-underway").mkdir()
    descriptor = os.open(cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    build.compiled("DEFAULT")
    assert (cache / "tmp-underway").exists()
    os.close(descriptor)
    build.compiled("AVX2")
    assert not (cache / "tmp-underway").exists()


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(cache, compiler):
    compiler(script="#!/bin/sh\nsleep 60\n")
    code = "from attnx.kernels.cpu import build; build.compiled('DEFAULT')"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.monotonic() + 60
    while not list(cache.glob("tmp-*")) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(cache.glob("tmp-*"))
    # A child of the process that has not become the compiler yet holds its lock for a moment longer.
    descriptor = os.open(cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)
    compiler()
    made = build.compiled("DEFAULT")
    assert list(cache.iterdir()) == [made]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\nexit 1\n", "status 1"),
        ("#!/bin/sh\nexit 0\n", "status 0"),
        ("#!/bin/sh\nfor i in 1 2 3; do echo error $i >&2; done; exit 1\n", "error 1"),
        ("#!/bin/sh\nhead -c 5000 /dev/zero | tr '\\0' x >&2; exit 1\n", "xxx"),
        ("#!/bin/sh\nsleep 20\n", "0.2 s"),
        ("neither a script nor a program", "can't be run"),
    ],
)
def test_a_broken_compiler_is_one_line(cache, compiler, monkeypatch, script, says):
    monkeypatch.setattr(build, "_TIMEOUT", 0.2 if "sleep" in script else 60)
    compiler(script=script)
    one_line(says)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "command", ["'unclosed", "''", "/", "/dev/null", "/bin/false", "no-such " + "x" * 5000, "a\nb"]
)
def test_a_command_that_is_no_compiler_is_one_line(cache, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    one_line(None)


def one_line(says):
    with pytest.raises(ImportError, match=says) as error:
        build.compiled("DEFAULT")
    message = str(error.value)
    assert not isinstance(error.value, build.CacheError)
    assert "CXX" in message
    assert len(message) <= 300
    assert len(message.splitlines()) == 1


def test_an_empty_cxx_is_none(monkeypatch):
    monkeypatch.setenv("CXX", " ")
    found = build._compiler()
    monkeypatch.delenv("CXX")
    assert build._compiler() == found


def test_a_kernel_still_runs_when_the_folder_it_was_compiled_in_is_gone(cache, monkeypatch):
    q = torch.randn(1, 2, 9, 8)
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.warns(UserWarning, match=r"other users can write to it .* compiled for this process alone"):
        alone = native._cached("DEFAULT")
    assert not list(cache.iterdir())
    monkeypatch.setattr(native, "kernel", lambda *_: alone)
    want = attnx.attention_map(q, q, backend="eager")
    torch.testing.assert_close(attnx.attention_map(q, q, backend="native"), want)
