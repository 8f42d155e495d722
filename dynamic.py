"""Training examples rendered from recordings on the device that trains: dynamic mixing, where a GPU is there to do it.

A store of examples (dataset.py) has few voices, and they are soon known. `downloader.py --dynamic` stores the
recordings instead,

    datasets/preprocessed/size=N/
        settings.json, validation/   as ever
        train/samples.i16            all recordings, one after another, 16 bits
        train/recordings.json        a list of rows: whose, and how many samples

and here N voices at a time are made of them, with the speeds, formants and references that `mixing` draws, and noise
for a quarter as many examples. After some epochs of remixing them, others take their place.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchaudio

import audio
import corpora
import dataset
import mixing
from encoder import SpeakerEncoder
from utils import UserError, whole

EPOCHS = 4  # of remixing the same voices
CHUNK = 256  # voices rendered at once, all at one speed
VOICES_PER_NOISE = 4
POWER = 10**-2.5  # of everything that is rendered; full scale 1


def write_recordings(folder, recordings, decoded):
    """Write the recordings of a split to `folder`; `decoded` are their samples (samples,), int16, in their order."""
    rows = []
    with whole(folder) as partial:
        partial.mkdir()
        with open(partial / "samples.i16", "wb") as file:
            for recording, samples in zip(recordings, decoded, strict=True):
                file.write(samples.astype("<i2").tobytes())
                row = {
                    name: getattr(recording, name) for name in ("kind", "corpus", "speaker", "gender", "age", "region")
                }
                rows.append({**row, "samples": len(samples)})
        (partial / "recordings.json").write_text(json.dumps(rows))


def decode(recording):
    """The samples of a recording (samples,), int16."""
    return np.round(audio.read(recording.path).clip(-1, 1) * 32767).astype(np.int16)


@dataclass
class Pieces:
    """Where a batch of signals comes from: `starts` and `lengths` (batch, pieces) in samples of all recordings, and
    how far into the signal they begin, `offsets` (batch,)."""

    starts: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, signals, first_samples):
        """Of lists of `mixing.Piece`, those of a signal, and each recording's first sample."""
        most = max(1, *map(len, signals))
        starts, lengths = torch.zeros(2, len(signals), most, dtype=torch.long)
        offsets = torch.zeros(len(signals), dtype=torch.long)
        for n, pieces in enumerate(signals):
            for m, piece in enumerate(pieces):
                scale = audio.SAMPLE_RATE * piece.recording.speed  # samples of the recording for a second heard
                starts[n, m] = first_samples[int(piece.recording.path.name)] + round(piece.start * scale)
                lengths[n, m] = int(piece.seconds * scale)
            if pieces:
                offsets[n] = round(pieces[0].offset * audio.SAMPLE_RATE * pieces[0].recording.speed)
        return cls(starts, lengths, offsets)

    def gather(self, recorded, samples):
        """The signals (batch, samples): the pieces one after another, silence before and after, from all recordings
        `recorded` (samples,), int16."""
        starts, lengths, offsets = (value.to(recorded.device) for value in vars(self).values())
        ends = lengths.cumsum(1)
        moments = torch.arange(samples, device=recorded.device) - offsets[:, None]
        piece = torch.searchsorted(ends, moments, right=True).clamp(max=lengths.shape[1] - 1)
        places = moments + (starts - ends + lengths).gather(1, piece)
        sounds = (moments >= 0) & (moments < ends[:, -1:])
        return recorded[places.clamp(0, len(recorded) - 1)].float().div(32768).masked_fill(~sounds, 0)


@dataclass
class Chunk:
    """What `Examples.render` renders at once."""

    names: list  # the speaker of each voice
    corpora: list
    percent: int  # the voices' speed is 100 / percent
    formants: torch.Tensor  # (voices,)
    targets: Pieces
    references: Pieces
    curves: torch.Tensor  # equaliser curves (2, voices, 6) of target and reference
    noises: list  # Pieces of noise and, one for one, of music


class Chunks(torch.utils.data.Dataset):
    """The chunks of `size` voices, drawn in other processes; the same for the same (seed, number)."""

    def __init__(self, mixer, first_samples, size, seed, number):
        self.mixer, self.first_samples, self.size, self.seed, self.number = mixer, first_samples, size, seed, number

    def __len__(self):
        return -(-self.size // CHUNK)

    def __getitem__(self, n):
        mixer, settings = self.mixer, self.mixer.settings
        rng = np.random.default_rng([self.seed, self.number, n])
        speed = mixing.draw_speed(rng, settings)
        count = min(CHUNK, self.size - n * CHUNK)
        targets, references, curves, formants, speakers = [], [], [], [], []
        for _ in range(count):
            name = mixer.names[rng.integers(len(mixer.names))]
            target, reference, equalise = mixer.draw_target(rng, mixer.draw_voice(rng, name, speed))
            if rng.random() < settings.partial:
                target = mixing.shorten(rng, target, settings.segment)
            targets.append([target])
            references.append(reference)
            formants.append(target.recording.formants)
            speakers.append(target.recording)
            curves.append([mixing.random_curve(rng) * equalise for _ in range(2)])
        noises = []
        for recordings, share in (mixer.noise, settings.noise_share), (mixer.music, settings.music_share):
            drawn = [rng.random() < share and len(recordings) > 0 for _ in range(-(-count // VOICES_PER_NOISE))]
            pieces = [[mixer.draw_piece(rng, recordings)] if sounds else [] for sounds in drawn]
            noises.append(Pieces.of(pieces, self.first_samples))
        return Chunk(
            names=[recording.speaker for recording in speakers],
            corpora=[recording.corpus for recording in speakers],
            percent=round(100 / speed),
            formants=torch.tensor(formants, dtype=torch.float32),
            targets=Pieces.of(targets, self.first_samples),
            references=Pieces.of(references, self.first_samples),
            curves=torch.tensor(np.array(curves), dtype=torch.float32).transpose(0, 1),
            noises=noises,
        )


class Examples(dataset.Examples):
    """As `dataset.Examples` with `remix`, from recordings that are held on `device`; `epoch` chooses the voices."""

    workers = 4  # processes that draw

    def load(self, split):
        folder = self.folder / split
        try:
            rows = json.loads((folder / "recordings.json").read_text())
            recorded = np.fromfile(folder / "samples.i16", "<i2")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no recordings ({error}); finish it with the downloader.py command") from error
        counts = [row["samples"] for row in rows]
        if sum(counts) != len(recorded):
            raise UserError(f"{folder}: not whole; copy it again, or remove it and run downloader.py")
        self.first_samples = np.cumsum([0, *counts])
        kinds = {kind: [] for kind in ("speech", "noise", "music")}
        for n, row in enumerate(rows):
            about = {name: value for name, value in row.items() if name != "samples"}
            kinds[row["kind"]].append(
                corpora.Recording(path=Path(str(n)), seconds=row["samples"] / audio.SAMPLE_RATE, **about)
            )
        names = {field.name for field in dataclasses.fields(mixing.Settings)}
        settings = mixing.Settings(**{name: value for name, value in self.settings.items() if name in names})
        self.mixer = mixing.Mixer(settings, **kinds)
        self.encoder = SpeakerEncoder(bf16=self.device.type == "cuda").to(self.device)
        size = self.settings["examples"][split]
        noises, numbers = -(-size // VOICES_PER_NOISE), np.arange(size)
        # of each example's parts; another voice stands for its interference
        self.rows = np.stack([numbers, (numbers - 1) % size, size + numbers % noises], axis=1)
        shape = size + noises, self.stft.n_freq, self.stft.frames(self.samples), 2
        try:
            self.recorded = torch.from_numpy(recorded).to(self.device)
            self.held = torch.empty(shape, dtype=torch.float16, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            needed = f"{size} voices and the recordings take {2e-9 * (math.prod(shape) + len(recorded)):.1f} GB"
            raise UserError(f"{self.folder}: {needed}, more than the GPU has; make it with a lower --size") from error
        self.dvectors = torch.empty(size, len(mixing.REFERENCE_SAMPLES), SpeakerEncoder.size, device=self.device)
        self.rendered = None

    @property
    def epoch(self):
        return self._epoch

    @epoch.setter
    def epoch(self, epoch):
        self._epoch = epoch
        if self.rendered != epoch // EPOCHS:
            self.render(epoch // EPOCHS)

    @torch.inference_mode()
    def render(self, number):
        """Take the voices of this number."""
        size = len(self.dvectors)
        chunks = Chunks(self.mixer, self.first_samples, size, self.seed, number)
        names, self.corpora, powers, noise_powers = [], [], [], []
        loader = torch.utils.data.DataLoader(
            chunks, batch_size=None, num_workers=self.workers if self.device.type == "cuda" else 0
        )
        for chunk in loader:
            start, noise = len(names), size + sum(map(len, noise_powers))
            voices, references = self.voices(chunk)
            powers.append(self.keep(start, voices))
            dvectors = self.encoder.prefix_dvectors(references, mixing.REFERENCE_SAMPLES)
            self.dvectors[start : start + len(voices)] = dvectors
            noise_powers.append(
                self.keep(noise, sum(level(pieces.gather(self.recorded, self.samples)) for pieces in chunk.noises))
            )
            names += chunk.names
            self.corpora += chunk.corpora
        self.powers = torch.cat(powers + noise_powers).numpy()[self.rows]
        self.speakers = [[{names[target]}, {names[other]}, set()] for target, other, _ in self.rows]
        self.rendered = number

    def voices(self, chunk):
        """The voices (voices, samples) of a chunk, and their references, a list of signals."""
        sounds = []
        for pieces, samples in (chunk.targets, self.samples), (chunk.references, max(mixing.REFERENCE_SAMPLES)):
            signals = pieces.gather(self.recorded, -(-samples * 100 // chunk.percent))
            signals = torchaudio.functional.resample(signals, 100, chunk.percent)[:, :samples]
            signals = mixing.shift_formants(signals, chunk.formants.to(self.device))
            sounds.append(mixing.equalise(signals, chunk.curves[len(sounds)].to(self.device)))
        voices, references = sounds
        lengths = chunk.references.lengths.sum(1) * chunk.percent // 100
        return voices, [reference[:length] for reference, length in zip(references, lengths, strict=True)]

    def keep(self, start, signals):
        """Hold the spectra of signals (batch, samples) from row `start` on; returns their powers (batch,)."""
        signals = level(signals)
        self.held[start : start + len(signals)] = torch.view_as_real(self.stft.spectrum(POWER**0.5 * signals))
        return POWER * signals.any(-1).double().cpu()

    def row(self, example, part):
        return self.rows[example, part]


def level(signals):
    """Signals (batch, samples) at power 1 where they sound; silent ones stay silent."""
    power = mixing.active_power(signals)[:, None]
    return torch.where(power > 0, signals / power.clamp(min=1e-20).sqrt(), 0).float()
