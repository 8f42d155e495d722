"""Reference recordings to d-vectors with the pretrained GE2E speaker encoder (Wan et al., 2018, arXiv:1710.10467).

The weights are those that the `resemblyzer` package carries (Apache 2.0, trained on LibriSpeech train-other, VoxCeleb
1 and 2); only its file is used, the network of three LSTM layers and a linear layer is written out here.
"""

import importlib.util
import math
from pathlib import Path

import librosa
import torch
import torch.nn.functional as F
from torch import nn

from audio import SAMPLE_RATE

WINDOW, HOP, MELS = 400, 160, 40  # samples, samples, bands: the features that the weights were trained on
PIECE = 160 * HOP  # samples that the encoder sees at once
STEP = 120 * HOP  # samples between two such pieces
BATCH = {"cpu": 256, "cuda": 4096}  # pieces embedded at once: an hour of reference takes no more memory than minutes
LEVEL_DB = -30.0  # dBFS, root mean square


class SpeakerEncoder(nn.Module):
    """Turns references (any number of samples from 1 s up, 16 kHz) into d-vectors (256,) of unit length."""

    size = 256

    def __init__(self, bf16=False):
        """With `bf16` autocast the d-vectors differ by some 0.001 and cost a third on a CPU that is made for it."""
        super().__init__()
        self.bf16 = bf16
        self.lstm = nn.LSTM(MELS, self.size, num_layers=3, batch_first=True)
        self.linear = nn.Linear(self.size, self.size)
        mel = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=MELS)
        self.register_buffer("mel", torch.from_numpy(mel), persistent=False)
        package = importlib.util.find_spec("resemblyzer")
        weights = Path(package.submodule_search_locations[0]) / "pretrained.pt"
        saved = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: value for name, value in saved.items() if name in self.state_dict()})
        self.eval().requires_grad_(False)

    def forward(self, pieces):
        """Embed pieces (batch, PIECE samples) of speech as (batch, 256), each of unit length."""
        level = pieces.square().mean(-1, keepdim=True).sqrt()
        pieces = pieces * (10 ** (LEVEL_DB / 20) / (level + 1e-9))
        window = torch.hann_window(WINDOW, device=pieces.device)
        spectrum = torch.stft(pieces, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)
        mel = self.mel @ spectrum.abs().square()[..., : PIECE // HOP]
        with torch.autocast(pieces.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.lstm(mel.transpose(1, 2))[1][0][-1].float()
        return F.normalize(F.relu(self.linear(hidden)), dim=-1)

    def dvectors(self, references):
        """Embed a list of references, each (samples,), as d-vectors (len(references), 256)."""
        return self.prefix_dvectors(references, [math.inf])[:, 0]

    @torch.inference_mode()
    def prefix_dvectors(self, references, lengths):
        """Embed the first `lengths` samples, as far as there are as many, of each of a list of references (samples,).

        Returns (len(references), len(lengths), 256). The d-vector is the mean over the pieces, PIECE long and STEP
        apart, that lie in the reference; one that is shorter than a piece is repeated.
        """
        device = self.mel.device
        references = [torch.as_tensor(reference, dtype=torch.float32, device=device) for reference in references]
        pieces, chosen = [], []  # (first sample, length) of each piece; (d-vector, piece) where one is of the other
        start = dvector = 0
        for reference in references:
            first = len(pieces)
            pieces += [(start + n, PIECE) for n in range(0, len(reference) - PIECE + 1, STEP)]
            for length in lengths:
                length = min(length, len(reference))
                numbers = range(first, first + 1 + (length - PIECE) // STEP)
                if length < PIECE:
                    numbers = [len(pieces)]
                    pieces.append((start, length))
                chosen += [(dvector, number) for number in numbers]
                dvector += 1
            start += len(reference)
        samples, moments = torch.cat(references), torch.arange(PIECE, device=device)
        batches = torch.tensor(pieces, device=device).split(BATCH.get(device.type, BATCH["cpu"]))
        embedded = [
            self(samples[first + moments % length]) for first, length in (batch.T[..., None] for batch in batches)
        ]
        dvectors, pieces = torch.tensor(chosen, device=device).T
        sums = torch.zeros(dvector, self.size, device=device).index_add_(0, dvectors, torch.cat(embedded)[pieces])
        return F.normalize(sums, dim=-1).view(len(references), len(lengths), self.size).clone()
