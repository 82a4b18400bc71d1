"""The scripts in launch/ that start runs: what they print with --dry-run is what they call.

Programs of clusters (gcloud, sbatch, srun, scontrol, nvidia-smi) and the environment's Python are
stand-ins that note their arguments and then do what the test says. Nothing here trains,
and no cloud or cluster is asked. Time limits are for a machine that hangs, not for a slow one.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[1]
POD = ("--zone=z", "--type=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--spot")
CONFIG = ("--config=c.py", "--workdir=/shared/a b", "--config.name=it's")
# What each script needs to have something to do.
USES = {
    "gpu_node.sh": ["--gpus=2", *CONFIG],
    "local_processes.sh": ["2", *CONFIG],
    "slurm.sh": ["--nodes=2", "--gpus-per-node=4", "--time=1:00:00", *CONFIG],
    "tpu_pod.sh": ["watch", *POD, *CONFIG],
}
LONG = 120  # seconds, for what takes a moment on a machine that is not busy
RECORD = """#!/usr/bin/env bash
wait_for() { until [[ -e $1 ]]; do sleep 0.05; done; }
# A call is one line, written at once: processes that start together do not mix theirs.
call=$(set -- "${0##*/}" "$@" && IFS=$'\\x1f' && echo "$*")
printf '%s\\n' "${call//$'\\n'/$'\\x1e'}" >>"$CALLS"
"""
# A run that has begun, and that SIGTERM makes save and stop.
WAIT = """
trap 'echo saved; exit 0' TERM
echo started
wait_for never
"""


class Machine:
    """A folder with stand-ins, and how to run a script among them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "CALLS": str(self.calls_file),
            "COSMOS_VENV": str(folder / "venv"),
            "COSMOS_PORT": "1234",
            "COSMOS_TPU_POLL": "0",
        }
        for name in ("gcloud", "sbatch", "srun", "scontrol"):
            self.program(name)
        self.program("git", "[[ $* != *rev-parse* ]] || echo abc123")
        self.program("nvidia-smi", "echo GPU 0; echo GPU 1")
        self.python("echo ran")

    def program(self, name: str, body: str = "", folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD + body + "\n")
        path.chmod(0o755)

    def python(self, body: str) -> None:
        """The environment's Python; `$id` is the number of its process."""
        find_id = "[[ $1 != -c ]] || exit 0\nid=$*; id=${id##*--process_id=}; id=${id%% *}\n"
        self.program("python", find_id + body, self.folder / "venv/bin")

    def popen(self, *command: str | Path, **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command,
            env=self.environment | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Tests in the background ignore it, and so would all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess:
        process = self.popen(*command, **variables)
        stdout, stderr = process.communicate(timeout=LONG)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def launch(self, script: str, *arguments: str, **variables: str):
        return self.run("bash", ROOT / "launch" / script, *arguments, **variables)

    def calls(self) -> list[list[str]]:
        """All calls but those that only ask git what is checked out."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().split("\n")[:-1]
        calls = [line.replace("\x1e", "\n").split("\x1f") for line in lines]
        return [call for call in calls if not {"rev-parse", "status"} & set(call)]


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:  # ends what a failed test left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(stream: IO[str], *lines: str) -> None:
    """Reads up to all of these lines."""
    read = ""
    while not all(line in read for line in lines):
        read += (line := stream.readline())
        assert line, read


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error_of(result: subprocess.CompletedProcess) -> str:
    """The one line of a mistake in the arguments."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: "), result
    assert result.stderr.count("\n") == 1, result
    return result.stderr


# ---- All scripts


@pytest.mark.parametrize("script", USES)
def test_dry_run_prints_and_runs_nothing(machine, script):
    result = machine.launch(script, *USES[script], "--dry-run")
    assert result.returncode == 0, result
    assert machine.calls() == []
    made = {path.name for path in machine.folder.iterdir()}
    assert made <= {"bin", "venv", "calls"}
    assert "--config=c.py" in result.stdout
    assert "--dry-run" not in result.stdout


@pytest.mark.parametrize("script", USES)
def test_help_is_the_header(machine, script):
    result = machine.launch(script, "--help")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] in (ROOT / "launch" / script).read_text()
    assert f"bash launch/{script}" in result.stdout
    assert not re.search(r"^#|set -euo", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *((script, [*USES[script], "--fly=1"], "unknown option '--fly=1'") for script in USES),
        *((script, [*USES[script], "-x"], "unknown option '-x'") for script in USES),
        ("gpu_node.sh", ["--gpus"], "--gpus needs a value"),
        ("gpu_node.sh", ["--gpus=none"], "--gpus is 'none'"),
        ("gpu_node.sh", ["--gpus=3"], "--gpus=3, but 2 are visible"),
        ("gpu_node.sh", ["stray"], "unexpected argument 'stray'"),
        ("local_processes.sh", CONFIG, "say once how many processes"),
        ("local_processes.sh", ["two"], "the number of processes is 'two'"),
        ("local_processes.sh", ["3", "--gpus=4"], "cannot be shared evenly by 3"),
        ("slurm.sh", CONFIG, "--gpus-per-node=N"),
        ("slurm.sh", ["--gpus-per-node=4"], "no --config=FILE"),
        ("slurm.sh", [*USES["slurm.sh"], "--job-name=my job"], "--job-name is 'my job'"),
        ("slurm.sh", ["--nodes=", "--gpus-per-node=4", *CONFIG], "--nodes needs a value"),
        ("tpu_pod.sh", POD, "say what to do"),
        ("tpu_pod.sh", ["fly", *POD], "unknown command 'fly'"),
        ("tpu_pod.sh", ["status"], "--zone is needed"),
        ("tpu_pod.sh", ["create", "--zone=z"], "--type is needed"),
        ("tpu_pod.sh", ["run", "--zone=z"], "no --config=FILE"),
        ("tpu_pod.sh", ["run", "--zone=z", "--bucket=b", *CONFIG], "--workdir=/mnt/cosmos/DIR"),
        ("tpu_pod.sh", ["watch", *POD, "--config=c.py", "--workdir=runs/a"], "--bucket and --nfs"),
        ("tpu_pod.sh", ["run", "--zone=z", "--config=c.py"], "--bucket and --nfs"),
        ("tpu_worker.sh", ["fly"], "unknown command 'fly'"),
    ],
)
def test_mistakes_are_one_line(machine, script, arguments, message):
    assert message in error_of(machine.launch(script, *arguments))
    assert not [call for call in machine.calls() if call[0] != "nvidia-smi"]


@pytest.mark.parametrize("script", ["gpu_node.sh", "local_processes.sh", "slurm.sh"])
def test_without_environment_says_how_to_make_it(machine, script):
    result = machine.launch(script, *USES[script], COSMOS_VENV=str(machine.folder / "none"))
    assert "launch/install.sh" in error_of(result)


def test_scripts_know_how_a_run_says_that_it_was_stopped():
    """Its status is 0 then too, so they look for the line: the two must not drift apart."""
    pattern = re.search("stopped_early='(.*)'", (ROOT / "launch/common.sh").read_text())[1]
    for module in ("main.py", "distributed.py"):
        said = re.findall(r'"(stopped [^"]*)"', (ROOT / "cosmos_jax" / module).read_text())
        assert len(said) == 1, module
        assert re.match(pattern, said[0])
        assert re.match(pattern, f"12:34:56 {said[0]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("script", "word", "printers"),
    [("gpu_node.sh", "--restarts=3", [""]), ("local_processes.sh", "2", ["[0] ", "[1] "])],
)
def test_a_signal_makes_all_processes_save(machine, script, word, printers, number):
    machine.python(WAIT)
    process = machine.popen("bash", ROOT / "launch" / script, word, *CONFIG)
    wait_for(process.stdout, *(f"{printer}started\n" for printer in printers))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=LONG)
    assert sorted(stdout.splitlines()) == [f"{printer}saved" for printer in printers]
    assert (process.returncode, stderr) == (0, "")


# ---- local_processes.sh


def test_processes_get_their_flags(machine):
    """Called from elsewhere: paths in the flags stay the caller's, the code is found."""
    machine.python('echo "in $PWD for $PYTHONPATH on $JAX_PLATFORMS"')
    result = machine.launch("local_processes.sh", "2", *CONFIG, "--", "--dry-run")
    assert result.returncode == 0, result
    cluster = ["--coordinator=localhost:1234", "--num_processes=2"]
    assert sorted(machine.calls()) == [
        ["python", "-m", "cosmos_jax.main", *cluster, f"--process_id={i}", *CONFIG, "--dry-run"]
        for i in range(2)
    ]
    said = f"in {machine.folder} for {ROOT} on cpu"
    assert sorted(result.stdout.splitlines()) == [f"[0] {said}", f"[1] {said}"]


def test_printed_processes_are_those_that_run(machine):
    printed = machine.launch("local_processes.sh", "2", "--gpus=4", *CONFIG, "--dry-run").stdout
    machine.python('echo "$JAX_LOCAL_DEVICE_IDS on $JAX_PLATFORMS"')
    result = machine.launch("local_processes.sh", "2", "--gpus=4", *CONFIG)
    assert sorted(result.stdout.splitlines()) == ["[0] 0,1 on cuda", "[1] 2,3 on cuda"]
    started = sorted(machine.calls())
    machine.calls_file.unlink()
    for line in printed.splitlines():
        machine.run("bash", "-c", line)
    assert sorted(machine.calls()) == started


def test_a_free_port_is_found(machine):
    lines = machine.launch("local_processes.sh", "2", "--dry-run", COSMOS_PORT="").stdout
    ports = set(re.findall(r"--coordinator=localhost:(\d+) ", lines))
    assert len(ports) == 1, lines
    assert 1024 < int(ports.pop()) < 65536


def test_a_signal_reaches_processes_that_start_after_it(machine):
    machine.python(WAIT)
    # While the command of the second process is made, until the test lets it go on.
    machine.program("seq", "[[ $2 == 0 ]] || { touch made; wait_for go; }")
    process = machine.popen("bash", ROOT / "launch/local_processes.sh", "2", "--gpus=2", *CONFIG)
    wait_for(process.stdout, "[0] started\n")
    wait_until((machine.folder / "made").exists)
    process.send_signal(signal.SIGTERM)
    (machine.folder / "go").touch()
    stdout, _ = process.communicate(timeout=LONG)
    assert "[0] saved" in stdout
    # The second one may not have come so far that it can save.
    assert process.returncode in (0, 128 + signal.SIGTERM)


def test_a_failure_ends_all_processes(machine):
    machine.python(
        "if ((id == 1)); then wait_for up0; wait_for up2; exit 3; fi\n"
        'trap "" TERM; echo "pid $$"; touch "up$id"; wait_for never'
    )
    result = machine.launch("local_processes.sh", "3", *CONFIG, COSMOS_GRACE="1")
    assert result.returncode == 3, result
    pids = re.findall(r"^\[[02]\] pid (\d+)$", result.stdout, re.MULTILINE)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert result.stderr == "error: a process ended with status 3; the others have 1 seconds\n"


def test_a_failure_leaves_the_others_time(machine):
    machine.python("((id == 0)) || exit 3\nwait_for go; echo done; exit 4")
    process = machine.popen("bash", ROOT / "launch/local_processes.sh", "2", *CONFIG)
    wait_for(process.stderr, "error: a process ended with status 3; the others have 60 seconds\n")
    (machine.folder / "go").touch()
    stdout, stderr = process.communicate(timeout=LONG)
    assert (process.returncode, stdout, stderr) == (3, "[0] done\n", "")


# ---- gpu_node.sh


def test_gpu_node_runs_what_it_prints(machine):
    machine.python('echo "$JAX_PLATFORMS $JAX_LOCAL_DEVICE_IDS ${SLURM_JOB_ID-unset}"')
    printed = machine.launch("gpu_node.sh", *USES["gpu_node.sh"], "--dry-run", SLURM_JOB_ID="7")
    result = machine.launch("gpu_node.sh", *USES["gpu_node.sh"], SLURM_JOB_ID="7")
    assert (result.returncode, result.stdout) == (0, "cuda 0,1 unset\n")
    python = str(machine.folder / "venv/bin/python")
    words = shlex.split(printed.stdout)
    assert words[words.index(python) + 1 :] == machine.calls()[-1][1:]
    assert machine.run("bash", "-c", printed.stdout, SLURM_JOB_ID="7").stdout == result.stdout


def test_gpu_node_needs_a_gpu(machine):
    machine.program("nvidia-smi", "exit 9")
    assert "NVIDIA driver" in error_of(machine.launch("gpu_node.sh", *CONFIG))
    machine.program("nvidia-smi", "echo GPU 0")
    machine.program("python", "exit 1", machine.folder / "venv/bin")
    assert "jax[cuda13]" in error_of(machine.launch("gpu_node.sh", *CONFIG))


@pytest.mark.parametrize(
    ("status", "pause", "starts"),
    [(0, ":", 1), (2, ":", 1), (5, ":", 2), (5, "kill -TERM $PPID", 1)],
)
def test_gpu_node_restarts_after_a_crash_only(machine, status, pause, starts):
    machine.python(f"exit {status}")
    machine.program("sleep", f"[[ $1 != 2 ]] || {pause}")
    result = machine.launch("gpu_node.sh", "--restarts=1", *CONFIG)
    assert result.returncode == status
    assert len([call for call in machine.calls() if "cosmos_jax.main" in call]) == starts


# ---- slurm.sh


def submitted(machine: Machine, *options: str) -> str:
    """The batch script that sbatch got."""
    machine.program("sbatch", 'cat >"$HOME/batch"')
    result = machine.launch("slurm.sh", *USES["slurm.sh"], *options)
    assert result.returncode == 0, result
    assert machine.calls() == [["sbatch"]]
    machine.calls_file.unlink()
    return (machine.folder / "batch").read_text()


def test_slurm_submits_what_it_prints(machine):
    options = ("--partition=p", "--cpus-per-task=16", "--job-name=j")
    printed = machine.launch("slurm.sh", *USES["slurm.sh"], *options, "--dry-run").stdout
    batch = submitted(machine, *options)
    assert printed == f"mkdir -p logs\nsbatch <<'END'\n{batch}END\n"
    assert (machine.folder / "logs").is_dir()
    directives = set(re.findall(r"^#SBATCH (.*)$", batch, re.MULTILINE))
    assert directives == set(
        "--job-name=j --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 "
        "--time=1:00:00 --partition=p --output=logs/%x-%j.log --open-mode=append "
        "--signal=TERM@120 --requeue".split()
    )


@pytest.mark.parametrize(
    ("line", "status", "requeued"),
    [
        ("12:34:56 stopped on request: diffusion at step 7; run the same command", 0, True),
        ("stopped on request before anything began", 0, True),
        ("12:34:56 evaluated: they stopped on request", 0, False),
        ("12:34:56 stopped on request: and then it broke", 1, False),
    ],
)
def test_slurm_job_is_requeued_if_stopped(machine, line, status, requeued):
    batch = submitted(machine)
    machine.program("srun", f'echo "{line}" >"${{2#--output=}}"; exit {status}')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "cosmos", "SLURM_RESTART_COUNT": "2"}
    result = machine.run("bash", "-c", batch, **job)
    assert result.returncode == status, result
    srun, *rest = machine.calls()
    assert srun[:3] == ["srun", "--kill-on-bad-exit=1", "--output=logs/cosmos-7.2.log"]
    assert srun[3:6] == ["env", "JAX_PLATFORMS=cuda", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]
    assert srun[-5:] == ["-m", "cosmos_jax.main", *CONFIG]
    assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])


# ---- tpu_pod.sh

# A cloud whose pod is in the state of the file `pod`, and whose runs end with the statuses in the
# file `ends`, one a line, some of them because the pod goes into another state.
CLOUD = r"""
cd "$HOME"
case "$*" in
    *"queued-resources create"*) echo READY >pod ;;
    *"queued-resources delete"*) rm pod ;;
    *"queued-resources describe"*)
        if [[ ! -e pod ]]; then
            echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such" >&2
            exit 1
        fi
        if [[ $(<pod) == SUSPENDED ]]; then echo SUSPENDED; else echo ACTIVE; fi
        ;;
    *"tpu-vm describe"*) cat pod ;;
    *"buckets describe"*) echo "$HIERARCHICAL" ;;
    *"tpu_worker.sh is-running"*) exit 1 ;;
    *"tpu_worker.sh follow"*)
        read -r status pod <ends
        sed -i 1d ends
        [[ -z $pod ]] || echo "$pod" >pod
        exit "$status"
        ;;
esac
"""


def pod(machine: Machine, *arguments: str, ends: str = "", **variables: str):
    """Runs the script in that cloud; the calls that change something follow the result."""
    machine.program("gcloud", CLOUD)
    (machine.folder / "ends").write_text(ends)
    result = machine.launch("tpu_pod.sh", *arguments, **variables)
    asked = re.compile("describe|is-running")
    calls = [call for call in machine.calls() if not asked.search(" ".join(call))]
    machine.calls_file.unlink(missing_ok=True)
    return result, calls


def watch(machine: Machine, ends: str):
    return pod(machine, *USES["tpu_pod.sh"], ends=ends)


def printed_calls(machine: Machine, *arguments: str) -> list[list[str]]:
    result = machine.launch("tpu_pod.sh", *arguments, "--dry-run")
    assert result.returncode == 0, result
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines if "describe" not in line]


@pytest.mark.parametrize("command", ["create", "install", "run", "stop", "delete"])
def test_pod_commands_call_what_they_print(machine, command):
    (machine.folder / "pod").write_text("READY\n")
    flags = CONFIG if command == "run" else ()
    result, calls = pod(machine, command, *POD, "--project=p", *flags, ends="0\n")
    assert result.returncode == 0, result
    assert calls == printed_calls(machine, command, *POD, "--project=p", *flags)
    assert all({"--zone=z", "--project=p"} <= set(call) for call in calls if call[0] == "gcloud")
    # All machines do it, but for showing the log.
    for call in calls:
        if "ssh" in call or "scp" in call:
            worker = "0" if "tpu_worker.sh follow" in shlex.join(call) else "all"
            assert f"--worker={worker}" in call
    assert any("--worker=all" in call for call in calls) == (command in ("install", "run", "stop"))


def test_pod_is_created_as_asked(machine):
    variables = {"COSMOS_TPU_NAME": "n", "COSMOS_TPU_ZONE": "a", "COSMOS_TPU_TYPE": "v6e-16"}
    result, calls = pod(machine, "create", "--zone=z", "--runtime=r", **variables)
    assert result.returncode == 0, result
    assert [shlex.join(call) for call in calls] == [
        "gcloud compute tpus queued-resources create n --node-id=n --accelerator-type=v6e-16 "
        "--runtime-version=r --zone=z"
    ]


def test_pod_that_is_lost_is_made_again_until_the_run_is_finished(machine):
    """Lost while the connection broke, while the run saved itself, and by its whole request."""
    result, calls = watch(machine, ends="1 PREEMPTED\n75 TERMINATED\n70 SUSPENDED\n0\n")
    assert result.returncode == 0, result
    *once, delete = printed_calls(machine, *USES["tpu_pod.sh"])
    steps = ("create", "archive", "scp", "install", "start", "follow")
    assert all(step in " ".join(call) for step, call in zip(steps, once, strict=True))
    assert "queued-resources delete cosmos --force --quiet" in " ".join(delete)
    assert calls == (once + [delete]) * 3 + once


@pytest.mark.parametrize("state", ["PREEMPTED", "FAILED", "SUSPENDED"])
def test_watch_begins_with_what_is_there(machine, state):
    (machine.folder / "pod").write_text(state)
    _, calls = watch(machine, ends="0\n")
    assert calls[0][4:6] == ["delete", "cosmos"]
    assert calls[1][4:6] == ["create", "cosmos"]
    (machine.folder / "pod").write_text("READY")
    _, calls = watch(machine, ends="0\n")
    assert calls[0][0] == "git"


@pytest.mark.parametrize(("ended", "status"), [(75, 0), (70, 70), (2, 2)])
def test_watch_ends_with_the_run_if_the_pod_is_well(machine, ended, status):
    result, calls = watch(machine, ends=f"{ended}\n")
    assert result.returncode == status, result
    assert "delete" not in str(calls)


def test_watch_connects_again(machine):
    result, calls = watch(machine, ends="1\n255\n0\n")
    assert result.returncode == 0, result
    assert len([call for call in calls if "tpu_worker.sh follow" in call[-2]]) == 3
    assert "delete" not in str(calls)


def test_bucket_must_rename_atomically(machine):
    bucket = ("install", *POD, "--bucket=gs://b")
    result, calls = pod(machine, *bucket, HIERARCHICAL="")
    assert "gs://b has no hierarchical namespace" in error_of(result)
    assert calls == []
    result, calls = pod(machine, *bucket, HIERARCHICAL="True")
    assert result.returncode == 0, result
    assert calls[-1][7].endswith("launch/tpu_worker.sh install --bucket=b")


# ---- tpu_worker.sh


@pytest.fixture
def worker(machine):
    """A machine with the repository's scripts in its home."""
    shutil.copytree(ROOT / "launch", machine.folder / "cosmos-jax/launch")
    machine.program("tar")
    return machine


def on_worker(worker: Machine, command: str, *options: str) -> subprocess.CompletedProcess:
    """Does what tpu_pod.sh has ssh do there."""
    of_pod = "run" if command in ("start", "follow") else command
    result = worker.launch("tpu_pod.sh", of_pod, "--zone=z", *options, *CONFIG, "--dry-run")
    line = next(line for line in result.stdout.splitlines() if f"worker.sh {command}" in line)
    (remote,) = (word for word in shlex.split(line) if word.startswith("--command="))
    return worker.run("bash", "-c", remote.removeprefix("--command="))


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("option", "entry"),
    [
        (
            "--bucket=gs://b",
            "b /mnt/cosmos gcsfuse rw,_netdev,allow_other,uid={},gid={},"
            "metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0 0 0\n",
        ),
        ("--nfs=10.0.0.2:/share", "10.0.0.2:/share /mnt/cosmos nfs rw,_netdev 0 0\n"),
    ],
)
def test_worker_is_not_used_without_its_storage(worker, option, entry, status):
    worker.program("mountpoint", "exit 1")
    worker.program("gcsfuse")
    worker.program("install.sh", folder=worker.folder / "cosmos-jax/launch")
    mount = f'case "$*" in tee*) cat >"$HOME/fstab" ;; *.mount) exit {status} ;; esac'
    worker.program("sudo", mount)
    assert on_worker(worker, "install", option).returncode == status
    assert (worker.folder / "fstab").read_text() == entry.format(os.getuid(), os.getgid())
    calls = [shlex.join(call) for call in worker.calls()]
    mounted = calls.index("sudo systemctl start mnt-cosmos.mount")
    assert ("install.sh" in calls[mounted:]) == (status == 0)
    assert ("jax[tpu]" in calls[-1]) == (status == 0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("echo results", 0),
        ("echo error: wrong; exit 2", 2),
        ("echo results; exit 1", 70),
        ("echo results; kill -KILL $$", 70),
        ("echo '12:34:56 stopped on request: saved'", 75),
    ],
)
def test_worker_tells_how_the_run_ended(worker, body, status):
    worker.python(body)
    assert on_worker(worker, "start").returncode == 0
    followed = on_worker(worker, "follow")
    assert followed.returncode == status, followed
    assert followed.stdout.startswith(("results", "error", "12:34"))
    assert worker.calls() == [["python", "-m", "cosmos_jax.main", *CONFIG]]


def test_worker_keeps_one_run_and_stops_it(worker):
    worker.python(WAIT.replace("saved", "stopped on request before anything began"))
    assert on_worker(worker, "start").returncode == 0
    assert "not starting another" in on_worker(worker, "start").stdout
    repository = worker.folder / "cosmos-jax"
    wait_until(lambda: "started" in (repository / "run.log").read_text())
    # A machine that shuts down tells all processes, also the shell that waits for the run.
    os.kill(int((repository / "run.pid").read_text()), signal.SIGTERM)
    assert on_worker(worker, "stop").returncode == 0
    assert on_worker(worker, "follow").returncode == 75
    assert "no run" in error_of(on_worker(worker, "stop"))
    assert len(worker.calls()) == 1


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ([], "demo/quickstart"),
        (["--config.diffusion.steps=5"], "demo/quickstart"),
        (["--config.data.source=jsonl:texts"], "quickstart"),
        (["--seed=1", "--config.encoder.name=here"], "quickstart"),
        (["--config.autoencoder.steps=5"], "quickstart"),
    ],
)
def test_the_quickstart_begins_with_the_demo_unless_something_else_is_given(
    tmp_path, flags, config
):
    """With a Python that says what it is asked to run."""
    venv, workdir = tmp_path / "venv", tmp_path / "run"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text('#!/bin/sh\necho "asked: $*"\n')
    python.chmod(0o755)
    for name in ("requirements.txt", "requirements-encoder.txt"):  # as if they were installed
        (venv / name).write_bytes((ROOT / name).read_bytes())

    def asked():
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "quickstart.sh"), str(workdir), *flags],
            **{"capture_output": True, "text": True, "check": True},
            env=os.environ | {"COSMOS_VENV": str(venv)},
        )
        return [line for line in done.stdout.splitlines() if "asked: -m cosmos_jax" in line]

    sentences, synopses, training = asked()
    assert f"generate --model={ROOT}/demo/sentences --num=8" in sentences
    assert f"generate --model={ROOT}/demo/synopses --input=" in synopses
    assert f"main --config={ROOT}/configs/{config}.py " in training
    assert training.endswith(" ".join([f"--workdir={workdir}", *flags]))
    given = f"--config.autoencoder.pretrained={ROOT}/demo/sentences"
    assert (given in training) == (config == "demo/quickstart")
    workdir.mkdir()
    assert asked() == [training]
