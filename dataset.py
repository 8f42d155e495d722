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


class Tensors:
    """A dataclass whose fields are tensors."""

    def to(self, device):
        return type(self)(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pin_memory(self):
        return type(self)(*(value.pin_memory() for value in vars(self).values()))


@dataclass
class Batch(Tensors):
    """Some examples: spectra (batch, freq, frames) complex64, dvector (batch, 256), absent (batch,) bool.

    A d-vector of zeros says that there is no reference, see `model.Network.forward`.
    """

    mixture: torch.Tensor
    target: torch.Tensor
    dvector: torch.Tensor
    absent: torch.Tensor


@dataclass
class Orders(Tensors):
    """Some `Recipe`s as tensors (batch, ...), small enough to be drawn by other processes; see `Examples.batch`."""

    rows: torch.Tensor  # of spectra (batch, sounds)
    gains: torch.Tensor  # of those, 0 where an item has fewer sounds
    target: torch.Tensor  # which of its sounds; -1: it is absent
    wanted: torch.Tensor
    reference: torch.Tensor
    strayed: torch.Tensor  # -1: it does not
    primary: torch.Tensor


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
        self.folder, self.remix, self.seed, self.device = Path(folder), remix, seed, device
        self.settings = read_settings(folder)
        self.stft = Stft(self.settings["n_fft"], self.settings["hop"])
        self.samples = self.settings["samples"]
        self.load(split)
        self.epoch = 0

    def load(self, split):
        """Open the shards of a split."""
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
                f"{self.folder}: not whole ({error}); copy it again, or remove it and run downloader.py"
            ) from error
        self.powers = np.array([row["powers"] for row in self.index])
        self.absent = np.array([row["absent"] for row in self.index])
        self.corpora = [row["target"]["corpus"] for row in self.index]
        # the speakers that sound in each part; noise has none
        self.speakers = [
            [set() if row["absent"] else {row["target"]["speaker"]}, {v["speaker"] for v in row["interferers"]}, set()]
            for row in self.index
        ]
        if self.device is not None:
            self.held = torch.empty(count, *self.shards[0].shape[1:], dtype=torch.float16, device=self.device)
            for part, shard in zip(self.held.split(SHARD), self.shards, strict=True):
                part.copy_(torch.from_numpy(np.array(shard)))
            self.held = self.held.flatten(0, 1)
            self.dvectors = self.dvectors.to(self.device)

    @staticmethod
    def bytes(folder, split):
        """The memory that the stored spectra of a split take."""
        return sum(path.stat().st_size for path in (Path(folder) / split).glob("*/spectra.npy"))

    def __len__(self):
        return len(self.powers)

    def __getitem__(self, n):
        return self.__getitems__([n])

    def __getitems__(self, items):
        """The `Batch` of these items."""
        orders = self.orders(items)
        return self.batch(orders if self.device is None else orders.to(self.device))

    def orders(self, items):
        """The `Orders` of these items."""
        recipes = self.recipes(items) if self.remix else [self.stored(n) for n in items]
        sounds = max(len(recipe.sounds) for recipe in recipes)
        rows, gains = np.zeros((len(recipes), sounds), int), np.zeros((len(recipes), sounds), np.float32)
        for n, recipe in enumerate(recipes):
            for m, sound in enumerate(recipe.sounds):
                rows[n, m], gains[n, m] = self.row(sound.example, sound.part), sound.gain
        target = [-1 if recipe.target is None else recipe.sounds.index(recipe.target) for recipe in recipes]
        strayed = [-1 if recipe.strayed is None else recipe.strayed for recipe in recipes]
        others = [[getattr(recipe, name) for recipe in recipes] for name in ("wanted", "reference")]
        numbers = map(torch.tensor, (target, *others, strayed, [recipe.primary for recipe in recipes]))
        return Orders(torch.from_numpy(rows), torch.from_numpy(gains), *numbers)

    def batch(self, orders):
        """The `Batch` of `Orders` on the device, if there is one."""
        spectra = self.spectra(orders.rows) * orders.gains[..., None, None, None]
        mixture, items, absent = spectra.sum(1), torch.arange(len(spectra), device=spectra.device), orders.target < 0
        target = spectra[items, orders.target].masked_fill_(absent[:, None, None, None], 0)
        dvector, strayed = self.dvectors[orders.wanted, orders.reference], self.dvectors[orders.strayed]
        dvector = dvector + (strayed[:, SHORTER] - strayed[:, LONGEST]) * (orders.strayed >= 0)[:, None]
        dvector = dvector.masked_fill(orders.primary[:, None], 0)
        return Batch(torch.view_as_complex(mixture), torch.view_as_complex(target), dvector, absent)

    def row(self, example, part):
        """The number of a part's spectrum among all."""
        return example * len(PARTS) + part

    def spectra(self, rows):
        """Spectra (..., freq, frames, 2) float32 of these `rows` (...)."""
        if self.device is not None:
            return self.held[rows].float()
        rows, places = torch.unique(rows, return_inverse=True)  # a pair's only once
        examples, parts = np.divmod(rows.numpy(), len(PARTS))
        found = [self.shards[n // SHARD][n % SHARD, part] for n, part in zip(examples, parts, strict=True)]
        return torch.from_numpy(np.stack(found)).float()[places]

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
        if not louder and settings["max_voices"] > 1 and rng.random() < settings["more_voices"]:
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
