"""A trained network in use: a reference becomes a voice, a mixture's samples become that voice's samples."""

import numpy as np
import torch

import model
from encoder import SpeakerEncoder
from utils import ROOT

CHECKPOINTS = ROOT / "models" / "extractor"
CHUNK = 2**17  # samples at most that go through the network at once, a whole number of hops


def default_checkpoint():
    """The best checkpoint of this machine's training, else the one that comes with the project."""
    best = CHECKPOINTS / "best.pt"
    return best if best.exists() else CHECKPOINTS / "pretrained.pt"


class Extractor:
    """A checkpoint on a device, by default `default_checkpoint`.

    Voices are d-vectors (256,), samples are numpy float32 (samples,) at 16 kHz. Raises `UserError` where the checkpoint
    or the device cannot be used.
    """

    def __init__(self, checkpoint=None, device="cpu"):
        self.device = model.find_device(device)
        self.network, self.checkpoint = model.load(checkpoint or default_checkpoint(), self.device)
        self.encoder = SpeakerEncoder().to(self.device)

    @property
    def sample_rate(self):
        return self.network.config.sample_rate

    def enroll(self, reference):
        """The voice of a reference (samples,), of 1 s or more."""
        return self.encoder.dvectors([reference])[0]

    def stream(self, voice):
        """A new `Stream` that keeps this voice."""
        return Stream(self.network, voice, self.device)

    def extract(self, mixture, voice):
        """The voice in a mixture (samples,), as long as it and in time with it."""
        return np.concatenate(list(self.extract_blocks([mixture], voice)))

    def extract_blocks(self, blocks, voice):
        """The voice in a mixture that comes in blocks of any length; yields blocks whose sum is as long and in time."""
        stream = self.stream(voice)
        ahead = stream.delay  # samples that come before the mixture's first
        for block in blocks:
            estimate = stream.feed(block)
            yield estimate[ahead:]
            ahead -= min(ahead, len(estimate))
        yield stream.flush()[ahead:]


class Stream:
    """One mixture on its way through the network; all state is here, so many streams share one network."""

    def __init__(self, network, voice, device):
        self.network, self.stft, self.device = network, network.config.stft, device
        self.voice = voice[None].to(device)
        self.waiting = np.zeros(0, dtype=np.float32)  # samples that are no whole hop yet
        self.analysis = self.state = self.synthesis = None

    @property
    def delay(self):
        """Samples by which the estimate lags behind the mixture."""
        return self.stft.delay

    @torch.inference_mode()
    def feed(self, samples):
        """Take samples (any number,) of the mixture; returns the estimate of all whole hops so far, `delay` late."""
        self.waiting = np.concatenate([self.waiting, np.asarray(samples, dtype=np.float32)])
        whole = len(self.waiting) // self.stft.hop * self.stft.hop
        ready, self.waiting = self.waiting[:whole], self.waiting[whole:]
        return np.concatenate([ready[:0], *(self.step(ready[n : n + CHUNK]) for n in range(0, whole, CHUNK))])

    def step(self, samples):
        """The estimate of some whole hops."""
        chunk = torch.from_numpy(samples)[None].to(self.device)
        spectrum, self.analysis = self.stft.analyse(chunk, self.analysis)
        estimate, self.state = self.network(spectrum, self.voice, self.state)
        estimate, self.synthesis = self.stft.synthesise(estimate, self.synthesis)
        return estimate[0].cpu().numpy()

    def flush(self):
        """The rest, once the mixture has ended: with all of `feed`, `delay` samples more than went in."""
        missing = len(self.waiting) + self.delay
        padding = -(-missing // self.stft.hop) * self.stft.hop - len(self.waiting)
        return self.feed(np.zeros(padding))[:missing]
