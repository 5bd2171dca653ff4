"""Files appear whole or not at all, whatever interrupts their writing, and only regular files and folders are replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from replacement.files import atomic_file, atomic_folder, check_file, check_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which may come to a sudden end."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_contents_replace_each_other_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    for text in ("first", "zweiter Text: ä"):
        assert write_atomic(path, text) == path
        assert path.read_text(encoding="utf-8") == text
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["text.txt"]


def test_long_names_are_no_obstacle(tmp_path: Path) -> None:
    name = "ä" * 127
    write_atomic(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def test_an_error_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")

    def fail(error: BaseException) -> None:
        with atomic_file(tmp_path / "file") as scratch, atomic_folder(tmp_path / "folder") as scratch_folder:
            scratch.write_text("ne")
            (scratch_folder / "file").write_text("new")
            raise error

    with pytest.raises(RuntimeError, match="in the middle"):
        fail(RuntimeError("in the middle"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_error_that_names_the_path(tmp_path: Path) -> None:
    reason = r"could not be written \(No space left on device"
    with pytest.raises(ValueError, match=rf"file: {reason}"), atomic_file(tmp_path / "file"):
        Path("/dev/full").write_text("text")
    with pytest.raises(ValueError, match=rf"folder: {reason}"), atomic_folder(tmp_path / "folder"):
        Path("/dev/full").write_text("text")
    assert names(tmp_path) == []


def test_a_write_the_system_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    code = """
        import resource, sys
        import numpy as np
        from safetensors.numpy import save_file
        from replacement.files import atomic_file, write_atomic
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        for number in (1, 2):
            try:
                if number == 1:
                    write_atomic(sys.argv[1], bytes(10_000))
                else:
                    with atomic_file(sys.argv[1]) as scratch:
                        save_file({"x": np.zeros(10_000)}, scratch)
            except ValueError as error:
                print(error)
    """
    write_atomic(tmp_path / "file", "old")
    message = f"{tmp_path / 'file'}: could not be written (File too large)"
    assert run(code, tmp_path / "file").stdout.splitlines() == [message, message]
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_other_files_that_fail_inside_the_block_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "source"
    with pytest.raises(ValueError, match=rf"No such file or directory: {missing}"), atomic_file(tmp_path / "a" / "b"):
        missing.read_text()


# What may be replaced ------------------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # addresses of sockets must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "socket": make_socket,
    "symbolic link": lambda path: path.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("write", [check_file, check_folder, lambda path: write_atomic(path, "text")])
def test_only_regular_files_and_folders_are_replaced(
    kind: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "target"
    SPECIAL[kind](path)
    before = os.lstat(path)
    with pytest.raises(ValueError, match=rf"target: expected a .*\b{kind}"):
        write(path)
    with pytest.raises(ValueError, match=rf"target: expected a folder, but it is a {kind}"), atomic_folder(path):
        pass
    assert os.lstat(path) == before
    assert names(tmp_path) == ["target"]


def test_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"null: expected a file name, given a device, which is never replaced"):
        check_file(os.devnull)
    with pytest.raises(ValueError, match=r"null: expected a folder, but /dev/null is a device"):
        check_folder(os.devnull)
    with pytest.raises(ValueError, match=r"null: expected a folder, but /dev/null is a device"):
        check_file(f"{os.devnull}/x")


def test_a_link_to_a_file_is_refused_and_a_link_to_a_folder_above_followed(tmp_path: Path) -> None:
    write_atomic(tmp_path / "real" / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "alias").symlink_to("file")
    with pytest.raises(ValueError, match="alias: expected a file name, given a symbolic link"):
        write_atomic(tmp_path / "link" / "alias", "new")
    write_atomic(check_file(tmp_path / "link" / "file"), "new")
    with atomic_folder(check_folder(tmp_path / "link"), keep_others=True) as scratch:
        (scratch / "more").write_text("more")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert names(tmp_path / "real") == ["alias", "file", "more"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc")
@pytest.mark.parametrize("check", [check_file, check_folder, lambda path: write_atomic(path, "")])
def test_proc_takes_no_files(check: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"/proc(/foo)?: .*\(No such file or directory"):
        check("/proc/foo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder: expected a file name, given a folder"),
        ("file/below", "expected a folder, but .*file is a file"),
        ("x" * 300, r"x': cannot be a file name \(File name too long\)"),
        ("a\0b", r"a\\x00b': cannot be a file name"),
    ],
)
def test_bad_names_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for write in (check_file, lambda path: write_atomic(path, "text")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_without_permission_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is closed to the superuser, who may run this test: the system's answer is given here."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(ValueError, match=r"takes no new files \(Permission denied\)"):
        check_folder(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match=r"file: could not be written \(Permission denied\)"):
        write_atomic(tmp_path / "file", "text")


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ({"a": "1", "b": "1"}, {"a": "2"}):
        with atomic_folder(tmp_path / "folder", replaces=("a", "b")) as scratch:
            for name, text in content.items():
                (scratch / name).write_text(text)
        assert names(tmp_path) == ["folder"]
        assert {path.name: path.read_text() for path in (tmp_path / "folder").iterdir()} == content


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    write_atomic(tmp_path / "notes" / "thesis.tex", "years of work")
    with (
        pytest.raises(ValueError, match=r"notes: holds 'thesis.tex', which would be lost"),
        atomic_folder(tmp_path / "notes", replaces=("a",)),
    ):
        raise AssertionError("refused before the work")
    with pytest.raises(ValueError, match="holds 'mine'"), atomic_folder(tmp_path / "folder"):
        write_atomic(tmp_path / "folder" / "mine", "made while the block ran")
    assert names(tmp_path) == ["folder", "notes"]
    assert (tmp_path / "folder" / "mine").exists()


def test_files_can_be_added_to_a_folder(tmp_path: Path) -> None:
    write_atomic(tmp_path / "folder" / "mine", "kept")
    write_atomic(tmp_path / "folder" / "plots" / "a.svg", "old")
    with atomic_folder(tmp_path / "folder", keep_others=True) as scratch:
        for name in ("plots/a.svg", "plots/b.svg", "c"):
            write_atomic(scratch / name, name)
    found = {str(p.relative_to(tmp_path / "folder")): p for p in (tmp_path / "folder").rglob("*") if p.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == {
        "mine": "kept",
        "plots/a.svg": "plots/a.svg",
        "plots/b.svg": "plots/b.svg",
        "c": "c",
    }
    assert names(tmp_path / "folder") == ["c", "mine", "plots"]


def test_files_are_added_to_a_folder_only_if_all_can_be(tmp_path: Path) -> None:
    def write(*files: str) -> None:
        with atomic_folder(tmp_path / "folder", keep_others=True) as scratch:
            for name in files:
                write_atomic(scratch / name, ", ".join(files))

    write("c")
    os.mkfifo(tmp_path / "folder" / "pipe")
    with pytest.raises(ValueError, match="given a named pipe"):
        write("c", "pipe")
    assert (tmp_path / "folder" / "c").read_text() == "c"
    assert names(tmp_path / "folder") == ["c", "pipe"]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o002])
def test_permissions_are_those_of_any_new_file(
    mask: int, umask: Callable[[int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    umask(mask)
    monkeypatch.delattr("os.umask")  # reading it means setting it, for all threads of the process
    write_atomic(tmp_path / "a" / "file", "text")
    with atomic_file(tmp_path / "a" / "tensors") as scratch:
        save_file({"x": np.zeros(3)}, scratch)  # makes private files
    with atomic_folder(tmp_path / "b") as scratch:
        save_file({"x": np.zeros(3)}, scratch / "tensors")
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


# Sudden ends and other writers ---------------------------------------------------------------------------------------

KILLED = """
    import os, sys
    from pathlib import Path
    from replacement.files import atomic_file, atomic_folder
    kind, path = sys.argv[1:]
    with (atomic_file if kind == "file" else atomic_folder)(path) as scratch:
        (scratch if kind == "file" else scratch / "a").write_text("half of the new cont")
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_content_and_the_next_one_cleans_up(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "file":
        write_atomic(target, "old")
    assert run(KILLED, kind, target).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == (2 if kind == "file" else 1)  # the scratch folder of the killed process
    assert not target.exists() or target.read_text() == "old"
    write_atomic(tmp_path / "another", "text")
    assert len(names(tmp_path)) == (3 if kind == "file" else 2)  # of another target: left alone
    if kind == "file":
        write_atomic(target, "new")
    else:
        with atomic_folder(target):
            pass
    assert names(tmp_path) == ["another", "target"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_survives_a_kill_between_the_renames(renames: int, tmp_path: Path) -> None:
    code = """
        import os, sys
        from replacement.files import atomic_folder
        rename, left = os.rename, int(sys.argv[2]) + 1  # the first rename finds the old folder in its way
        def rename_or_die(*arguments):
            global left
            if not left:
                os.kill(os.getpid(), 9)
            left -= 1
            rename(*arguments)
        os.rename = rename_or_die
        with atomic_folder(sys.argv[1], replaces=["a"]) as scratch:
            (scratch / "a").write_text("new")
    """
    target = tmp_path / "target"
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("old")
    killed = run(code, target, renames).returncode == -signal.SIGKILL
    assert killed == (renames < 2)
    with pytest.raises(ValueError, match="holds 'a', which"), atomic_folder(target):
        raise AssertionError("the old folder is moved back before it is looked at")
    assert names(tmp_path) == ["target"]
    assert (target / "a").read_text() == ("old" if killed else "new")


def test_scratch_folders_of_living_processes_and_other_machines_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_file(tmp_path / "file") as scratch:
        scratch.write_text("slow")
        write_atomic(tmp_path / "file", "fast")
    assert (tmp_path / "file").read_text() == "slow"
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "another")
        patch.setattr("os.getpid", lambda: 2**22 + 1)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        write_atomic(tmp_path / "file", "from there")
    write_atomic(tmp_path / "file", "from here")
    assert [name for name in names(tmp_path) if "another" in name] == names(tmp_path)[:1]


def test_concurrent_writers_leave_one_whole_result(tmp_path: Path) -> None:
    def write(number: int) -> None:
        text = str(number % 10) * 200_000
        write_atomic(tmp_path / "file", text)
        with atomic_folder(tmp_path / "folder", replaces=("a", "b")) as scratch:
            (scratch / "a").write_text(text)
            (scratch / "b").write_text(text)

    write(0)
    with ThreadPoolExecutor(4) as threads:
        tasks = [threads.submit(write, number) for number in range(40)]
        while not all(task.done() for task in tasks):
            text = (tmp_path / "file").read_text()
            assert text == text[0] * 200_000
    for task in tasks:
        task.result()
    first, second = ((tmp_path / "folder" / name).read_text() for name in "ab")
    assert first == second == first[0] * 200_000
    assert names(tmp_path) == ["file", "folder"]
