"""The corpora that can be fetched, and the recordings, speakers and rooms found in them or in folders of your own."""

import csv
import dataclasses
import functools
import hashlib
import operator
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import soundfile

from utils import UserError

KINDS = ("speech", "noise", "music", "rooms")
SUFFIXES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .sph".split())
PACKED = (".tar.gz", ".tgz", ".zip")
HELD_OUT_SHARE = 0.1  # of noise, music, rooms and speakers, for validation
MIN_SPEAKERS = 2  # in training and in validation
AGES = (10, 16, 30, 50)  # bounds of the age groups in `speaker_table`, in years


@dataclass(frozen=True)
class Recording:
    """One audio file; `speaker` is the corpus and the speaker in it, or its category of noise or music, or its room."""

    path: Path
    kind: str  # one of KINDS
    corpus: str
    speaker: str  # "LibriSpeech/19", "DEMAND/DKITCHEN", "RIRS_NOISES/mediumroom/Room001"
    seconds: float
    gender: str = ""  # "f", "m" or "" where it is not known
    age: int | None = None  # years
    region: str = ""  # accent, where it is known
    speed: float = 1.0  # at which it is played; `seconds` is how long it then is
    formants: float = 1.0  # factor on the frequencies of formants, beside that of the speed

    def at(self, speed, formants=1.0):
        """The same, `speed` times as fast and as high, its formants `formants` times higher: another voice."""
        return dataclasses.replace(self, seconds=self.seconds * self.speed / speed, speed=speed, formants=formants)


@dataclass(frozen=True)
class Archive:
    """A file to download, to be unpacked where it is packed. `about_bytes` is for forecasts only."""

    file: str
    url: str
    about_bytes: int
    checksum: str | None = None  # "sha256:..." or "md5:..."; None where its publisher states none

    @property
    def packed(self):
        return self.file.endswith(PACKED)

    @property
    def unpacked(self):
        """Name of the folder that it is unpacked to; a plain file keeps its own."""
        return next((self.file[: -len(suffix)] for suffix in PACKED if self.file.endswith(suffix)), self.file)


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be fetched; `files` maps each of its kinds to a pattern of paths in the unpacked archives."""

    name: str
    licence: str
    archives: list[Archive]
    files: dict[str, str]
    default: bool = False
    folder: str = ""  # below the folder for corpora; rows with the same folder share archives

    def __post_init__(self):
        object.__setattr__(self, "folder", self.folder or self.label)

    @property
    def kinds(self):
        return tuple(self.files)

    @property
    def label(self):
        """What `Recording.corpus` says: the subsets of a corpus have the same speakers' names."""
        return self.name.split("/")[0]

    @property
    def about_bytes(self):
        return sum(archive.about_bytes for archive in self.archives)


def openslr(number, file, about_bytes, checksum=None):
    return Archive(file, f"https://www.openslr.org/resources/{number}/{file}", about_bytes, checksum)


def librispeech_row(subset, about_bytes, sha256, default=False):
    archive = openslr(12, f"{subset}.tar.gz", about_bytes, f"sha256:{sha256}")
    return Corpus(f"LibriSpeech/{subset}", "CC BY 4.0", [archive], {"speech": "**/*"}, default)


def demand(environment, about_bytes, md5):
    file = f"{environment}_16k.zip"
    return Archive(file, f"https://zenodo.org/records/1227121/files/{file}", about_bytes, f"md5:{md5}")


def librosa(file, sha256):
    return Archive(file, f"https://librosa.org/data/audio/{file}", 2_000_000, f"sha256:{sha256}")


# Each recording was made with 16 microphones at once, ch01 to ch16.
DEMAND_FILES = {"noise": "**/ch01.*"}
DEMAND = [
    demand("DKITCHEN", 110_501_049, "7ffbf52d7f4699f96927846103dc8788"),
    demand("PCAFETER", 107_431_494, "99927d148128254141a9417d051510bb"),
    demand("STRAFFIC", 118_572_691, "2efa87262f272bbf9ba578088e81939c"),
    demand("TMETRO", 126_589_090, "95daf4df678e13b120e14211e6d89571"),
    demand("DLIVING", 80_170_627, "46741384d9e434a0bd8b3ec1830b6052"),
    demand("DWASHING", 102_343_250, "7e5ee9437ce9409c5f9a779b6212a240"),
    demand("NFIELD", 86_536_782, "a740046c6f4e174e16f5d568aaec5024"),
    demand("NPARK", 86_029_332, "80f1385a34d7f1705758926b57f138ce"),
    demand("NRIVER", 98_689_565, "54264db61d3fe073fb81f2e40e0d19b5"),
    demand("OHALLWAY", 77_941_854, "fe918bbb0e63e73d09ba7f4843ef33f1"),
    demand("OMEETING", 82_703_355, "62f7cfe7fe6d30b7d8a215fe37c2dfd2"),
    demand("OOFFICE", 88_995_191, "7b61cc2d182d5a654cb9c3101ddd4041"),
    demand("PRESTO", 111_292_815, "b98d2e6854eeebb397f29a8ad7457092"),
    demand("PSTATION", 119_441_094, "d7448009f6c2aeb6ba570375df1750a3"),
    demand("SPSQUARE", 110_928_528, "205d0e7b8fe74504a2f8d252fc414b9e"),
    demand("TBUS", 128_916_709, "706b11b0d8504f9f3b3f3211e91b3863"),
    demand("TCAR", 130_045_975, "4d930012796bd298932245a26189f973"),
]
# The commit, as the checksum is of this archive; "master" would change with the next commit.
ESC_50 = Archive(
    "ESC-50-master.zip",
    "https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip",
    645_832_161,
    "sha256:661183a6f53ef04f12c9bd618fed0ddc1713280d6c94a5a5431e844ba6f6a21f",
)
CORPORA = [
    librispeech_row("dev-clean", 337_926_286, "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3", True),
    librispeech_row("dev-other", 314_305_928, "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
    librispeech_row("test-clean", 346_663_984, "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"),
    librispeech_row("test-other", 328_757_843, "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"),
    librispeech_row(
        "train-clean-100", 6_387_309_499, "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"
    ),
    librispeech_row(
        "train-clean-360", 23_049_477_885, "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"
    ),
    librispeech_row(
        "train-other-500", 30_593_501_606, "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"
    ),
    Corpus(
        "VCTK",
        "CC BY 4.0",
        [
            Archive(
                "VCTK-Corpus-0.92.zip",
                "https://datashare.is.ed.ac.uk/bitstream/handle/10283/3443/VCTK-Corpus-0.92.zip",
                11_747_302_977,
                "sha256:f96258be9fdc2cbff6559541aae7ea4f59df3fcaf5cf963aae5ca647357e359c",
            )
        ],
        {"speech": "**/*"},
    ),
    Corpus("speechocean762", "CC BY 4.0", [openslr(101, "speechocean762.tar.gz", 520_000_000)], {"speech": "**/*"}),
    Corpus("DEMAND", "CC BY-SA 3.0", DEMAND[:4], DEMAND_FILES, default=True),
    Corpus("DEMAND/all", "CC BY-SA 3.0", DEMAND, DEMAND_FILES),
    Corpus("ESC-10", "CC BY", [ESC_50], {"noise": "**/audio/*"}, default=True, folder="ESC-50"),
    Corpus("ESC-50", "CC BY-NC 3.0: no training of what ships", [ESC_50], {"noise": "**/audio/*"}),
    Corpus(
        "RIRS_NOISES",
        "Apache 2.0",
        [openslr(28, "rirs_noises.zip", 1_311_166_223, "md5:e6f48e257286e05de56413b4779d8ffb")],
        {"noise": "**/pointsource_noises/*", "rooms": "**/simulated_rirs/**/*"},
    ),
    Corpus(
        "MUSAN",
        "CC BY 4.0 or freer, see its LICENSE files",
        [openslr(17, "musan.tar.gz", 11_086_114_085, "md5:0c472d4fc0c5141eca47ad1ffeb2a7df")],
        {"noise": "**/musan/noise/**/*", "music": "**/musan/music/**/*"},
    ),
    Corpus(
        "librosa",  # those of librosa's example recordings that are music and not CC BY-NC
        "CC BY 3.0; the Hungarian Dance is in the public domain",
        [
            librosa(
                "Kevin_MacLeod_-_Vibe_Ace.ogg",
                "6c23aed3dd5aa57f2b1652ecab68d15d9b82ad257f54e639eb2880ca09bc118a",
            ),
            librosa(
                "Kevin_MacLeod_-_P_I_Tchaikovsky_Dance_of_the_Sugar_Plum_Fairy.ogg",
                "b5c1a3e26310e6618d3c124f458654cd235650fcb9db7d711302644566600484",
            ),
            librosa(
                "Karissa_Hobbs_-_Lets_Go_Fishin.ogg",
                "27b3667c396c1831511aa3c415fcf582b6e8be560cafb844c5b67b76b72c1cb3",
            ),
            librosa(
                "sorohanro_-_solo-trumpet-06.ogg",
                "8374466fd3951d24509da6e799b132a0db0bdeda69d99c69d989a6888d3d727d",
            ),
            librosa(
                "Hungarian_Dance_number_5_-_Allegro_in_F_sharp_minor_(string_orchestra).ogg",
                "919b48aa4cc66a0357d2cd5728664c5ab8f15c4b3469460df4b59470d35d3e49",
            ),
        ],
        {"music": "*"},
        default=True,
    ),
]


def defaults(kind):
    """The names of the corpora that are fetched unless others are asked for."""
    return [corpus.name for corpus in CORPORA if corpus.default and kind in corpus.kinds]


def listing():
    """The table of corpora as text: name, kinds, size of the download in GB, how it is verified, licence."""
    rows = [("corpus", "kinds", "GB", "verified by", "licence")]
    for corpus in CORPORA:
        checks = {archive.checksum.split(":")[0] if archive.checksum else "size only" for archive in corpus.archives}
        name = corpus.name + (" *" if corpus.default else "")
        size = f"{corpus.about_bytes / 1e9:.2f}"
        rows.append((name, ", ".join(corpus.kinds), size, ", ".join(sorted(checks)), corpus.licence))
    note = "* by default. Size only: nobody publishes a checksum; unpacking checks the archive's own."
    return "\n".join([*aligned(rows), note])


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def find(sources, kind, root):
    """The recordings of a kind in all `sources`, sorted by corpus, speaker and path.

    A source is the name of a corpus in `CORPORA`, fetched to `root` before, or a folder of recordings in any format
    that soundfile reads. For speech, a folder laid out as LibriSpeech, VCTK or speechocean762 is recognised and the
    speakers' gender, age and accent are read; in any other, the folders directly inside are the speakers. For noise
    and music, every file counts and its folder is the category; for rooms, each folder of impulse responses is a room.
    Files that cannot be read are left out with a warning. Raises `UserError` where a source has no recordings, or
    recordings of speech that no speaker's folder holds.
    """
    describe = {"speech": describe_speech, "rooms": describe_rooms}.get(kind, describe_noise)
    found = {}
    labels = {corpus.label for corpus in CORPORA}
    for source in sources:
        corpus = next((corpus for corpus in CORPORA if corpus.name == source and kind in corpus.kinds), None)
        if corpus:
            folder, label = Path(root).absolute() / corpus.folder, corpus.label
            paths = fetched_files(corpus, kind, folder)
        else:
            folder = Path(os.path.abspath(Path(source).expanduser()))
            if not folder.is_dir():
                names = ", ".join(corpus.name for corpus in CORPORA if kind in corpus.kinds)
                raise UserError(f"{source}: neither a folder nor a corpus of {kind}; give a folder or one of {names}")
            label = free_label(folder, labels)
            labels.add(label)
            paths = audio_files(folder, "**/*")
        if not paths:
            raise UserError(f"{source}: no audio files; give a folder with recordings (wav, flac, ogg, opus, mp3 ...)")
        for recording in measured(describe(paths, kind, folder, label), source):
            found.setdefault(recording.path.resolve(), recording)
    return sorted(found.values(), key=lambda r: (r.corpus, r.speaker, r.path))


def is_fetched(name, root):
    """Whether the corpus of this name is below `root`, whole."""
    (corpus,) = (corpus for corpus in CORPORA if corpus.name == name)
    return all((Path(root) / corpus.folder / archive.unpacked).exists() for archive in corpus.archives)


def fetched_files(corpus, kind, folder):
    paths = []
    for archive in corpus.archives:
        unpacked = folder / archive.unpacked
        if not unpacked.exists():
            raise UserError(f"{unpacked}: {corpus.name} is not fetched yet; run python3 downloader.py")
        paths += audio_files(unpacked, corpus.files[kind]) if archive.packed else [unpacked]
    return paths


def audio_files(folder, pattern):
    """Audio files by their suffix, sorted; hidden files and folders are none."""
    paths = (path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES)
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def free_label(folder, labels):
    """The folder's name, with as many parents' names as make it differ from `labels`."""
    parts = [part for part in folder.parts if part != folder.anchor] or ["recordings"]
    return next((label for n in range(1, len(parts) + 1) if (label := "/".join(parts[-n:])) not in labels), str(folder))


def measured(recordings, source):
    """The recordings with their durations; files that cannot be read are left out with a warning."""
    readable, unreadable = [], []
    for recording in recordings:
        try:
            seconds = soundfile.info(recording.path).duration
        except (soundfile.LibsndfileError, OSError) as error:
            unreadable.append(f"{recording.path} ({error})")
            continue
        if seconds > 0:
            readable.append(dataclasses.replace(recording, seconds=seconds))
        else:
            unreadable.append(f"{recording.path} (no sound in it)")
    if unreadable:
        print(f"warning: {source}: {len(unreadable)} files left out, the first is {unreadable[0]}", file=sys.stderr)
    if not readable:
        raise UserError(f"{source}: none of its audio files can be used; convert them to WAV or FLAC")
    return readable


def describe_rooms(paths, kind, folder, label):
    rooms = ["/".join([label, *path.relative_to(folder).parent.parts[-2:]]) for path in paths]
    return [Recording(path, kind, label, room, 0.0) for path, room in zip(paths, rooms, strict=True)]


def describe_noise(paths, kind, folder, label):
    table = functools.cache(esc50_table)
    recordings = []
    for path in paths:
        row = table(path.parent.parent).get(esc50_clip(path.stem))
        if label == "ESC-10" and (row is None or row["esc10"] != "True"):
            continue
        category = row["category"] if row else path.parent.name
        recordings.append(Recording(path, kind, label, f"{label}/{category}", 0.0))
    return recordings


def esc50_table(folder):
    """The rows of ESC-50's table by clip; empty where the folder holds none."""
    table = folder / "meta" / "esc50.csv"
    if not table.exists():
        return {}
    with open(table, newline="", encoding="utf-8") as lines:
        return {esc50_clip(Path(row["filename"]).stem): row for row in csv.DictReader(lines)}


def esc50_clip(stem):
    """The clip in a file name of ESC-50, 1-100032-A in 1-100032-A-0, whose last number is the category."""
    return re.sub(r"^(\d-\d+-[A-Z])-\d+$", r"\1", stem)


def describe_speech(paths, kind, folder, label):
    known = [recording for layout in (librispeech, vctk, speechocean762) for recording in layout(paths)]
    if known:
        others = len(paths) - len(known)
        if others:
            print(f"warning: {folder}: {others} files are not in the layout of {known[0].corpus}", file=sys.stderr)
        return [recording for recording in known if not recording.path.stem.endswith("_mic2")]
    if any(path.parent == folder for path in paths):
        raise UserError(f"{folder}: audio files without a speaker; put those of each speaker in a folder of their own")
    names = [path.relative_to(folder).parts[0] for path in paths]
    return [Recording(path, kind, label, f"{label}/{name}", 0.0) for path, name in zip(paths, names, strict=True)]


def librispeech(paths):
    """Recordings among `paths` laid out as speaker/chapter/speaker-chapter-number, with SPEAKERS.TXT above or not."""
    table = functools.cache(lambda path: read_table(path, "|"))
    recordings = []
    for path in paths:
        match = re.fullmatch(r"(\d+)-(\d+)-\d+", path.stem)
        if match and path.parts[-3:-1] == match.groups():
            speaker = match[1]
            rows = [table(folder / "SPEAKERS.TXT").get(speaker) for folder in path.parents[2:4]]
            gender = next((row[1].lower() for row in rows if row), "")
            recordings.append(Recording(path, "speech", "LibriSpeech", f"LibriSpeech/{speaker}", 0.0, gender))
    return recordings


def vctk(paths):
    """Recordings among `paths` laid out as p225/p225_001_mic1, with speaker-info.txt above or not."""
    table = functools.cache(read_table)
    recordings = []
    for path in paths:
        match = re.fullmatch(r"(p\d{3}|s5)_\d{3}(_mic[12])?", path.stem)
        if match and path.parent.name == match[1]:
            speaker = match[1]
            tables = [table(folder / "speaker-info.txt") for folder in path.parents[1:3]]
            rows = [rows.get(speaker, rows.get(speaker[1:])) for rows in tables]  # older releases leave the p out
            _, age, gender, accent = next((row for row in rows if row), ["", "", "", ""])[:4]
            recording = Recording(path, "speech", "VCTK", f"VCTK/{speaker}", 0.0, gender.lower())
            age = int(age) if age.isdigit() else None
            recordings.append(dataclasses.replace(recording, age=age, region=accent.replace("Unknown", "")))
    return recordings


def speechocean762(paths):
    """Recordings among `paths` laid out as WAVE/SPEAKER0001/000010011, with tables in train and test; all Mandarin."""
    table = functools.cache(read_table)
    recordings = []
    for path in paths:
        match = re.fullmatch(r"SPEAKER(\d+)", path.parent.name)
        if match and path.parent.parent.name == "WAVE":
            speaker = match[1]
            folders = [path.parents[2] / split for split in ("train", "test")]
            ages = [table(folder / "spk2age").get(speaker) for folder in folders]
            genders = [table(folder / "spk2gender").get(speaker) for folder in folders]
            recording = Recording(path, "speech", "speechocean762", f"speechocean762/{speaker}", 0.0, region="Mandarin")
            age = next((int(row[1]) for row in ages if row), None)
            gender = next((row[1] for row in genders if row), "")
            recordings.append(dataclasses.replace(recording, gender=gender, age=age))
    return recordings


def read_table(path, separator=None):
    """The rows of a corpus's table by their first column; empty where there is no such file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [[cell.strip() for cell in line.split(separator)] for line in lines if line and not line.startswith(";")]
    return {row[0]: row for row in rows if len(row) > 1}


SYNTAX = (
    "conditions like 'gender=f age<16 region!=Scottish' on gender, age, region, corpus or speaker, with = != < <= > >="
)
COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def select(recordings, where):
    """The recordings that meet every condition of `where`, such as 'gender=f age<16'; all of them where it is empty.

    What is not known of a speaker meets no condition. Raises `UserError` for a malformed condition, or where nothing
    is left.
    """
    kept = recordings
    for condition in re.sub(r"\s*([!<>]?=|[<>])\s*", r"\1", where).split():
        match = re.fullmatch(r"(gender|age|region|corpus|speaker)([!<>]?=|[<>])([^!<>=]+)", condition)
        if (
            not match
            or (match[1] == "age") != match[3].isdigit()
            or (match[1] != "age" and match[2] not in ("=", "!="))
        ):
            raise UserError(f"--where: {condition!r} is no condition; give {SYNTAX}")
        field, compare, value = match[1], COMPARE[match[2]], match[3].lower()
        if field == "gender":
            value = {"female": "f", "male": "m"}.get(value, value)
        if field == "age":
            kept = [r for r in kept if r.age is not None and compare(r.age, int(value))]
        else:
            kept = [r for r in kept if getattr(r, field) and compare(getattr(r, field).lower(), value)]
    if not kept:
        raise UserError(f"--where: no recording meets {where!r}; --list-speakers shows what there is")
    return kept


def speaker_table(recordings):
    """Recordings, speakers and hours by region, gender and age group, as text."""
    groups = {}
    for r in recordings:
        groups.setdefault((r.region, r.gender, age_group(r.age)), []).append(r)
    rows = [("region", "gender", "age", "speakers", "recordings", "hours")]
    for (region, gender, (_, ages)), group in sorted(groups.items()):
        speakers, hours = len({r.speaker for r in group}), sum(r.seconds for r in group) / 3600
        rows.append((region or "-", gender or "-", ages, str(speakers), str(len(group)), f"{hours:.2f}"))
    speakers, hours = len({r.speaker for r in recordings}), sum(r.seconds for r in recordings) / 3600
    rows.append(("all", "", "", str(speakers), str(len(recordings)), f"{hours:.2f}"))
    return "\n".join(aligned(rows))


def age_group(age):
    """The age group's number and name."""
    if age is None:
        return len(AGES) + 1, "-"
    group = sum(age >= bound for bound in AGES)
    if group == 0:
        return group, f"under {AGES[0]}"
    return group, f"{AGES[-1]} and over" if group == len(AGES) else f"{AGES[group - 1]} to {AGES[group] - 1}"


def split_files(recordings):
    """The recordings of noise, music or rooms for training and those for validation; at least one unless there is one.

    Which they are is the same everywhere, see `is_held_out`.
    """
    held_out = [r for r in recordings if is_held_out(r)]
    if not held_out and len(recordings) > 1:
        first = min(map(place_in_split, recordings))
        held_out = [r for r in recordings if place_in_split(r) == first]
    chosen = set(held_out)
    return [r for r in recordings if r not in chosen], held_out


def is_held_out(recording):
    """Whether a recording of noise, music or a room is for validation: one in ten, the same everywhere."""
    return place_in_split(recording) < HELD_OUT_SHARE


def place_in_split(recording):
    """A number from 0 to 1 by which recordings of noise, music or rooms are split.

    The names of the file and its folder decide, as DEMAND calls every file ch01. The takes of one source of ESC-50
    stay together, and so do the impulse responses of a room.
    """
    if recording.kind == "rooms":
        return fraction(recording.speaker)
    stem = re.sub(r"^(\d-\d+)-[A-Z](-\d+)?$", r"\1", recording.path.stem)
    return fraction(f"{recording.path.parent.name}/{stem}")


def split_speakers(recordings):
    """The recordings for training and those for validation, which are of a tenth of the speakers, at least two.

    A speaker's name decides, so that most speakers stay where they are when the recordings change. Raises `UserError`
    for fewer than four speakers.
    """
    names = sorted({r.speaker for r in recordings}, key=fraction)
    if len(names) < 2 * MIN_SPEAKERS:
        raise UserError(
            f"{', '.join(sorted(names)) or 'no recordings'}: fewer than four speakers, two for training and two for "
            "validation; add recordings with --speech or loosen --where"
        )
    share = sum(fraction(name) < HELD_OUT_SHARE for name in names)
    validation = set(names[: min(max(share, MIN_SPEAKERS), len(names) - MIN_SPEAKERS)])
    return [r for r in recordings if r.speaker not in validation], [r for r in recordings if r.speaker in validation]


def fraction(name):
    """A number from 0 to 1 that depends on `name` alone, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
