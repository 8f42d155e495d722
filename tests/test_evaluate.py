"""evaluate.py: a fixed list, and figures that tell a good extractor from a useless one."""

import numpy as np
import pytest

import evaluate
import mixing


@pytest.fixture(scope="module")
def cases(recordings):
    return evaluate.two_voices(recordings["speech"], 4, 1.5, [-5.0, 5.0], seed=1)


class Perfect:
    """Knows the parts, and takes the one whose speaker's voice it is given."""

    def __init__(self, cases):
        self.parts = {}
        for plan, other, settings in cases:
            example = mixing.render(plan, settings)
            self.parts[len(example.reference), float(example.reference[100])] = example.parts[0]
            reference = np.concatenate([mixing.load(piece) for piece in other])
            self.parts[len(reference), float(reference[100])] = example.parts[1]

    def enroll(self, reference):
        return len(reference), float(reference[100])

    def extract(self, mixture, voice):
        return self.parts[voice] + 0.01 * mixture


class Useless:
    def enroll(self, reference):
        return None

    def extract(self, mixture, voice):
        return mixture


def test_the_list_is_fixed(recordings, cases):
    again = evaluate.two_voices(recordings["speech"], 4, 1.5, [-5.0, 5.0], seed=1)
    assert [plan for plan, _, _ in again] == [plan for plan, _, _ in cases]
    other = evaluate.two_voices(recordings["speech"], 4, 1.5, [-5.0, 5.0], seed=2)
    assert [plan for plan, _, _ in other] != [plan for plan, _, _ in cases]
    for plan, other, _ in cases:
        assert len(plan.interference) == 1
        assert not plan.noise
        assert {piece.recording.speaker for piece in other} == {plan.interference[0].recording.speaker}


def test_the_figures_of_a_perfect_and_of_a_useless_extractor(cases):
    perfect = evaluate.summary([evaluate.score(Perfect(cases), *case) for case in cases])
    assert "by more than 1 dB in 100 %, wrong speaker in 0 %" in perfect
    useless = evaluate.summary([evaluate.score(Useless(), *case) for case in cases])
    assert "improvement 0.00 dB (median 0.00), by more than 1 dB in 0 %" in useless
    assert "that voice: improvement 0.00 dB" in useless


def test_the_mixture_has_the_stated_ratio(cases):
    for case in cases:
        row = evaluate.score(Useless(), *case)
        assert row["mixture"] == pytest.approx(case[0].sir_db, abs=0.6)
        assert row["turned_mixture"] == pytest.approx(-case[0].sir_db, abs=0.6)


def test_the_learning_curve_is_a_picture(tmp_path):
    rows = [{"minutes": 1.0, "si_sdr_improvement": 0.5}, {"minutes": 2.0, "si_sdr_improvement": 1.5}]
    evaluate.learning_curve(tmp_path / "curve.png", rows)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
