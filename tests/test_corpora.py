"""corpora.py on excerpts of real corpora where there are some, and on small folders of its own."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpora
from corpora import Recording
from utils import UserError

EXCERPTS = Path(os.environ.get("CORPORA", Path(__file__).parents[2] / "shared" / "corpora"))
real = pytest.mark.skipif(not EXCERPTS.is_dir(), reason=f"no excerpts of real corpora in {EXCERPTS} (set CORPORA)")


def record(path, seconds=0.1, sample_rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (round(seconds * sample_rate), channels))
    soundfile.write(path, noise, sample_rate)
    return path


def find(folder, kind):
    return corpora.find([str(folder)], kind, Path("nowhere"))


def speakers(recordings):
    return {r.speaker for r in recordings}


def people(count, **known):
    return [Recording(Path(f"{n}.wav"), "speech", "x", f"x/{n}", 3.0, **known) for n in range(count)]


@real
@pytest.mark.parametrize(
    ("folder", "count", "files"),
    [
        ("LibriSpeech/train-clean-100", 251, 462),
        ("LibriSpeech/test-other", 10, 100),
        ("LibriSpeech", 263, 582),
        ("speechocean762", 250, 5245),
        ("VCTK", 14, 95),
    ],
)
def test_speakers_of_the_excerpts(folder, count, files):
    found = find(EXCERPTS / folder, "speech")
    assert len(speakers(found)) == count
    assert len(found) == files
    assert found == sorted(found, key=lambda r: (r.corpus, r.speaker, r.path))
    name = folder.split("/")[0]
    assert {r.corpus for r in found} == {name}
    assert all(r.speaker.startswith(f"{name}/") and r.kind == "speech" for r in found)
    if name != "VCTK":  # the excerpt lacks speaker-info.txt
        assert {r.gender for r in found} == {"f", "m"}
    train, validation = corpora.split_speakers(found)
    assert len(speakers(validation)) >= 2
    assert not speakers(train) & speakers(validation)


@real
def test_ages_of_the_excerpts():
    found = find(EXCERPTS / "speechocean762", "speech")
    assert len(speakers(corpora.select(found, "age<16"))) == 122
    assert len(speakers(corpora.select(found, "age>=16 region=Mandarin"))) == 250 - 122
    (age,) = {r.age for r in found if r.speaker == "speechocean762/1030"}
    assert age == 27
    assert sum(r.seconds for r in found) / 3600 == pytest.approx(5.98, abs=0.01)


@real
def test_overlapping_sources_are_one():
    twice = [str(EXCERPTS / "LibriSpeech"), str(EXCERPTS / "LibriSpeech" / "dev-clean")]
    assert len(corpora.find(twice, "speech", Path("nowhere"))) == 582


@real
@pytest.mark.parametrize(("kind", "categories"), [("noise", 12), ("music", 2)])
def test_noise_and_music_of_the_excerpts(kind, categories):
    found = find(EXCERPTS / kind, kind)
    assert len(speakers(found)) == categories
    assert 0.03 < np.mean([corpora.is_held_out(r) for r in found]) < 0.25


def test_a_folder_per_speaker_in_any_format(tmp_path):
    root = tmp_path / "mine"
    record(root / "anna" / "a.wav", 0.5, 44100, 2)
    record(root / "anna" / "session 2" / "b.flac", 0.25, 8000)
    record(root / "bert" / "c.ogg", 0.1, 48000)
    record(root / "bert" / "d.mp3", 1.0, 16000)
    record(root / "cleo" / "e.AIFF", 0.1, 22050)
    record(root / "cleo" / "._f.wav")
    (root / "cleo" / "notes.txt").write_text("no audio")
    found = find(root, "speech")
    assert [(r.speaker, r.path.name) for r in found] == [
        ("mine/anna", "a.wav"),
        ("mine/anna", "b.flac"),
        ("mine/bert", "c.ogg"),
        ("mine/bert", "d.mp3"),
        ("mine/cleo", "e.AIFF"),
    ]
    assert [round(r.seconds, 2) for r in found[:2]] == [0.5, 0.25]
    assert {(r.corpus, r.gender, r.age, r.region) for r in found} == {("mine", "", None, "")}


def test_same_names_in_two_folders_are_two_speakers(tmp_path):
    folders = [tmp_path / "a" / "voices", tmp_path / "b" / "voices", tmp_path / "b" / "VCTK"]
    for folder in folders:
        record(folder / "p225" / "x.wav")
    found = corpora.find([str(folder) for folder in folders], "speech", tmp_path)
    assert speakers(found) == {"voices/p225", "b/voices/p225", "b/VCTK/p225"}


def test_one_librispeech_speaker_in_two_subsets(tmp_path):
    for subset in ("train-clean-100", "train-clean-360"):
        record(tmp_path / "LibriSpeech" / subset / "19" / "198" / f"19-198-000{len(subset) % 7}.flac")
    record(tmp_path / "LibriSpeech" / "train-clean-360" / "27" / "1" / "27-1-0000.flac")
    (tmp_path / "LibriSpeech" / "SPEAKERS.TXT").write_text(";ID\n19   | F | train-clean-100  | 25.19 | Some | One\n")
    for sources in (["LibriSpeech"], ["LibriSpeech/train-clean-100", "LibriSpeech/train-clean-360"], ["."]):
        found = corpora.find([str(tmp_path / source) for source in sources], "speech", tmp_path)
        assert [(r.speaker, r.gender) for r in found] == [("LibriSpeech/19", "f")] * 2 + [("LibriSpeech/27", "")]


def test_vctk_takes_one_microphone_and_reads_accents(tmp_path, capsys):
    for speaker in ("p225", "p280", "s5"):
        record(tmp_path / "wav48_silence_trimmed" / speaker / f"{speaker}_001_mic1.flac")
        record(tmp_path / "wav48_silence_trimmed" / speaker / f"{speaker}_001_mic2.flac")
    info = "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\np225  23  F    English    Southern  England\n"
    (tmp_path / "speaker-info.txt").write_text(info + "p280  25  F    Unknown    France (mic2 files unavailable)\n")
    found = find(tmp_path, "speech")
    assert [(r.speaker, r.gender, r.age, r.region) for r in found] == [
        ("VCTK/p225", "f", 23, "English"),
        ("VCTK/p280", "f", 25, ""),
        ("VCTK/s5", "", None, ""),
    ]
    assert {r.path.stem[-4:] for r in found} == {"mic1"}
    assert capsys.readouterr().err == ""


def test_files_without_a_speaker(tmp_path):
    record(tmp_path / "a.wav")
    with pytest.raises(UserError, match="those of each speaker in a folder of their own"):
        find(tmp_path, "speech")


@pytest.mark.parametrize("kind", corpora.KINDS)
def test_empty_and_missing_folders(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no audio files; give a folder"):
        find(tmp_path / "empty", kind)
    with pytest.raises(UserError, match=f"nowhere: neither a folder nor a corpus of {kind}; give"):
        find(tmp_path / "nowhere", kind)


def test_a_corpus_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="VCTK: neither a folder nor a corpus of noise; .*DEMAND"):
        corpora.find(["VCTK"], "noise", tmp_path)


def test_unreadable_files_are_left_out_with_a_warning(tmp_path, capsys):
    record(tmp_path / "rain" / "good.wav")
    (tmp_path / "rain" / "bad.wav").write_bytes(b"no audio")
    record(tmp_path / "rain" / "empty.wav", 0)
    assert [r.path.name for r in find(tmp_path, "noise")] == ["good.wav"]
    warning = capsys.readouterr().err
    assert "2 files left out" in warning
    assert "bad.wav" in warning
    assert warning.count("\n") == 1
    (tmp_path / "rain" / "good.wav").unlink()
    with pytest.raises(UserError, match="none of its audio files can be used"):
        find(tmp_path, "noise")


def test_rooms_are_folders(tmp_path):
    for room in ("small/Room001", "medium/Room001"):
        for n in range(2):
            record(tmp_path / "rirs" / room / f"{n}.wav")
    found = find(tmp_path / "rirs", "rooms")
    assert speakers(found) == {"rirs/small/Room001", "rirs/medium/Room001"}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("", "abcd"),
        ("gender=f", "ab"),
        ("gender=female age<16", "a"),
        ("age<16", "ac"),
        ("age<=16", "abc"),
        ("age != 16", "ac"),
        ("age>=16", "b"),
        ("region=scottish", "b"),
        ("region!=Scottish", "a"),
        ("corpus=x speaker!=x/a", "bcd"),
    ],
)
def test_select(where, kept):
    known = {"a": ("f", 9, "English"), "b": ("f", 16, "Scottish"), "c": ("m", 3, ""), "d": ("", None, "")}
    recordings = [Recording(Path(f"{name}.wav"), "speech", "x", f"x/{name}", 1.0, *known[name]) for name in known]
    assert "".join(r.path.stem for r in corpora.select(recordings, where)) == kept


@pytest.mark.parametrize("where", ["gender", "age=young", "gender<f", "height>2", "gender==f", "=f", "age<16,gender=f"])
def test_select_malformed(where):
    with pytest.raises(UserError, match="is no condition; give conditions like 'gender=f age<16"):
        corpora.select(people(3, age=3), where)


def test_select_nothing():
    with pytest.raises(UserError, match="no recording meets 'age<16'"):
        corpora.select(people(3), "age<16")


def test_speaker_table():
    recordings = people(2, gender="f", age=12, region="Welsh") + people(3)[2:] * 2
    lines = corpora.speaker_table(recordings).splitlines()
    assert lines[0].split() == ["region", "gender", "age", "speakers", "recordings", "hours"]
    assert [line.split() for line in lines[1:]] == [
        ["-", "-", "-", "1", "2", "0.00"],
        ["Welsh", "f", "10", "to", "15", "2", "2", "0.00"],
        ["all", "3", "4", "0.00"],
    ]


def test_held_out_is_a_tenth_and_the_same_everywhere(tmp_path):
    noise = [Recording(tmp_path / "rain" / f"{n}.wav", "noise", "x", "x/rain", 1.0) for n in range(2000)]
    held_out = [r.path.name for r in noise if corpora.is_held_out(r)]
    assert 150 < len(held_out) < 250
    assert held_out[:3] == ["1.wav", "3.wav", "9.wav"]
    environments = [Recording(Path(f"{n}/ch01.wav"), "noise", "DEMAND", f"DEMAND/{n}", 1.0) for n in range(200)]
    assert 5 < sum(map(corpora.is_held_out, environments)) < 40


def test_takes_of_one_source_and_responses_of_one_room_stay_together():
    for n in range(100):
        takes = [Recording(Path(f"dog/1-{n}-{t}-0.wav"), "noise", "ESC-50", "ESC-50/dog", 5.0) for t in "ABCD"]
        assert len(set(map(corpora.is_held_out, takes))) == 1
        room = [Recording(Path(f"Room{n}/{k}.wav"), "rooms", "x", f"x/small/Room{n}", 0.5) for k in range(4)]
        assert len(set(map(corpora.is_held_out, room))) == 1


@pytest.mark.parametrize("count", [4, 5, 20, 1000])
def test_split_is_disjoint_and_the_same_in_any_order(count):
    recordings = people(count) * 2
    train, validation = corpora.split_speakers(recordings)
    assert not speakers(train) & speakers(validation)
    assert len(train) + len(validation) == len(recordings)
    assert len(speakers(train)) >= 2
    assert len(speakers(validation)) >= 2
    if count == 1000:
        assert 70 < len(speakers(validation)) < 130
    assert speakers(corpora.split_speakers(recordings[::-1])[1]) == speakers(validation)


def test_speakers_stay_where_they_are_when_others_come():
    few, more = (speakers(corpora.split_speakers(people(count))[1]) for count in (500, 1000))
    assert few == more & speakers(people(500))


@pytest.mark.parametrize("low", [True, False])
def test_both_splits_get_two_speakers_wherever_their_names_fall(low):
    names = [r for r in people(1000) if (corpora.fraction(r.speaker) < corpora.HELD_OUT_SHARE) == low]
    train, validation = corpora.split_speakers(names[:4])
    assert (len(speakers(train)), len(speakers(validation))) == (2, 2)


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_speakers(count):
    with pytest.raises(UserError, match="fewer than four speakers.*add recordings"):
        corpora.split_speakers(people(count))


def test_listing_names_every_corpus_with_licence_and_check():
    text = corpora.listing()
    for corpus in corpora.CORPORA:
        (line,) = (line for line in text.splitlines() if line.split()[0] == corpus.name)
        assert corpus.licence in line
        assert ("size only" in line) == any(archive.checksum is None for archive in corpus.archives)
        assert (" * " in line) == corpus.default


def test_table_is_sound():
    names = [corpus.name for corpus in corpora.CORPORA]
    assert len(set(names)) == len(names)
    for corpus in corpora.CORPORA:
        assert set(corpus.kinds) <= set(corpora.KINDS)
        for archive in corpus.archives:
            assert archive.url.startswith("https://")
            algorithm, _, digest = (archive.checksum or "md5:" + "0" * 32).partition(":")
            assert len(digest) == {"md5": 32, "sha256": 64}[algorithm]
    assert not [c.name for c in corpora.CORPORA if c.default and "NC" in c.licence]


def test_a_copy_of_esc50_keeps_its_categories(tmp_path):
    root = tmp_path / "ESC-50-master"
    record(root / "audio" / "1-100032-A-0.wav")
    shutil.copy(root / "audio" / "1-100032-A-0.wav", root / "audio" / "1-5-B-9.wav")
    (root / "meta").mkdir()
    table = "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
    (root / "meta" / "esc50.csv").write_text(table)
    assert speakers(find(root, "noise")) == {"ESC-50-master/dog", "ESC-50-master/audio"}
