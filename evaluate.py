"""Score a checkpoint on two-voice mixtures of speakers that it has never heard: a fixed list, drawn from a seed."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import corpora
import mixing
from extractor import Extractor
from metrics import si_sdr
from model import DEVICE
from utils import POSITIVE, ROOT, UserError, option, parse, require, run, whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

TRIES = 1000  # to draw voices that leave something for a reference


@dataclass(frozen=True, kw_only=True)
class Options:
    speech: list[str] = option(["LibriSpeech/test-clean"], "corpora, or folders with a folder per speaker")
    datasets: str = option(str(ROOT / "datasets"), "folder that holds the corpora")
    checkpoint: str | None = option(None, "checkpoint (default: models/extractor/best.pt, else the shipped one)")
    mixtures: int = option(200, "number of mixtures")
    segment: float = option(4.0, "their length in seconds")
    sir_db: list[float] = option([-5.0, 5.0], "range of the target over the interference in dB", nargs=2)
    seed: int = option(1, "seed of the list")
    curve: str | None = option(None, "save a picture of the checkpoint's learning curve here, too")
    device: str = option(DEVICE, "cpu, cuda, cuda:1 ...")

    def __post_init__(self):
        require(self, POSITIVE, "mixtures")


def main(argv):
    options = parse(Options, argv, __doc__)
    recordings = corpora.find(options.speech, "speech", Path(options.datasets))
    extractor = Extractor(options.checkpoint, options.device)
    cases = two_voices(recordings, options.mixtures, options.segment, options.sir_db, options.seed)
    print(summary([score(extractor, *case) for case in tqdm(cases, unit="mixture")]))
    if options.curve:
        learning_curve(options.curve, extractor.checkpoint.get("curve", []))
        print(options.curve)


def two_voices(recordings, count, segment, sir_db, seed):
    """A list of (Plan, reference of the interfering voice, Settings), item i drawn from (`seed`, i)."""
    settings = mixing.Settings(
        segment=segment, more_voices=0, no_voices=0, absent=0, partial=0, noise_share=0, music_share=0, sir_db=sir_db
    )
    mixer = mixing.Mixer(settings, recordings)
    cases = []
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        for _ in range(TRIES):
            plan = mixer.draw(rng)
            reference = mixer.draw_reference(rng, plan.interference[0])
            if sum(piece.seconds for piece in reference) >= mixing.MIN_REFERENCE_SECONDS:
                break
        else:
            raise UserError(f"--segment {segment:g}: leaves no speech for references; give a shorter one")
        cases.append((plan, reference, settings))
    return cases


def score(extractor, plan, interferer_reference, settings):
    """SI-SDR in dB of one mixture, of the estimate, and of what the interfering voice's reference extracts."""
    example = mixing.render(plan, settings)
    target, interference = example.parts[:2]
    mixture = target + interference
    other = np.concatenate([mixing.load(piece) for piece in interferer_reference])
    estimate = extractor.extract(mixture, extractor.enroll(example.reference))
    turned = extractor.extract(mixture, extractor.enroll(other))
    pairs = {
        "mixture": (mixture, target),
        "estimate": (estimate, target),
        "estimate_to_interference": (estimate, interference),
        "turned_mixture": (mixture, interference),
        "turned_estimate": (turned, interference),
    }
    return {name: si_sdr(*map(torch.from_numpy, pair)).item() for name, pair in pairs.items()}


def summary(rows):
    """The figures of a list of scores, as text."""
    value = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    improvement = value["estimate"] - value["mixture"]
    turned = value["turned_estimate"] - value["turned_mixture"]
    wrong = value["estimate"] < value["estimate_to_interference"]
    return (
        f"{len(rows)} mixtures: SI-SDR {value['mixture'].mean():.2f} dB, estimates {value['estimate'].mean():.2f} dB\n"
        f"improvement {improvement.mean():.2f} dB (median {np.median(improvement):.2f}), "
        f"by more than 1 dB in {100 * (improvement > 1).mean():.0f} %, wrong speaker in {100 * wrong.mean():.0f} %\n"
        f"with the interfering voice's reference, that voice: improvement {turned.mean():.2f} dB"
    )


def learning_curve(path, curve):
    """Save a picture of the validation rows of a training, see `main.Trainer.validate`."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot([row["minutes"] for row in curve], [row["si_sdr_improvement"] for row in curve], marker="o")
    axis.set(xlabel="minutes of training", ylabel="validation SI-SDR improvement, dB")
    axis.grid(alpha=0.3)
    with whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
