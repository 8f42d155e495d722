"""What the README tells a new user to type is there and works."""

import re
import shlex

import numpy as np
import pytest
from conftest import DEMO

import audio
from utils import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SCRIPTS = sorted({command[1] for command in COMMANDS if command[0] == "python3" and command[1].endswith(".py")})


def test_the_readme_has_the_commands():
    assert ["make", "demo"] in COMMANDS
    assert ["make", "test"] in COMMANDS
    for script in ("downloader.py", "main.py", "test.py"):
        assert ["python3", script] in COMMANDS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_in_the_readme_exists(script, name):
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        if command[:2] == ["python3", name]:
            for word in command[2:]:
                if word.startswith("--"):
                    assert word in done.stdout, f"{name} {word}"


def test_every_file_in_the_readme_exists():
    for path in re.findall(r"`([\w/]+\.py)`", README) + re.findall(r"\]\((\w[\w/.-]+\.(?:png|md))\)", README):
        assert (ROOT / path).exists(), path


def test_the_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.fullmatch(r"-r requirements\.txt|[\w-]+==[\w.]+", line), line


def test_only_data_in_the_data_folders():
    for folder in ("datasets", "models"):
        assert not list((ROOT / folder).glob("*.py"))
    assert DEMO.is_dir()


def test_the_shipped_weights_extract_the_bundled_mixture(script, tmp_path):
    done = script(
        "test.py", DEMO / "mixture.flac", "--reference", DEMO / "reference.opus", "--target", DEMO / "target.flac",
        "--checkpoint", ROOT / "models" / "extractor" / "pretrained.pt", "--output", tmp_path, "--no-play",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    improvement = float(re.search(r"improvement ([-\d.]+) dB", done.stdout)[1])
    assert improvement >= 3
    target, estimate = (audio.read(path) for path in (DEMO / "target.flac", tmp_path / "mixture_estimate.wav"))
    assert 0.5 < np.dot(estimate, target) / np.dot(target, target) < 1.5  # as loud as in the mixture
    assert (ROOT / "models" / "extractor" / "pretrained.pt").stat().st_size <= 16_000_000
