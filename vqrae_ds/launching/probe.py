"""What runs on a node that is examined: facts about it, asked for and given line by line.

`connections` sends this file to a Python over its standard input, so that it runs where neither
this package nor anything else is installed: it imports the standard library alone. A request is a
line of JSON, {"ask": NAME, "seconds": S, "details": {...}}; the answer is a line that begins with
`MARK`. When the requests end, what was written is removed.

Nothing waits for a file server that hangs: every check has a thread of its own, and is left behind
after its time.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time

MARK = "vqrae-probe "  # a greeting of the login shell has none
LARGEST_INDEX = 200_000_000  # bytes: reading more takes longer than anybody waits here
MANY_SHARDS = 2000  # more than these are shared out among the nodes
STAT_SECONDS = 2.0

_written, _made = [], []  # files and folders


def serve() -> None:
    """Answer the requests of the standard input until it ends."""
    asked = {"clock": clock, "inspect": inspect, "read": read_tokens, "all_reduce": all_reduce}
    for line in sys.stdin:
        request = json.loads(line)
        answer = asked[request["ask"]](request["seconds"], **request["details"])
        sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()
    for remove, paths in ((os.unlink, _written), (os.rmdir, _made)):
        for path in paths:
            with contextlib.suppress(OSError):  # never written, or a folder that is not empty
                remove(path)
    os._exit(0)  # a thread that hangs would be waited for


def within(seconds: float, checks: dict) -> dict:
    """Run all `checks` side by side; {"value": ...}, {"error": text} or {"late": seconds} each."""
    found = {}

    def run(name, check):
        try:
            found[name] = {"value": check()}
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            found[name] = {"error": f"{place}{error.strerror or error}"}
        except Exception as error:  # whatever a node has in store is a finding
            found[name] = {"error": f"{type(error).__name__}: {error}"}

    threads = [threading.Thread(target=run, args=check, daemon=True) for check in checks.items()]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: found.get(name, {"late": seconds}) for name in checks}


def clock(seconds: float) -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()


def inspect(seconds: float, **details) -> dict:
    """All facts that need no other node. What `details` does not have is not looked for."""
    os.environ.update(details["environment"])
    # What `python -m` of the run would search: its folder, PYTHONPATH, the installed packages.
    own = [path for path in sys.path if path]
    sys.path[:] = details["search"] + [path for path in own if path not in details["search"]]
    checks = {
        "python": platform.python_version,
        "packages": lambda: installed(details["packages"]),
        "code": lambda: code(details["folder"], details["package"]),
        "config": lambda: {path: digest([path]) for path in details["config"]},
        "run folder": lambda: write_token(details["run_folder"], details["token"]),
        "disk": lambda: disk(details["run_folder"]),
        "weights": lambda: faulty_weights(details["run_folder"], details["weights"]),
    }
    if local := details.get("local_dir"):
        checks["local"] = lambda: write_token(local, details["token"]) and free_bytes(local)
    if details.get("devices"):
        checks["gpus"] = devices
    if details.get("port"):
        checks["port"] = lambda: is_free(details["port"])
        # The node's first address is what DeepSpeed's launcher takes for the master's.
        checks["address"] = lambda: _run(["hostname", "-I"]).stdout.split()[0]
    for setting, folder in details["data"].items():
        checks[setting] = lambda folder=folder: shards(folder, **details["share"])
    return within(seconds, checks)


def installed(packages: list) -> dict:
    """The version of each package, None where it is not installed."""
    versions = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def code(folder: str, package: str) -> dict:
    """Where the package would be imported from, and a digest of its Python files."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(2, "the folder that the run is started in is not there", folder)
    spec = importlib.util.find_spec(package)  # of a package at the top: nothing is executed
    if spec is None or not spec.submodule_search_locations:
        return {"folder": None, "digest": None}
    home = list(spec.submodule_search_locations)[0]
    files = sorted(glob.glob(os.path.join(glob.escape(home), "**", "*.py"), recursive=True))
    return {"folder": home, "digest": digest(files, home)}


def digest(paths: list, home: str = "") -> str:
    """One hash over names, relative to `home`, and bytes of files."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        name = os.path.relpath(path, home) if home else os.path.basename(path)
        whole.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        whole.update(content)
    return whole.hexdigest()[:16]


def devices() -> int:
    """The number of NVIDIA GPUs that a rank would see."""
    try:
        listed = _run(["nvidia-smi", "-L"])
    except FileNotFoundError:
        folder = "/proc/driver/nvidia/gpus"
        count = len(os.listdir(folder)) if os.path.isdir(folder) else 0
    else:
        if listed.returncode:
            raise OSError(f"nvidia-smi -L: {listed.stdout.strip() or listed.stderr.strip()}")
        count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([v for v in visible.split(",") if v]))


def is_free(port: int) -> bool:
    """Whether nothing listens on the port; a connection that is just closing does not count."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError:
            return False
    return True


def write_token(folder: str, token: str) -> bool:
    """Write the file `token`, which holds its own name, into the folder, made if need be."""
    missing, parent = [], folder
    while parent and not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    os.makedirs(folder, exist_ok=True)
    _made.extend(missing)
    path = os.path.join(folder, token)
    _written.append(path)
    with open(path, "w") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())  # a full disk, a quota or a server may refuse only now
    return True


def read_tokens(seconds: float, folder: str, tokens: list) -> dict:
    """{token: whether this node sees it as it was written}, as one of `within`'s answers."""

    def look(token):
        path = os.path.join(folder, token)
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            return file.read() == token
        return False

    return within(seconds, {"shared": lambda: {token: look(token) for token in tokens}})["shared"]


def disk(folder: str) -> dict:
    """Free bytes where the run's folder is or will be; its complete checkpoints, and their size."""
    manifests = sorted(glob.glob(_manifests(folder)))
    size = None
    if manifests:
        with open(manifests[-1]) as file:
            size = sum(record["size"] for record in json.load(file)["files"].values())
    frozen = glob.glob(os.path.join(glob.escape(folder), "frozen", "*.safetensors"))
    found = {"free": free_bytes(folder), "checkpoints": len(manifests), "size": size}
    return {**found, "has_frozen": bool(frozen)}


def free_bytes(folder: str) -> int:
    """What this user may write where the folder is or will be."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def shards(folder: str, rank: int, nodes: int) -> dict:
    """The shards of a data set, and [name, what is wrong with it] of some."""
    path = os.path.join(folder, "index.json")
    if fault := _fault_of(path):
        return {"shards": 0, "mine": 0, "checked": 0, "faults": [["index.json", fault]]}
    if os.stat(path).st_size > LARGEST_INDEX:
        return {"shards": None}
    with open(path) as file:
        listed = [(shard["file"], shard["size"]) for shard in json.load(file)["shards"]]
    mine = listed if len(listed) <= MANY_SHARDS else listed[rank::nodes]
    faults, checked, deadline = [], 0, time.monotonic() + STAT_SECONDS
    while checked < len(mine) and time.monotonic() < deadline:
        name, size = mine[checked]
        if fault := _fault_of(os.path.join(folder, name), size):
            faults.append([name, fault])
        checked += 1
    return {"shards": len(listed), "mine": len(mine), "checked": checked, "faults": faults}


def faulty_weights(run_folder: str, weights: list) -> list:
    """[setting, file, what is wrong with it]. First weights are not asked of a run that resumes."""
    resumes = bool(glob.glob(_manifests(run_folder)))
    found = []
    for entry in (e for e in weights if not (e["is_first"] and resumes)):
        path = entry["path"]
        if path is None:  # as torch.hub.get_dir() of torch/hub.py
            cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
            home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
            path = os.path.join(os.path.expanduser(home), "hub", "checkpoints", entry["cached"])
        faults = [(file, _fault_of(file)) for file in _files_of(path, entry["kind"])]
        found += [[entry["setting"], *fault] for fault in faults if fault[1]][:1]
    return found


def all_reduce(seconds: float, search: list, folder: str, settings: dict) -> dict:
    """What `vqrae_ds.launching.all_reduce` finds, in a process that is ended after its time."""

    def measure():
        command = [sys.executable, "-m", "vqrae_ds.launching.all_reduce", json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
        done = _run(command, cwd=folder, env=environment, timeout=seconds)
        answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not answers:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")
        return json.loads(answers[-1][len(MARK) :])

    found = within(seconds + 2, {"all_reduce": measure})["all_reduce"]
    return {"late": seconds} if found.get("error", "").startswith("TimeoutExpired") else found


def _run(command: list, **options) -> subprocess.CompletedProcess:
    """Run to the end, without the standard input: requests come there."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options
    )


def _fault_of(path: str, size: int | None = None) -> str | None:
    """What is wrong with a file, which is to have `size` bytes, or with a folder."""
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:  # not one that cannot be reached
        return "is missing"
    if not os.access(path, os.R_OK):
        return "cannot be read by this user (chmod a+r)"
    return f"has {found} bytes, the index says {size}" if size not in (None, found) else None


def _manifests(run_folder: str) -> str:
    return os.path.join(glob.escape(run_folder), "checkpoints", "step_*", "manifest.json")


def _files_of(path: str, kind: str) -> list:
    """What must be there and readable: a file, a folder, or safetensors with all its shards."""
    if kind != "weights":
        return [path]
    names, index = ["model.safetensors"], os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index) as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    return [os.path.join(path, name) for name in names]


if __name__ == "__main__":
    serve()
