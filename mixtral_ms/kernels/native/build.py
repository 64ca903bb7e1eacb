"""Builds C++ libraries once per machine and source, and says why when it cannot."""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.errors import UserError
from mixtral_ms.kernels.native.library_cache import (
    building,
    is_whole,
    new_library,
    private_folder,
)
from mixtral_ms.log import get_logger

SWITCH = "MIXTRAL_MS_NATIVE"
_FOLDER = Path(__file__).parent
# -ffast-math vectorises expf; infinities and NaN must still flow to the overflow check.
_COMPILE = ("-O3", "-march=native", "-std=c++17", "-c", "-fPIC", "-fopenmp-simd", "-ffast-math",
            "-fno-finite-math-only")  # fmt: skip
# Linked without -ffast-math: with it, g++ adds start-up code that makes every denormal of the
# whole process zero as soon as the library is loaded.
_LINK = ("-shared", "-ldl", "-lpthread")
_BUILD_TIMEOUT_S = 180


@functools.cache
def native_library() -> Path | None:
    """Path of the kernels that are operators of MindSpore, which must be imported already.

    None (with one log line) when this machine cannot use them; see `built_library`.
    """
    library = built_library("kernels", _FOLDER)
    if library is None or ctypes.CDLL(str(library)).native_ready():
        return library
    _unusable("MindSpore's oneDNN does not export the matrix product they call")
    return None


@functools.cache
def built_library(name: str, folder: Path) -> Path | None:
    """Path of the built library, or None (with one log line) when this machine cannot use it.

    The environment variable MIXTRAL_MS_NATIVE chooses: "auto" (default), "0" never, "1" must.

    Args:
        name: what the file is called, and the log calls it.
        folder: of its sources, all *.cpp there; they may include headers of this folder too.

    Raises:
        UserError: MIXTRAL_MS_NATIVE=1 and the kernels cannot be built, or another value.
    """
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "0", "1"):
        raise UserError(f"{SWITCH}={switch!r}: allowed are auto, 0 (never) and 1 (must)")
    if switch == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        _unusable("no g++ on this machine")
        return None
    sources = sorted(folder.glob("*.cpp"))
    headers = sorted({*folder.glob("*.hpp"), *_FOLDER.glob("*.hpp")})
    try:
        path = private_folder() / f"{name}-{_fingerprint(compiler, [*sources, *headers])}.so"
        with building(path):
            if not is_whole(path):
                if path.exists():
                    get_logger().warning("%s is not as it was built: it is built again", path)
                _compile(compiler, sources, path)
        ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _unusable(str(error))
        return None
    return path


def _unusable(problem: str) -> None:
    if os.environ.get(SWITCH) == "1":
        raise UserError(f"{SWITCH}=1, but the C++ kernels cannot be used: {problem}")
    get_logger().info("C++ kernels are off, numpy serves: %s", problem)


def _fingerprint(compiler: str, files: Sequence[Path]) -> str:
    """Changes with anything that the binary depends on, the processor's features included."""
    cpu_flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu_flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = " ".join(_COMPILE + _LINK)
    texts = [path.read_bytes() for path in files]
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    others = (compiler, flags, cpu_flags, libc or "", importlib.metadata.version("mindspore"))
    return hashlib.sha256(b"\0".join(texts + [s.encode() for s in others])).hexdigest()[:16]


def _compile(compiler: str, sources: Sequence[Path], path: Path) -> None:
    get_logger().info("building the C++ %s (once on this machine)", path.stem.partition("-")[0])
    with tempfile.TemporaryDirectory() as folder, new_library(path) as aside:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        for source, compiled in zip(sources, objects, strict=True):
            _run([compiler, *_COMPILE, f"-I{_FOLDER}", str(source), "-o", compiled])
        _run([compiler, *objects, "-o", str(aside), *_LINK])


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        first = next((s for s in result.stderr.splitlines() if "error" in s), result.stderr)
        raise OSError(f"building them failed: {first.strip()[:300]}")
