"""Hear it: extract one voice from recordings, or from an example of the validation set."""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import audio
import dataset
from extractor import PRIMARY_SECONDS, Extractor, Voice
from metrics import attenuation_db, si_sdr
from model import DEVICE
from utils import ROOT, UserError, option, parse, run, whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

BLOCK_SECONDS = 10.0  # of the pieces that recordings are read in
RESULTS = ROOT / "results"


@dataclass(frozen=True, kw_only=True)
class Options:
    mixture: list[str] = option(
        [], "recordings to extract from; none: an example of the validation set", positional=True
    )
    reference: str | None = option(
        None, "recording of the wanted voice alone, 1 s or more; none: the primary, loudest speaker"
    )
    self_enroll: bool | None = option(
        None, "without a reference, take one from the first estimate (default: where a recording has 5 s or more)"
    )
    target: str | None = option(None, "recording of what is right, if known: prints SI-SDR, saves a picture beside it")
    output: str | None = option(None, "file for one mixture, folder for several or for an example (default: results)")
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")
    data: str | None = option(None, "folder with examples (default: the largest in datasets/preprocessed)")
    example: int = option(0, "number of the validation example")
    play: bool = option(True, "play the sound")
    device: str = option(DEVICE, "cpu, cuda, cuda:1 ...")


def main(argv):
    options = parse(Options, argv, __doc__)
    if options.reference and not options.mixture:
        raise UserError(f"{options.reference}: a reference needs a MIXTURE to extract from")
    extractor = Extractor(options.checkpoint, options.device)
    if not options.mixture:
        return extract_example(extractor, options)
    if options.target and len(options.mixture) > 1:
        raise UserError(f"{options.target}: a target goes with one mixture; leave it out or give one")
    voice = None
    if options.reference:
        reference = audio.read(options.reference)
        audio.check_reference(reference, options.reference)
        voice = extractor.enroll(reference)
    target = audio.read(options.target) if options.target else None
    failed = 0
    for path, output in outputs(options):
        try:
            if target is not None and len(target) != len(audio.read(path)):
                raise UserError(f"{options.target}: not as long as {path}; give the target's part of this mixture")
            extract_file(extractor, voice or primary(extractor, path, options.self_enroll), path, output)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"{output}")
        if options.target:
            compare(path, target, output)
        if options.play:
            with audio.Reader(output) as reader:
                play(reader.blocks(1.0), reader.rate)
    return 2 if failed else 0


def outputs(options):
    """Pairs of mixture and output path: a file for one, a folder for several."""
    several = len(options.mixture) > 1
    place = Path(options.output or RESULTS)
    suffix = Path(options.output).suffix.lower() if options.output else ""
    if not several and suffix and not place.is_dir():
        pairs = [(options.mixture[0], place)]
    elif several and suffix in audio.FORMATS:
        raise UserError(f"{place}: is a file, but there are {len(options.mixture)} mixtures; give a folder")
    elif place.exists() and not place.is_dir():
        raise UserError(f"{place}: is a file; give a folder")
    else:
        pairs = [(path, place / f"{Path(path).stem}_estimate.wav") for path in options.mixture]
    if len({output for _, output in pairs}) < len(pairs):
        raise UserError("two mixtures have the same name; extract them one by one")
    given = {Path(path).resolve() for path in (*options.mixture, options.reference, options.target) if path}
    for _, output in pairs:
        if output.resolve() in given:
            raise UserError(f"{output}: is one of the recordings given; choose another --output")
    return pairs


def primary(extractor, path, self_enroll):
    """The voice of a recording's primary speaker, heard from itself; `None` where that is not wanted or not possible.

    Without a wish (`None`), recordings of PRIMARY_SECONDS or more are heard, and those of unknown length.
    """
    with audio.Reader(path) as reader:
        long = reader.frames is None or reader.frames >= PRIMARY_SECONDS * reader.rate
        if not (long if self_enroll is None else self_enroll):
            return None
        blocks = progress(reader, f"{Path(path).name}, who speaks")
        blocks = audio.Resampler(reader.rate, extractor.sample_rate).convert(blocks)
        voice, start = extractor.enroll_primary(blocks)
    if voice is None:
        print(f"{path}: no voice is heard for {PRIMARY_SECONDS:g} s, so nothing of it is taken as a reference")
    else:
        end = start + PRIMARY_SECONDS
        print(f"{path}: the reference is what was heard from {start:g} to {end:g} s, and what sounds like it nearby")
    return voice


def progress(reader, name):
    """The blocks of a recording, with a progress bar."""
    total = reader.frames and reader.frames / reader.rate
    with tqdm(total=total, unit="s", unit_scale=True, desc=name, disable=None) as bar:
        for block in reader.blocks(BLOCK_SECONDS):
            bar.update(len(block) / reader.rate)
            yield block


def extract_file(extractor, voice, path, output):
    """Extract a voice from a recording of any length into one of the same rate and length."""
    with audio.Reader(path) as reader, audio.Writer(output, reader.rate) as writer:
        for block in extractor.extract_blocks(progress(reader, Path(path).name), voice, reader.rate):
            writer.write(block)


def extract_example(extractor, options):
    """Extract the target of a validation example: figures, three recordings, a picture, and sound."""
    folder = options.data or dataset.largest()
    examples = dataset.Examples(folder, "validation")
    dataset.check_model(examples.settings, extractor.network.config)
    if not 0 <= options.example < len(examples):
        raise UserError(f"{folder}: has no validation example {options.example}; choose 0 to {len(examples) - 1}")
    batch = examples[options.example]
    signals = examples.stft.samples(torch.cat([batch.mixture, batch.target]), examples.samples)
    mixture, target = signals.numpy()
    estimate = extractor.extract(mixture, Voice(batch.dvector[0]))
    place = Path(options.output or RESULTS)
    signals = {"mixture": mixture, "target": target, "estimate": estimate}
    print_scores(signals)
    for name, samples in signals.items():
        audio.write(place / f"{name}.wav", samples, extractor.sample_rate)
        print(place / f"{name}.wav")
    picture(place / "spectrograms.png", signals, extractor.sample_rate)
    print(place / "spectrograms.png")
    if options.play:
        for samples in (mixture, target, estimate):
            play([samples], extractor.sample_rate)


def compare(mixture, target, output):
    """Print SI-SDR before and after of a recording extracted to a file, and save a picture beside it."""
    signals = {"mixture": audio.read(mixture), "target": target, "estimate": audio.read(output)}
    print_scores(signals)
    path = Path(output).with_suffix(".png")
    picture(path, signals, audio.SAMPLE_RATE)
    print(path)


def print_scores(signals):
    """Print how much better the estimate is than the mixture, or how much quieter where the target is silent."""
    mixture, target, estimate = (torch.from_numpy(signals[name]) for name in ("mixture", "target", "estimate"))
    if not target.any():
        print(f"the target does not speak; the estimate is {attenuation_db(estimate, mixture):.1f} dB quieter")
        return
    before, after = si_sdr(mixture, target).item(), si_sdr(estimate, target).item()
    print(f"SI-SDR: mixture {before:.1f} dB, estimate {after:.1f} dB, improvement {after - before:.1f} dB")


def picture(path, signals, rate):
    """Save the spectrograms of named signals (samples,) side by side as a PNG."""
    figure, axes = plt.subplots(1, len(signals), figsize=(4 * len(signals), 3), sharey=True, layout="constrained")
    for axis, (name, samples) in zip(axes, signals.items(), strict=True):
        loudest = 20 * np.log10(np.abs(samples).max() + 1e-6)
        power = axis.specgram(samples + 1e-8, NFFT=512, Fs=rate, noverlap=384, scale="dB")[3]
        power.set_clim(loudest - 110, loudest - 40)
        axis.set(title=name, xlabel="seconds")
    axes[0].set_ylabel("Hz")
    with whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def play(blocks, rate):
    """Play a signal that comes in blocks (samples,), or say why that cannot be done."""
    try:
        import sounddevice  # needs the PortAudio library, which may be missing

        with sounddevice.OutputStream(rate, channels=1, dtype="float32") as stream:
            for block in blocks:
                stream.write(np.ascontiguousarray(block[:, None], dtype=np.float32))
    except Exception as error:
        print(f"not played: {str(error).strip()}; on Linux: sudo apt-get install libportaudio2", file=sys.stderr)


if __name__ == "__main__":
    run(main)
