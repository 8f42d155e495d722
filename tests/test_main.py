"""Training: it learns, it goes on as if it had never stopped, and nothing is lost."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
import unittest.mock

import pytest
import torch
from conftest import SIZE

import dataset
import main
import model
from utils import ROOT, UserError

SMALL = {"channels": [8, 8, 8], "blocks": 2, "dilations": [1, 2], "full_channels": 2, "full_hidden": 8}
SMALL_ARGUMENTS = "--channels 8 8 8 --blocks 2 --dilations 1 2 --full-channels 2 --full-hidden 8".split()


@pytest.fixture
def options(tmp_path, store):
    """Options of a small, fast, exact training."""
    return main.Options(
        data=str(store),
        output=str(tmp_path / "extractor"),
        logs=str(tmp_path / "runs"),
        steps=7,
        every=3,
        batch_size=4,
        warmup=2,
        device="cpu",
        bf16=False,
        compile=False,
        threads=1,
        loaders=0,
        **SMALL,
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(options, stop_at=None):
    """Train in this process, up to `stop_at` as if Ctrl-C came then; returns the trainer."""
    trainer = main.Trainer(options, dataset.Path(options.data))
    trainer.resume()
    if stop_at is not None:
        update = trainer.update

        def update_and_stop(batch):
            result = update(batch)
            if trainer.step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        trainer.update = update_and_stop
    trainer.train()
    return trainer


def weights(trainer_or_path):
    if isinstance(trainer_or_path, main.Trainer):
        return trainer_or_path.network.state_dict()
    return torch.load(trainer_or_path, weights_only=True)["weights"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def arguments(options, **changes):
    """The command line of main.py for these options."""
    command = [sys.executable, str(ROOT / "main.py")]
    for name, value in dataclasses.asdict(dataclasses.replace(options, **changes)).items():
        if name in ("sample_rate", "dvector_size") or value is None:
            continue
        name = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        else:
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return command


def test_a_step_moves_matrices_alike_in_all_directions_and_every_other_weight():
    network = model.Network(model.Config())
    parameters = list(network.parameters())
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    main.Optimizer(network, weight_decay=0).step(1e-3)
    for p, old in zip(parameters, before, strict=True):
        assert (p != old).any()
        if p.ndim == 4 and p[0].numel() > len(p):
            values = torch.linalg.svdvals(main.as_matrix((p - old).detach()))
            assert values[-1] > 0.5 * values[0]  # of AdamW's step it would be 0.2 to 0.5, as of the gradient


@pytest.mark.parametrize("stop_at", [1, 4, 12])
def test_it_goes_on_as_if_it_had_never_stopped(options, tmp_path, stop_at):
    options = dataclasses.replace(options, steps=14)  # more than the 10 steps of an epoch
    straight = trained(options)
    assert straight.step == 14
    again = dataclasses.replace(options, output=str(tmp_path / "again"))
    stopped = trained(again, stop_at)
    assert stopped.step == stop_at
    resumed = trained(again)
    assert resumed.step == 14
    assert_same(weights(straight), weights(resumed))
    one, other = straight.optimizer.state_dict(), resumed.optimizer.state_dict()
    for name, moment in (("muon", "momentum_buffer"), ("adamw", "exp_avg_sq")):
        states = one[name]["state"], other[name]["state"]
        assert states[0]
        assert all(torch.equal(states[0][n][moment], states[1][n][moment]) for n in states[0])
    assert [row["si_sdr_improvement"] for row in straight.curve if row["step"] == 14] == [
        row["si_sdr_improvement"] for row in resumed.curve if row["step"] == 14
    ]


def test_a_killed_training_goes_on(options, tmp_path):
    options = dataclasses.replace(options, steps=200, every=2)
    killed = dataclasses.replace(options, output=str(tmp_path / "killed"))
    rng = random.Random(0)
    reached = 0
    for _ in range(2):
        process = subprocess.Popen(arguments(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while newest_step(killed) <= reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # any moment, that of writing among them
        process.kill()
        process.wait()
        assert reached < newest_step(killed) < 150
        reached = newest_step(killed)
    end = reached + 5
    resumed = trained(killed, stop_at=end)
    straight = trained(options, stop_at=end)
    assert_same(weights(straight), weights(resumed))
    assert not list((tmp_path / "killed").glob(f".*epoch-{reached // 10}_batch-{reached % 10}.*partial*"))


def newest_step(options):
    """The step of the newest checkpoint, by its name; an epoch has 10 steps."""
    names = [path.stem for path in main.checkpoints(options.output)]
    return max((int(re.split("[-_]", name)[2]) * 10 + int(re.split("[-_]", name)[4]) for name in names), default=0)


def test_another_store_or_batch_size_is_refused_and_nothing_is_lost(options, tmp_path):
    trained(options, stop_at=5)
    kept = [path.name for path in main.checkpoints(options.output)]
    trainer = main.Trainer(dataclasses.replace(options, batch_size=8), dataset.Path(options.data))
    with pytest.raises(UserError, match="batch_size 4 there, 8 now"):
        trainer.resume()
    trainer = main.Trainer(options, dataset.Path(options.data))
    trainer.examples.powers = trainer.examples.powers[:20]
    with pytest.raises(UserError, match=f"examples {SIZE} there, 20 now"):
        trainer.resume()
    assert [path.name for path in main.checkpoints(options.output)] == kept


def test_with_broken_checkpoints_only_it_does_not_begin_anew(options):
    trained(options, stop_at=1)
    (path,) = main.checkpoints(options.output)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        main.Trainer(options, dataset.Path(options.data)).resume()


def test_it_stops_after_the_epochs_and_the_minutes(options):
    assert trained(dataclasses.replace(options, steps=100, epochs=1, every=50)).step == 10
    minutes = dataclasses.replace(options, output=options.output + "-minutes", steps=100, minutes=1e-6)
    assert trained(minutes).step == 1


def test_an_output_that_cannot_be_written_is_a_clear_error(options, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        trained(dataclasses.replace(options, output=str(tmp_path / "file" / "extractor"), every=1))
    with pytest.raises(UserError, match="logs"):
        trained(dataclasses.replace(options, logs=str(tmp_path / "file" / "logs")))


def test_a_mixture_that_is_the_target_does_not_rule_the_figure(options):
    trainer = main.Trainer(options, dataset.Path(options.data))
    load = trainer.load

    def clean(examples, chosen):
        for batch in load(examples, chosen):
            yield dataclasses.replace(batch, mixture=batch.target.clone())

    trainer.load = clean

    def noisy(batch):
        noise = torch.view_as_complex(torch.randn(*batch.mixture.shape, 2) / 2**0.5)
        return [batch.mixture + 0.1 * batch.mixture.abs().square().mean((1, 2)).sqrt()[:, None, None] * noise]

    trainer.estimates = noisy
    writer, bar = unittest.mock.MagicMock(), unittest.mock.MagicMock()
    trainer.validate(writer, bar)
    # 20 dB, and 3 more as half of the noise is no STFT of any signal, instead of MAX_SI_SDR
    assert trainer.curve[0]["si_sdr_improvement"] == pytest.approx(23 - main.MAX_SI_SDR, abs=1)


def test_ctrl_c_saves_and_says_how_to_go_on(options):
    process = subprocess.Popen(
        arguments(options, steps=100000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not main.checkpoints(options.output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "go on with the same command" in printed
    newest = main.checkpoints(options.output)[0]
    assert str(newest) in printed
    assert torch.load(newest, weights_only=True)["step"] >= 3


def test_checkpoints_have_the_names_and_the_best_is_kept(options):
    trainer = trained(dataclasses.replace(options, steps=14, every=2, keep=3))
    names = [path.name for path in main.checkpoints(options.output)]
    assert names == ["extractor_epoch-1_batch-4.pt", "extractor_epoch-1_batch-2.pt", "extractor_epoch-1_batch-0.pt"]
    best = torch.load(os.path.join(options.output, "best.pt"), weights_only=True)
    improvements = {row["step"]: row["si_sdr_improvement"] for row in trainer.curve}
    assert len(improvements) == 7
    assert improvements[best["step"]] == max(improvements.values()) == trainer.best
    assert "optimizer" not in best


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(options, capsys):
    trained(options, stop_at=5)
    newest, before = main.checkpoints(options.output)[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    trainer = main.Trainer(options, dataset.Path(options.data))
    trainer.resume()
    printed = capsys.readouterr().out
    assert f"warning: {newest}: not a whole checkpoint" in printed
    assert f"{before}: going on from step 3" in printed
    assert trainer.step == 3


def test_processes_that_train_together_share_the_epoch(options):
    alone = main.Trainer(dataclasses.replace(options, batch_size=8), dataset.Path(options.data))
    one, other = (main.Trainer(options, dataset.Path(options.data)) for _ in range(2))
    one.team.size = other.team.size = 2
    other.team.rank = 1
    steps = zip(alone.batches(1, 2), one.batches(1, 2), other.batches(1, 2), strict=True)
    for whole, first, second in steps:
        assert torch.equal(whole.mixture, torch.cat([first.mixture, second.mixture]))
        assert torch.equal(whole.dvector, torch.cat([first.dvector, second.dvector]))
    assert alone.steps_per_epoch == one.steps_per_epoch == SIZE // 8


def test_two_processes_train_one_network_and_go_on(options):
    """Started by torchrun; the gradients are those of both, so the weights are not those of one alone."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    for steps in (3, 6):
        command = [*torchrun, *arguments(options, steps=steps)[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"step {steps} of {steps}") == 1
        assert done.stdout.count("going on from step 3") == (steps == 6)
    saved = torch.load(main.checkpoints(options.output)[0], weights_only=True)
    assert (saved["step"], saved["step_size"]) == (6, 8)
    with pytest.raises(UserError, match="examples a step 8 there, 4 now"):
        trained(options)
    alone = trained(dataclasses.replace(options, output=options.output + "-alone", steps=6))
    different = [not torch.equal(weights(alone)[name], value) for name, value in saved["weights"].items()]
    assert sum(different) > len(different) / 2


def test_another_model_is_refused(options):
    trained(options, stop_at=1)
    other = dataclasses.replace(options, full_hidden=12)
    trainer = main.Trainer(other, dataset.Path(options.data))
    with pytest.raises(UserError, match="full_hidden 8 there, 12 now"):
        trainer.resume()


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(options):
    trainer = main.Trainer(options, dataset.Path(options.data))
    before = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    batch = next(iter(trainer.batches(0, 0)))
    batch.mixture[0, 3, 3] = torch.nan
    with pytest.raises(UserError, match=r"not-finite_step-0\.pt: .* lower --learning-rate"):
        trainer.update(batch)
    saved = torch.load(os.path.join(options.output, "not-finite_step-0.pt"), weights_only=True)
    assert torch.isnan(torch.view_as_real(saved["batch"]["mixture"])).any()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.network.named_parameters())


def test_the_schedule_depends_on_the_step_alone_and_can_be_extended(options):
    trainer = main.Trainer(dataclasses.replace(options, steps=100, warmup=10, decay=0.2), dataset.Path(options.data))

    def rate(step):
        trainer.step = step
        return trainer.learning_rate()

    peak = options.learning_rate
    assert rate(0) == pytest.approx(peak / 10)
    assert rate(9) == rate(50) == rate(80) == pytest.approx(peak)
    assert rate(90) == pytest.approx(peak / 2)
    assert rate(99) == pytest.approx(peak / 20)
    trainer.options = dataclasses.replace(trainer.options, steps=1000)
    assert rate(99) == pytest.approx(peak)


def test_it_learns(options):
    options = dataclasses.replace(options, steps=120, every=120, learning_rate=3e-3, batch_size=8)
    trainer = main.Trainer(options, dataset.Path(options.data))
    batch = next(iter(trainer.batches(0, 0)))
    losses = [trainer.update(batch)[0] for _ in range(80)]
    assert losses[-1] < losses[0] - 5


def test_a_rehearsed_mixture_is_heard_twice_and_both_times_count(options):
    options = dataclasses.replace(options, rehearse=True, learning_rate=3e-3, batch_size=8)
    trainer = main.Trainer(options, dataset.Path(options.data))
    batch = next(iter(trainer.batches(0, 0)))
    for _ in range(10):  # until it has a mask of its own
        trainer.update(batch)
    losses = [trainer.loss(batch, estimate)[0].item() for estimate in trainer.estimates(batch)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)
    assert trainer.update(batch)[0] == pytest.approx(sum(losses) / 2, abs=1e-4)
    trainer.network.eval()
    heard, state = trainer.network(batch.mixture, batch.dvector)
    again, _ = trainer.network(batch.mixture, batch.dvector, state)
    for estimate, expected in zip(trainer.estimates(batch), (heard, again), strict=True):
        assert torch.allclose(estimate, expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "cost"), [(-1, 1.5), (0.01, 4), (3, 1)])
def test_the_level_and_the_sign_of_an_estimate_count(options, factor, cost):
    trainer = main.Trainer(options, dataset.Path(options.data))
    examples = dataset.Examples(options.data, "train")
    batch = examples.__getitems__([n for n in range(SIZE) if not examples.absent[n]][:4])
    right, _ = trainer.loss(batch, batch.target)
    wrong, _ = trainer.loss(batch, factor * batch.target)
    assert wrong > right + cost


def test_silence_is_right_where_the_target_is_absent(options):
    trainer = main.Trainer(options, dataset.Path(options.data))
    absent = [n for n, row in enumerate(trainer.examples.index) if row["absent"]] or [0]
    batch = trainer.examples[absent[0]]
    batch.absent[:], batch.target[:] = True, 0
    loud, _ = trainer.loss(batch, batch.mixture)
    quiet, ratio = trainer.loss(batch, 0.01 * batch.mixture)
    assert quiet < loud - 3
    assert torch.isnan(ratio).all()
    estimate = (0.5 * batch.mixture).requires_grad_()
    trainer.loss(batch, estimate)[0].backward()
    assert torch.isfinite(torch.view_as_real(estimate.grad)).all()


def test_a_silent_mixture_has_a_finite_loss(options):
    trainer = main.Trainer(options, dataset.Path(options.data))
    batch = trainer.examples[0]
    batch.mixture[:], batch.target[:], batch.absent[:] = 0, 0, True
    loss, _ = trainer.update(batch)
    assert loss == pytest.approx(0, abs=1)


def test_tensorboard_gets_figures_pictures_and_sound(options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(dataclasses.replace(options, steps=3))
    events = EventAccumulator(options.logs)
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "validation/si_sdr_improvement"} <= set(tags["scalars"])
    assert {"0/mixture", "0/target", "0/estimate"} <= set(tags["images"])
    assert {"0/mixture", "0/target", "0/estimate"} <= set(tags["audio"])


def test_loading_in_processes_gives_the_same_batches(options):
    here = main.Trainer(options, dataset.Path(options.data))
    there = main.Trainer(dataclasses.replace(options, loaders=2), dataset.Path(options.data))
    for one, other in zip(here.batches(1, 7), there.batches(1, 7), strict=True):
        assert torch.equal(one.mixture, other.mixture)
        assert torch.equal(one.dvector, other.dvector)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "nowhere"], "nowhere: no examples here"),
        (["--batch-size", 0], "--batch-size 0: give more than 0"),
        (["--batch-size", 1000], "lower --batch-size"),
        (["--n-fft", 1024], "n_fft=512, the model 1024"),
        (["--fine-hz", 8000], "--fine-hz 8000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(refusal, store, tmp_path, extra, message):
    arguments = ["--data", store, "--output", tmp_path, "--no-compile", "--device", "cpu", *SMALL_ARGUMENTS]
    assert message in refusal(main.main, *arguments, *extra)


def test_a_network_trained_with_autocast_and_loaded_again_is_in_fp32(options, tmp_path):
    trained(dataclasses.replace(options, bf16=True, steps=2))
    network, _ = model.load(main.checkpoints(options.output)[0])
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.config == model.Config(**SMALL)
