"""downloader.py and dataset.py: the same bytes whatever the workers, whole shards only, remixing that never repeats."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, SIZE

import corpora
import dataset
import downloader
import mixing
import model
import utils
from encoder import SpeakerEncoder
from utils import ROOT, UserError


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory):
    """A copy of the scripts that writes shards of 8, so that a small store has several; returns its folder."""
    folder = tmp_path_factory.mktemp("scripts")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    source = (folder / "dataset.py").read_text()
    assert "\nSHARD = 256\n" in source
    (folder / "dataset.py").write_text(source.replace("\nSHARD = 256\n", "\nSHARD = 16\n"))
    return folder


def command(folder, datasets, *more):
    arguments = ["--speech", DEMO / "voices", "--noise", DEMO / "noise", "--music", DEMO / "music"]
    arguments += ["--datasets", datasets, "--segment", 0.5, "--size", 192, *more]
    return [sys.executable, str(folder / "downloader.py"), *map(str, arguments)]


def test_the_mixture_is_the_sum_and_the_stored_parts_are_the_rendered_ones(store, recordings, settings):
    examples = dataset.Examples(store, "train")
    assert len(examples) == SIZE
    mixer = mixing.Mixer(settings, **downloader.split(recordings)["train"])
    for n in (0, 17, SIZE - 1):
        plan = mixer.draw(np.random.default_rng([settings.seed, 0, n]))
        example = mixing.render(plan, settings)
        batch = examples[n]
        signals = examples.stft.samples(torch.cat([batch.mixture, batch.target]), settings.samples).numpy()
        assert np.abs(signals[0] - example.parts.sum(0)).max() < 1e-3 * np.abs(example.parts.sum(0)).max() + 1e-5
        assert np.abs(signals[1] - example.parts[0]).max() < 1e-3 * np.abs(example.parts).max() + 1e-5
        assert batch.absent.item() == example.row["absent"]
        dvector = SpeakerEncoder().dvectors([example.reference])
        assert (batch.dvector * dvector).sum() > 0.999  # bfloat16 in the store


def test_train_and_validation_share_no_speaker_and_no_noise(store):
    train, validation = (dataset.Examples(store, split) for split in dataset.SPLITS)
    assert len(validation) == downloader.validation_size(SIZE)

    def speakers(examples):
        rows = examples.index
        return {r["target"]["speaker"] for r in rows} | {v["speaker"] for r in rows for v in r["interferers"]}

    def noises(examples):
        return {(piece["speaker"], piece["file"]) for row in examples.index for piece in row["noise"]}

    assert not speakers(train) & speakers(validation)
    assert noises(train)
    assert not noises(train) & noises(validation)


def test_the_index_has_no_paths_and_the_store_can_be_moved(store, tmp_path):
    moved = tmp_path / "elsewhere" / "size=40"
    shutil.copytree(store, moved)
    before, after = dataset.Examples(store, "train")[3], dataset.Examples(moved, "train")[3]
    assert torch.equal(before.mixture, after.mixture)
    text = "".join(path.read_text() for path in store.rglob("*.json"))
    assert str(ROOT) not in text
    assert str(ROOT.parent) not in text


def all_recipes(examples, epochs=20):
    """The recipes of some epochs, in pairs of neighbours."""
    pairs = []
    for examples.epoch in range(epochs):
        recipes = examples.recipes(range(len(examples)))
        pairs += zip(recipes[::2], recipes[1::2], strict=True)
    return pairs


def test_remixing_never_repeats_and_never_mixes_a_speaker_with_himself(store):
    examples = dataset.Examples(store, "train", remix=True)
    pairs = all_recipes(examples)
    for pair in pairs:
        for recipe in pair:
            speakers = [examples.speakers[sound.example][sound.part] for sound in recipe.sounds]
            assert len(set().union(*speakers)) == sum(map(len, speakers))
            wanted = examples.index[recipe.wanted]["target"]["speaker"]
            assert (recipe.target is None) == (wanted not in set().union(*speakers))
            assert recipe.target is None or recipe.target in recipe.sounds
    assert pairs[: SIZE // 2] != pairs[SIZE // 2 : SIZE]
    assert all_recipes(examples) == pairs


def test_both_voices_of_a_pair_are_wanted_of_the_same_mixture(store):
    examples = dataset.Examples(store, "train", remix=True)
    pairs = all_recipes(examples)
    both = [pair for pair in pairs if pair[0].target and pair[1].target]
    assert len(both) > len(pairs) / 2

    def voices(recipe):
        return sum(sound.part != dataset.NOISE for sound in recipe.sounds)

    for one, other in both:
        assert one.sounds == other.sounds
        assert one.target != other.target
    kinds = {
        "alone": [one for one, _ in pairs if voices(one) == 1],
        "more voices": [one for one, _ in pairs if voices(one) == 3],
        "absent": [recipe for pair in pairs for recipe in pair if recipe.target is None],
        "primary": [one for one, _ in pairs if one.primary],
    }
    assert all(kinds.values()), {name: len(found) for name, found in kinds.items()}
    examples.settings["max_voices"] = 1
    assert max(voices(one) for one, _ in all_recipes(examples)) == 2


def test_most_pairs_are_of_one_corpus(store):
    examples = dataset.Examples(store, "train", remix=True)
    speakers = sorted({row["target"]["speaker"] for row in examples.index})
    corpora = {speaker: "one" if n % 2 else "other" for n, speaker in enumerate(speakers)}
    examples.corpora = [corpora[row["target"]["speaker"]] for row in examples.index]

    def share(pairs):
        """Of pairs of two voices, those of one corpus."""
        same = [
            len({examples.corpora[s.example] for s in one.sounds if s.part == dataset.TARGET}) == 1
            for one, _ in pairs
            if sum(s.part == dataset.TARGET for s in one.sounds) == 2
        ]
        return sum(same) / len(same)

    assert dataset.SAME_CORPUS_SHARE < share(all_recipes(examples)) < 0.95
    first = examples.index[0]["target"]["speaker"]
    examples.corpora = ["alone" if row["target"]["speaker"] == first else "rest" for row in examples.index]
    pair = examples.pair(0, 1)
    assert examples.speakers[pair[0].wanted] != examples.speakers[pair[1].wanted]  # none other of its corpus


def test_remixed_parts_have_ratios_in_the_stated_range(store):
    examples = dataset.Examples(store, "train", remix=True)

    def power(sound):
        return examples.powers[sound.example, sound.part] * sound.gain**2

    ratios = {"noise": [], "without a reference": [], "with one": []}
    for one, _ in all_recipes(examples):
        kind = "without a reference" if one.primary else "with one"
        first, *others = one.sounds
        for other in others:
            if power(other):
                ratio = 10 * np.log10(power(first) / power(other))
                ratios["noise" if other.part == dataset.NOISE else kind].append(ratio)
    for kind, low, high in ("noise", 0, 20), ("without a reference", 3, 10), ("with one", -5, 10):
        assert low - 0.001 <= min(ratios[kind])
        assert max(ratios[kind]) <= high + 0.001
    assert max(ratios["with one"]) > 5  # louder voices come with a reference, too
    assert sum(map(len, ratios.values())) > SIZE


def test_a_batch_is_its_pairs(store):
    examples = dataset.Examples(store, "train", remix=True)
    batch = examples.__getitems__([4, 9, 2, 7, 5])
    for start, items in ((0, [4, 9]), (2, [2, 7]), (4, [5])):
        pair = examples.__getitems__(items)
        assert torch.equal(batch.mixture[start : start + 2], pair.mixture)
        assert torch.equal(batch.dvector[start : start + 2], pair.dvector)


def test_dvectors_stray_and_are_stored_or_zero_otherwise(store):
    examples = dataset.Examples(store, "train", remix=True)
    items = list(range(len(examples)))
    batch, recipes = examples.__getitems__(items), examples.recipes(items)
    for dvector, recipe in zip(batch.dvector, recipes, strict=True):
        stray = examples.dvectors[recipe.strayed, dataset.SHORTER] - examples.dvectors[recipe.strayed, -1]
        expected = examples.dvectors[recipe.wanted, recipe.reference] + stray
        torch.testing.assert_close(dvector, torch.zeros(256) if recipe.primary else expected)
    assert len({recipe.strayed for recipe in recipes}) > len(items) / 3
    stored = dataset.Examples(store, "validation")
    assert torch.equal(stored.__getitems__([0, 1]).dvector, stored.dvectors[:2, -1])


def test_a_store_of_one_voice_is_remixed_as_far_as_it_goes(store):
    examples = dataset.Examples(store, "train", remix=True)
    speaker = examples.index[0]["target"]["speaker"]
    examples.speakers = [[{speaker}, {speaker}, set()]] * len(examples)
    for pair in all_recipes(examples, epochs=1):
        for recipe in pair:
            assert recipe.target == recipe.sounds[0]
            assert recipe.sounds[1:] == [sound for sound in recipe.sounds if sound.part == dataset.NOISE]


def test_examples_held_on_a_device_are_the_same(store):
    mapped = dataset.Examples(store, "train", remix=True)
    held = dataset.Examples(store, "train", remix=True, device=torch.device("cpu"))
    one, other = mapped.__getitems__([1, 5]), held.__getitems__([1, 5])
    assert torch.equal(one.mixture, other.mixture)
    assert torch.equal(one.target, other.target)


def test_the_store_is_not_read_into_memory(store):
    examples = dataset.Examples(store, "train")
    assert all(isinstance(shard, np.memmap) for shard in examples.shards)
    assert all(shard.dtype == np.float16 for shard in examples.shards)


def test_workers_make_no_difference_and_a_killed_run_goes_on(small_shards, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run(command(small_shards, alone, "--workers", 1), check=True, capture_output=True)
    whole = contents(alone)
    shards = sorted(name for name in whole if name.endswith("spectra.npy"))
    assert len(shards) == 13

    store = killed / "preprocessed" / "size=192"
    rng = random.Random(1)
    for expected in (1, 4):
        process = subprocess.Popen(
            command(small_shards, killed, "--workers", 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len(list(store.glob("*/0*"))) < expected and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        workers = children(process.pid)
        assert len(workers) >= 4
        process.kill()
        process.wait()
        there = [str(path.relative_to(killed)) for path in sorted(store.glob("*/0*/spectra.npy"))]
        assert expected <= len(there) < len(shards)
        for name in there:  # only whole ones
            assert (killed / name).read_bytes() == whole[name]
        deadline = time.monotonic() + 20
        while any(map(utils.alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(utils.alive, workers))
    done = subprocess.run(command(small_shards, killed, "--workers", 4), check=True, capture_output=True, text=True)
    assert "192 examples" in done.stdout
    assert contents(killed) == whole


def children(process):
    """The numbers of the processes that a process started."""
    return [int(n) for task in Path(f"/proc/{process}/task").iterdir() for n in (task / "children").read_text().split()]


def test_noise_and_music_are_held_out_even_if_few():
    some = [corpora.Recording(Path(f"{n}.wav"), "music", "own", "own/a", 10.0) for n in range(10)]
    few = [recording for recording in some if not corpora.is_held_out(recording)][:5]
    train, validation = corpora.split_files(few)
    assert len(train) == 4
    assert len(validation) == 1
    assert corpora.split_files(few[:1]) == (few[:1], [])
    assert corpora.split_files([]) == ([], [])


def test_what_a_killed_run_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".00000.{dead.pid}.partial").mkdir()
    (tmp_path / f".00000.{os.getppid()}.partial").mkdir()  # somebody alive is writing
    with utils.whole(tmp_path / "00000") as partial:
        partial.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".00000.{os.getppid()}.partial", "00000"]


def test_files_whose_names_begin_alike_are_written_side_by_side(tmp_path):
    with utils.whole(tmp_path / "anna.both.wav") as both:
        both.write_text("both")
        with utils.whole(tmp_path / "anna.wav") as one:
            one.write_text("one")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"anna.both.wav": "both", "anna.wav": "one"}


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    def examples():
        yield np.zeros((3, 5, 4, 2), np.float16), np.zeros((3, 256), np.float32), {}
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        dataset.write_shard(tmp_path / "00000", 2, examples())
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_is_a_clear_error(store, tmp_path):
    shutil.copytree(store, tmp_path / "size=40")
    spectra = tmp_path / "size=40" / "train" / "00000" / "spectra.npy"
    spectra.write_bytes(spectra.read_bytes()[:5000])
    with pytest.raises(UserError, match="not whole"):
        dataset.Examples(tmp_path / "size=40", "train")


def test_the_largest_store_is_found(tmp_path):
    for name in ("size=9", "size=10", "size=2", "size=99-old", "size=100"):
        (tmp_path / name).mkdir()
        if name != "size=100":
            (tmp_path / name / "settings.json").write_text("{}")
    assert dataset.largest(tmp_path) == tmp_path / "size=10"
    assert dataset.largest(tmp_path / "size=9") == tmp_path / "size=9"


def test_other_settings_are_refused_with_what_differs(store, recordings, settings, script):
    other = mixing.Settings(segment=1.5, seed=7)
    with pytest.raises(UserError, match=r"seed 0 there, 7 now"):
        downloader.prepare(store, other, recordings, SIZE, workers=1)
    with pytest.raises(UserError, match=r"n_fft 512 there, 320 now"):
        downloader.prepare(store, settings, recordings, SIZE, workers=1, n_fft=320, hop=160)


def test_a_model_with_another_stft_is_refused(store):
    with pytest.raises(UserError, match="n_fft=512, the model 1024"):
        dataset.check_model(dataset.read_settings(store), model.Config(n_fft=1024))


def test_an_unfinished_store_is_a_clear_error(store, tmp_path):
    shutil.copytree(store, tmp_path / "size=40")
    shutil.rmtree(tmp_path / "size=40" / "train" / "00000")
    with pytest.raises(UserError, match="00000: missing; finish the store"):
        dataset.Examples(tmp_path / "size=40", "train")
    with pytest.raises(UserError, match="no examples here"):
        dataset.Examples(tmp_path, "train")


def test_settings_are_whole(store):
    settings = json.loads((store / "settings.json").read_text())
    assert settings["segment"] == 1.5
    assert settings["examples"] == {"train": SIZE, "validation": downloader.validation_size(SIZE)}
    assert settings["samples"] == 24000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speech", "no-such-folder"], "no-such-folder: neither a folder nor a corpus"),
        (["--where", "height>3"], "no condition"),
        (["--size", 2000000000], "GB needed"),
        (["--segment", 0], "--segment"),
        (["--size", 0], "--size"),
        (["--workers", 0], "--workers"),
        (["--n-fft", 600, "--hop", 300], "--n-fft"),
        (["--sir-db", 5, -5], "--sir-db"),
        (["--absent", 2], "--absent"),
        (["--seed", -1], "--seed -1: give 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(refusal, tmp_path, arguments, message):
    speech = [] if "--speech" in arguments else ["--speech", DEMO / "voices"]
    without = ["--noise", "none", "--music", "none", "--datasets", tmp_path]
    assert message in refusal(downloader.main, *speech, *without, *arguments)
    assert not list(tmp_path.rglob("spectra.npy"))


def test_list_and_list_speakers(script, tmp_path):
    listed = script("downloader.py", "--list")
    assert listed.returncode == 0
    for name in ("LibriSpeech/dev-clean", "VCTK", "speechocean762", "DEMAND", "ESC-50", "RIRS_NOISES", "MUSAN"):
        assert name in listed.stdout
    speakers = script("downloader.py", "--list-speakers", "--speech", DEMO / "voices", "--datasets", tmp_path)
    assert speakers.returncode == 0
    assert "24" in speakers.stdout
