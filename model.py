"""The network: a causal conv-net with skip connections that keeps one voice of a mixture.

In the line of VoiceFilter (Wang et al., 2019, arXiv:1810.04826): a mask over the STFT of the mixture, conditioned on
the target speaker's d-vector; here causal, complex and small enough for one core of a laptop. Strided convolutions
bring the frequencies down to a few bands, blocks of {dilated convolution over bands and time, a linear layer across
the bands, an LSTM over time shared by the bands} look at voice and time, and a mirrored decoder returns to a mask for
every frequency. The d-vector scales and shifts every stage (FiLM, Perez et al., 2018, arXiv:1709.07871).
"""

import io
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from stft import Stft
from utils import POSITIVE, UserError, option, require, whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network's shape; stored in every checkpoint. Each field is an option of `main.py`."""

    sample_rate: int = 16000  # Hz
    dvector_size: int = 256
    n_fft: int = option(512, "length of the STFT's window in samples")
    hop: int = option(256, "hop of the STFT in samples")
    channels: list[int] = option([24, 48, 64], "channels of the strided stages, each of which halves the frequencies")
    dilations: list[int] = option([1, 2, 4, 8], "dilation in frames of each block's convolution, a block each")
    hidden: int = option(64, "units of each block's LSTM")
    compression: float = option(0.3, "exponent on the magnitudes that the network sees")
    mask_bound: float = option(2.0, "largest magnitude of the mask")
    level_seconds: float = option(3.0, "time constant of the running level")

    def __post_init__(self):
        require(self, POSITIVE, "n_fft", "hop", "hidden", "mask_bound", "level_seconds")
        require(self, (lambda values: values and min(values) > 0, "numbers more than 0"), "channels", "dilations")
        fits = self.n_fft % (2 * self.hop) == 0
        require(self, (lambda hop: fits, f"a whole part of half of --n-fft {self.n_fft}"), "hop")
        halves = all(bands % 2 for bands in self.bands[:-1])
        require(self, (lambda n_fft: halves, "a power of two, or another length whose bins halve"), "n_fft")

    @property
    def stft(self):
        return Stft(self.n_fft, self.hop)

    @property
    def bands(self):
        """The number of frequency bins before and after each strided stage."""
        bands = [self.stft.n_freq]
        for _ in self.channels:
            bands.append((bands[-1] + 1) // 2)
        return bands


class FiLM(nn.Module):
    """Batch normalisation whose scale and shift are a linear function of the d-vector, then ReLU."""

    def __init__(self, channels, dvector_size):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.condition = nn.Linear(dvector_size, 2 * channels)
        self.activation = nn.ReLU()

    def forward(self, x, dvector):
        scale, shift = self.condition(dvector)[:, :, None, None].chunk(2, dim=1)
        return self.activation(self.norm(x) * (1 + scale) + shift)


class Block(nn.Module):
    """Convolution over bands and past frames, a linear layer across the bands, an LSTM over time; each residual."""

    def __init__(self, channels, bands, hidden, dilation, dvector_size):
        super().__init__()
        self.history = 2 * dilation
        self.conv = nn.Conv2d(channels, channels, 3, padding=(1, 0), dilation=(1, dilation), bias=False)
        self.film = FiLM(channels, dvector_size)
        self.across = nn.Linear(bands, bands)
        self.across_norm = nn.BatchNorm2d(channels)
        self.lstm_norm = nn.BatchNorm2d(channels)
        self.lstm = nn.LSTM(channels, hidden, batch_first=True)
        self.project = nn.Linear(hidden, channels)

    def forward(self, x, dvector, state):
        # x: (batch, channels, bands, frames)
        batch, channels, bands, frames = x.shape
        if state is None:
            past, memory = x.new_zeros(batch, channels, bands, self.history), None
        else:
            past, memory = state
        extended = torch.cat([past, x], dim=-1)
        past = extended[..., frames:]
        x = x + self.film(self.conv(extended.contiguous(memory_format=torch.channels_last)), dvector)

        y = F.relu(self.across_norm(x)).permute(0, 3, 1, 2)  # (batch, frames, channels, bands)
        x = x + self.across(y).permute(0, 2, 3, 1)

        y = self.lstm_norm(x).permute(0, 2, 3, 1).reshape(batch * bands, frames, channels)
        y, memory = self.lstm(y, memory)
        y = self.project(y).reshape(batch, bands, frames, channels).permute(0, 3, 1, 2)
        return x + y, (past, memory)


class Network(nn.Module):
    """Mixture spectrum and d-vector to the spectrum of that voice; see the module's text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        size, bands = config.dvector_size, config.bands
        inputs, outputs = [3, *config.channels], [2, *config.channels]
        kernel = {"kernel_size": (5, 1), "stride": (2, 1), "padding": (2, 0), "bias": False}
        self.down = nn.ModuleList(nn.Conv2d(a, b, **kernel) for a, b in pairwise(inputs))
        self.down_film = nn.ModuleList(FiLM(channels, size) for channels in config.channels)
        self.blocks = nn.ModuleList(
            Block(config.channels[-1], bands[-1], config.hidden, dilation, size) for dilation in config.dilations
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, **kernel) for a, b in reversed(list(pairwise(outputs))))
        self.up_film = nn.ModuleList(FiLM(channels, size) for channels in reversed(config.channels[:-1]))
        self.register_buffer("dvector_mean", torch.zeros(size))
        self.register_buffer("dvector_scale", torch.ones(()))
        self.to(memory_format=torch.channels_last)

    def standardise(self, dvectors):
        """Take mean and scale of the training speakers' d-vectors (speakers, dvector_size).

        The components of d-vectors are small and much the same for all voices; what differs is what counts. One scale
        for all: components that are nearly always zero would become huge where they are not.
        """
        self.dvector_mean.copy_(dvectors.mean(0))
        self.dvector_scale.copy_(dvectors.std(0).square().mean().sqrt())

    def forward(self, mixture, dvector, state=None):
        """Estimate the target's spectrum; training, files and streams all call this.

        `mixture` is (batch, freq, frames) complex64, `dvector` (batch, dvector_size), `state` that of the chunk
        before, `None` at the start. Returns the estimate, of the mixture's shape, and the state.
        """
        level_state, block_states = state or (None, [None] * len(self.blocks))
        level, level_state = self.level(mixture, level_state)
        dvector = (dvector - self.dvector_mean) / self.dvector_scale
        mask, block_states = self.mask(self.features(mixture, level), dvector, block_states)
        return self.bound(mask) * mixture, (level_state, block_states)

    def level(self, mixture, state):
        """Running root mean square (batch, 1, frames) of a spectrum, with exponentially fading weights."""
        power = torch.view_as_real(mixture).square().sum(-1).mean(1)
        batch, frames = power.shape
        rate = self.config.hop / self.config.sample_rate / self.config.level_seconds
        age = torch.arange(frames, device=power.device)
        age = age[:, None] - age  # (frame, earlier frame)
        weight = torch.exp(-rate * age.clamp(min=0)) * (age >= 0)
        fade = torch.exp(-rate * torch.arange(1, frames + 1, device=power.device))
        total, count = state if state is not None else power.new_zeros(2, batch, 1)
        total = (power[:, None] * weight).sum(-1) + total * fade
        count = weight.sum(-1) + count * fade
        return (total / count).sqrt()[:, None], torch.stack([total[:, -1:], count[:, -1:]])

    def features(self, mixture, level):
        """What the network sees (batch, 3, freq, frames): compressed real and imaginary part, log magnitude."""
        spectrum = torch.view_as_real(mixture / (level + 1e-9))
        power = spectrum.square().sum(-1) + 1e-10
        compressed = spectrum * (power ** ((self.config.compression - 1) / 2))[..., None]
        features = torch.stack([compressed[..., 0], compressed[..., 1], 0.1 * power.log()], dim=1)
        return features.contiguous(memory_format=torch.channels_last)

    def mask(self, x, dvector, states):
        """The unbounded mask (batch, 2, freq, frames) for features; takes and returns a list of the blocks' states."""
        skips, new_states = [], []
        for conv, film in zip(self.down, self.down_film, strict=True):
            x = film(conv(x), dvector)
            skips.append(x)
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, dvector, state)
            new_states.append(state)
        for conv, film in zip(self.up[:-1], self.up_film, strict=True):
            x = film(conv(x + skips.pop()), dvector)
        return self.up[-1](x + skips.pop()), new_states

    def bound(self, mask):
        """A mask (batch, 2, freq, frames) as complex numbers of magnitude up to `mask_bound`."""
        mask = mask.float().permute(0, 2, 3, 1)
        length = torch.sqrt(1 + mask.square().sum(-1, keepdim=True) / self.config.mask_bound**2)
        return torch.view_as_complex((mask / length).contiguous())


def save(path, network, **rest):
    """Write a checkpoint: the network's configuration and weights, and whatever plain data `rest` names."""
    # by way of memory, as torch's own writer has another error for a full disk
    written = io.BytesIO()
    torch.save({"config": asdict(network.config), "weights": network.state_dict(), **rest}, written)
    with whole(path) as partial:
        partial.write_bytes(written.getbuffer())


def load(path, device="cpu"):
    """Read a checkpoint; returns the network in evaluation mode and the checkpoint, a plain dict.

    Raises `UserError` for a file that is missing, broken or no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        network = Network(Config(**checkpoint["config"]))
        network.load_state_dict(checkpoint["weights"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with: python3 main.py") from None
    except Exception as error:
        raise UserError(f"{path}: not a whole checkpoint of this network ({first_line(error)}); use another") from error
    return network.to(device).eval(), checkpoint


def bf16_is_fast(device):
    """Whether bfloat16 autocast pays on a torch device: on GPUs, and on CPUs with AMX (5 to 8 times fp32)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


def find_device(name):
    """The torch device of this name. Raises `UserError` where it cannot be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)}); use cpu") from error


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


def parameters(network):
    """The number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def macs_per_second(config):
    """Multiply-accumulates for a second of audio, recurrent layers included, normalisation and masking left out."""
    bands, top, kernel = config.bands, config.channels[-1], 5
    down = sum(kernel * a * b * n for a, b, n in zip([3, *config.channels], config.channels, bands[1:], strict=False))
    up = sum(kernel * a * b * n for a, b, n in zip([2, *config.channels], config.channels, bands[1:], strict=False))
    conv, across = 9 * top * top * bands[-1], top * bands[-1] ** 2
    lstm = (4 * config.hidden * (top + config.hidden) + config.hidden * top) * bands[-1]
    per_frame = down + up + len(config.dilations) * (conv + across + lstm)
    return per_frame * config.sample_rate / config.hop
