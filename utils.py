"""What every script shares: clear errors, whole files and command lines made from dataclasses."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right: one line that names the file, the fact and the remedy."""


def run(main, argv=None):
    """Call `main(argv)` as a script: a `UserError` becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def whole(path):
    """Yield a temporary path beside `path` and rename it to `path` at the end: all of it or nothing.

    The temporary path keeps the suffix, so that writers which go by it work. What was written is removed
    when the block raises, and what a killed run left of it. Works for a file or a folder. Raises `UserError` where
    nothing can be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for found in path.parent.iterdir():
            left = re.fullmatch(rf"\.{re.escape(path.stem)}\.(\d+)\.partial{re.escape(path.suffix)}", found.name)
            if left and (int(left[1]) == os.getpid() or not alive(int(left[1]))):
                remove(found)
        yield partial
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({what}); choose another place or free some disk") from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def remove(path):
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def alive(process):
    """Whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def processes(count, prepare, *args):
    """Yield an executor of `count` processes, each of which calls `prepare(*args)` first; they end with this one.

    Raises `UserError` where one of them is ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(count, context, start_process, (prepare, *args))
    try:
        yield executor
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process was ended, perhaps for want of memory; run it again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def start_process(prepare, *args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=end_with_parent, daemon=True).start()
    prepare(*args)


def end_with_parent():
    """A killed main process must not leave its workers behind."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def option(default, help, **argparse_options):
    """A dataclass field that `parse` shows on the command line; `positional=True` makes it a positional argument."""
    metadata = {"help": help, **argparse_options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def differences(before, now):
    """What differs between two dictionaries, as text for an error; empty where nothing does."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} there, {now.get(name)} now" for name in names)


def require(options, condition, *names):
    """Raise `UserError` for the first of the named options whose value does not meet `condition`, (function, text)."""
    meets, text = condition
    for name in names:
        value = getattr(options, name)
        if not meets(value):
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise UserError(f"--{name.replace('_', '-')} {shown}: give {text}")


POSITIVE = (lambda value: value is None or value > 0, "more than 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
SHARE = (lambda value: 0 <= value <= 1, "a share from 0 to 1")
RANGE = (lambda value: value[0] <= value[1], "the lower end first")


def parse(options_class, argv, description):
    """Fill the dataclass `options_class` from `argv`; the fields' defaults and help texts make the command line.

    `bool` fields become `--name/--no-name`, `list[str]` fields take one or more values, `X | None` fields take
    an X and stay `None` without one. A field `from_` becomes `--from`.
    """
    parser = argparse.ArgumentParser(description=description)
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        if not field.metadata:
            continue
        extra = dict(field.metadata)
        positional = extra.pop("positional", False)
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        if default not in (None, "", []) and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            extra["help"] += f" (default: {shown})"
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        if typing.get_origin(kind) is list:
            extra.setdefault("nargs", "*" if positional else "+")
            (kind,) = typing.get_args(kind)
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = kind
        if not positional:
            extra["dest"] = field.name
        name = field.name if positional else "--" + field.name.rstrip("_").replace("_", "-")
        parser.add_argument(name, default=default, **extra)
    return options_class(**vars(parser.parse_args(argv)))
