"""What tests share: the real recordings where they are, else the bundled voices; a small store; a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import corpora
import downloader
import mixing
import model
import utils
from metrics import si_sdr
from utils import ROOT

CORPORA = Path(os.environ.get("CORPORA", ROOT.parent / "shared" / "corpora"))
DEMO = ROOT / "datasets" / "demo"
SIZE = 40


def score(estimate, target):
    """SI-SDR in dB of numpy signals (samples,)."""
    return si_sdr(torch.from_numpy(estimate.copy()), torch.from_numpy(target)).item()


@pytest.fixture(scope="session")
def recordings():
    """Recordings by kind: real ones where there are some, otherwise the bundled ones."""
    if CORPORA.exists():
        speech = corpora.find([str(CORPORA / "LibriSpeech")], "speech", CORPORA)
        speech = [r for r in speech if "test-other" not in r.path.parts]
        noise, music = CORPORA / "noise", CORPORA / "music"
    else:
        speech = corpora.find([str(DEMO / "voices")], "speech", DEMO)
        noise, music = DEMO / "noise", DEMO / "music"
    return {
        "speech": speech,
        "noise": corpora.find([str(noise)], "noise", noise),
        "music": corpora.find([str(music)], "music", music),
    }


@pytest.fixture(scope="session")
def settings():
    return mixing.Settings(segment=1.5)


@pytest.fixture(scope="session")
def store(tmp_path_factory, recordings, settings):
    """A store of SIZE examples; do not write in it."""
    folder = tmp_path_factory.mktemp("store") / f"size={SIZE}"
    downloader.prepare(folder, settings, recordings, SIZE, workers=2)
    return folder


@pytest.fixture(scope="session")
def network():
    """A network whose weights, running averages included, are not where they start, and whose mask is not bounded."""
    torch.manual_seed(0)
    network = model.Network(model.Config()).eval()
    for layer in network.up[-1].children():
        layer.reset_parameters()  # they begin with zeros
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * (tensor.abs().mean() if tensor.ndim > 1 else 1.0) * torch.randn_like(tensor)
    return network


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("checkpoint") / "random.pt"
    model.save(path, network)
    return path


@pytest.fixture
def refusal(capsys):
    """Call a script's `main` as from its command line; it must end with exit code 2 and one line, which is returned."""

    def call(main, *arguments):
        with pytest.raises(SystemExit) as ended:
            utils.run(main, [str(argument) for argument in arguments])
        errors = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert len(errors) == 1, errors
        return errors[0]

    return call


@pytest.fixture
def script():
    """Run one of the scripts as its user would; returns the finished process."""

    def call(*arguments, cwd=ROOT, **options):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)

    return call
