"""Recordings to training examples: who speaks when, how loud, over which noise, in which room.

`draw` decides everything about an example from a random generator and is cheap, `render` makes its sound. An example
is three parts that sum to the mixture: target, interference (all other voices) and noise (with music), and the
reference, other speech of the target speaker.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pyroomacoustics
import scipy.signal
import torch
import torch.nn.functional as F

import audio
import corpora
from utils import NOT_NEGATIVE, POSITIVE, RANGE, SHARE, UserError, option, require

pyroomacoustics.constants.set("num_threads", 1)  # downloader.py has a process for each core
PARTS = ("target", "interference", "noise")
REFERENCE_SECONDS = (1.0, 3.0, 10.0)  # the lengths of reference that each example has a d-vector of
REFERENCE_SAMPLES = [round(seconds * audio.SAMPLE_RATE) for seconds in REFERENCE_SECONDS]
MIN_REFERENCE_SECONDS = 1.5  # what a drawn reference has at least
SILENCE = 1e-10  # power, full scale 1; what is below is never made louder
NATURAL = {"speed": [1.0, 1.0], "formants": [1.0, 1.0]}  # settings that leave voices as they are
EQUALISER_DB = 4.0  # largest gain and loss
FORMANT_WINDOW = 384  # samples
ENVELOPE = 26  # samples of the cepstrum that are the envelope: below the period of all but the highest voices


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What examples are like; the defaults are what `downloader.py` makes. Shares are probabilities, 0 to 1."""

    segment: float = option(3.0, "length of an example in seconds")
    max_voices: int = option(3, "most interfering voices in an example")
    more_voices: float = option(0.2, "share of examples with two or more interfering voices")
    no_voices: float = option(0.1, "share of examples with noise only as interference")
    absent: float = option(0.07, "share of examples in which the target does not speak")
    partial: float = option(0.3, "share of examples in which the voices overlap only partly")
    noise_share: float = option(0.5, "share of examples with noise")
    music_share: float = option(0.2, "share of examples with music")
    speed: list[float] = option([0.85, 1.18], "range of the speed of voices, which makes further ones of them", nargs=2)
    formants: list[float] = option([0.87, 1.15], "range of the factor on formants, beside the speed's", nargs=2)
    reverb: float = option(0.0, "share of examples in a reverberant room")
    sir_db: list[float] = option([-5.0, 5.0], "range of the target over the interference in dB", nargs=2)
    snr_db: list[float] = option([0.0, 20.0], "range of the target over noise and music in dB", nargs=2)
    level_db: list[float] = option([-35.0, -15.0], "range of the mixture's level in dBFS", nargs=2)
    seed: int = option(0, "seed of everything drawn at random")

    def __post_init__(self):
        shares = ("more_voices", "no_voices", "absent", "partial", "noise_share", "music_share", "reverb")
        require(self, SHARE, *shares)
        require(self, RANGE, "sir_db", "snr_db", "level_db", "speed", "formants")
        require(self, POSITIVE, "max_voices")
        require(self, NOT_NEGATIVE, "seed")
        require(self, (lambda factors: min(factors) >= 0.5 and max(factors) <= 2, "0.5 to 2"), "speed", "formants")
        require(self, (lambda seconds: seconds >= 0.1, "0.1 s or more"), "segment")

    @property
    def samples(self):
        return round(self.segment * audio.SAMPLE_RATE)


@dataclass(frozen=True)
class Piece:
    """Part of a recording: from `start` for `seconds`, heard `offset` seconds into the segment."""

    recording: corpora.Recording
    start: float
    seconds: float
    offset: float = 0.0


@dataclass
class Plan:
    """Everything about one example but its sound; levels and ratios in dB."""

    speaker: corpora.Recording  # any recording of the target speaker
    reference: list[Piece]
    target: Piece | None  # None where the target does not speak
    interference: list[Piece]
    noise: list[Piece]
    sir_db: float
    snr_db: float
    level_db: float
    equalise: bool  # reference and segment come from one recording, so their sound is made to differ
    room: bool
    seed: int  # of what `render` draws: equaliser curves and the room
    more: list[Piece] = field(default_factory=list)  # of the target, after its first piece


@dataclass
class Example:
    """A rendered example: `parts` (3, samples), `reference` (samples,), and `row`, its line in the store's index."""

    parts: np.ndarray
    reference: np.ndarray
    row: dict = field(default_factory=dict)


class Mixer:
    """Draws examples from the recordings of one split.

    `speech`, `noise`, `music` and `rooms` are lists of `corpora.Recording`; all but `speech` may be empty. Without
    `rooms`, which hold impulse responses, reverberation is simulated. Raises `UserError` where fewer than two
    speakers have enough speech.
    """

    def __init__(self, settings, speech, noise=(), music=(), rooms=()):
        self.settings, self.noise, self.music = settings, list(noise), list(music)
        self.speakers = group(speech)
        for name, recordings in list(self.speakers.items()):
            seconds = [r.at(max(settings.speed)).seconds for r in recordings]
            longest, total = max(seconds), sum(seconds)
            if max(longest - 1, total - longest) < MIN_REFERENCE_SECONDS:
                del self.speakers[name]
        if len(self.speakers) < 2:
            raise UserError(
                f"{len(self.speakers)} speakers with 2.5 s of speech or more; give at least 2 for each split"
            )
        self.names = list(self.speakers)
        self.rooms = list(group(rooms).values())

    def draw(self, rng):
        """Decide on one example with the numpy generator `rng`; returns a `Plan`."""
        s = self.settings
        name = self.names[rng.integers(len(self.names))]
        target, reference, equalise = self.draw_target(rng, self.draw_voice(rng, name))
        absent = rng.random() < s.absent
        count = 1
        if rng.random() < s.more_voices and s.max_voices > 1:
            count = rng.integers(2, s.max_voices + 1)
        alone = not absent and rng.random() < s.no_voices and len(self.noise) > 0
        others = [n for n in rng.permutation(len(self.names))[: count + 1] if self.names[n] != name]
        voices = [] if alone else [self.draw_voice(rng, self.names[n]) for n in others[:count]]
        interference = [self.draw_piece(rng, recordings) for recordings in voices]
        noise = []
        for recordings, share in ((self.noise, s.noise_share), (self.music, s.music_share)):
            if recordings and (rng.random() < share or (alone and recordings is self.noise)):
                noise.append(self.draw_piece(rng, recordings))
        if rng.random() < s.partial and interference:
            target = shorten(rng, target, s.segment)
            interference = [shorten(rng, piece, s.segment) for piece in interference]
        return Plan(
            speaker=self.speakers[name][0],
            reference=reference,
            target=None if absent else target,
            interference=interference,
            noise=noise,
            sir_db=rng.uniform(*s.sir_db),
            snr_db=rng.uniform(*s.snr_db),
            level_db=rng.uniform(*s.level_db),
            equalise=equalise,
            room=rng.random() < s.reverb,
            seed=int(rng.integers(2**32)),
        )

    def draw_voice(self, rng, name, speed=None):
        """The recordings of a speaker, all at one speed and with one factor on formants."""
        if all(getattr(self.settings, setting) == values for setting, values in NATURAL.items()):
            return self.speakers[name]  # without drawing, or the fixed lists would not stay as they are
        speed = speed or draw_speed(rng, self.settings)
        formants = rng.uniform(*self.settings.formants)
        return [recording.at(speed, formants) for recording in self.speakers[name]]

    def draw_piece(self, rng, recordings):
        """A piece of at most one segment out of one of the recordings; a shorter one lies anywhere in the segment."""
        recording = recordings[rng.integers(len(recordings))]
        seconds = min(recording.seconds, self.settings.segment)
        start = rng.uniform(0, recording.seconds - seconds)
        return Piece(recording, start, seconds, rng.uniform(0, self.settings.segment - seconds))

    def draw_target(self, rng, recordings):
        """The target's piece, its reference, and whether both are of one recording."""
        target = self.draw_piece(rng, recordings)
        others = [r for r in recordings if r is not target.recording]
        if sum(r.seconds for r in others) >= MIN_REFERENCE_SECONDS:
            return target, self.draw_reference(rng, target), False
        recording = target.recording
        seconds = min(target.seconds, recording.seconds - MIN_REFERENCE_SECONDS)
        start = rng.uniform(0, recording.seconds - seconds)
        if max(start, recording.seconds - start - seconds) < MIN_REFERENCE_SECONDS:
            start = 0.0 if rng.random() < 0.5 else recording.seconds - seconds
        target = Piece(recording, start, seconds, rng.uniform(0, self.settings.segment - seconds))
        return target, self.draw_reference(rng, target), True

    def draw_reference(self, rng, target):
        """Up to 10 s of other recordings of the speaker of a piece, or else of what its recording has outside it."""
        voice = target.recording.speed, target.recording.formants
        others = [r.at(*voice) for r in self.speakers[target.recording.speaker] if r.path != target.recording.path]
        rests = [Piece(others[n], 0, others[n].seconds) for n in rng.permutation(len(others))]
        if sum(rest.seconds for rest in rests) < MIN_REFERENCE_SECONDS:
            end = target.start + target.seconds
            rests = [
                Piece(target.recording, 0, target.start),
                Piece(target.recording, end, target.recording.seconds - end),
            ]
            rests.sort(key=lambda rest: -rest.seconds)
        reference, missing = [], max(REFERENCE_SECONDS)
        for rest in rests:
            if missing > 0 and rest.seconds > 0:
                reference.append(Piece(rest.recording, rest.start, min(rest.seconds, missing)))
                missing -= rest.seconds
        return reference


def render(plan, settings, rooms=()):
    """Make the sound of a `Plan`: the three parts at their levels, the reference, and the row for the index."""
    rng = np.random.default_rng(plan.seed)
    samples = settings.samples
    curves = random_curve(rng), random_curve(rng)
    responses = (
        draw_room(rng, rooms, 1 + len(plan.interference)) if plan.room else [None] * (1 + len(plan.interference))
    )

    spoken = [plan.target, *plan.more] if plan.target else []
    target = sound(spoken, samples, responses[:1] * len(spoken))
    reference = np.concatenate([load(piece) for piece in plan.reference])
    if plan.equalise:
        target, reference = (
            equalise(torch.from_numpy(signal), torch.from_numpy(curve)).numpy()
            for signal, curve in zip((target, reference), curves, strict=True)
        )
    parts = np.stack([target, sound(plan.interference, samples, responses[1:]), sound(plan.noise, samples)])

    powers = active_power(torch.from_numpy(parts)).numpy()
    speech = powers[0] if powers[0] > 0 else powers[1]
    wanted = np.array([speech, speech * 10 ** (-plan.sir_db / 10), speech * 10 ** (-plan.snr_db / 10)])
    if powers[0] == 0:
        wanted[1] = speech
    gains = np.sqrt(np.divide(wanted, powers, out=np.zeros(3), where=powers > 0))
    parts *= gains[:, None]
    mixture = parts.sum(0)
    rms, peak = np.sqrt(np.mean(mixture**2)), np.abs(mixture).max()
    gain = min(10 ** (plan.level_db / 20) / max(rms, 1e-9), 0.99 / max(peak, np.abs(parts).max(), 1e-9))
    parts *= gain
    powers = wanted * gain**2 * (powers > 0)
    return Example(parts.astype(np.float32), reference.astype(np.float32), index_row(plan, powers, gains * gain))


def index_row(plan, powers, gains):
    """What the store's index says of an example; no paths, so that the store can be copied anywhere."""

    def who(recording):
        return {
            "speaker": recording.speaker,
            "corpus": recording.corpus,
            "gender": recording.gender,
            "age": recording.age,
            "region": recording.region,
        }

    def what(piece):
        recording = piece.recording
        return {
            "speaker": recording.speaker,
            "file": recording.path.name,
            "start": round(piece.start * recording.speed, 4),
            "speed": round(recording.speed, 4),
            "formants": round(recording.formants, 4),
        }

    return {
        "target": who(plan.speaker),
        "absent": bool(powers[0] == 0),
        "pieces": [what(piece) for piece in (plan.target, *plan.more) if piece],
        "reference": [what(piece) for piece in plan.reference],
        "interference": [what(piece) for piece in plan.interference],
        "interferers": [who(piece.recording) for piece in plan.interference],
        "noise": [what(piece) for piece in plan.noise],
        "sir_db": plan.sir_db,
        "snr_db": plan.snr_db,
        "room": plan.room,
        "powers": [float(p) for p in powers],  # of the parts where they sound, full scale 1
        "gains": [float(g) for g in gains],
    }


def draw_speed(rng, settings):
    """A speed at which voices take whole percents of their time, so that the rates have samples in common."""
    return 100 / round(100 / rng.uniform(*settings.speed))


def group(recordings):
    """Recordings by speaker, in their order."""
    speakers = {}
    for recording in recordings:
        speakers.setdefault(recording.speaker, []).append(recording)
    return speakers


def shorten(rng, piece, segment):
    """Keep a random 30 to 100 % of a piece and move it to a random place in the segment."""
    seconds = piece.seconds * rng.uniform(0.3, 1.0)
    return Piece(piece.recording, piece.start, seconds, rng.uniform(0, segment - seconds))


def load(piece):
    """The samples of a piece (round(seconds * SAMPLE_RATE),); raises `UserError` where its file cannot be read."""
    speed, formants = piece.recording.speed, piece.recording.formants
    rate = round(audio.SAMPLE_RATE / speed)  # read at this rate and heard at another, it is faster or slower
    samples = audio.read_segment(piece.recording.path, piece.start * speed, piece.seconds * speed, rate)
    if formants == 1:
        return samples
    return shift_formants(torch.from_numpy(samples)[None], torch.tensor([formants]))[0].numpy()


def shift_formants(samples, factors):
    """Move the formants of voices (batch, samples) to `factors` (batch,) times their frequencies; the pitch stays.

    Each frame's spectrum is divided by its envelope, the first part of its cepstrum (Oppenheim and Schafer, 1968), and
    multiplied by the moved one; both are linear in the logarithm of its magnitudes, and so is what is added to that.
    """
    length, device = samples.shape[-1], samples.device
    if length < FORMANT_WINDOW:
        return samples
    frames = {"n_fft": FORMANT_WINDOW, "hop_length": FORMANT_WINDOW // 3}
    frames["window"] = torch.hann_window(FORMANT_WINDOW, device=device)
    spectrum = torch.stft(samples, **frames, pad_mode="constant", return_complex=True)
    bins = torch.arange(spectrum.shape[1], device=device)
    turns = 2 * math.pi / FORMANT_WINDOW * torch.arange(ENVELOPE, device=device)[:, None]
    cosines = torch.cos(turns * bins)
    moved = torch.cos(turns * (bins / factors[:, None, None]).clamp(max=len(bins) - 1))  # (batch, ENVELOPE, bins)
    twice = torch.where(bins % (len(bins) - 1) == 0, 1, 2)  # all bins but the first and the last stand for two
    envelope = cosines * twice / FORMANT_WINDOW @ (spectrum.abs() + 1e-6).log()
    gain = torch.exp(2 * (moved - cosines).transpose(1, 2) @ envelope)
    return torch.istft(spectrum * gain, **frames, length=length)


def sound(pieces, samples, responses=None):
    """The sum (samples,) of pieces, each as loud as the others where it sounds, each through its room response."""
    total = np.zeros(samples)
    for n, piece in enumerate(pieces):
        start = round(piece.offset * audio.SAMPLE_RATE)
        heard = load(piece)[: samples - start]
        placed = np.zeros(samples)
        placed[start : start + len(heard)] = heard
        if responses and responses[n] is not None:
            placed = scipy.signal.fftconvolve(placed, responses[n])[:samples]
        power = active_power(torch.from_numpy(placed)).item()
        if power > 0:
            total += placed / np.sqrt(power)
    return total


def active_power(samples):
    """Mean power of signals (..., samples) from first to last 20 ms within 50 dB of the loudest, 0 if silent."""
    frame = audio.SAMPLE_RATE // 50
    energy = F.pad(samples.double(), (0, -samples.shape[-1] % frame)).unflatten(-1, (-1, frame)).square().sum(-1)
    loudest = energy.amax(-1, keepdim=True)
    heard = (energy > 1e-5 * loudest).int()
    between = (heard.cumsum(-1) > 0) & (heard.flip(-1).cumsum(-1).flip(-1) > 0)
    power = (energy * between).sum(-1) / (frame * between.sum(-1).clamp(min=1))
    return torch.where(loudest[..., 0] < frame * SILENCE, 0.0, power)


def random_curve(rng):
    """A smooth random equaliser: gains in dB at six frequencies from 100 Hz to 8 kHz."""
    return rng.uniform(-EQUALISER_DB, EQUALISER_DB, 6)


def equalise(samples, curves):
    """Filter signals (..., samples) with equaliser `curves` (..., 6), interpolated over the frequency's logarithm."""
    spectrum = torch.fft.rfft(samples)
    frequencies = np.fft.rfftfreq(samples.shape[-1], 1 / audio.SAMPLE_RATE)
    points = np.geomspace(100, audio.SAMPLE_RATE / 2, curves.shape[-1])
    place = np.interp(np.log(np.maximum(frequencies, 1)), np.log(points), np.arange(len(points)))
    nearness = np.clip(1 - np.abs(place - np.arange(len(points))[:, None]), 0, 1)  # (6, frequencies)
    gains_db = curves.double() @ torch.from_numpy(nearness).to(samples.device)
    return torch.fft.irfft(spectrum * 10 ** (gains_db / 20), n=samples.shape[-1])


def draw_room(rng, rooms, sources):
    """Impulse responses of one room for several places: recorded ones where there are, else simulated (image method,
    Allen and Berkley, 1979, by pyroomacoustics) in a box of 3 to 8 m with a reverberation time of 0.15 to 0.5 s."""
    if rooms:
        responses = rooms[rng.integers(len(rooms))]
        chosen = [responses[n] for n in rng.choice(len(responses), sources, replace=len(responses) < sources)]
        return [audio.read(recording.path) for recording in chosen]
    size = rng.uniform([3, 3, 2.4], [8, 6, 3.5])
    absorption, order = pyroomacoustics.inverse_sabine(rng.uniform(0.15, 0.5), size)
    material = pyroomacoustics.Material(min(absorption, 0.99))
    box = pyroomacoustics.ShoeBox(size, fs=audio.SAMPLE_RATE, materials=material, max_order=min(order, 12))
    box.add_microphone(rng.uniform(0.5, size - 0.5))
    for _ in range(sources):
        box.add_source(rng.uniform(0.5, size - 0.5))
    box.compute_rir()
    return [response / np.abs(response).max() for response in box.rir[0]]
