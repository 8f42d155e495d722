"""Train the extractor on the examples that `downloader.py` made; started again, it goes on where it stopped.

`torchrun --nproc-per-node N -- main.py` trains with N processes, on as many GPUs or, with `--threads 1`, CPU cores.
"""

import dataclasses
import math
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import dataset
import dynamic
import model
from metrics import attenuation_db, si_sdr, spectral_distance
from utils import NOT_NEGATIVE, POSITIVE, ROOT, SHARE, UserError, differences, option, parse, require, run

MAX_SI_SDR = 30.0  # dB; a better estimate is not pushed further, or clean targets would rule the gradient
GPU_SHARE = 0.5  # of the GPU's free memory that the examples may take
SHOWN = 3  # validation examples that TensorBoard shows


@dataclass(frozen=True, kw_only=True)
class Options(model.Config):
    data: str | None = option(None, "folder with examples (default: the largest in datasets/preprocessed)")
    output: str = option(str(ROOT / "models" / "extractor"), "folder for checkpoints; training goes on from the newest")
    logs: str = option(str(ROOT / "runs"), "folder for TensorBoard's logs")
    begin_with: str | None = option(None, "checkpoint whose weights a new training begins with")
    steps: int = option(50000, "length of the learning rate's schedule; training ends there, a larger one extends it")
    minutes: float | None = option(None, "stop after this time")
    epochs: int | None = option(None, "stop after this many epochs")
    batch_size: int = option(8, "examples a step, in each process")
    learning_rate: float = option(3e-3, "highest learning rate")
    warmup: int = option(200, "steps in which the learning rate rises")
    decay: float = option(0.65, "share of the schedule, at its end, in which the learning rate falls to zero")
    weight_decay: float = option(0.01, "weight decay, of matrices and all else")
    spectral_weight: float = option(3.0, "weight of the spectral term beside the SI-SDR in dB")
    level_weight: float = option(0.1, "weight of a dB by which the estimate is too loud or too quiet")
    absent_weight: float = option(0.2, "weight of a dB of attenuation where the target is absent")
    rehearse: bool = option(False, "hear each mixture twice in a row, as recordings are: better there, half as fast")
    clip: float = option(5.0, "largest norm of the gradient")
    every: int = option(500, "steps between checkpoints, each with a validation")
    keep: int = option(3, "newest checkpoints to keep beside the best")
    device: str = option(model.DEVICE, "cpu, cuda, cuda:1 ...")
    bf16: bool | None = option(None, "bfloat16 autocast (default: on a GPU, and on a CPU that is faster with it)")
    compile: bool = option(
        shutil.which("g++") is not None, "compile the network first, a minute that long runs win back"
    )
    threads: int = option(torch.get_num_threads(), "threads on the CPU")
    loaders: int | None = option(None, "processes that load examples (default: 2 for a GPU, else the main one: 0)")
    seed: int = option(0, "seed of the weights, the order and the remixing")

    def __post_init__(self):
        super().__post_init__()
        require(self, POSITIVE, "steps", "minutes", "epochs", "batch_size", "learning_rate", "every", "keep", "threads")
        require(self, SHARE, "decay")
        require(self, NOT_NEGATIVE, "seed")


def main(argv):
    options = parse(Options, argv, __doc__)
    torch.set_num_threads(options.threads)
    trainer = Trainer(options, Path(options.data or dataset.largest()))
    trainer.resume()
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Team:
    """The processes that train together, as torchrun's environment tells; without it this one alone.

    They have the same weights at each step, and each has batches of its own. The first one writes and shows.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0

    def join(self, device):
        """Connect the processes; returns the device of this one."""
        if self.size == 1:
            return device
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return device

    def agree(self, wish, device):
        """Whether any of them wishes it."""
        if self.size == 1:
            return wish
        wishes = torch.tensor(float(wish), device=device)
        torch.distributed.all_reduce(wishes)
        return wishes.item() > 0

    def average(self, gradients):
        """Make each of the gradients the mean of all processes'."""
        if self.size == 1:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(together)
        together /= self.size
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class Optimizer:
    """Muon (Jordan et al., 2024) for matrices and the kernels of convolutions, AdamW for the last layer and all else.

    Its `state_dict` is that of both. Muon's steps are scaled as Liu et al. (2025, arXiv:2502.16982) do, so that one
    learning rate suits both.
    """

    def __init__(self, network, weight_decay):
        last = set(network.up[-1].parameters())
        self.matrices = [p for p in network.parameters() if p.ndim > 1 and p not in last]
        # torch's Muon takes nothing but matrices: it gets views of the kernels, which share their memory
        self.views = [as_matrix(p.detach()) for p in self.matrices]
        assert all(view.data_ptr() == p.data_ptr() for view, p in zip(self.views, self.matrices, strict=True))
        others = [p for p in network.parameters() if p.ndim <= 1 or p in last]
        self.muon = torch.optim.Muon(self.views, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, weight_decay=weight_decay)

    def step(self, learning_rate):
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = as_matrix(p.grad)
        for optimizer in self.muon, self.adamw:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def as_matrix(kernel):
    """A kernel (rows, channels, height, width) that lies channels-last in memory as a matrix of so many rows."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


class Trainer:
    """The state of a training: network, optimizer, where it stands, and the examples."""

    def __init__(self, options, folder):
        self.options, self.team = options, Team()
        self.device = self.team.join(model.find_device(options.device))
        on_gpu = self.device.type == "cuda"
        self.bf16 = model.bf16_is_fast(self.device) if options.bf16 is None else options.bf16
        self.loaders = (2 if on_gpu else 0) if options.loaders is None else options.loaders
        config = model.Config(**{f.name: getattr(options, f.name) for f in dataclasses.fields(model.Config)})
        settings = dataset.read_settings(folder)
        dataset.check_model(settings, config)
        held = self.device if self.fits(folder) else None
        if settings.get("dynamic"):
            self.examples = dynamic.Examples(folder, "train", remix=True, seed=options.seed, device=self.device)
        else:
            self.examples = dataset.Examples(folder, "train", remix=True, seed=options.seed, device=held)
        self.validation = dataset.Examples(folder, "validation", device=held)
        if not self.steps_per_epoch:
            raise UserError(f"{folder}: {len(self.examples)} examples; lower --batch-size to as many")
        torch.manual_seed(options.seed)
        self.network = model.Network(config).to(self.device)
        if options.begin_with is None:
            self.network.standardise(self.examples.dvectors[:, -1])
        else:
            self.network.load_state_dict(self.beginning(config))
        if options.compile:
            self.network.mask = torch.compile(self.network.mask)
        self.optimizer = Optimizer(self.network, options.weight_decay)
        self.step = 0
        self.best = -math.inf
        self.curve = []  # a row for every validation
        self.seconds = 0.0  # of training so far
        self.stopping = False  # wished for, in this process

    def beginning(self, config):
        """The weights of `--begin-with`. Raises `UserError` where they are another model's."""
        network, _ = model.load(self.options.begin_with, self.device)
        differing = differences(asdict(network.config), asdict(config))
        if differing:
            raise UserError(f"{self.options.begin_with}: another model ({differing}); give its options too")
        return network.state_dict()

    def fits(self, folder):
        """Whether all spectra may be held in the GPU's memory."""
        if self.device.type != "cuda":
            return False
        needed = sum(dataset.Examples.bytes(folder, split) for split in dataset.SPLITS)
        return needed < GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]

    @property
    def step_size(self):
        """Examples a step, of all processes."""
        return self.options.batch_size * self.team.size

    @property
    def steps_per_epoch(self):
        return len(self.examples) // self.step_size

    def learning_rate(self):
        """Warm-up, constant, then a linear fall to zero at the end; a function of the step alone."""
        options = self.options
        rise = (self.step + 1) / max(options.warmup, 1)
        fall = (options.steps - self.step) / max(options.decay * options.steps, 1)
        return options.learning_rate * max(0.0, min(1.0, rise, fall))

    def batches(self, epoch, start):
        """This process's batches of an epoch from step `start` on; their order depends on seed and epoch alone."""
        self.examples.epoch = epoch
        order = np.random.default_rng([self.options.seed, epoch]).permutation(len(self.examples))
        size, team = self.options.batch_size, self.team
        firsts = [(n * team.size + team.rank) * size for n in range(start, self.steps_per_epoch)]
        return self.load(self.examples, [order[n : n + size].tolist() for n in firsts])

    def load(self, examples, chosen):
        """A loader of the batches of item numbers `chosen`, onto the device without waiting."""
        held = examples.device is not None  # where the loaders' processes have no business: they draw the orders
        loader = torch.utils.data.DataLoader(
            range(len(examples)),
            batch_sampler=chosen,
            collate_fn=examples.orders if held else examples.__getitems__,
            num_workers=self.loaders,
            pin_memory=self.device.type == "cuda",
        )
        made = (one.to(self.device) for one in loader)
        return map(examples.batch, made) if held else made

    def estimates(self, batch):
        """The estimate's spectrum for each time that the mixture is heard, with autocast where it is wanted."""
        times = 2 if self.options.rehearse else 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(batch.mixture.repeat(1, 1, times), batch.dvector)[0].chunk(times, dim=-1)

    def waveforms(self, *spectra):
        return [self.examples.stft.samples(spectrum, self.examples.samples) for spectrum in spectra]

    def loss(self, batch, estimate):
        """The loss, a scalar, and the SI-SDR in dB of each example, NaN where the target is absent."""
        estimated, target, mixture = self.waveforms(estimate, batch.target, batch.mixture)
        ratio = si_sdr(estimated, target)
        silence = attenuation_db(estimated, mixture, eps=1e-4 * mixture.square().sum(-1) + 1e-8)
        # SI-SDR knows no level: without a term of its own the silence of absent targets makes all estimates quiet
        level = attenuation_db(estimated, target).abs()
        voice = self.options.level_weight * level - ratio.clamp(max=MAX_SI_SDR)
        waveform = torch.where(batch.absent, -self.options.absent_weight * silence, voice)
        spectral = spectral_distance(estimate, batch.target, batch.mixture)
        loss = (waveform + self.options.spectral_weight * spectral).mean()
        return loss, ratio.detach().masked_fill(batch.absent, torch.nan)

    def train(self):
        """Train until the schedule, the time or the epochs end, or Ctrl-C; saves a checkpoint in every case."""
        options = self.options
        try:
            writer = SummaryWriter(options.logs, purge_step=self.step) if self.team.first else None
        except OSError as error:
            raise UserError(f"{options.logs}: cannot be written ({error.strerror}); choose other --logs") from error
        before = signal.signal(signal.SIGINT, self.stop)
        began, earlier = time.monotonic(), self.seconds
        last = options.steps if options.epochs is None else min(options.steps, options.epochs * self.steps_per_epoch)
        size, ended = self.step_size, False
        bar = tqdm(total=last * size, initial=self.step * size, unit="example", disable=not self.team.first)
        try:
            while self.step < last and not ended:
                epoch, start = divmod(self.step, self.steps_per_epoch)
                for batch in self.batches(epoch, start):
                    loss, ratio = self.update(batch)
                    self.seconds = earlier + time.monotonic() - began
                    bar.update(size)
                    bar.set_postfix(epoch=epoch, loss=f"{loss:.2f}", si_sdr=f"{ratio:.1f} dB")
                    if writer:
                        writer.add_scalar("train/loss", loss, self.step)
                        writer.add_scalar("train/si_sdr", ratio, self.step)
                    timed_out = options.minutes is not None and time.monotonic() - began > options.minutes * 60
                    ended = self.team.agree(self.stopping or timed_out or self.step >= last, self.device)
                    if self.team.first and (self.step % options.every == 0 or ended):
                        self.save()
                        self.validate(writer, bar)
                        self.seconds = earlier + time.monotonic() - began
                        self.save()
                    if ended:
                        break
        finally:
            bar.close()
            if writer:
                writer.close()
            signal.signal(signal.SIGINT, before)
        if self.team.first:
            print(f"{self.path()}: step {self.step} of {options.steps}, best validation improvement {self.best:.2f} dB")
        if self.team.first and self.step < last:
            print("go on with the same command")

    def stop(self, *_):
        """Ctrl-C: end after this step."""
        self.stopping = True

    def update(self, batch):
        """One step; returns its loss and SI-SDR in dB. Raises `UserError`, its batch saved, if they are not finite."""
        self.network.train()
        losses, ratios = zip(*(self.loss(batch, estimate) for estimate in self.estimates(batch)), strict=True)
        loss = sum(losses) / len(losses)
        self.network.zero_grad()
        loss.backward()
        self.team.average([p.grad for p in self.network.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            path = Path(self.options.output) / f"not-finite_step-{self.step}.pt"
            model.save(path, self.network, batch=vars(batch))
            raise UserError(
                f"{path}: the loss or its gradient is not finite here; start again with a lower --learning-rate"
            )
        self.optimizer.step(self.learning_rate())
        self.step += 1
        return loss.item(), ratios[-1].nanmean().item()

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # to compile it again for this takes longer than to do without
    def validate(self, writer, bar):
        """Score the whole validation set, remember the best, and show some of it in TensorBoard."""
        self.network.eval()
        size = self.options.batch_size
        chosen = [list(range(n, min(n + size, len(self.validation)))) for n in range(0, len(self.validation), size)]
        losses, improvements, silences = [], [], []
        for number, batch in enumerate(self.load(self.validation, chosen)):
            estimate = self.estimates(batch)[-1]
            loss, ratio = self.loss(batch, estimate)
            waves = self.waveforms(batch.mixture, batch.target, estimate)
            mixture, target, estimated = waves
            losses.append(loss.item())
            # where the mixture is the target there is nothing to improve, and its ratio has no bound
            before = si_sdr(mixture, target).clamp(max=MAX_SI_SDR)
            improvements.append((ratio.clamp(max=MAX_SI_SDR) - before)[~batch.absent])
            silences.append(attenuation_db(estimated, mixture)[batch.absent])
            if number == 0:
                self.show(writer, waves)
        row = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "loss": float(np.mean(losses)),
            "si_sdr_improvement": torch.cat(improvements).mean().item(),
            "absent_attenuation": torch.cat(silences).median().item() if any(map(len, silences)) else None,
        }
        self.curve.append(row)
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(f"validation/{name}", value, self.step)
        bar.write(
            f"step {self.step}, {row['minutes']} min: validation SI-SDR improvement {row['si_sdr_improvement']:.2f} dB"
        )
        if row["si_sdr_improvement"] > self.best:
            self.best = row["si_sdr_improvement"]
            model.save(Path(self.options.output) / "best.pt", self.network, step=self.step, curve=self.curve)

    def show(self, writer, waves):
        """Pictures and sound of the first validation examples for TensorBoard."""
        for name, wave in zip(("mixture", "target", "estimate"), waves, strict=True):
            decibels = 20 * torch.log10(self.examples.stft.spectrum(wave).abs().flip(1) + 1e-6)
            for n in range(min(SHOWN, len(wave))):
                writer.add_image(f"{n}/{name}", (decibels[n, None] / 80 + 0.5).clamp(0, 1), self.step)
                sound = wave[n] / wave[n].abs().max().clamp(min=1e-6)
                writer.add_audio(f"{n}/{name}", sound, self.step, sample_rate=self.network.config.sample_rate)

    @staticmethod
    def identity(options, examples, step_size):
        """What must be the same for a training to go on: the model, and the order of the batches."""
        names = [field.name for field in dataclasses.fields(model.Config)] + ["batch_size", "seed"]
        return {"examples": examples, "examples a step": step_size, **{name: options[name] for name in names}}

    def path(self):
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        return Path(self.options.output) / f"extractor_epoch-{epoch}_batch-{batch}.pt"

    def save(self):
        """Write the checkpoint of this step and remove old ones."""
        model.save(
            self.path(),
            self.network,
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            examples=len(self.examples),
            step_size=self.step_size,
            seconds=self.seconds,
            best=self.best,
            curve=self.curve,
            random_state=torch.get_rng_state(),
            options=asdict(self.options),
        )
        for path in checkpoints(self.options.output)[self.options.keep :]:
            path.unlink()

    def resume(self):
        """Go on from the newest whole checkpoint, if there is one; a broken one is passed over with a warning.

        Raises `UserError` where none is whole, and for another model, store, batch size or seed.
        """
        found = checkpoints(self.options.output)
        for path in found:
            try:
                network, saved = model.load(path, self.device)
            except UserError as error:
                print(f"warning: {error}; trying the one before")
                continue
            now = self.identity(asdict(self.options), len(self.examples), self.step_size)
            before = self.identity(saved["options"] | saved["config"], saved["examples"], saved["step_size"])
            differing = differences(before, now)
            if differing:
                raise UserError(
                    f"{path}: another training ({differing}); choose another --output or remove the checkpoints"
                )
            self.network.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.best, self.curve = saved["step"], saved["best"], saved["curve"]
            self.seconds = saved["seconds"]
            torch.set_rng_state(saved["random_state"].cpu())
            if self.team.first:
                print(f"{path}: going on from step {self.step}")
            return
        if found:
            raise UserError(
                f"{self.options.output}: none of its checkpoints is whole; remove them or choose another --output"
            )


def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    found = []
    for path in Path(folder).glob("extractor_epoch-*_batch-*.pt"):
        match = re.fullmatch(r"extractor_epoch-(\d+)_batch-(\d+)\.pt", path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return [path for _, _, path in sorted(found, reverse=True)]


if __name__ == "__main__":
    run(main)
