"""Starts, uses and stops a throwaway cluster; all its state is in one folder."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType

from tests.cluster import config
from tests.cluster.processes import Process, find, kill_and_wait

PROGRAMS = (
    *("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd"),
    *("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "sacct", "sacctmgr"),
)
# Set in the environment of every process of a cluster, so that stop() finds what the daemons started.
MARK = "HPC_RLHF_CLUSTER"
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CHECKOUT = Path(__file__).parents[2]


# The states of a job that succeeded: from 24.05 on, one that requeued itself while it was preempted stays PREEMPTED.
SUCCEEDED = ("COMPLETED", "PREEMPTED")


class ClusterError(Exception):
    """The cluster failed; the message names the part."""


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"missing programs: {', '.join(missing)} (scripts/install-slurm.sh installs them on Debian)"
    if os.geteuid() != 0:
        return "a cluster of several nodes on one host needs root"
    return None


def wait_until(holds: Callable[[], object], timeout: float, what: str, every: float = 0.2) -> None:
    """Return as soon as ``holds()`` is true.

    Raises:
        ClusterError: it did not become true in time; the message names ``what``.
    """
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout:g} s in vain for: {what}")
        time.sleep(every)


class Cluster:
    """A Slurm cluster of four nodes on this host.

    Partitions: ``gpu`` (default, never preempted), ``low`` and ``low-cancel`` (preempted by requeue and by
    cancel, after a grace), ``low-now`` and ``low-cancel-now`` (without one) and ``high`` (preempts those four), each
    over all nodes; ``first`` and ``last`` over two nodes each, never preempted.

    Args:
        folder: where all state goes; absent or empty before start(), removed by stop().
        owner: a pid; if that process ends without calling stop(), a watchdog stops the cluster.
    """

    def __init__(self, folder: Path, owner: int | None = None) -> None:
        self.folder = folder.absolute()
        self.owner = owner
        self.conf = self.folder / "slurm.conf"
        self._record = self.folder / "daemons.json"
        self._popens: list[subprocess.Popen[bytes]] = []  # kept, so that the ended ones are waited for

    # Life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle; clean up on failure."""
        reason = why_not()
        if reason is not None:
            raise ClusterError(reason)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ClusterError(f"{self.folder} is not empty; a cluster left there is removed by `down`")
        if len(bytes(self.folder)) > 80:
            raise ClusterError(f"{self.folder} is too long a path for the sockets in it")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill all processes of the cluster and remove its folder."""
        if not self._record.exists():
            return
        # Recorded daemons first: once they are gone, they start no new processes.
        left = kill_and_wait(self.daemons().values())
        while not left and (strays := self._strays()):
            left = kill_and_wait(strays)
        for popen in self._popens:
            popen.poll()
        self._popens.clear()
        if left:
            names = ", ".join(f"{process.pid} ({process.command()})" for process in left)
            raise ClusterError(f"could not kill {names}; {self.folder} is kept")
        shutil.rmtree(self.folder)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def daemons(self) -> dict[str, Process]:
        """The daemons started, by name."""
        try:
            record: dict[str, list[int]] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        return {name: Process(pid, started) for name, (pid, started) in record.items()}

    # Use ------------------------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """The environment for Slurm's commands against this cluster, without any other Slurm variables."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.conf)}

    @cached_property
    def version(self) -> tuple[int, int]:
        """Slurm's version, such as (24, 11)."""
        year, month = self.run("scontrol", "--version").stdout.split()[1].split(".")[:2]
        return int(year), int(month)

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster.

        Raises:
            ClusterError: ``check`` is set and the command failed.
        """
        done = subprocess.run(
            [str(word) for word in command],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(map(str, command))} exited with {done.returncode}: {done.stderr}")
        return done

    def sbatch(self, *options: str | Path) -> str:
        """Submit a job; the options are sbatch's. Returns its id."""
        return self.run("sbatch", "--parsable", *options).stdout.strip()

    def state(self, job_id: str) -> str:
        """A job's state as slurmctld knows it, such as RUNNING; slurmctld forgets finished jobs after five minutes."""
        return self.field(job_id, "JobState")

    def field(self, job_id: str, name: str) -> str:
        """A field of `scontrol show job`, such as Restarts, NodeList or Dependency."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")

    def wait_state(self, job_id: str, states: str | Sequence[str], timeout: float = 90) -> str:
        """Wait until a job is in one of the states; returns that one."""
        wanted = (states,) if isinstance(states, str) else tuple(states)
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.state(job_id)
            return seen in wanted

        try:
            wait_until(reached, timeout, f"job {job_id} is {' or '.join(wanted)}")
        except ClusterError as error:
            raise ClusterError(f"{error}; it is {seen}") from None
        return seen

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd. Its jobs keep running, as on a node that has lost its network."""
        kill_and_wait([self.daemons()[name]])

    def start_node(self, name: str) -> None:
        """Start a killed node again and wait until Slurm has cleared it."""
        self._spawn(name, "slurmd", "-D", "-N", name)
        states = ("sinfo", "--noheader", f"--nodes={name}", "--partition=gpu", "--format=%T")
        wait_until(lambda: self.run(*states).stdout.strip() in ("idle", "mixed"), 180, f"{name} is back")

    @contextmanager
    def broken_node(self, name: str) -> Iterator[None]:
        """Let a node fail to launch jobs, for which Slurm drains it and holds them."""
        broken = self.folder / f"broken-{name}"
        broken.touch()
        try:
            yield
        finally:
            broken.unlink()
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs keep running.

        It writes down what it knows. Killed, it would forget the last seconds, and think a job that ended then alive
        until the node's next registration, minutes later.
        """
        controller = self.daemons()["slurmctld"]
        os.kill(controller.pid, signal.SIGTERM)
        wait_until(lambda: not controller.alive, 120, "slurmctld has ended")

    def start_controller(self) -> None:
        """Start slurmctld again from its saved state and wait until it responds."""
        self._spawn("slurmctld", "slurmctld", "-D")
        wait_until(lambda: self._answers("scontrol", "ping"), 120, "slurmctld answers again")

    @contextmanager
    def changed(self, *changes: tuple[str, str], **files: str) -> Iterator[None]:
        """Run the block with changed settings.

        Args:
            changes: what to replace in slurm.conf, and by what.
            files: texts of files beside it, by their names with `_lua` for `.lua`.
        """
        before = self.conf.read_text()
        text = before
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        paths = {self.folder / name.replace("_lua", ".lua"): content for name, content in files.items()}
        try:
            self.stop_controller()
            self.conf.write_text(text)
            for path, content in paths.items():
                path.write_text(content)
            self.start_controller()
            yield
        finally:
            self.stop_controller()
            self.conf.write_text(before)
            for path in paths:
                path.unlink(missing_ok=True)
            self.start_controller()

    def clear(self) -> None:
        """Cancel every job and wait until all nodes are idle again.

        Raises:
            ClusterError: they are not within 180 s; the message shows the queue and the nodes.
        """
        # Pending jobs first: a run's sentinels would start when its stages end.
        self.run("scancel", "--user=root", "--state=PENDING")
        self.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)

        def is_clear() -> bool:
            # Each time: a job may be requeued, or be submitted by one that is ending; and a node drains when a process
            # takes longer to die than Slurm waits.
            self.run("scancel", "--user=root", check=False)
            drained = self.run(
                "sinfo", "--noheader", "--partition=gpu", "--states=drained", "--format=%N"
            ).stdout.strip()
            if drained:
                self.run("scontrol", "update", f"NodeName={drained}", "State=RESUME", check=False)
            return not self.run("squeue", "--noheader").stdout and self._all_idle()

        try:
            wait_until(is_clear, 180, "all nodes are idle", every=0.5)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.describe()}") from None

    def describe(self) -> str:
        """The queue, the nodes and the last lines of the controller's log."""
        queue = self.run("squeue", "--states=all", "--format=%i %j %P %T %r %N %S", check=False)
        nodes = self.run("sinfo", "--Node", "--format=%N %P %T %E", check=False)
        return "\n".join([queue.stdout + queue.stderr, nodes.stdout + nodes.stderr, self._tail("slurmctld")])

    # The parts ------------------------------------------------------------------------------------

    def _start(self) -> None:
        for name in ("log", "state", "spool", "dev", "db"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._record.write_text("{}")
        ports = _free_ports()
        self._write_conf(ports)
        if self.owner is not None:
            watch = [sys.executable, "-m", "tests.cluster", "watch", str(self.folder), str(self.owner)]
            # Not recorded: it stops the others.
            self._popens.append(subprocess.Popen(watch, cwd=CHECKOUT, start_new_session=True))
        self._start_munge()
        self._start_mariadb()
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._await("slurmdbd", lambda: self._answers("sacctmgr", "--noheader", "show", "cluster"))
        self.run("sacctmgr", "--immediate", "add", "cluster", "throwaway")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for index in range(1, config.NODES + 1):
            self._spawn(f"node{index}", "slurmd", "-D", "-N", f"node{index}")
        self._await("slurmctld", self._all_idle)

    def _write_conf(self, ports: config.Ports) -> None:
        host = socket.gethostname().partition(".")[0]
        self.conf.write_text(config.slurm_conf(self.folder, host, ports))
        if self.version >= (25, 11):
            with self.conf.open("a") as conf:
                conf.write("SlurmctldParameters=enable_expedited_requeue\n")
        if self.version > (22, 5):  # which does not know this, and starts without
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "prolog").write_text(config.prolog(self.folder))
        (self.folder / "prolog").chmod(0o755)
        (self.folder / "gres.conf").write_text(config.gres_conf(self.folder))
        dbd = self.folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses one that others may read
        dbd.write_text(config.slurmdbd_conf(self.folder, ports))
        for index in range(config.GPUS):
            # Slurm wants a device file for each GPU and never opens it: these are copies of /dev/null.
            os.mknod(self.folder / f"dev/gpu{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        here = self.folder
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force"),  # force: a checkout in a private home is fine
            *(f"--key-file={key}", f"--socket={here}/munge.socket", f"--pid-file={here}/munged.pid"),
            *(f"--log-file={here}/log/munged.log", f"--seed-file={here}/munge.seed"),
        )
        self._await("munged", lambda: _listening(here / "munge.socket"))

    def _start_mariadb(self) -> None:
        options = ["--no-defaults", f"--datadir={self.folder}/db", "--user=root"]
        # Root over the socket only: no password, no network.
        self._run_part(
            "mariadb-install-db", *("mariadb-install-db", *options, "--skip-test-db", "--auth-root-socket-user=root")
        )
        self._spawn(
            "mariadbd",
            *("mariadbd", *options, "--skip-networking", f"--socket={self.folder}/mysql.socket"),
            *(f"--pid-file={self.folder}/mariadbd.pid", "--innodb-flush-log-at-trx-commit=0"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--skip-log-bin"),
        )
        self._await("mariadbd", lambda: _listening(self.folder / "mysql.socket"))

    def _spawn(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"log/{name}.out").open("wb") as out:
            popen = subprocess.Popen(
                [program, *args],
                env=self._daemon_env(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._popens.append(popen)
        process = Process.of(popen.pid)
        if process is None:
            raise ClusterError(f"{name} exited at once:\n{self._tail(name)}")
        record = {key: [each.pid, each.started] for key, each in self.daemons().items()}
        self._record.write_text(json.dumps({**record, name: [process.pid, process.started]}))

    def _run_part(self, name: str, *command: str) -> None:
        with (self.folder / f"log/{name}.out").open("wb") as out:
            code = subprocess.run(
                command, env=self._daemon_env(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            ).returncode
        if code != 0:
            raise ClusterError(f"{name} exited with {code}:\n{self._tail(name)}")

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until a daemon is ready; the error shows the log's tail of a daemon that is not, or that died."""

        def ready_or_dead() -> bool:
            dead = [each for each, process in self.daemons().items() if not process.alive]
            if dead:
                raise ClusterError(f"{dead[0]} exited:\n{self._tail(dead[0])}")
            return ready()

        try:
            wait_until(ready_or_dead, 120, f"{name} is ready", every=0.1)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self._tail(name)}") from None

    def _daemon_env(self) -> dict[str, str]:
        path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
        # slurmdbd has no setting for MariaDB's socket; the client library reads this one.
        own = {"PATH": path, MARK: str(self.folder), "MYSQL_UNIX_PORT": f"{self.folder}/mysql.socket"}
        return {**self.env, **own}

    def _strays(self) -> list[Process]:
        """Processes that the daemons started: Slurm's step managers, found by the mark, and those of jobs."""
        mark, conf = f"{MARK}={self.folder}", f"SLURM_CONF={self.conf}"

        def ours(process: Process) -> bool:
            pairs = process.environ()
            in_job = conf in pairs and any(pair.startswith("SLURM_JOB_ID=") for pair in pairs)
            return mark in pairs or in_job

        return find(ours)

    def _answers(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T", check=False)
        return states.stdout.split() == ["idle"] * config.NODES

    def _tail(self, name: str) -> str:
        logs = [*self.folder.glob(f"log/{name}.*"), *self.folder.glob(f"log/slurmd.{name}.log")]
        text = "\n".join(log.read_text(errors="replace").strip() for log in logs)
        return "\n".join(text.splitlines()[-20:])


def watch(folder: Path, owner: int) -> None:
    """Wait until the owner exits, then stop its cluster; return early if the cluster was stopped properly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = Process.of(owner)
    while process is not None and process.alive and folder.exists():
        time.sleep(0.5)
    Cluster(folder).stop()


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _free_ports() -> config.Ports:
    """A block of free ports below the ephemeral ones, and below those where jobs put MASTER_PORT."""
    for first in random.sample(range(12000, 19900, 10), 100):
        if all(_is_free(first + offset) for offset in range(2 + config.NODES)):
            return config.Ports(first, first + 1, first + 2)
    raise ClusterError("no block of free ports between 12000 and 19900")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
