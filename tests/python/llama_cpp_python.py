"""llama-cpp-python as its users have it: installed without compiling, run as a program, with its own tests.

As a program it prints the results of these tests on the stock library, on ours, and on ours with LM-Infinite:

    PYTHONPATH=cmake python tests/python/llama_cpp_python.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from get_llama_cpp import LOCK_PATH, Lock, obtain_sdist
from stock import ROOT, run, stock_program

TIMEOUT = 300
"""Seconds after which a program that never ends is a failure."""

PRELUDE = "import json, os, sys\narguments = json.loads(sys.argv[1])\n"


def source_distribution() -> Path:
    """Returns the pinned source distribution, from the download cache if it is there."""
    return obtain_sdist(Lock.load(LOCK_PATH))


def extract(names: tuple[str, ...], into: Path) -> Path:
    """Extracts the files of the source distribution whose path begins with one of the names; returns their root."""
    with tarfile.open(source_distribution(), "r:gz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if member.isfile() and path.startswith(names):
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                file = archive.extractfile(member)
                assert file is not None
                (into / path).write_bytes(file.read())
    return into


@dataclass(frozen=True)
class Finished:
    """What a program left behind."""

    status: int
    output: str
    log: str

    @property
    def value(self) -> Any:
        """What it printed last, as JSON."""
        assert self.status == 0, self.log
        return json.loads(self.output.splitlines()[-1])


@dataclass(frozen=True)
class LlamaCppPython:
    """A virtual environment with llama-cpp-python. What else it needs it finds in the environment of the tests."""

    python: Path

    @classmethod
    def install(cls, folder: Path) -> LlamaCppPython:
        """Installs the pinned version into a new virtual environment, with what its own tests import."""
        run(sys.executable, "-m", "venv", folder)
        python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        ours = sysconfig.get_path("purelib")
        Path(packages, "environment_of_the_tests.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        run(
            python, "-m", "pip", "install", "--disable-pip-version-check", source_distribution(), "scipy",
            environment={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"},
        )  # fmt: skip
        return cls(python)

    def run(
        self, program: str, libraries: Path | None, *, environment: dict[str, str] | None = None, **arguments: Any
    ) -> Finished:
        """Runs a Python program, which finds the arguments in a dictionary of that name.

        Args:
            program: Python source.
            libraries: The folder for LLAMA_CPP_LIB_PATH; None leaves it unset.
            environment: Further variables. Others whose names begin with LMINF_ are removed.
            arguments: Anything that JSON can express.
        """
        command = [str(self.python), "-c", PRELUDE + program, json.dumps(arguments)]
        finished = subprocess.run(
            command,
            env=_environment(libraries, environment),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
        return Finished(finished.returncode, finished.stdout, finished.stderr)

    def own_tests(
        self, folder: Path, libraries: Path, model: Path, environment: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Runs the tests of the source distribution.

        Args:
            folder: A new folder for the tests and what they write.
            libraries: The folder for LLAMA_CPP_LIB_PATH.
            model: Takes the place of each transformer that the tests would download.
            environment: Further variables.

        Returns:
            "passed", "failed" or "skipped" for each test.
        """
        extract(("tests/", "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"), folder)
        variables = {
            "DEFAULT_MODEL": str(model),
            "PYTHONPATH": str(ROOT / "tests" / "python" / "stand_ins"),
            **(environment or {}),
        }
        report = folder / "report.xml"
        options = ["--quiet", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-c", os.devnull, "--rootdir=."]
        finished = subprocess.run(
            [self.python, "-m", "pytest", *options, f"--junit-xml={report}", "tests"],
            cwd=folder, env=_environment(libraries, variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )  # fmt: skip
        assert report.is_file(), finished.stdout.decode(errors="replace")
        cases = ElementTree.parse(report).iter("testcase")
        return {case.attrib["name"]: _outcome(case) for case in cases}


def _environment(libraries: Path | None, further: dict[str, str] | None) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("LMINF_")}
    variables.pop("LLAMA_CPP_LIB_PATH", None)
    if libraries is not None:
        variables["LLAMA_CPP_LIB_PATH"] = str(libraries)
    return {**variables, **(further or {})}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def main() -> None:
    """Prints the results as tables in Markdown."""
    from lminf_edge import lib_path, models

    model = models.default_model_path()
    columns: dict[str, tuple[Path, dict[str, str]]] = {
        "stock": (stock_program().parents[2] / "bin", {}),
        "ours": (lib_path(), {}),
        "ours, `LMINF_N_WINDOW=1024`": (lib_path(), {"LMINF_N_WINDOW": "1024"}),
    }
    with tempfile.TemporaryDirectory() as folder:
        installed = LlamaCppPython.install(Path(folder, "environment"))
        results = {
            name: installed.own_tests(Path(folder, str(i)), libraries, model, environment)
            for i, (name, (libraries, environment)) in enumerate(columns.items())
        }
    print(f"| | {' | '.join(results)} |\n| --- |{' --- |' * len(results)}")
    for outcome in ("passed", "failed", "skipped"):
        counts = [str(list(result.values()).count(outcome)) for result in results.values()]
        print(f"| {outcome} | {' | '.join(counts)} |")
    for test in results["stock"]:
        outcomes = [result[test] for result in results.values()]
        if "failed" in outcomes:
            print(f"| `{test}` | {' | '.join(outcomes)} |")


if __name__ == "__main__":
    main()
