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
REFERENCE_SHARES = (0.05, 0.2, 0.75)  # how often training takes each of REFERENCE_SECONDS
PRIMARY_SHARE = 0.1  # of training items come without a reference; their target is the loudest voice
PRIMARY_SIR_DB = (3.0, 10.0)
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

    With `remix`, item i keeps its target and gets another example's interference, a third one's noise, a reference
    length and new ratios, drawn anew for every (`seed`, `epoch`, i); the interfering voices are never the target's. A
    few items have no reference, and a target that is louder than the other voices.
    Without, it is as it was stored, with the longest reference. Raises `UserError` for a store that is not whole.
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
        # the speakers that sound in each part; noise has none
        self.voices = [
            [set() if row["absent"] else {row["target"]["speaker"]}, {v["speaker"] for v in row["interferers"]}]
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
        recipes = [self.recipe(n) for n in items]
        target = self.part(items, [0] * len(items), [recipe.gains[0] for recipe in recipes])
        interference = self.part(
            [r.interference for r in recipes], [r.part for r in recipes], [r.gains[1] for r in recipes]
        )
        noise = self.part([r.noise for r in recipes], [2] * len(items), [r.gains[2] for r in recipes])
        dvector = self.dvectors[items, [recipe.reference for recipe in recipes]]
        dvector[[n for n, recipe in enumerate(recipes) if recipe.primary]] = 0
        absent = torch.from_numpy(self.absent[items]).to(dvector.device)
        return Batch(target + interference + noise, target, dvector, absent)

    def part(self, items, parts, gains):
        """Stored spectra (len(items), freq, frames), complex64, times `gains`."""
        rows = [self.shards[n // SHARD][n % SHARD, part] for n, part in zip(items, parts, strict=True)]
        if self.device is None:
            rows = [torch.from_numpy(np.array(row)) for row in rows]
        spectra = torch.view_as_complex(torch.stack(rows).float())
        return spectra * torch.tensor(gains, dtype=torch.float32, device=spectra.device)[:, None, None]

    def recipe(self, n):
        """What item n is made of."""
        longest = len(REFERENCE_SECONDS) - 1
        if not self.remix:
            return Recipe(n, 1, n, (1.0, 1.0, 1.0), longest, primary=False)
        rng = np.random.default_rng([self.seed, self.epoch, n])
        speaker = self.index[n]["target"]["speaker"]
        while True:
            donor, part = int(rng.integers(len(self))), int(rng.integers(2))
            if speaker not in self.voices[donor][part]:
                break
        noise = int(rng.integers(len(self)))
        primary = not self.absent[n] and rng.random() < PRIMARY_SHARE
        sir_db = rng.uniform(*(PRIMARY_SIR_DB if primary else self.settings["sir_db"]))
        snr_db = rng.uniform(*self.settings["snr_db"])
        powers = self.powers[n, 0], self.powers[donor, part], self.powers[noise, 2]
        speech = powers[0] or powers[1] or 1.0
        ratio_db = sir_db if powers[0] else 0.0
        gains = (1.0, gain_between(speech, powers[1], ratio_db), gain_between(speech, powers[2], snr_db))
        return Recipe(donor, part, noise, gains, int(rng.choice(longest + 1, p=REFERENCE_SHARES)), primary)


@dataclass(frozen=True)
class Recipe:
    """An item's interference (part `part` of an example), its noise (of an example), the gains of its three parts, its
    reference (one of REFERENCE_SECONDS, by number), and whether it is to be done without."""

    interference: int
    part: int
    noise: int
    gains: tuple
    reference: int
    primary: bool


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


assert PARTS == ("target", "interference", "noise")
