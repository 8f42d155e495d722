"""The store of precomputed examples and the training source that remixes them.

    datasets/preprocessed/size=N/
        settings.json                the exact settings; nothing else may be added to this store
        train/00000/, 00001/, ...    shards of up to SHARD examples
        validation/00000/, ...
            spectra.npy     (examples, 3 parts, freq, frames, 2) float16: STFTs of target, interference, noise; re, im
            dvectors.npy    (examples, 3 lengths, 256) float32: of 1, 3 and 10 s of reference, or as much as there was
            index.json      a list of rows: speakers, files, powers, ratios (mixing.index_row)

The STFT is linear, so the mixture is the sum of the parts, and other gains or other examples' parts make new mixtures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mixing import PARTS, REFERENCE_SECONDS
from stft import Stft
from utils import ROOT, UserError, whole

SHARD = 256
SPLITS = ("train", "validation")
REFERENCE_SHARES = (0.1, 0.45, 0.45)  # how often training takes each of REFERENCE_SECONDS
LOUDER_SHARE = 0.2  # of pairs have one voice that is louder, by PRIMARY_SIR_DB
PRIMARY_SHARE = 0.5  # of those louder voices are wanted without a reference
PRIMARY_SIR_DB = (3.0, 10.0)
SAME_CORPUS_SHARE = 0.7  # of pairs are of one corpus: two are told apart by their microphones, not their voices
NOISE_SHARE = 0.5  # of pairs get an example's noise, if it has any: voices are what is to be learnt first
TARGET, INTERFERENCE, NOISE = map(PARTS.index, ("target", "interference", "noise"))
SHORTER, LONGEST = 1, len(REFERENCE_SECONDS) - 1
TRIES = 1000  # to find an example that fits
PREPROCESSED = ROOT / "datasets" / "preprocessed"


def write_shard(folder, count, examples):
    """Write one shard from an iterator of `count` (spectra, dvectors, row), all of it or nothing.

    One example is held at a time; writing to a memory map instead would end the process on a full disk.
    """
    dvectors, rows = [], []
    with whole(folder) as partial:
        partial.mkdir()
        with open(partial / "spectra.npy", "wb") as file:
            for spectra, dvector, row in examples:
                if not rows:
                    header = {"descr": "<f2", "fortran_order": False, "shape": (count, *spectra.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(spectra.astype("<f2").tobytes())
                dvectors.append(dvector)
                rows.append(row)
        assert len(rows) == count
        np.save(partial / "dvectors.npy", np.stack(dvectors))
        (partial / "index.json").write_text(json.dumps(rows))


def read_settings(folder):
    """The settings a store was made with. Raises `UserError` where there is no store."""
    try:
        return json.loads((Path(folder) / "settings.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no examples here; make them with: python3 downloader.py") from None


def largest(root=PREPROCESSED):
    """The largest store under `root`; `root` where there is none."""
    found = [path for path in Path(root).glob("size=*/settings.json") if path.parent.name[5:].isdigit()]
    return max((path.parent for path in found), key=lambda path: int(path.name[5:]), default=Path(root))


@dataclass
class Batch:
    """Some examples: spectra (batch, freq, frames) complex64, dvector (batch, 256), absent (batch,) bool.

    A d-vector of zeros says that there is no reference, see `model.Network.forward`.
    """

    mixture: torch.Tensor
    target: torch.Tensor
    dvector: torch.Tensor
    absent: torch.Tensor

    def to(self, device):
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pin_memory(self):
        return Batch(*(value.pin_memory() for value in vars(self).values()))


class Examples(torch.utils.data.Dataset):
    """The examples of one split of a store, read through memory maps or, given a device, held there as a whole.

    With `remix`, neighbours in a batch are a pair: their targets are mixed at a new ratio, in a share of pairs with a
    third example's interference or a fourth's noise, all drawn anew for every (`seed`, `epoch`, pair). Each of the two
    is the target of one item, so that nothing but the d-vector tells what is right. In a share of pairs one speaks
    alone; in a share of items somebody is wanted who does not speak, or the louder voice without a reference. D-vectors
    stray, by as much as another example's does from 10 to 3 s of reference, or training would learn voices by heart.
    Without `remix` an item is as it was stored, with the longest reference.

    Raises `UserError` for a store that is not whole.
    """

    def __init__(self, folder, split, remix=False, seed=0, device=None):
        self.folder, self.remix, self.seed, self.device, self.epoch = Path(folder), remix, seed, device, 0
        self.settings = read_settings(folder)
        self.stft = Stft(self.settings["n_fft"], self.settings["hop"])
        self.samples = self.settings["samples"]
        count = self.settings["examples"][split]
        shards = [self.folder / split / f"{n:05d}" for n in range(-(-count // SHARD))]
        missing = [shard for shard in shards if not shard.exists()]
        if missing:
            raise UserError(f"{missing[0]}: missing; finish the store with the downloader.py command that began it")
        try:
            self.shards = [np.load(shard / "spectra.npy", mmap_mode="r") for shard in shards]
            self.dvectors = torch.from_numpy(np.concatenate([np.load(shard / "dvectors.npy") for shard in shards]))
            self.index = [row for shard in shards for row in json.loads((shard / "index.json").read_text())]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{folder}: not whole ({error}); copy it again, or remove it and run downloader.py"
            ) from error
        self.powers = np.array([row["powers"] for row in self.index])
        self.absent = np.array([row["absent"] for row in self.index])
        self.corpora = [row["target"]["corpus"] for row in self.index]
        # the speakers that sound in each part; noise has none
        self.speakers = [
            [set() if row["absent"] else {row["target"]["speaker"]}, {v["speaker"] for v in row["interferers"]}, set()]
            for row in self.index
        ]
        if device is not None:
            self.shards = [torch.from_numpy(np.array(shard)).to(device) for shard in self.shards]
            self.dvectors = self.dvectors.to(device)

    @staticmethod
    def bytes(folder, split):
        """The memory that the spectra of a split take."""
        return sum(path.stat().st_size for path in (Path(folder) / split).glob("*/spectra.npy"))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, n):
        return self.__getitems__([n])

    def __getitems__(self, items):
        """The `Batch` of these items."""
        recipes = self.recipes(items) if self.remix else [self.stored(n) for n in items]
        spectra = {sound: self.spectrum(sound) for recipe in recipes for sound in recipe.sounds}  # a pair's only once
        batch = []
        for recipe in recipes:
            mixture = sum(spectra[sound] for sound in recipe.sounds)
            target = torch.zeros_like(mixture) if recipe.target is None else spectra[recipe.target]
            dvector = self.dvectors[recipe.wanted, recipe.reference]
            if recipe.strayed is not None:
                dvector = dvector + self.dvectors[recipe.strayed, SHORTER] - self.dvectors[recipe.strayed, LONGEST]
            dvector = torch.zeros_like(dvector) if recipe.primary else dvector
            batch.append((mixture, target, dvector, torch.tensor(recipe.target is None, device=mixture.device)))
        return Batch(*map(torch.stack, zip(*batch, strict=True)))

    def spectrum(self, sound):
        """The spectrum (freq, frames), complex64, of a `Sound`."""
        row = self.shards[sound.example // SHARD][sound.example % SHARD, sound.part]
        if self.device is None:
            row = torch.from_numpy(np.array(row))
        return sound.gain * torch.view_as_complex(row.float())

    def stored(self, n):
        """The `Recipe` of example n as it was stored."""
        sounds = [Sound(n, part) for part in range(len(PARTS))]
        return Recipe(sounds, None if self.absent[n] else sounds[TARGET], n, LONGEST)

    def recipes(self, items):
        """The `Recipe` of each item, remixed."""
        pairs = [self.pair(items[n], items[min(n + 1, len(items) - 1)]) for n in range(0, len(items), 2)]
        return [recipe for pair in pairs for recipe in pair][: len(items)]

    def pair(self, one, other):
        """The two recipes of a mixture of these examples' targets; others stand in for those that do not fit."""
        settings = self.settings
        rng = np.random.default_rng([self.seed, self.epoch, one, other])
        one = self.find(rng, TARGET, set(), one)
        corpus = self.corpora[one] if rng.random() < SAME_CORPUS_SHARE else None
        other = self.find(rng, TARGET, self.speakers[one][TARGET], other, corpus)
        if other is None:
            other = one
        speakers = self.speakers[one][TARGET] | self.speakers[other][TARGET]
        louder = rng.random() < LOUDER_SHARE
        sir_db = rng.uniform(*(PRIMARY_SIR_DB if louder else settings["sir_db"]))
        voices = [Sound(one, TARGET)]
        if other != one and rng.random() >= settings["no_voices"]:
            voices.append(self.under(one, other, TARGET, sir_db))
        targets = dict(zip((one, other), voices, strict=False))
        if not louder and rng.random() < settings["more_voices"]:
            third = self.find(rng, INTERFERENCE, speakers)
            if third is not None:
                voices.append(self.under(one, third, INTERFERENCE, rng.uniform(*settings["sir_db"])))
                speakers = speakers | self.speakers[third][INTERFERENCE]
        noise = []
        if rng.random() < NOISE_SHARE:
            noise.append(self.under(one, int(rng.integers(len(self))), NOISE, rng.uniform(*settings["snr_db"])))
        recipes = []
        for wanted in (one, other):
            target, primary = targets.get(wanted), louder and wanted == one and rng.random() < PRIMARY_SHARE
            if not primary and rng.random() < settings["absent"]:
                stranger = self.find(rng, TARGET, speakers)
                wanted, target = (wanted, target) if stranger is None else (stranger, None)
            reference = int(rng.choice(len(REFERENCE_SECONDS), p=REFERENCE_SHARES))
            strayed = int(rng.integers(len(self)))
            recipes.append(Recipe([*voices, *noise], target, wanted, reference, primary, strayed))
        return recipes

    def find(self, rng, part, speakers, first=None, corpus=None):
        """An example, `first` if it fits, whose `part` sounds with none of these speakers in it; `None` for none.

        With `corpus`, the target of the example is of that corpus, unless none is found.
        """
        example = int(rng.integers(len(self))) if first is None else first
        for tried in range(TRIES):
            sounds = self.powers[example, part] > 0 and not self.speakers[example][part] & speakers
            if sounds and (corpus in (None, self.corpora[example]) or tried > TRIES / 2):
                return example
            example = int(rng.integers(len(self)))

    def under(self, one, example, part, ratio_db):
        """The part of an example, `ratio_db` under the target of example `one`."""
        return Sound(example, part, gain_between(self.powers[one, TARGET], self.powers[example, part], ratio_db))


@dataclass(frozen=True)
class Sound:
    """A part, one of PARTS by number, of an example, times a gain."""

    example: int
    part: int
    gain: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """What an item is made of."""

    sounds: list[Sound]  # their sum is the mixture
    target: Sound | None  # one of them; None: it is absent
    wanted: int  # the example whose reference it comes with
    reference: int  # which one, of REFERENCE_SECONDS by number
    primary: bool = False  # whether it is to be done without
    strayed: int | None = None  # the example whose d-vector's way from the longest to a shorter reference is added


def gain_between(power, other, ratio_db):
    """The gain on a signal of power `other` that puts it `ratio_db` under one of `power`; 1 where there is none."""
    return float(np.sqrt(power / other * 10 ** (-ratio_db / 10))) if other > 0 else 1.0


def check_model(settings, config):
    """Raise `UserError` unless a store's settings fit a `model.Config`."""
    for name in ("sample_rate", "n_fft", "hop"):
        if settings[name] != getattr(config, name):
            raise UserError(
                f"the examples have {name}={settings[name]}, the model {getattr(config, name)}; "
                "prepare examples of another --size for it with downloader.py"
            )
