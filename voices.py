"""Make the voices, the noise and the music in datasets/demo, which `make demo` and the tests use without a corpus.

A maintainer runs it once, on Debian. No recording of a person is in it: the voices come from Debian's speech
synthesizers, the noise and the music are computed. datasets/demo/README.md has the licences.
"""

import dataclasses
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from audio import SAMPLE_RATE
from utils import ROOT, UserError, option, parse, run, whole

DEMO = ROOT / "datasets" / "demo"
LEVEL_DB = -23.0  # dBFS, root mean square
PEAK = 0.9
TRIM_DB = 30.0
OPUS_LEVEL = 0.955  # of libsndfile: 6000 + (1 - level) * 250000 bit/s, about 17 kbit/s
UTTERANCES = 6  # of each voice
STRETCH = 1.2  # the synthesizers hurry when left alone
PACKAGES = {
    "flite": "flite",
    "espeak-ng": "espeak-ng",
    "text2wave": "festival festvox-kdlpc16k festvox-italp16k festvox-itapc16k festvox-ca-ona-hts festvox-suopuhe-lj "
    "festvox-suopuhe-mv festvox-czech-dita festvox-czech-krb festvox-czech-machac festvox-czech-ph",
}
# festival's voices outside English predate UTF-8
ENCODINGS = {"en": "utf-8", "cs": "iso-8859-2", "ca": "iso-8859-1", "fi": "iso-8859-1", "it": "iso-8859-1"}


@dataclasses.dataclass(frozen=True)
class Voice:
    """A speaker: a synthesizer's voice, changed by a mean pitch (Hz) and by its formants, which go up with `tract`."""

    name: str
    sex: str
    program: str
    voice: str
    language: str = "en"
    tract: float = 1.0
    pitch: float | None = None


VOICES = [
    Voice("slt", "f", "flite", "slt"),
    Voice("slt_low", "f", "flite", "slt", tract=0.86, pitch=165),
    Voice("rms", "m", "flite", "rms"),
    Voice("rms_low", "m", "flite", "rms", tract=0.86),
    Voice("awb", "m", "flite", "awb"),
    Voice("awb_high", "f", "flite", "awb", tract=1.15, pitch=200),
    Voice("kal", "m", "flite", "kal16"),
    Voice("kal_high", "f", "flite", "kal16", tract=1.25, pitch=230),
    Voice("ked", "m", "text2wave", "ked_diphone"),
    Voice("ked_high", "f", "text2wave", "ked_diphone", tract=1.18, pitch=190),
    Voice("lp", "f", "text2wave", "lp_diphone", "it"),
    Voice("pc", "m", "text2wave", "pc_diphone", "it"),
    Voice("ona", "f", "text2wave", "upc_ca_ona_hts", "ca"),
    Voice("ona_low", "f", "text2wave", "upc_ca_ona_hts", "ca", tract=0.86),
    Voice("lj", "f", "text2wave", "suo_fi_lj_diphone", "fi"),
    Voice("mv", "m", "text2wave", "hy_fi_mv_diphone", "fi"),
    Voice("dita", "f", "text2wave", "czech_dita", "cs"),
    Voice("krb", "m", "text2wave", "czech_krb", "cs"),
    Voice("machac", "m", "text2wave", "czech_machac", "cs"),
    Voice("ph", "m", "text2wave", "czech_ph", "cs"),
    Voice("espeak_f2", "f", "espeak-ng", "en-us+f2"),
    Voice("espeak_annie", "f", "espeak-ng", "en-us+Annie"),
    Voice("espeak_m7", "m", "espeak-ng", "en-gb-scotland+m7"),
    Voice("espeak_adam", "m", "espeak-ng", "en-us+adam"),
]
NOISES = ("pink", "fan", "hum", "rain", "keyboard", "engine", "wind", "beeps")
TIMBRES = ("organ", "strings", "bells", "guitar")
MUSIC = (*TIMBRES, "drums", "band")
TAKES = 2  # of each kind of noise and music
EXAMPLE = ("slt", "rms")  # who speaks, and who talks over it, in the bundled mixture
EXAMPLE_SNR_DB = 10.0


@dataclasses.dataclass
class Options:
    output: str = option(str(DEMO), "folder that gets the folders voices, noise and music; existing ones are replaced")
    seed: int = option(0, "seed of the noise and the music")


def main(argv):
    options = parse(Options, argv, __doc__.splitlines()[0])
    output = Path(options.output)
    check_programs()
    with whole(output / "voices") as folder:
        for voice, sentences in dealt_sentences():
            for n, sentence in enumerate(sentences):
                write(folder / voice.name / f"{n:02d}.opus", speak(voice, sentence))
    for kind, names, make in (("noise", NOISES, noise), ("music", MUSIC, music)):
        with whole(output / kind) as folder:
            for i, name in enumerate(names):
                for take in range(TAKES):
                    rng = np.random.default_rng([options.seed, kind == "music", i, take])
                    write(folder / name / f"{take:02d}.opus", make(rng, name))
    example(output)
    files = [path for path in output.rglob("*") if path.is_file()]
    print(f"{output}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")


def example(folder):
    """The mixture that `make demo` extracts a voice from, its target, and a reference from other sentences."""
    load = {name: [soundfile.read(folder / "voices" / name / f"{n:02d}.opus")[0] for n in range(3)] for name in EXAMPLE}
    target, interference = load[EXAMPLE[0]][0], load[EXAMPLE[1]][0]
    noise = soundfile.read(folder / "noise" / "fan" / "00.opus")[0] * 10 ** (-EXAMPLE_SNR_DB / 20)
    length = min(len(target), len(interference))
    mixture = 0.5 * (target[:length] + interference[:length] + noise[:length])
    assert np.abs(mixture).max() < PEAK
    for name, samples in (("mixture", mixture), ("target", 0.5 * target[:length])):
        with whole(folder / f"{name}.flac") as partial:
            soundfile.write(partial, samples, SAMPLE_RATE)
    with whole(folder / "reference.opus") as partial:
        write(partial, np.concatenate(load[EXAMPLE[0]][1:]))


def check_programs():
    """Raise `UserError` with the Debian packages of each synthesizer that is missing."""
    missing = [program for program in PACKAGES if not shutil.which(program)]
    if missing:
        packages = " ".join(PACKAGES[program] for program in missing)
        raise UserError(f"{', '.join(missing)}: not installed; on Debian: apt-get install {packages}")


def dealt_sentences():
    """Pairs of each voice and its sentences: the next ones in its language, from the top again after the last."""
    dealt = dict.fromkeys(ENCODINGS, 0)
    for voice in VOICES:
        lines = (DEMO / "sentences" / f"{voice.language}.txt").read_text(encoding="utf-8").splitlines()
        start = dealt[voice.language]
        dealt[voice.language] += UTTERANCES
        yield voice, [lines[n % len(lines)] for n in range(start, start + UTTERANCES)]


def speak(voice, sentence):
    """Synthesise `sentence` as samples, without the silence at both ends; raises `UserError` where that fails."""
    # resampling by `tract` shortens the speech and raises its pitch
    stretch = STRETCH * voice.tract
    pitch = voice.pitch and voice.pitch / voice.tract
    with tempfile.TemporaryDirectory() as folder:
        text, wav = Path(folder, "text.txt"), Path(folder, "speech.wav")
        text.write_text(sentence + "\n", encoding=ENCODINGS[voice.language])
        if voice.program == "flite":
            command = ["-voice", voice.voice, "--setf", f"duration_stretch={stretch}", "-f", text, "-o", wav]
            if pitch:
                command += ["--setf", f"int_f0_target_mean={pitch}"]
        elif voice.program == "espeak-ng":
            command = ["-v", voice.voice, "-s", str(round(175 / stretch)), "-f", text, "-w", wav]
        else:
            scheme = f"(voice_{voice.voice}) (Parameter.set 'Duration_Stretch {stretch})"
            if voice.voice.endswith("_hts"):
                scheme += f' (set! hts_engine_params (append hts_engine_params (list (list "-r" {1 / stretch}))))'
            if pitch:
                scheme += f" (set! int_lr_params '((target_f0_mean {pitch}) (target_f0_std {pitch / 8})"
                scheme += " (model_f0_mean 170) (model_f0_std 34)))"
            command = ["-eval", f"(begin {scheme})", text, "-o", wav]
        done = subprocess.run([voice.program, *command], capture_output=True, text=True, errors="replace")
        if done.returncode or not wav.exists() or wav.stat().st_size < 1000:
            complaint = " ".join((done.stderr or "no sound").split())[:200]
            raise UserError(f"voice {voice.name}: {complaint}; on Debian: apt-get install {PACKAGES[voice.program]}")
        speech, rate = soundfile.read(wav)
    return trim(soxr.resample(speech, rate * voice.tract, SAMPLE_RATE))


def trim(speech):
    """Cut both ends off where they are `TRIM_DB` below the loudest 10 ms, but for 50 and 100 ms."""
    frame = SAMPLE_RATE // 100
    frames = speech[: len(speech) // frame * frame].reshape(-1, frame)
    level_db = 10 * np.log10(np.square(frames).mean(1) + 1e-10)
    loud = np.flatnonzero(level_db > level_db.max() - TRIM_DB)
    return speech[max(loud[0] - 5, 0) * frame : (loud[-1] + 10) * frame]


def write(path, samples):
    """Write samples as Opus at `LEVEL_DB`, or lower where they would peak over `PEAK`."""
    gain = 10 ** (LEVEL_DB / 20) / np.sqrt(np.square(samples).mean())
    samples = samples * min(gain, PEAK / np.abs(samples).max())
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)


def noise(rng, name, seconds=10):
    """Samples of one of `NOISES`, at any level."""
    samples = seconds * SAMPLE_RATE
    t = np.arange(samples) / SAMPLE_RATE
    if name == "pink":
        return coloured(rng, samples, rng.uniform(-1.2, -0.8))
    if name == "fan":
        blades = rng.uniform(60, 120)
        return coloured(rng, samples, -1.6) + harmonics(t * blades, [0.2, 0.1, 0.05]) * (1 + 0.3 * np.sin(t))
    if name == "hum":
        mains = rng.choice([50, 60])
        return harmonics(t * mains, [0.4, 1, 0.3, 0.5, 0.1, 0.3, 0, 0.2]) + 0.03 * coloured(rng, samples, 0)
    if name == "rain":
        drops = events(rng, samples, 60, lambda: ring(rng.uniform(1000, 6000), 0.01) * rng.exponential(1.5))
        return coloured(rng, samples, 0.3, low=150) + drops
    if name == "keyboard":
        keys = events(rng, samples, 6, lambda: coloured(rng, 800, 0, low=1500) * np.exp(-np.arange(800) / 120))
        return keys * 3 + 0.1 * coloured(rng, samples, -1)
    if name == "engine":
        turns = np.cumsum(rng.uniform(25, 45) * (1 + 0.2 * slow(rng, samples))) / SAMPLE_RATE
        return harmonics(turns, 1 / np.arange(1, 40)) + 0.3 * coloured(rng, samples, -1)
    if name == "wind":
        return coloured(rng, samples, -2, low=60) * np.exp(0.6 * slow(rng, samples))
    pattern = (t * rng.uniform(1.5, 3) % 1 < 0.4) & (t % 4 < 2.5)
    return harmonics(t * rng.uniform(900, 2200), [1, 0, 0.3]) * pattern + 0.05 * coloured(rng, samples, -1)


def coloured(rng, samples, exponent, low=40):
    """Gaussian noise whose power goes with frequency to the power `exponent`, from `low` Hz on; level 1."""
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    gain = np.maximum(frequency, low) ** (exponent / 2) * (frequency >= low)
    shaped = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * gain, samples)
    return shaped / np.sqrt(np.square(shaped).mean())


def slow(rng, samples):
    """A curve of level about 1 that wanders within seconds."""
    points = rng.standard_normal(samples // SAMPLE_RATE * 2 + 2)
    return np.interp(np.arange(samples), np.arange(len(points)) * SAMPLE_RATE / 2, points)


def harmonics(turns, levels):
    """Sines at 1, 2, 3... times a fundamental that has made `turns` (samples,) turns."""
    return sum(level * np.sin(2 * np.pi * (n + 1) * turns) for n, level in enumerate(levels))


def ring(frequency, decay_seconds):
    """A sine that dies away."""
    t = np.arange(round(decay_seconds * 5 * SAMPLE_RATE)) / SAMPLE_RATE
    return np.sin(2 * np.pi * frequency * t) * np.exp(-t / decay_seconds)


def events(rng, samples, per_second, make):
    """Sounds from `make()` at random times."""
    track = np.zeros(samples)
    for start in rng.integers(0, samples, per_second * samples // SAMPLE_RATE):
        add(track, start, make())
    return track


def add(track, start, sound):
    """Add `sound` to `track` from sample `start` on, as far as it fits."""
    part = track[start : start + len(sound)]
    part += sound[: len(part)]


def music(rng, name, seconds=12):
    """Samples of one of `MUSIC`, at any level: chords in a timbre, a beat, or everything together."""
    beat = round(60 / rng.uniform(80, 130) * SAMPLE_RATE)
    track = np.zeros(seconds * SAMPLE_RATE)
    key = rng.uniform(110, 196)  # Hz
    progression = [[0, 5, 7, 0], [0, 9, 5, 7], [9, 5, 0, 7], [0, 7, 9, 5]][rng.integers(4)]  # semitones
    for n, start in enumerate(range(0, len(track), beat)):
        root = progression[n // 4 % 4]
        chord = [root, root + (3 if root == 9 else 4), root + 7, root + 12]
        if name in ("drums", "band"):
            for half in (0, beat // 2):
                add(track, start + half, 0.1 * coloured(rng, 800, 0, low=4000) * np.exp(-np.arange(800) / 150))
            if n % 2:
                add(track, start, 0.5 * coloured(rng, 3000, -0.5, low=200) * np.exp(-np.arange(3000) / 700))
            else:
                add(track, start, 2 * ring(rng.uniform(55, 60), 0.06))
        for timbre in TIMBRES if name == "band" else (name,):
            if timbre in ("organ", "strings") and n % 4 == 0:
                for step in chord:
                    add(track, start, 0.2 * note(rng, timbre, key * 2 ** (step / 12), beat * 4))
            elif timbre in ("bells", "guitar"):
                for half in (0, beat // 2):
                    pitch = key * 2 ** (rng.choice(chord) / 12) * (4 if timbre == "bells" else 1)
                    add(track, start + half, 0.5 * note(rng, timbre, pitch, beat * 2))
    return track


def note(rng, timbre, frequency, samples):
    """One note of `TIMBRES`."""
    t = np.arange(samples) / SAMPLE_RATE
    if timbre == "organ":
        sound = harmonics(t * frequency, [1, 0.6, 0.2, 0.4, 0, 0.1, 0, 0.2])
        attack = 0.03
    elif timbre == "strings":
        vibrato = 0.003 * frequency * np.sin(2 * np.pi * 5.5 * t) / 5.5
        sound = harmonics(t * frequency + vibrato, 1 / np.arange(1, min(20, int(7000 / frequency))))
        attack = 0.25
    elif timbre == "bells":
        partials = [(1, 1.0), (2.76, 0.5), (5.4, 0.2)]
        sound = sum(a * np.sin(2 * np.pi * frequency * r * t) * np.exp(-t * r * 2) for r, a in partials)
        attack = 0.002
    else:  # a plucked string: Karplus and Strong, Computer Music Journal 7(2), 1983
        period = round(SAMPLE_RATE / frequency)
        string = rng.uniform(-1, 1, period)
        periods = []
        for _ in range(-(-samples // period)):
            periods.append(string)
            string = 0.498 * (string + np.roll(string, 1))
        sound = np.concatenate(periods)[:samples]
        attack = 0.002
    return sound * np.minimum(1, t / attack) * np.minimum(1, (samples / SAMPLE_RATE - t) / 0.05)


if __name__ == "__main__":
    run(main)
