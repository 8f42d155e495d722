"""Download, verify and unpack the archives of a corpus; a broken transfer goes on where it stopped."""

import errno
import gzip
import http.client
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import pooch
from tqdm import tqdm

from utils import UserError, whole

STALL_SECONDS = 30  # without data, after which a server counts as stopped
ATTEMPTS = 4  # in a row that bring no new data
WAIT_SECONDS = 2  # between attempts
CHUNK_BYTES = 1 << 20
UNPACKED_SHARE = 1.6  # bytes unpacked per byte of archive, at most: FLAC takes 1.0, zipped WAV 1.5
BROKEN_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,
)


class BadArchive(UserError):
    """An archive that is truncated, corrupt or unsafe to unpack."""


def fetch(corpus, root, mirror=None, stall_seconds=STALL_SECONDS):
    """Make sure that the archives of a `corpora.Corpus` lie unpacked in `root`; what is there already is kept.

    `mirror` is a folder or URL with files of the same names, taken instead of the corpus's own addresses. They are
    verified with its SHA256SUMS where it has one, as they may be excerpts, and with the corpus's checksums otherwise.
    A server that sends nothing for `stall_seconds` counts as stopped. Raises `UserError` where an archive is missing,
    truncated, corrupt or unsafe, where the server stops and where the disk is full; the next call goes on.
    """
    folder = Path(root) / corpus.folder
    missing = [archive for archive in corpus.archives if not (folder / archive.unpacked).exists()]
    for archive in corpus.archives:
        if archive not in missing:  # a run killed just after unpacking leaves the archive
            partial_archive(folder, archive).unlink(missing_ok=True)
    if not missing:
        return
    sums = mirror_sums(mirror, stall_seconds) if mirror else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
    for archive in missing:
        checksum = sums.get(archive.file, archive.checksum)
        target = folder / archive.unpacked
        if mirror and not is_url(mirror):
            file = Path(mirror).expanduser() / archive.file
            if not file.is_file():
                raise UserError(f"{file}: not there; add it to the mirror, or leave --mirror out")
            install(archive, file, checksum, target)
            continue
        file = partial_archive(folder, archive)
        download(mirror_url(mirror, archive.file) if mirror else archive.url, file, archive.packed, stall_seconds)
        try:
            install(archive, file, checksum, target)
        except BadArchive:
            file.unlink()
            raise
        file.unlink()


def disk_needed(corpora, root=None):
    """Bytes of disk, about, to fetch and unpack `corpora`; archives that lie unpacked in `root` need none."""
    archives = {(corpus.folder, archive.unpacked): archive for corpus in corpora for archive in corpus.archives}
    sizes = [
        archive.about_bytes
        for (folder, unpacked), archive in archives.items()
        if root is None or not (Path(root) / folder / unpacked).exists()
    ]
    # an archive is removed once it is unpacked, so that there is one at a time
    return round(sum(sizes) * UNPACKED_SHARE) + max(sizes, default=0)


def partial_archive(folder, archive):
    """Where an archive is downloaded to: it is called .partial until it is verified and unpacked, and then removed."""
    return folder / f"{archive.file}.partial"


def is_url(mirror):
    return str(mirror).startswith(("http://", "https://"))


def mirror_url(mirror, file):
    return f"{mirror.rstrip('/')}/{urllib.parse.quote(file)}"


def mirror_sums(mirror, stall_seconds):
    """Checksums by file name from the mirror's SHA256SUMS; empty where it has none."""
    if is_url(mirror):
        url = mirror_url(mirror, "SHA256SUMS")
        try:
            with request(url, {}, stall_seconds) as response:
                text = response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise UserError(f"{url}: the server says {error.code} {error.reason}; check --mirror") from error
            return {}
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url}: {reason(error)}; check --mirror and the network, then run again") from error
    else:
        folder = Path(mirror).expanduser()
        if not folder.is_dir():
            raise UserError(f"{mirror}: no such folder; give --mirror a folder or a URL")
        sums = folder / "SHA256SUMS"
        text = sums.read_text(errors="replace") if sums.exists() else ""
    lines = re.findall(r"^([0-9a-fA-F]{64}) [ *](?:\./)?(.+?)\s*$", text, re.MULTILINE)
    return {name: f"sha256:{digest}" for digest, name in lines}


def download(url, file, packed, stall_seconds):
    """Download `url` to `file`, after what is there of it already; try again as long as new data comes."""
    failures, most = 0, size(file)
    while True:
        try:
            return receive(url, file, packed, stall_seconds)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{size(file)}":
                return  # all of it is there
            if error.code == 416:
                file.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                remedy = "try again later, or give a copy of it with --mirror"
                raise UserError(f"{url}: the server says {error.code} {error.reason}; {remedy}") from error
            problem = f"the server says {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = reason(error)
        failures = 0 if size(file) > most else failures + 1
        most = max(most, size(file))
        if failures == ATTEMPTS:
            remedy = "run again to go on from there, or give a copy of it with --mirror"
            raise UserError(f"{url}: {problem}, {size(file) / 1e6:.1f} MB are there; {remedy}")
        time.sleep(WAIT_SECONDS)


def receive(url, file, packed, stall_seconds):
    """One attempt to download what is missing of `file`."""
    there = size(file)
    with request(url, {"Range": f"bytes={there}-"} if there else {}, stall_seconds) as response:
        # a server that knows no Range answers 200 and sends all of it
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", "")) if response.status == 206 else None
        start = int(start[1]) if start else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total is not None:
            if total == there:
                return
            check_disk(file.parent, file.stem, total - start + (total * UNPACKED_SHARE if packed else 0))
        with (
            open_for_resume(file, start) as output,
            tqdm(desc=file.stem, initial=start, total=total, unit="B", unit_scale=True, mininterval=0.5) as bar,
        ):
            while chunk := response.read1(CHUNK_BYTES):
                write(output, chunk, file)
                bar.update(len(chunk))
    if total is not None and size(file) < total:
        raise ConnectionError(f"the transfer ended at {size(file)} of {total} bytes")


def request(url, headers, stall_seconds):
    # some servers refuse Python's own name; a packed answer would be packed twice
    headers = {"User-Agent": "cocktail-party", "Accept-Encoding": "identity", **headers}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall_seconds)


def reason(error):
    error = getattr(error, "reason", error)
    if isinstance(error, TimeoutError):
        return "the server stopped sending"
    return str(error) or type(error).__name__


def open_for_resume(file, start):
    try:
        output = open(file, "r+b" if file.exists() else "wb")
        output.seek(start)
        output.truncate()
        return output
    except OSError as error:
        raise not_written(file, error) from error


def write(output, chunk, file):
    try:
        output.write(chunk)
        output.flush()
    except OSError as error:
        raise not_written(file, error) from error


def not_written(file, error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{file}: the disk is full; free some and run again to go on from there")
    return UserError(f"{file}: cannot be written ({error.strerror}); choose another place")


def size(file):
    return file.stat().st_size if file.exists() else 0


def check_disk(folder, name, needed):
    free = shutil.disk_usage(folder).free
    if free < needed:
        needs = f"{free / 1e9:.2f} GB free, {name} needs {needed / 1e9:.2f} GB with what is in it"
        raise UserError(f"{folder}: {needs}; free some disk or choose another")


def install(archive, file, checksum, target):
    """Verify `file` and put it, or what is packed in it, at `target`: all of it or nothing. Raises `BadArchive`."""
    algorithm, _, digest = (checksum or "").partition(":")
    if checksum and pooch.file_hash(str(file), alg=algorithm) != digest.lower():
        raise BadArchive(f"{file}: corrupt, its checksum is not {checksum}; run again, or replace it in the mirror")
    with whole(target) as partial:
        if not archive.packed:
            shutil.copyfile(file, partial)
            return
        partial.mkdir()
        try:
            (unpack_zip if archive.file.endswith(".zip") else unpack_tar)(file, partial)
        except BROKEN_ARCHIVE as error:
            remedy = "run again, or replace it in the mirror"
            raise BadArchive(f"{file}: truncated, corrupt or unsafe ({error}); {remedy}") from error


def unpack_zip(file, folder):
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        check_disk(folder, file.name, sum(member.file_size for member in members))
        for member in tqdm(members, desc=f"unpacking {file.name}", unit="file", leave=False):
            check_member(member.filename, not stat.S_ISLNK(member.external_attr >> 16))
            archive.extract(member, folder)


def unpack_tar(file, folder):
    check_disk(folder, file.name, size(file) * UNPACKED_SHARE)
    with tarfile.open(file, "r:gz") as archive:
        for member in tqdm(archive, desc=f"unpacking {file.name}", unit="file", leave=False):
            if hasattr(tarfile, "data_filter"):
                archive.extract(member, folder, filter="data")
            else:  # Python before 3.10.12 and 3.11.4
                check_member(member.name, member.isfile() or member.isdir())
                archive.extract(member, folder)
        # tarfile takes a damaged header for the end; reading on to gzip's checksum tells
        while archive.fileobj.read(CHUNK_BYTES):
            pass


def check_member(name, plain):
    path = PurePosixPath(name.replace("\\", "/"))
    if not plain or path.is_absolute() or ".." in path.parts or os.path.splitdrive(name)[0]:
        raise tarfile.TarError(f"{name!r} is a link or leads out of the folder")
