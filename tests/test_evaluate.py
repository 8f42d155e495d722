"""evaluate.py: fixed lists that are what they say, and figures that tell a good extractor from a useless one."""

import dataclasses
import functools
import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

import audio
import corpora
import evaluate
import lists
import mixing
import report
from extractor import REHEARSAL_SECONDS, Extractor
from lists import ESTIMATE, OTHER, SELF
from metrics import over_suppression, si_sdr
from model import Config

LIST = {"count": 30, "segment": 4.0, "sir_db": [-5.0, 5.0], "seed": 1}


def voices(corpus, speakers, recordings=12, seconds=7.0, **about):
    """Recordings that only exist on paper; drawing a list needs no more."""
    return [
        corpora.Recording(Path(f"/{corpus}/{s}/{n}.wav"), "speech", corpus, f"{corpus}/{s}", seconds + n / 10, **about)
        for s in range(speakers)
        for n in range(recordings)
    ]


PAPER = {
    "speech": voices("A", 6, gender="f") + voices("B", 6, gender="m", age=30),
    "accents": voices("C", 5, gender="f", age=12),
    "words": voices("D", 4),
    "noise": [corpora.Recording(Path("/rain.wav"), "noise", "N", "N/rain", 9.0)],
    "music": [corpora.Recording(Path("/tune.wav"), "music", "M", "M/tune", 60.0)],
}
TEXTS = {recording.path: "some words" for recording in PAPER["words"][::2]}


def paper_list(name, **common):
    return lists.fixed_lists([name], PAPER, TEXTS, **{**LIST, **common})


def speakers(pieces):
    return {piece.recording.speaker for piece in pieces}


# ---- The lists ----


def test_the_two_voices_are_the_same_on_every_machine():
    plans = [case.plan for case in paper_list("two-voices", count=3)]
    drawn = [(p.speaker.speaker, p.interference[0].recording.speaker, p.target.recording.path.stem) for p in plans]
    assert drawn == [("A/5", "A/0", "6"), ("B/0", "B/3", "3"), ("B/1", "A/3", "5")]
    assert [plan.sir_db for plan in plans] == pytest.approx(
        [-0.1480902556836492, 2.145433591151118, 0.19952031573398532]
    )


@pytest.mark.parametrize("name", lists.LISTS)
def test_a_list_is_fixed_by_its_seed(name):
    assert paper_list(name) == paper_list(name)
    assert paper_list(name, count=10) == paper_list(name)[:10]
    assert paper_list(name) != paper_list(name, seed=2)


@pytest.mark.parametrize("name", lists.LISTS)
def test_references_are_other_speech_of_the_right_speaker(name):
    for case in paper_list(name):
        plan = case.plan
        spoken = [plan.target, *plan.more] if plan.target else []
        assert speakers([*plan.reference, *spoken]) == {plan.speaker.speaker}
        assert plan.speaker.speaker not in speakers(plan.interference)
        assert not {p.recording for p in plan.reference} & {p.recording for p in spoken}
        if OTHER in case.references and plan.interference:
            other = case.references[OTHER]
            assert speakers(other) == speakers(plan.interference)
            assert not {p.recording for p in other} & {p.recording for p in plan.interference}
            assert lists.total(other) >= mixing.MIN_REFERENCE_SECONDS


@pytest.mark.parametrize(
    ("name", "interferers", "sir_db"),
    [
        ("two-voices", 1, [-5, 5]), ("noisy", 1, [-5, 5]), ("three-voices", 2, [-5, 5]), ("accents", 1, [-5, 5]),
        ("reverberant", 1, [-5, 5]), ("target-absent", 1, [-5, 5]), ("clean-target", 0, [-5, 5]),
    ],
)  # fmt: skip
def test_a_list_has_the_voices_and_conditions_that_it_names(name, interferers, sir_db):
    for case in paper_list(name):
        plan = case.plan
        assert len(plan.interference) == interferers
        assert sir_db[0] <= plan.sir_db <= sir_db[1]
        assert (plan.target is None) == (name == "target-absent")
        assert plan.room == (name == "reverberant")
        assert bool(plan.noise) == (name == "noisy")
        if name == "noisy":
            assert 0 <= plan.snr_db <= 15
        if name == "accents":
            assert speakers([*plan.reference, *plan.interference]) <= {r.speaker for r in PAPER["accents"]}


@pytest.mark.parametrize(
    "name",
    ["two-voices", "noisy", "three-voices", "accents", "reverberant", "target-absent", "reference-length", "pairs"],
)
def test_all_voices_speak_from_start_to_end(name, monkeypatch):
    """Also where recordings are shorter than the segment, which then ends with the shortest."""
    short = {"speech": voices("A", 6, seconds=2.5), "accents": voices("C", 5, seconds=2.5)}
    monkeypatch.setitem(globals(), "PAPER", {**PAPER, **short})
    lengths = set()
    for case in paper_list(name):
        plan = case.plan
        lengths.add(case.settings.segment)
        for piece in [*([plan.target] if plan.target else []), *plan.interference]:
            assert (piece.offset, piece.seconds) == (0, case.settings.segment)
        for piece in plan.noise:
            assert piece.offset + piece.seconds <= case.settings.segment
    assert lists.SHORTEST <= min(lengths) < max(lengths) <= 4


def test_noise_and_music_take_turns():
    kinds = [[piece.recording.kind for piece in case.plan.noise] for case in paper_list("noisy", count=4)]
    assert kinds == [["noise"], ["music"], ["noise"], ["music"]]


@pytest.mark.parametrize(("name", "seconds"), [*lists.SEGMENTS.items(), ("primary", lists.PRIMARY_SEGMENT)])
def test_both_voices_fill_the_segment(name, seconds):
    for case in paper_list(name):
        assert case.settings.segment == seconds
        for pieces in ([case.plan.target, *case.plan.more], case.plan.interference):
            ends = np.cumsum([piece.seconds for piece in pieces])
            assert ends[-1] == pytest.approx(seconds)
            assert [piece.offset for piece in pieces] == pytest.approx([0, *ends[:-1]])
            assert len({piece.recording for piece in pieces}) == len(pieces)


def test_the_primary_speaker_is_louder_and_extracted_with_and_without_reference():
    for case in paper_list("primary"):
        assert 3 <= case.plan.sir_db <= 10
        assert case.references.keys() == {ESTIMATE, SELF, "with a reference", OTHER}
        assert case.references[ESTIMATE] is None


def test_the_lengths_of_references():
    for case in paper_list("reference-length"):
        assert [case.references[f"reference {s} s"] for s in (1, 2, 3, 5, 10)] == [1, 2, 3, 5, 10]
        assert lists.total(case.plan.reference) == pytest.approx(10)


def test_references_of_the_same_and_of_another_recording_are_equally_long():
    for case in paper_list("recording"):
        (same,), target = case.references["same recording"], case.plan.target
        assert same.recording == target.recording
        assert same.start + same.seconds <= target.start + 1e-6 or same.start >= target.start + target.seconds
        assert same.start + same.seconds <= target.recording.seconds + 1e-6
        assert case.references["another recording"] == same.seconds >= mixing.MIN_REFERENCE_SECONDS
        assert lists.total(case.plan.reference) >= same.seconds


def test_words_are_those_of_the_whole_target():
    for case in paper_list("words"):
        assert case.text == TEXTS[case.plan.target.recording.path]
        assert case.plan.target.seconds == case.plan.target.recording.seconds == case.settings.segment


def test_a_list_that_cannot_be_drawn_is_left_out_with_a_line(capsys):
    nothing = {kind: [] for kind in PAPER}
    cases = lists.fixed_lists(lists.LISTS, {**nothing, "speech": voices("A", 2, recordings=2)}, None, **LIST)
    errors = capsys.readouterr().err.splitlines()
    left_out = ["noisy", "three-voices", "accents", "reference-length", "segment-30", "words"]
    assert set(left_out) <= {line.split()[0] for line in errors}
    assert all(" is left out: " in line for line in errors)
    assert "two-voices" in {case.list for case in cases}
    single = {**nothing, "speech": voices("A", 2, recordings=1)}
    with pytest.raises(evaluate.UserError, match="two-voices is left out: too few voices with enough speech for 7 s"):
        lists.fixed_lists(["two-voices"], single, None, **{**LIST, "segment": 7.0})
    with pytest.raises(evaluate.UserError, match="words is left out: pocketsphinx is not installed"):
        lists.fixed_lists(["words"], PAPER, None, **LIST)


# ---- The recordings ----


def silence(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.zeros(round(seconds * audio.SAMPLE_RATE), dtype=np.float32))


def test_only_held_out_noise_music_and_speakers_are_used(tmp_path):
    for n in range(30):
        silence(tmp_path / "speech" / f"{n % 6}" / f"{n}.wav")
        silence(tmp_path / "noise" / "rain" / f"{n}.wav")
        silence(tmp_path / "music" / f"{n}.wav")
        silence(tmp_path / "WAVE" / f"SPEAKER{n:04}" / f"{n:05}0.wav")
    speech, noise, music = (str(tmp_path / name) for name in ("speech", "noise", "music"))
    words = str(tmp_path / "WAVE")
    options = evaluate.Options(speech=[speech], accents=[speech], words=[words], noise=[noise], music=[music])
    found = evaluate.find_recordings(options)
    assert len(found["speech"]) == len(found["accents"]) == 30
    for kind in ("noise", "music"):
        every = corpora.find([str(tmp_path / kind)], kind, tmp_path)
        assert found[kind] == corpora.split_files(every)[1]
        assert 0 < len(found[kind]) < 15
    every = corpora.find([words], "speech", tmp_path)
    assert len(every) == 30
    assert found["words"] == corpora.split_speakers(every)[1]
    without = evaluate.find_recordings(dataclasses.replace(options, noise=["none"], lists=["noisy"]))
    assert not without["noise"]
    assert without["music"]


def test_transcripts_of_both_layouts(tmp_path):
    silence(tmp_path / "dev-clean/12/34/12-34-0000.flac")
    silence(tmp_path / "dev-clean/12/34/12-34-0001.flac")
    (tmp_path / "dev-clean/12/34/12-34.trans.txt").write_text("12-34-0000 SOME WORDS\n12-34-0002 NO FILE\n\n")
    silence(tmp_path / "ocean/WAVE/SPEAKER0001/000010011.wav")
    (tmp_path / "ocean/train").mkdir()
    (tmp_path / "ocean/train/text").write_text("000010011\tWE CALL IT BEAR\n")
    found = corpora.find([str(tmp_path / "dev-clean"), str(tmp_path / "ocean")], "speech", tmp_path)
    texts = evaluate.transcripts(found)
    assert {path.stem: text for path, text in texts.items()} == {
        "12-34-0000": "SOME WORDS",
        "000010011": "WE CALL IT BEAR",
    }


# ---- The figures ----


class Known:
    """An extractor that knows what it should extract: `answer(scene, name)` of the references' names."""

    network = types.SimpleNamespace(config=Config())

    def __init__(self, scene, answer):
        self.scene, self.answer = scene, answer

    def enroll(self, reference):
        return next(name for name, known in self.scene.references.items() if known is reference)

    def enroll_primary(self, blocks):
        return SELF, 0.0

    def extract(self, mixture, voice):
        return self.answer(self.scene, voice)


def perfect(scene, voice):
    return (scene.interference if voice == OTHER else scene.target) + 0.01 * scene.mixture


def useless(scene, voice):
    return scene.mixture


def turned(scene, voice):
    return (scene.target if voice == OTHER else scene.interference) + 0.01 * scene.mixture


def silent(scene, voice):
    return 0.01 * scene.mixture


@pytest.fixture(scope="module")
def scenes(recordings):
    found = {**dict.fromkeys(PAPER, []), **recordings}
    common = {"count": 4, "segment": 1.5, "sir_db": [-5.0, 5.0], "seed": 1}
    names = ["two-voices", "three-voices", "noisy", "target-absent", "clean-target"]
    cases = lists.fixed_lists(names, found, {}, **common)
    return [evaluate.scene_of(case) for case in cases]


def rows_of(scenes, answer, measures=None):
    return [evaluate.score(Known(scene, answer), scene, measures or {}) for scene in scenes]


@pytest.fixture(scope="module")
def summaries(scenes):
    """The figures of each known extractor."""
    return {answer: report.summary(rows_of(scenes, answer)) for answer in (perfect, useless, turned, silent)}


@pytest.mark.parametrize("name", ["two-voices", "three-voices", "noisy"])
def test_the_figures_of_known_extractors(summaries, name):
    figures = {answer: summaries[answer][name] for answer in (perfect, useless, turned)}
    assert figures[perfect][ESTIMATE]["improvement_mean"][0] > 20
    assert figures[perfect][ESTIMATE]["improved_share"] == 100
    assert figures[perfect][ESTIMATE]["wrong_speaker_share"] == 0
    assert figures[perfect][ESTIMATE]["over_suppression_share"] == 0
    assert figures[useless][ESTIMATE]["improvement_mean"] == [0, 0, 0]
    assert figures[useless][ESTIMATE]["improved_share"] == 0
    assert figures[turned][ESTIMATE]["wrong_speaker_share"] == 100
    assert figures[turned][ESTIMATE]["improvement_mean"][0] < -10
    for scores in figures.values():
        assert scores["mixture"]["improvement_mean"] == [0, 0, 0]
        assert scores[report.ORACLE]["improvement_mean"][0] > 5
        assert scores[report.ORACLE]["wrong_speaker_share"] == 0


def test_the_control_is_scored_on_the_interfering_voice(summaries):
    assert summaries[perfect]["two-voices"][OTHER]["improvement_mean"][0] > 20
    assert summaries[perfect]["two-voices"][OTHER]["wrong_speaker_share"] == 0
    assert summaries[turned]["two-voices"][OTHER]["wrong_speaker_share"] == 100


def test_an_absent_target_counts_by_its_attenuation(summaries):
    absent = summaries[perfect]["target-absent"]
    assert absent[ESTIMATE] == {"attenuation_median_db": pytest.approx(40, abs=0.1), "mixtures": 4}
    assert absent["mixture"]["attenuation_median_db"] == 0
    assert absent[report.ORACLE]["attenuation_median_db"] > 60
    assert absent[OTHER]["si_sdr_median"] > 30  # that voice speaks, and alone


def test_a_clean_target_counts_by_what_is_lost(summaries):
    clean = summaries[perfect]["clean-target"][ESTIMATE]
    assert clean["si_sdr_median"] > 60
    assert clean["over_suppression_share"] == 0
    assert "improvement_mean" not in clean
    lost = summaries[silent]["clean-target"][ESTIMATE]
    assert lost["over_suppression_share"] == 100
    assert lost["attenuation_median_db"] == pytest.approx(40, abs=0.1)


def test_the_mixture_has_the_stated_ratio(scenes):
    for scene in scenes:
        if scene.about["list"] == "two-voices":
            row = evaluate.score(Known(scene, useless), scene, {})
            assert row["signals"]["mixture"]["si_sdr"] == pytest.approx(scene.about["sir_db"], abs=0.6)


def test_the_libraries_figures_of_known_extractors(scenes):
    measures = evaluate.quality_measures()
    for answer, low, high in ((perfect, 3, 4.65), (useless, 1, 3)):
        for row in rows_of(scenes[:2], answer, measures):
            scores = row["signals"][ESTIMATE]
            assert low < scores["pesq"] <= high
            assert (scores["stoi"] > 0.95) == (answer is perfect)
            assert (scores["sdr"] > 20) == (answer is perfect)


def test_what_is_not_defined_is_left_out():
    samples = np.zeros(4000, dtype=np.float32)
    samples[:100] = 0.1
    scores = evaluate.figures(samples, samples, samples, 0 * samples, evaluate.quality_measures())
    assert "stoi" not in scores
    assert np.isfinite(list(scores.values())).all()


def test_si_sdr_is_that_of_torchmetrics(scenes):
    for scene in scenes[:4]:
        mixture, target = torch.from_numpy(scene.mixture), torch.from_numpy(scene.target)
        theirs = scale_invariant_signal_distortion_ratio(mixture, target, zero_mean=True)
        assert si_sdr(mixture, target).item() == pytest.approx(theirs.item(), abs=1e-2)


def test_over_suppression_is_the_share_of_active_frames_that_are_lost():
    target = torch.randn(100 * 320, generator=torch.Generator().manual_seed(0))
    target[50 * 320 :] = 0  # pauses do not count
    estimate = 0.5 * target
    assert over_suppression(estimate, target) == 0
    estimate[: 20 * 320] *= 0.1
    assert over_suppression(estimate, target).item() == pytest.approx(0.4)
    assert over_suppression(0 * target, target) == 1
    other = torch.randn(100 * 320, generator=torch.Generator().manual_seed(1))
    assert over_suppression(target + other, target) < 0.01
    assert over_suppression(0.1 * target + other, target) > 0.95  # what leaks of others does not hide it


def test_the_oracle_mask_is_bounded_as_the_networks():
    noise = np.random.default_rng(0).standard_normal((2, 16000)).astype(np.float32)
    within = evaluate.oracle(Config(), noise[0], 1.5 * noise[0])
    np.testing.assert_allclose(within, 1.5 * noise[0], atol=1e-4)
    beyond = evaluate.oracle(Config(), noise[0], 30 * noise[0])
    np.testing.assert_allclose(beyond, Config().mask_bound * noise[0], atol=1e-4)


def test_intervals_are_over_speakers():
    values, speaker = np.repeat([0.0, 1.0], 50), np.repeat(["a", "b"], 50)
    assert report.interval(values, speaker, np.mean) == (0, 1)
    many = np.random.default_rng(0).standard_normal(1000)
    low, high = report.interval(many, np.arange(1000), np.mean)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.15)


def test_the_words_that_are_recognised():
    pytest.importorskip("pocketsphinx")
    assert evaluate.word_errors(np.zeros(16000, dtype=np.float32), "SOME WORDS") == [2, 2]
    row = {"list": "words", "target": {"speaker": "a", "corpus": "A"}, "signals": {ESTIMATE: {"word_errors": [1, 2]}}}
    longer = {
        "list": "words",
        "target": {"speaker": "b", "corpus": "A"},
        "signals": {ESTIMATE: {"word_errors": [0, 8]}},
    }
    assert report.summary([row, longer])["words"][ESTIMATE]["word_error_rate"] == pytest.approx(10)


def test_the_cuts_of_lists():
    def row(name, sir_db, one, other):
        keys = ("gender", "age", "corpus")
        voices = {"target": dict(zip(keys, one, strict=True)), "interferers": [dict(zip(keys, other, strict=True))]}
        return {"list": name, "sir_db": sir_db, **voices}

    assert list(report.cuts(row("two-voices", -2.6, ("f", 20, "A"), ("m", 20, "A")))) == ["SIR -5 to -2.5 dB"]
    assert list(report.cuts(row("two-voices", 2.5, ("f", 20, "A"), ("m", 20, "A")))) == ["SIR 2.5 to 5 dB"]
    assert list(report.cuts(row("pairs", 0, ("f", 20, "A"), ("m", 29, "B")))) == [
        "different sex", "same age group", "different corpus",
    ]  # fmt: skip
    assert list(report.cuts(row("pairs", 0, ("", None, "A"), ("m", 29, "A")))) == ["same corpus"]
    assert list(report.cuts(row("words", 0, ("", None, "A"), ("m", 29, "B")))) == ["A"]


# ---- The command ----


@pytest.mark.skipif(not importlib.util.find_spec("pesq"), reason="needs pesq")
def test_the_whole_command(script, checkpoint, tmp_path):
    done = script(
        "evaluate.py", "--speech", DEMO / "voices", "--accents", DEMO / "voices", "--noise", DEMO / "noise",
        "--music", "none", "--mixtures", 2, "--segment", 1.5, "--workers", 1, "--checkpoint", checkpoint,
        "--output", tmp_path / "out", "--curve", tmp_path / "curve.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "words is left out: no --words" in done.stderr
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(figures["rows"]) == 2 * len({row["list"] for row in figures["rows"]})
    assert figures["summary"]["two-voices"][ESTIMATE].keys() >= {"improvement_mean", "pesq_mean", "stoi_mean"}
    written = (tmp_path / "out" / "report.md").read_text()
    for name in lists.MAIN:
        assert f"| {name} |" in written
        assert name in done.stdout
    for name in ("improvement-by-sir.png", "histograms.png", "best.png", "worst.png", "best-estimate.wav"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
        assert f"({name})" in written
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def case(tmp_path):
    """A folder with one case in three formats and rates."""
    target = audio.read(DEMO / "target.flac")
    folder = tmp_path / "cases" / "one"
    folder.mkdir(parents=True)
    target_at_44100 = audio.read(DEMO / "target.flac", rate=44100)
    audio.write(folder / "target.flac", target_at_44100, 44100)
    audio.write(folder / "mixture.wav", audio.read(DEMO / "mixture.flac")[: len(target)])
    audio.write(folder / "reference.ogg", audio.read(DEMO / "reference.opus", rate=22050), 22050)
    return folder


def test_cases_of_any_format_and_rate(script, checkpoint, case, tmp_path):
    done = script(
        "evaluate.py", "--cases", case.parent, "--checkpoint", checkpoint, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("one ")
    figures = json.loads((tmp_path / "figures.json").read_text())
    (row,) = figures["rows"]
    mixture, target = audio.read(DEMO / "mixture.flac"), audio.read(DEMO / "target.flac")
    expected = si_sdr(torch.from_numpy(mixture), torch.from_numpy(target)).item()
    assert row["signals"]["mixture"]["si_sdr"] == pytest.approx(expected, abs=0.1)
    assert figures["summary"]["cases"][ESTIMATE]["mixtures"] == 1


def test_live_scores_what_a_stream_returns(checkpoint, case, tmp_path):
    scene = evaluate.read_case(case)
    for more, seconds in ((["--live"], 0), ([], REHEARSAL_SECONDS)):
        arguments = ["--cases", str(case.parent), "--checkpoint", str(checkpoint), "--json", str(tmp_path / "out.json")]
        evaluate.main([*arguments, *more])
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        extractor = Extractor(checkpoint, rehearsal_seconds=seconds)
        estimate = extractor.extract(scene.mixture, extractor.enroll(scene.references[ESTIMATE]))
        expected = si_sdr(*map(torch.from_numpy, (estimate, scene.target))).item()
        assert row["signals"][ESTIMATE]["si_sdr"] == pytest.approx(expected, abs=0.01)


def test_what_is_not_the_target_is_interference_at_any_level(case):
    target = evaluate.read_case(case).target
    interference = np.random.default_rng(0).normal(size=len(target)).astype(np.float32) * 0.05
    audio.write(case / "mixture.wav", 0.5 * (target + interference))
    scene = evaluate.read_case(case)
    assert si_sdr(torch.from_numpy(scene.interference), torch.from_numpy(interference)) > 20
    (case / "reference.ogg").unlink()
    assert evaluate.read_case(case).references == {ESTIMATE: None, SELF: None}


def test_cases_are_a_line_each_with_what_was_scored():
    def row(case, *signals):
        return {"case": case, "signals": {name: {"si_sdr": 1.234, "improvement": 5.0} for name in signals}}

    table = report.case_table([row("one", "mixture", ESTIMATE), row("two", "mixture", ESTIMATE)])
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [["one", "1.23", "1.23"], ["two", "1.23", "1.23"]]
    assert "self-enrolled" not in table
    assert "self-enrolled" in report.case_table([row("one", ESTIMATE), row("two", ESTIMATE, SELF)])


def test_cases_that_cannot_be_used(refusal, checkpoint, case):
    score = functools.partial(refusal, evaluate.main, "--quick", "--checkpoint", checkpoint, "--cases")
    assert "no such folder" in score(case / "nowhere")
    assert "has no subfolders" in score(case)
    audio.write(case / "reference.wav", np.zeros(8000, dtype=np.float32))
    assert "reference.ogg and reference.wav" in score(case.parent)
    (case / "reference.ogg").unlink()
    assert "reference.wav: 0.50 s of reference is too short" in score(case.parent)
    audio.write(case / "target.flac", np.zeros(8000, dtype=np.float32))
    assert "give the target's part of this mixture" in score(case.parent)
    (case / "target.flac").unlink()
    assert "has no target.*" in score(case.parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixtures", 0], "--mixtures 0: give more than 0"),
        (["--workers", 0], "--workers 0: give more than 0"),
        (["--sir-db", 5, -5], "--sir-db 5.0 -5.0: give the lower end first"),
        (["--lists", "two-voices", "many"], "--lists two-voices many: give some of two-voices, noisy"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--speech", "nowhere"], "nowhere: neither a folder nor a corpus"),
        (["--speech", DEMO / "voices", "--noise", "nowhere"], "nowhere: neither a folder nor a corpus of noise"),
        (["--speech", DEMO / "voices", "--lists", "words"], "words is left out: no --words"),
    ],
)
def test_options_that_cannot_be_used(refusal, checkpoint, arguments, message):
    assert message in refusal(evaluate.main, "--checkpoint", checkpoint, *arguments)


def test_a_missing_package_is_told(refusal, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pesq" else find(name))
    assert "pesq: is not installed" in refusal(evaluate.main)


def test_the_learning_curve_is_a_picture(tmp_path):
    rows = [{"minutes": 1.0, "si_sdr_improvement": 0.5}, {"minutes": 2.0, "si_sdr_improvement": 1.5}]
    report.learning_curve(tmp_path / "curve.png", rows)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
