"""What is installed is what was locked."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import FastAPI

from tests.serving import clean_environment, root, serving

_UV: Final = Path(sys.executable).with_name("uv")
_LOCK: Final[dict[str, Any]] = tomllib.loads((root() / "uv.lock").read_text("utf-8"))
_WORKFLOWS: Final = sorted((root() / ".github" / "workflows").glob("*.yml"))
_LONG: Final = {"faults", "live", "cancellation", "soak", "contract", "simulate", "mutation"}
_OTHERS: Final = [package for package in _LOCK["package"] if package["name"] != "goodstanding"]


def _run(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, cwd=root(), env=clean_environment(variables), capture_output=True, text=True, timeout=60, check=False
    )


def _make(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run make in the environment that there is, whatever it thinks of its age."""
    make = shutil.which("make")
    assert make is not None
    return _run(make, "--silent", "--old-file=.venv/.ready", *words, **variables)


def test_every_file_has_a_hash() -> None:
    """Each file that could be installed is named with its SHA-256, and comes from PyPI."""
    assert len(_OTHERS) > 50
    for package in _OTHERS:
        assert {"registry": "https://pypi.org/simple"} == package["source"], package["name"]
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files, package["name"]
        for file in files:
            assert re.fullmatch("sha256:[0-9a-f]{64}", file["hash"]), file["url"]


def test_the_lock_is_the_projects() -> None:
    """The lock names the dependencies that pyproject.toml asks for, group by group."""
    project = tomllib.loads((root() / "pyproject.toml").read_text("utf-8"))
    [own] = [package for package in _LOCK["package"] if package["name"] == "goodstanding"]
    for group, asked in project["dependency-groups"].items():
        assert {_name(text) for text in asked} == {entry["name"] for entry in own["dev-dependencies"][group]}
    assert {_name(text) for text in project["project"]["dependencies"]} == {one["name"] for one in own["dependencies"]}


@pytest.mark.parametrize("locked", [True, False])
def test_another_file_is_not_installed(tmp_path: Path, *, locked: bool) -> None:
    """A file whose hash is not the locked one is refused."""
    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    _write_wheel(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if locked else "0" * 64
    (tmp_path / "requirements.txt").write_text(f"harmless==1.0 --hash=sha256:{digest}\n")
    done = _run(
        *(str(_UV), "pip", "install", "--offline", "--no-config", "--require-hashes", "--no-index"),
        *("--find-links", str(tmp_path), "--target", str(tmp_path / "target"), "--cache-dir", str(tmp_path / "cache")),
        *("--python", sys.executable, "-r", str(tmp_path / "requirements.txt")),
    )
    assert locked is (done.returncode == 0), done.stderr
    assert locked is (tmp_path / "target" / "harmless.py").exists()
    assert locked or "hash" in done.stderr.lower()


def test_the_sbom_names_every_dependency(tmp_path: Path) -> None:
    """`make sbom` writes CycloneDX with what a user installs, each with its version, and no tool of ours."""
    path = tmp_path / "sbom.json"
    done = _make("sbom", f"SBOM={path}", f"UV={_UV}")
    assert 0 == done.returncode, done.stderr
    written = json.loads(path.read_text("utf-8"))
    assert "CycloneDX" == written["bomFormat"]
    named = {part["purl"].removeprefix("pkg:pypi/").partition("?")[0] for part in written["components"]}
    versions = {f"{package['name']}@{package['version']}" for package in _OTHERS}
    assert named <= versions
    names = {name.partition("@")[0] for name in named}
    assert names == _closure()
    assert {"asyncpg", "fastapi", "pyjwt", "cryptography", "redis", "uvicorn"} <= names
    assert not {"pytest", "ruff", "schemathesis", "atheris"} & names


def _closure() -> set[str]:
    """Name all that the lock says the product needs at run time, and what that needs, on whatever platform."""
    packages = {package["name"]: package for package in _LOCK["package"]}
    wanted = list(packages["goodstanding"]["dependencies"])
    found: set[tuple[str, str | None]] = set()
    while wanted:
        one = wanted.pop()
        package = packages[one["name"]]
        for extra in (None, *one.get("extra", ())):
            if (one["name"], extra) not in found:
                found.add((one["name"], extra))
                wanted += package.get("dependencies", []) if extra is None else package["optional-dependencies"][extra]
    return {name for name, _ in found}


@pytest.mark.parametrize(
    ("told", "code", "expected"),
    [
        ("error: Request failed after 3 retries\n  cause: error sending request for url (https://x)", 2, 0),
        ("error: error sending request for url (https://x)\n  cause: operation timed out", 2, 0),
        ("Vulnerabilities:\n- X: error sending request for url (https://x)\nnetwork: timed out, dns error", 1, 2),
        ("error: error sending request for url (https://x)", 1, 2),
        ("error: HTTP status server error (500 Internal Server Error) for url (https://x)", 2, 2),
        ("error: Failed to parse `uv.lock`\n  cause: network = [", 2, 2),
    ],
)
def test_an_audit_fails_unless_nobody_can_be_asked(tmp_path: Path, told: str, code: int, expected: int) -> None:
    """Whatever an advisory says is a finding; a request that was not answered is told, and fails in CI alone."""
    tool = tmp_path / "uv"
    tool.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{told}\nEND\nexit {code}\n")
    tool.chmod(0o755)
    done = _make("audit", f"UV={tool}")
    assert expected == done.returncode, done.stdout + done.stderr
    assert told in done.stdout
    assert ("not audited" in done.stdout) is (expected == 0)
    # Where nobody reads what is told, whatever is not audited fails.
    unread = _make("audit", f"UV={tool}", CI="true")
    assert 2 == unread.returncode
    assert done.stdout == unread.stdout


def test_an_audit_by_the_real_tool(tmp_path: Path) -> None:
    """With nobody at the database's address it is not audited; what a database knows there is a finding."""
    database = FastAPI()
    text = "network: dns error, timed out, client error (connect)"
    known = {"id": "GHSA-x", "modified": "2026-01-01T00:00:00Z", "summary": text}

    @database.post("/v1/querybatch")
    def ask(asked: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"results": [{"vulns": [known]}, *[{} for _ in asked["queries"][1:]]]}

    database.get("/v1/vulns/GHSA-x")(lambda: known)
    with serving(database) as url:
        for address, code, expected in (("http://127.0.0.1:1", 0, "not audited"), (url, 2, text)):
            tool = tmp_path / "uv"
            # The proxy: it asks PyPI too, and a test asks nobody outside.
            tool.write_text(
                f'#!/bin/sh\nHTTPS_PROXY=http://127.0.0.1:1 UV_HTTP_RETRIES=0 exec {_UV} "$@" --service-url {address}\n'
            )
            tool.chmod(0o755)
            done = _make("audit", f"UV={tool}")
            assert code == done.returncode, done.stdout + done.stderr
            assert expected in done.stdout
            assert 2 == _make("audit", f"UV={tool}", CI="true").returncode


def test_the_installer_has_hashes_too() -> None:
    """uv, which installs everything else, is one version, every file of it by its SHA-256; and it is what runs here."""
    lines = (root() / ".ci" / "uv.txt").read_text("utf-8").splitlines()
    pinned, *hashes = [line.strip(" \\") for line in lines if not line.startswith("#")]
    assert f"uv {pinned.removeprefix('uv==')}" == " ".join(_run(str(_UV), "--version").stdout.split()[:2])
    assert len(hashes) > 10
    assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", text) for text in hashes)
    makefile = (root() / "Makefile").read_text("utf-8")
    assert ["--require-hashes --requirement .ci/uv.txt"] == re.findall(
        r"pip install (?:--quiet |--disable-\S+ )*(.*)", makefile
    )


@pytest.mark.parametrize("path", _WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_little(path: Path) -> None:
    """What it uses is pinned by digest, it may read and keeps no credentials, each job ends, each command exists."""
    text = path.read_text("utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used)
    assert ["contents: read"] == re.findall(r"^permissions:\n  (.*)$", text, re.MULTILINE)
    assert 1 == text.count("permissions:")
    assert sum(one.startswith("actions/checkout@") for one in used) == text.count("persist-credentials: false")
    assert text.count("runs-on:") == text.count("timeout-minutes:")
    assert _made(text) <= set(re.findall(r"^([a-z-]+):", (root() / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_what_takes_long_is_run_every_week() -> None:
    """Each of the long runs has a job with a time in which it has to end, and all of them begin once a week."""
    text = (root() / ".github" / "workflows" / "weekly.yml").read_text("utf-8")
    assert _LONG == _made(text)
    assert text.count("{ make:") == len(re.findall(r"minutes: \d+ \}", text))
    assert re.search(r'cron: "\d+ \d+ \* \* \d"', text)


def _made(workflow: str) -> set[str]:
    return set(re.findall(r'make(?:: ")? ?([a-z][a-z-]*)', workflow))


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=; ]", requirement)[0]


def _write_wheel(path: Path) -> None:
    info = "harmless-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("harmless.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
