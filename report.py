"""The rows of an evaluation as tables, pictures and a report; see `evaluate.score` for what a row is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

import audio
import corpora
from lists import ESTIMATE, OTHER, SELF
from test import picture
from utils import whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

ORACLE = "oracle mask"
SIR_STEP = 2.5  # dB
RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Column:
    """A statistic over a list's mixtures of one of `evaluate.figures`."""

    key: str
    title: str
    figure: str
    statistic: Callable
    format: str = "{:.1f}"
    interval: bool = False  # whether it has a 95 % interval
    brief: bool = True  # whether the terminal shows it, too


COLUMNS = (
    Column("si_sdr_mean", "SI-SDR", "si_sdr", np.mean),
    Column("si_sdr_median", "median", "si_sdr", np.median),
    Column("improvement_mean", "improvement", "improvement", np.mean, "{:.2f}", interval=True),
    Column("improvement_median", "median", "improvement", np.median, "{:.2f}", interval=True, brief=False),
    Column("improvement_10th_percentile", "10th percentile", "improvement", lambda v: np.percentile(v, 10), "{:.2f}",
           interval=True, brief=False),
    Column("improved_share", "> 1 dB", "improvement", lambda v: 100 * np.mean(v > 1), "{:.0f} %"),
    Column("wrong_speaker_share", "wrong voice", "wrong_speaker", lambda v: 100 * np.mean(v), "{:.1f} %"),
    Column("sdr_mean", "SDR", "sdr", np.mean),
    Column("pesq_mean", "PESQ", "pesq", np.mean, "{:.2f}"),
    Column("stoi_mean", "STOI", "stoi", np.mean, "{:.3f}"),
    Column("attenuation_median_db", "quieter", "attenuation_db", np.median),
    Column("over_suppression_share", "suppressed", "over_suppression", lambda v: 100 * np.mean(v), "{:.1f} %"),
    Column("word_error_rate", "word errors", "word_errors", lambda v: 100 * v[:, 0].sum() / v[:, 1].sum(), "{:.0f} %"),
)  # fmt: skip
LEGEND = (
    "SI-SDR, its improvement over the mixture, SDR and quieter (the median level below the mixture) in dB, with 95 % "
    "bootstrap intervals over target speakers; wrong voice: nearer to the interfering voices than to the target; "
    "suppressed: active frames of the target that lost more than 10 dB; the oracle mask is the best that this STFT "
    "allows; the interferer's reference is scored on the interfering voice"
)


def groups(rows):
    """Rows by list, then by the cuts of lists."""
    found = {}
    for row in rows:
        found.setdefault(row["list"], []).append(row)
    for name, members in list(found.items()):
        for row in sorted(members, key=lambda row: row.get("sir_db", 0)):
            for cut in cuts(row):
                found.setdefault(f"{name}, {cut}", []).append(row)
    return found


def cuts(row):
    """The names of the cuts that a row is in: SIR of two voices; what pairs share, where known; corpus of words."""
    if row["list"] == "two-voices":
        low = SIR_STEP * (row["sir_db"] // SIR_STEP)
        yield f"SIR {low:g} to {low + SIR_STEP:g} dB"
    if row["list"] == "words":
        yield row["target"]["corpus"]
    if row["list"] == "pairs":
        pair = row["target"], row["interferers"][0]
        known = {
            "sex": [voice["gender"] for voice in pair],
            "age group": [voice["age"] and corpora.age_group(voice["age"]) for voice in pair],
            "corpus": [voice["corpus"] for voice in pair],
        }
        for name, (one, other) in known.items():
            if one and other:
                yield f"{'same' if one == other else 'different'} {name}"


def signals(rows):
    """The names of what is scored in a group, in order."""
    return list(dict.fromkeys(name for row in rows for name in row["signals"]))


def measure(rows, name, column):
    """A column's (value, low end, high end) for one signal of some rows; `None` where it is not defined in any.

    The ends are the 95 % interval where the column has one, else `None`.
    """
    chosen = [row for row in rows if column.figure in row["signals"].get(name, {})]
    if not chosen:
        return None
    values = np.array([row["signals"][name][column.figure] for row in chosen], dtype=float)
    scored = [(name == OTHER and row["interferers"] or [row["target"]])[0] for row in chosen]
    speakers = np.array([voice["speaker"] for voice in scored])
    low, high = interval(values, speakers, column.statistic) if column.interval else (None, None)
    return float(column.statistic(values)), low, high


def interval(values, speakers, statistic):
    """The 95 % bootstrap interval of a statistic of `values` (rows,), when speakers (rows,) are drawn anew."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    spoken = [values[speakers == speaker] for speaker in np.unique(speakers)]
    rng = np.random.default_rng(0)
    draws = rng.integers(len(spoken), size=(RESAMPLES, len(spoken)))
    resampled = [statistic(np.concatenate([spoken[n] for n in draw])) for draw in draws]
    return tuple(map(float, np.percentile(resampled, [2.5, 97.5])))


def summary(rows):
    """All figures by group, signal and column: a value, or [value, low end, high end]; for JSON."""
    return {
        group: {
            name: {
                column.key: list(found) if column.interval else found[0]
                for column in COLUMNS
                if (found := measure(members, name, column))
            }
            | {"mixtures": len(members)}
            for name in signals(members)
        }
        for group, members in groups(rows).items()
    }


def table(figures, brief):
    """A `summary` as rows of text, the head first; columns that no row has are left out."""
    lines = [(group, name, scores) for group, scored in figures.items() for name, scores in scored.items()]
    columns = [c for c in COLUMNS if (c.brief or not brief) and any(c.key in scores for _, _, scores in lines)]
    cells = [["list", "signal", "n", *(column.title for column in columns)]]
    last = None
    for group, name, scores in lines:
        cells.append([group if group != last else "", name, str(scores["mixtures"])])
        cells[-1] += [cell(scores.get(column.key), column.format) for column in columns]
        last = group
    return cells


def cell(value, format):
    if value is None:
        return "-"
    if isinstance(value, list):
        shown, low, high = map(format.format, value)
        return f"{shown} [{low}, {high}]"
    return format.format(value)


def text(figures):
    """A `summary` for the terminal."""
    return "\n".join([*corpora.aligned(table(figures, brief=True)), LEGEND])


def case_table(rows):
    """A line for each of `evaluate.read_case`'s rows, as text."""
    shown = (
        ("mixture", "mixture", "si_sdr"), ("estimate", ESTIMATE, "si_sdr"), ("improvement", ESTIMATE, "improvement"),
        ("self-enrolled", SELF, "si_sdr"), ("oracle mask", ORACLE, "si_sdr"), ("SDR", ESTIMATE, "sdr"),
        ("PESQ", ESTIMATE, "pesq"), ("STOI", ESTIMATE, "stoi"), ("quieter", ESTIMATE, "attenuation_db"),
    )  # fmt: skip
    shown = [column for column in shown if any(column[1] in row["signals"] for row in rows)]
    lines = [["case", *(title for title, _, _ in shown)]]
    for row in rows:
        values = [row["signals"].get(name, {}).get(figure) for _, name, figure in shown]
        lines.append([row["case"], *(cell(value, "{:.2f}") for value in values)])
    return "\n".join(corpora.aligned(lines))


def extremes(rows):
    """Which of the first list's rows have the most and the least improvement: {"best": n, "worst": n}, or nothing."""
    gains = {
        n: row["signals"][ESTIMATE]["improvement"]
        for n, row in enumerate(rows)
        if row["list"] == rows[0]["list"] and "improvement" in row["signals"].get(ESTIMATE, {})
    }
    return {"best": max(gains, key=gains.get), "worst": min(gains, key=gains.get)} if gains else {}


def save(folder, about, rows, figures, examples, rate):
    """Write report.md: what was scored, the rows' `summary`, pictures, and the sound of examples, {name: signals}.

    Returns its path.
    """
    head, *body = table(figures, brief=False)
    lines = [
        "# Evaluation",
        "",
        about,
        "",
        *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)),
    ]
    lines += ["", LEGEND + ".", ""]
    for name, figure in pictures(rows).items():
        save_picture(folder / f"{name}.png", figure)
        lines += [f"![{name}]({name}.png)", ""]
    for name, heard in examples.items():
        picture(folder / f"{name}.png", heard, rate)
        lines += [f"The {name} case of {rows[0]['list']}:", "", f"![{name}]({name}.png)", ""]
        for signal, samples in heard.items():
            file = re.sub(r"[^\w.]+", "-", f"{name}-{signal}.wav")
            audio.write(folder / file, samples, rate)
            lines.append(f"- [{signal}]({file})")
        lines.append("")
    with whole(folder / "report.md") as partial:
        partial.write_text("\n".join(lines))
    return folder / "report.md"


def pictures(rows):
    """What there is data for, by file name: improvement against SIR, reference and segment length, histograms."""
    found = groups(rows)
    by_sir = [
        (np.mean([row["sir_db"] for row in members]), members, ESTIMATE)
        for name, members in found.items()
        if name.startswith("two-voices, SIR")
    ]
    lengths = found.get("reference-length", [])
    references = [name for name in signals(lengths) if name.startswith("reference ")]
    by_reference = [(float(name.split()[1]), lengths, name) for name in references]
    by_segment = [(m[0]["segment"], m, ESTIMATE) for name, m in found.items() if name.startswith("segment-")]
    drawn = {
        "improvement-by-sir": curve(by_sir, "SIR of the mixture, dB", found.get("two-voices", [])),
        "improvement-by-reference": curve(by_reference, "length of the reference, s"),
        "improvement-by-segment": curve(by_segment, "length of the mixture, s"),
        "histograms": histograms({name: members for name, members in found.items() if "," not in name}),
    }
    return {name: figure for name, figure in drawn.items() if figure}


def curve(points, label, scattered=()):
    """A figure of mean improvement with its interval over `points` (x, rows, signal), and of each row by its SIR."""
    column = next(column for column in COLUMNS if column.key == "improvement_mean")
    if not points:
        return None
    x = [place for place, _, _ in points]
    mean, low, high = np.array([measure(rows, name, column) for _, rows, name in points]).T
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    gains = [row["signals"][ESTIMATE].get("improvement", np.nan) for row in scattered]
    axis.scatter([row["sir_db"] for row in scattered], gains, s=6, alpha=0.4)
    axis.errorbar(x, mean, np.maximum([mean - low, high - mean], 0), marker="o", capsize=3, color="C1")
    axis.set(xlabel=label, ylabel="SI-SDR improvement, dB")
    axis.grid(alpha=0.3)
    return figure


def histograms(lists):
    """A figure with the improvements of each list that has some."""
    gains = {}
    for name, rows in lists.items():
        scores = [row["signals"].get(ESTIMATE, {}) for row in rows]
        if values := [score["improvement"] for score in scores if "improvement" in score]:
            gains[name] = values
    if not gains:
        return None
    lines = -(-len(gains) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(12, 2.2 * lines), sharex=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(gains) :]:
        axis.remove()
    for axis, (name, values) in zip(axes.flat, gains.items(), strict=False):
        axis.hist(values, bins=np.arange(np.floor(min(values)), max(values) + 2))
        axis.set(title=name)
    figure.supxlabel("SI-SDR improvement, dB")
    figure.supylabel("mixtures")
    return figure


def learning_curve(path, rows):
    """Save a picture of the validation rows of a training, see `main.Trainer.validate`."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot([row["minutes"] for row in rows], [row["si_sdr_improvement"] for row in rows], marker="o")
    axis.set(xlabel="minutes of training", ylabel="validation SI-SDR improvement, dB")
    axis.grid(alpha=0.3)
    save_picture(Path(path), figure)


def save_picture(path, figure):
    with whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)
