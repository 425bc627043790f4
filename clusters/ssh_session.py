"""The system's OpenSSH as the operator has set it up: their configuration, their agent, their live sessions.

Nothing here asks for a password: BatchMode is on, and where a site wants more than a key the operator opens
a session, which is then shared by all commands (ControlMaster).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable  # noqa: UP035 - Python 3.9 syntax, as in the whole room

from clusters.connection import Unreachable
from clusters.ssh_budget import Budget

_CONNECT_SECONDS = 15
_LOCAL_SECONDS = 10.0  # for commands that reach no site
_PERSIST_SECONDS = 4 * 3600
_SSH_FAILED = 255
_ROOM = 30  # characters left for it when a socket's name, at most 104, has ssh's hash and suffix
_REFUSALS = re.compile(
    "Permission denied|Too many authentication failures|Host key verification failed"
    "|HOST IDENTIFICATION HAS CHANGED|No supported authentication methods|Certificate invalid"
)
_VALID_UNTIL = re.compile(r"Valid: (?:from \S+ to (\S+)|forever)")


@dataclass(frozen=True)
class Output:
    """What a command at a site printed, and its own exit code."""

    code: int
    output: bytes
    errors: str


@dataclass(frozen=True)
class Session:
    """Commands at one site, each over the one connection that lives, or that the first of them opens."""

    alias: str
    budget: Budget
    config: Path | None = None

    def run(
        self,
        words: Sequence[str],
        stdin: bytes,
        timeout: float,
        started: Callable[[int], object] = lambda _pid: None,
    ) -> Output:
        """Run `ssh` or `sftp`; `started` is told its pid. Raises Unreachable where ssh itself failed."""
        self.budget.take(not self.is_live(), self.credentials, self.remedy())
        # Files, not pipes: a shared session holds what it was given, and would hold us through a cut network.
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as told,
        ):
            given.write(stdin)
            given.seek(0)
            process = subprocess.Popen(words, stdin=given, stdout=output, stderr=told, start_new_session=True)
            started(process.pid)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.budget.failed()
                raise Unreachable(f"{self.alias}: no answer within {timeout:.0f} s") from None
            done = Output(code, _whole(output), _whole(told).decode(errors="replace"))
        if code == _SSH_FAILED:
            self._failed(done.errors)
        self.budget.succeeded()
        return done

    def command(self, words: str, stdin: bytes = b"", timeout: float = 60.0) -> Output:
        """Run a command line in the operator's shell at the site: one execution of ssh."""
        return self.run(["ssh", *self.options(), "-T", self.alias, words], stdin, timeout)

    def _failed(self, errors: str) -> None:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        if refusal := next((line for line in lines if _REFUSALS.search(line)), ""):
            self.budget.was_refused(refusal[:200], self.credentials())
            raise Unreachable(f"{self.alias}: {refusal[:200]}; {self.remedy()}")
        self.budget.failed()
        told = lines[-1][:200] if lines else "it ended without a word, as when the command there is killed"
        raise Unreachable(f"{self.alias}: ssh: {told}")

    # ---- the operator's configuration

    def options(self) -> list[str]:
        """What is said on the command line: the rest is the operator's."""
        own = [] if self._shares_already() else self._own_sharing()
        return [*self._file(), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", *own]

    def control_path(self) -> Path:
        """Where the shared session listens."""
        if self._shares_already():
            return Path(self.settings["controlpath"][0])
        return Path(_settings(self.alias, (*self._file(), *self._own_sharing()))["controlpath"][0])

    @functools.cached_property
    def settings(self) -> dict[str, list[str]]:
        """The operator's configuration for this site, every keyword with its values."""
        return _settings(self.alias, tuple(self._file()))

    def _file(self) -> list[str]:
        return ["-F", str(self.config)] if self.config else []

    def _shares_already(self) -> bool:
        """Whether the operator's own configuration shares sessions: then theirs are used, as they are."""
        return self.settings.get("controlpath", ["none"]) != ["none"]

    def _own_sharing(self) -> list[str]:
        """Sessions of ours end by themselves when the network is dead for a minute."""
        # The same host by another configuration may be another machine: its session is not shared.
        other = hashlib.sha256(str(self.config).encode()).hexdigest()[:6] if self.config else ""
        sharing = ["ControlMaster=auto", f"ControlPath={private_directory()}/{other}%C"]
        lasting = [f"ControlPersist={_PERSIST_SECONDS}", "ServerAliveInterval=20", "ServerAliveCountMax=3"]
        return [word for fact in (*sharing, *lasting) for word in ("-o", fact)]

    # ---- the operator's session

    def is_live(self) -> bool:
        """Whether a session listens at the control path; a socket whose owner is dead does not."""
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(_LOCAL_SECONDS)
                client.connect(str(self.control_path()))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End a session of ours; the operator's own are left alone."""
        if not self._shares_already() and self.is_live():
            subprocess.run(
                ["ssh", *self._file(), "-S", str(self.control_path()), "-O", "exit", self.alias],
                capture_output=True, check=False, timeout=_LOCAL_SECONDS,
            )  # fmt: skip

    def remedy(self) -> str:
        """What the operator types to open a session by hand."""
        words = ["ssh", *self._file()]
        if not self._shares_already():
            words += ["-M", "-S", str(self.control_path()), "-fN"]
        return f"type `{' '.join([*words, self.alias])}`"

    def credentials(self) -> str:
        """A digest of what could be shown to the site: it changes when keys or certificates are renewed."""
        seen = [self._agent("-l")]
        for path in self._key_files():
            facts = path.stat()
            seen.append(f"{path} {facts.st_mtime_ns} {facts.st_size}")
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()

    def certificate_ends(self) -> float | None:
        """When the last of the operator's certificates expires, seconds since 1970; None without any."""
        texts = [
            _listing("ssh-keygen", "-L", "-f", str(p))
            for p in self._key_files()
            if p.name.endswith("-cert.pub")
        ]
        texts.append(_listing("ssh-keygen", "-L", "-f", "-", stdin=_listing("ssh-add", "-L")))
        found = [end for text in texts for end in _VALID_UNTIL.findall(text)]
        if "" in found:
            return float("inf")
        return max((time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) for end in found), default=None)

    def _agent(self, what: str) -> str:
        """What the agent that ssh would use for this site holds."""
        named = self.settings.get("identityagent", ["SSH_AUTH_SOCK"])[0]
        if named in ("none", "SSH_AUTH_SOCK"):
            return "" if named == "none" else _listing("ssh-add", what)
        return _listing("ssh-add", what, SSH_AUTH_SOCK=str(Path(named).expanduser()))

    def _key_files(self) -> list[Path]:
        keys = [Path(p).expanduser() for p in self.settings.get("identityfile", [])]
        named = [Path(p).expanduser() for p in self.settings.get("certificatefile", [])]
        beside = [key.with_name(key.name + "-cert.pub") for key in keys]
        return [path for path in dict.fromkeys([*keys, *named, *beside]) if path.is_file()]


def _whole(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


@functools.lru_cache(maxsize=256)
def _settings(alias: str, options: tuple[str, ...]) -> dict[str, list[str]]:
    """`ssh -G`, which reaches no site. Raises Unreachable, with ssh's own line about a bad configuration."""
    command = ["ssh", *options, "-G", "--", alias]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LOCAL_SECONDS)
    if done.returncode:
        raise Unreachable(f"{alias}: ssh: {done.stderr.strip().splitlines()[0][:200] if done.stderr else ''}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name, []).append(value)
    return found


def _listing(*words: str, stdin: str = "", **environment: str) -> str:
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, check=False, timeout=_LOCAL_SECONDS,
            env={**os.environ, **environment},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def private_directory() -> Path:
    """A short path for sockets (their names may have 104 characters) that nobody else can enter.

    Raises ValueError where somebody else has put something there.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = Path(runtime).is_dir() and 0 < len(runtime) < _ROOM
    base = Path(runtime) if usable else Path("/tmp")  # noqa: S108 - made private below
    path = base / f"eurotrain-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ValueError(f"{path} is not a directory of your own that nobody else can enter; remove it")
    return path
