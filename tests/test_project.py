"""What a newcomer leans on: the two commands, the versions, the configs, the shipped data; and no path of ours."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Put together here, so that this file does not name what it forbids.
FORBIDDEN = [
    *(rf"(?<![\w.~]){'/' + folder}/" for folder in ("work", "root", "home", "Users", "opt", "mnt")),
    *(re.escape(".".join(host)) for host in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))),
    *(re.escape(".".join(host)) for host in (("npmjs", "org"), ("npmjs", "com"), ("deb", "debian", "org"))),
]


def pins() -> dict[str, Version]:
    """Return the versions of constraints.txt by canonical name, each line checked to be a bare `name==version`."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"constraints.txt: {line!r} is not name==version"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt pins {name} twice"
        found[name] = Version(match[2])
    return found


def requirements() -> list[Requirement]:
    """Return what the package and its extras ask for, references of one extra to another left out."""
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


def committed_text() -> dict[str, str]:
    """Return the text of every file that is, or would be, committed; binary files are left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout, so what is committed is not known")
    texts = {}
    for name in done.stdout.decode().split("\0"):
        content = (ROOT / name).read_bytes() if name and (ROOT / name).is_file() else b""
        if b"\0" not in content:
            texts[name] = content.decode("utf-8")
    return texts


def fenced_commands(markdown: str) -> list[str]:
    """Return the lines of a page's code blocks, in order, without comments."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def test_make_run_and_make_test_are_the_first_two_commands_of_the_readme() -> None:
    commands = fenced_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands[:2] == ["make run", "make test"]


def test_ci_runs_what_the_readme_says_and_can_be_executed() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_the_public_workflow_does_what_ci_does_on_every_python_that_is_promised() -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert "bash .ci/run" in [step.get("run") for step in jobs["test"]["steps"]]
    promised = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for step in steps for word in re.findall(r"^make (\w+)$", step.get("run", ""), re.MULTILINE)]
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_make_without_a_target_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == phony[1].split()


def test_the_command_that_make_run_calls_names_an_existing_config() -> None:
    configs = re.findall(r"--config (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert configs
    assert [name for name in configs if not (ROOT / name).is_file()] == []


def test_the_base_package_asks_for_torch_alone() -> None:
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_every_requirement_has_a_tested_version_inside_its_range() -> None:
    tested = pins()
    for requirement in requirements():
        version = tested.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no version of {requirement.name}"
        assert version in requirement.specifier, f"{requirement.name}: {version} is outside {requirement.specifier}"


def test_no_requirement_is_pinned_in_pyproject() -> None:
    assert [str(r) for r in requirements() if any(part.operator in ("==", "===") for part in r.specifier)] == []


def test_no_file_names_a_path_of_our_machines_or_a_package_registry() -> None:
    texts = committed_text()
    assert "pyproject.toml" in texts
    pattern = re.compile("|".join(FORBIDDEN))
    hits = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert hits == []


@pytest.mark.parametrize(
    "line",
    [
        "see " + "/work" + "/main",
        'open("' + "/root" + '/x")',
        "https://files." + "pythonhosted" + ".org/x",
        "/home" + "/a/b",
    ],
)
def test_a_planted_path_or_host_is_caught(line: str) -> None:
    assert re.search("|".join(FORBIDDEN), line)


@pytest.mark.parametrize("line", ["~/work/data", "our/work/flow", "framework/", "the homework/root/x"])
def test_ordinary_words_with_slashes_are_no_paths_of_our_machines(line: str) -> None:
    assert not re.search("|".join(FORBIDDEN), line)


def test_every_config_starts_with_a_comment_that_says_what_it_does() -> None:
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert configs
    assert [path.name for path in configs if not re.match(r"# \S", path.read_text(encoding="utf-8"))] == []


def test_the_package_carries_its_types_its_data_and_the_datas_licences() -> None:
    package = resources.files("finetune_bn")
    assert package.joinpath("py.typed").is_file()
    with resources.as_file(package.joinpath("data/emoji64.zip")) as path, zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    vendors = {name.split("/")[0] for name in names if name.endswith(".webp")}
    assert vendors == {"noto", "twemoji", "fluent"}
    notice = package.joinpath("data/emoji64_NOTICE.md").read_text(encoding="utf-8")
    for holder, licence in (("Noto", "Apache-2.0"), ("Twemoji", "CC-BY 4.0"), ("Fluent", "MIT")):
        assert re.search(rf"{holder}.*{re.escape(licence)}", notice), f"emoji64_NOTICE.md lacks {holder}, {licence}"


@pytest.mark.parametrize("host", ["a-host.example", "192.0.2.1", "2001:db8::1"])
def test_the_tests_reach_no_other_machine(host: str) -> None:
    with pytest.raises(OSError, match="tests have no network"):
        socket.create_connection((host, 80))


def test_the_tests_reach_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
