"""A trained network in use: a reference becomes a voice, a mixture's samples become that voice's samples.

`test.py`, `live.py`, `evaluate.py` and whoever imports this project use an `Extractor`:

    extractor = Extractor()
    voice = extractor.enroll(reference)         # or None: the primary speaker
    estimate = extractor.extract(mixture, voice)

    stream = extractor.stream(voice, rate=48000)
    estimate = stream.feed(samples)             # again and again, any number of samples
    estimate = stream.flush()
"""

import hashlib
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F

import model
from audio import SAMPLE_RATE, Resampler, resampling_delay
from encoder import PIECE, SpeakerEncoder
from utils import ROOT, UserError, whole

CHECKPOINTS = ROOT / "models" / "extractor"
PRIMARY_SECONDS, PRIMARY_STEP_SECONDS = 5.0, 1.0  # what the primary speaker is enrolled from, and where it may begin
REHEARSAL_SECONDS = 5.0  # of a recording that the network hears before it begins
FRAME = 320  # samples that a level is measured over
PRIMARY_LEVEL = 1e-8  # its median power at least, full scale 1
ALIKE = 0.7  # product of two d-vectors of one voice at least: 95 % of a voice's are more alike, 80 % of others' less
ALIKE_POWER = 0.05  # of the loudest, at least, where a voice is compared
LOUDEST = 8.0  # samples of a stream are clipped to this, 18 dB over full scale: one click must not rule the level
GRAPH_HOPS = 8  # that go through the graph one by one; more are faster together, through the network
NETWORK_HOPS = 512  # at most that go through the network at once


def default_checkpoint():
    """The best checkpoint of this machine's training, else the one that comes with the project."""
    best = CHECKPOINTS / "best.pt"
    return best if best.exists() else CHECKPOINTS / "pretrained.pt"


@dataclass(frozen=True)
class Voice:
    """What a reference says of a speaker: a d-vector (256,), float32; all zeros for the primary speaker."""

    dvector: torch.Tensor

    def save(self, path):
        """Write it to a small file. Raises `UserError` where that cannot be written."""
        with whole(path) as partial:
            torch.save({"dvector": self.dvector}, partial)

    @staticmethod
    def load(path):
        """Read what `save` wrote. Raises `UserError` for anything else."""
        try:
            dvector = torch.load(path, map_location="cpu", weights_only=True)["dvector"].float()
            if dvector.shape != PRIMARY.dvector.shape or not dvector.isfinite().all():
                raise ValueError("another size")
        except FileNotFoundError:
            raise UserError(f"{path}: no such voice; save one with: live.py --enroll 5 --save {path}") from None
        except Exception as error:
            raise UserError(f"{path}: not a saved voice; give a recording with --reference instead") from error
        return Voice(dvector)


PRIMARY = Voice(torch.zeros(SpeakerEncoder.size))


class Extractor:
    """A checkpoint on a device, by default `default_checkpoint`; for `rehearsal_seconds` see `extract_blocks`.

    Samples are numpy float32 (samples,), at 16 kHz unless a rate is given. A voice of `None` is the primary speaker.
    Raises `UserError` where the checkpoint or the device cannot be used.
    """

    def __init__(self, checkpoint=None, device="cpu", rehearsal_seconds=REHEARSAL_SECONDS):
        checkpoint = Path(checkpoint or default_checkpoint())
        self.rehearsal_seconds = rehearsal_seconds
        self.device = model.find_device(device)
        self.network, self.checkpoint = model.load(checkpoint, self.device)
        self.encoder = SpeakerEncoder().to(self.device)
        self.graph = find_graph(checkpoint.with_suffix(".onnx"), self.network) if self.device.type == "cpu" else None

    @property
    def sample_rate(self):
        return self.network.config.sample_rate

    @property
    def stft(self):
        return self.network.config.stft

    def enroll(self, reference):
        """The `Voice` of a reference (samples,), of 1 s or more."""
        return Voice(self.encoder.dvectors([reference])[0].cpu())

    def enroll_primary(self, blocks):
        """The `Voice` of the loudest sustained voice in a mixture that comes in blocks at 16 kHz, heard from itself.

        The reference is the piece of PRIMARY_SECONDS of the estimate without a reference whose median level is highest,
        and what sounds like it as long before and after. Returns the voice and the second at which the piece begins;
        `None` for both where there is no such piece.
        """
        size, step = (round(seconds * self.sample_rate) for seconds in (PRIMARY_SECONDS, PRIMARY_STEP_SECONDS))
        silence = [np.zeros(size, dtype=np.float32)]  # around the first piece and the last
        held, position = np.zeros(0, dtype=np.float32), 0
        loudest, stretch, start = PRIMARY_LEVEL, None, None
        for block in itertools.chain(silence, self.extract_blocks(blocks), silence):
            held = np.concatenate([held, block])
            while len(held) >= 3 * size:
                level = np.median(np.square(held[size : 2 * size]).reshape(-1, FRAME).mean(1))
                if level > loudest:
                    loudest, stretch, start = level, held[: 3 * size], position
                held, position = held[step:], position + step
        if stretch is None:
            return None, None
        return self.enroll_alike(stretch[size : 2 * size], stretch), start / self.sample_rate

    def enroll_alike(self, reference, estimate):
        """The `Voice` of a reference (samples,) and of what sounds like it in an estimate (samples,)."""
        known = self.encoder.dvectors([reference])
        pieces = np.lib.stride_tricks.sliding_window_view(estimate, PIECE)[:: PIECE // 4]
        powers = np.square(pieces).mean(1)
        dvectors = self.encoder(torch.from_numpy(pieces[powers > ALIKE_POWER * powers.max()]).to(self.device))
        alike = dvectors[dvectors @ known[0] > ALIKE]
        return Voice(F.normalize(torch.cat([known, alike]).mean(0), dim=-1).cpu())

    def stream(self, voice=None, rate=SAMPLE_RATE):
        """A new `Stream` that keeps this voice of samples at `rate` Hz."""
        return Stream(self, voice, rate)

    def extract(self, mixture, voice=None, rate=SAMPLE_RATE):
        """The voice in a mixture (samples,), as long as it and in time with it; see `extract_blocks`."""
        return np.concatenate(list(self.extract_blocks([mixture], voice, rate)))

    def extract_blocks(self, blocks, voice=None, rate=SAMPLE_RATE):
        """The voice in a mixture that comes in blocks of any length; yields blocks whose sum is as long and in time.

        Its first `rehearsal_seconds` are heard twice: the network knows voices apart better after a second of both.
        Without, the blocks are what a stream returns.
        """
        stream, blocks, start = self.stream(voice, rate), iter(blocks), []
        length = round(self.rehearsal_seconds * rate)
        while sum(map(len, start)) < length and (block := next(blocks, None)) is not None:
            start.append(block)
        if start:
            stream.rehearse(np.concatenate(start)[:length])
        for block in itertools.chain(start, blocks):
            yield stream.feed(block)
        yield stream.flush()

    def feed(self, streams, blocks):
        """Feed a block of samples to each of some streams of this extractor, in one go; returns what each returns.

        Streams that have as many hops ready go through the network together.
        """
        ready = [stream.take(block) for stream, block in zip(streams, blocks, strict=True)]
        estimates = [samples[:0] for samples in ready]
        for length in {len(samples) for samples in ready} - {0}:
            members = [n for n, samples in enumerate(ready) if len(samples) == length]
            together = self.advance([streams[n] for n in members], np.stack([ready[n] for n in members]))
            for n, estimate in zip(members, together, strict=True):
                estimates[n] = estimate
        return [stream.give(estimate) for stream, estimate in zip(streams, estimates, strict=True)]

    @torch.inference_mode()
    def advance(self, streams, samples):
        """The estimates (streams, samples), whole hops at 16 kHz, `stft.delay` late, of the next samples of streams."""
        dvectors = torch.stack([(stream.voice or PRIMARY).dvector for stream in streams]).to(self.device)
        state = [torch.cat(tensors) for tensors in zip(*(stream.state for stream in streams), strict=True)]
        estimates = []
        extract, hops = self.network.extract, NETWORK_HOPS
        if self.graph is not None and samples.shape[1] <= GRAPH_HOPS * self.stft.hop:
            extract, hops = self.graph, 1
        for chunk in torch.from_numpy(samples).to(self.device).split(hops * self.stft.hop, dim=-1):
            estimate, state = extract(chunk, dvectors, state)
            estimates.append(estimate)
        for n, stream in enumerate(streams):
            stream.state = [tensor[n : n + 1] for tensor in state]
        return torch.cat(estimates, dim=-1).cpu().numpy()

    def start(self):
        """The state of a stream before its first sample, see `Network.extract`."""
        return self.network.start(1, self.device)


class HopGraph:
    """`Network.extract` for one hop, as the graph that `export.py` wrote; several times as fast on a CPU."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # it is too little work to share
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.weights = self.session.get_modelmeta().custom_metadata_map.get("weights")

    def __call__(self, samples, dvector, state):
        values = [tensor.numpy() for tensor in (samples, dvector, *state)]
        estimate, *state = map(torch.from_numpy, self.session.run(None, dict(zip(self.inputs, values, strict=True))))
        return estimate, state


def find_graph(path, network):
    """The `HopGraph` in a file, or `None` where there is none of these weights."""
    if not path.exists():
        return None
    try:
        graph = HopGraph(path)
    except Exception:  # onnxruntime's errors have no common class
        graph = None
    if graph is None or graph.weights != digest(network):
        print(f"warning: {path}: not the graph of this checkpoint; write it with: python3 export.py", file=sys.stderr)
        return None
    return graph


def digest(network):
    """A hash of a network's weights and configuration, by which a graph says whose it is."""
    weights = network.state_dict()
    found = hashlib.sha256(repr(network.config).encode())
    for name in sorted(weights):
        found.update(weights[name].cpu().numpy().tobytes())
    return found.hexdigest()


class Stream:
    """One mixture on its way through an extractor; all state is here, so many streams share one network.

    `voice` may be replaced at any time; the estimate fades over within a window of the STFT.
    """

    def __init__(self, extractor, voice=None, rate=SAMPLE_RATE):
        self.extractor, self.voice, self.rate = extractor, voice or PRIMARY, rate
        self.there = Resampler(rate, extractor.sample_rate)
        self.back = Resampler(extractor.sample_rate, rate)
        self.waiting = np.zeros(0, dtype=np.float32)  # samples at 16 kHz that are no whole hop yet
        self.early = extractor.stft.delay  # samples of the estimate that are before the mixture's first
        self.fed = self.returned = 0  # samples at `rate`
        self.state = extractor.start()

    @property
    def delay(self):
        """The most samples of the estimate that can be missing after a `feed`: the latency, without sound card."""
        rate = self.extractor.sample_rate
        converting = resampling_delay(self.rate, rate) + resampling_delay(rate, self.rate)
        return math.ceil((self.extractor.stft.n_fft / rate + converting) * self.rate)

    def rehearse(self, samples):
        """Before the start, let the network hear samples (any number,) of the mixture; nothing else is kept of them."""
        other = Stream(self.extractor, self.voice, self.rate)
        other.feed(samples)
        self.state = self.state[:2] + other.state[2:]  # the STFT's begins anew

    def feed(self, samples):
        """Take samples (any number,) of the mixture; returns what is ready of the estimate, in time with it."""
        return self.extractor.feed([self], [samples])[0]

    def flush(self):
        """The rest, once the mixture has ended: with all of `feed`, as many samples as went in."""
        stft = self.extractor.stft
        rest = np.concatenate([self.waiting, self.there.flush()])
        self.waiting = np.zeros(0, dtype=np.float32)
        padding = -(len(rest) + stft.delay) % stft.hop + stft.delay
        estimate = self.extractor.advance([self], np.pad(rest, (0, padding))[None])[0]
        estimate = estimate[self.early : len(rest) + stft.delay]
        estimate = np.concatenate([self.back.feed(estimate), self.back.flush()])
        missing = self.fed - self.returned - len(estimate)  # rounding there and back can make one too many or too few
        return np.pad(estimate, (0, missing)) if missing > 0 else estimate[: len(estimate) + missing]

    def take(self, samples):
        """Add samples at `rate` to those that wait; returns the whole hops that are ready."""
        # what is no sound must not stay in the network's memory for ever
        samples = np.nan_to_num(np.asarray(samples, dtype=np.float32), posinf=0.0, neginf=0.0).clip(-LOUDEST, LOUDEST)
        self.fed += len(samples)
        self.waiting = np.concatenate([self.waiting, self.there.feed(samples)])
        size = len(self.waiting) // self.extractor.stft.hop * self.extractor.stft.hop
        ready, self.waiting = self.waiting[:size], self.waiting[size:]
        return ready

    def give(self, estimate):
        """The network's estimate as the stream returns it: in time and at `rate`."""
        early, self.early = self.early, max(0, self.early - len(estimate))
        estimate = self.back.feed(estimate[early:])
        self.returned += len(estimate)
        return estimate
