"""fetch.py against a server on this machine that truncates, corrupts, stalls and recovers, and against mirrors."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import shutil
import stat
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import soundfile

import corpora
import fetch
from corpora import Archive, Corpus
from utils import UserError

STALL_SECONDS = 0.3


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by name; `faults` are what goes wrong with the next requests, "" for nothing."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.ranges, self.sent = {}, [], [], 0
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        content = server.files.get(self.path.strip("/"))
        fault = server.faults.pop(0) if server.faults else ""
        if content is None or fault == "404":
            return self.send_error(404)
        if fault == "503":
            return self.send_error(503)
        server.ranges.append(self.headers.get("Range"))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if fault == "ignore range":
            start = 0
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:-1] + bytes([body[-1] ^ 1])
        if fault in ("truncate", "stall"):
            body = body[: len(body) // 2]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
            self.wfile.flush()
        server.sent += len(body)
        if fault == "stall":
            server.released.wait(10)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0)


def audio(seconds=0.1, format="FLAC"):
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * 16000))
    content = io.BytesIO()
    soundfile.write(content, noise, 16000, format=format)
    return content.getvalue()


def tar_gz(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


LIBRISPEECH = {
    "LibriSpeech/SPEAKERS.TXT": b"; comment\n19 | F | dev-clean | 8.0 | A\n26 | M | dev-clean | 8.0 | B\n",
    "LibriSpeech/dev-clean/19/198/19-198-0000.flac": audio(),
    "LibriSpeech/dev-clean/26/495/26-495-0000.flac": audio(),
}
TAR = tar_gz(LIBRISPEECH)


def corpus_of(server, content, checksum="right", file="dev-clean.tar.gz", name="LibriSpeech/dev-clean", files=None):
    server.files[file] = content
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}" if checksum == "right" else checksum
    return Corpus(
        name, "CC0", [Archive(file, f"{server.url}/{file}", len(content), checksum)], files or {"speech": "**"}
    )


def assert_fetched(root):
    folder = root / "LibriSpeech"
    assert [path.name for path in folder.iterdir()] == ["dev-clean"]  # neither archive nor partial
    for name, content in LIBRISPEECH.items():
        assert (folder / "dev-clean" / name).read_bytes() == content


def assert_nothing_whole(root):
    assert not (root / "LibriSpeech" / "dev-clean").exists()
    assert not [path for path in (root / "LibriSpeech").glob(".*")]


def test_fetch_unpacks_and_fetches_once(server, tmp_path):
    corpus = corpus_of(server, TAR)
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)
    fetch.fetch(corpus, tmp_path)
    assert server.ranges == [None]


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_goes_on_where_the_transfer_stopped(server, tmp_path, fault):
    server.faults = [fault]
    fetch.fetch(corpus_of(server, TAR), tmp_path, stall_seconds=STALL_SECONDS)
    assert_fetched(tmp_path)
    assert server.ranges == [None, f"bytes={len(TAR) // 2}-"]
    assert server.sent == len(TAR)


def test_goes_on_in_the_next_run(server, tmp_path, monkeypatch):
    corpus = corpus_of(server, TAR)
    server.faults = ["truncate"] + ["503"] * fetch.ATTEMPTS
    with pytest.raises(UserError, match=r"dev-clean.tar.gz: the server says 503 .*run again"):
        fetch.fetch(corpus, tmp_path)
    assert_nothing_whole(tmp_path)
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)
    assert server.ranges[-1] == f"bytes={len(TAR) // 2}-"
    assert server.sent == len(TAR)


def test_any_number_of_breaks_as_long_as_data_comes(server, tmp_path):
    server.faults = ["truncate"] * (2 * fetch.ATTEMPTS)
    fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_fetched(tmp_path)
    assert server.sent == len(TAR)


def test_starts_anew_where_range_is_ignored(server, tmp_path):
    server.faults = ["truncate", "ignore range"]
    fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_fetched(tmp_path)
    assert server.sent == len(TAR) // 2 + len(TAR)


@pytest.mark.parametrize("fault", ["", "ignore range"])
def test_starts_anew_where_more_is_there_than_should_be(server, tmp_path, fault):
    server.faults = [fault]
    (tmp_path / "LibriSpeech").mkdir()
    (tmp_path / "LibriSpeech" / "dev-clean.tar.gz.partial").write_bytes(TAR + TAR)
    fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_fetched(tmp_path)


def test_gives_up_where_range_is_ignored_and_the_transfer_always_breaks(tmp_path, server):
    corpus = corpus_of(server, TAR)

    class Broken(Handler):
        def do_GET(self):
            server.faults = ["truncate"]
            del self.headers["Range"]
            super().do_GET()

    server.RequestHandlerClass = Broken
    with pytest.raises(UserError, match="ended at .*run again"):
        fetch.fetch(corpus, tmp_path)
    assert len(server.ranges) == 1 + fetch.ATTEMPTS


def test_a_stopped_server(server, tmp_path):
    server.faults = ["stall"] * 20
    corpus = corpus_of(server, b"ab", checksum=None)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"the server stopped sending, .* are there; run again"):
        fetch.fetch(corpus, tmp_path, stall_seconds=0.05)
    assert time.monotonic() - start < 3


def test_no_server(server, tmp_path):
    corpus = corpus_of(server, TAR)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="refused.*run again"):
        fetch.fetch(corpus, tmp_path)


def test_missing_archive(server, tmp_path):
    server.faults = ["404"]
    with pytest.raises(UserError, match=r"dev-clean.tar.gz: the server says 404 .*--mirror"):
        fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_nothing_whole(tmp_path)


@pytest.mark.parametrize("checksum", ["right", None])
def test_corrupt_archive_is_fetched_anew_by_the_next_run(server, tmp_path, checksum):
    corpus = corpus_of(server, TAR, checksum)
    server.faults = ["corrupt"]
    with pytest.raises(UserError, match=r"dev-clean.tar.gz.*corrupt.*run again"):
        fetch.fetch(corpus, tmp_path)
    assert list((tmp_path / "LibriSpeech").iterdir()) == []
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)


def test_archive_without_checksum_that_lost_its_end(server, tmp_path):
    for content in (TAR[:-20], TAR[:-1] + bytes([TAR[-1] ^ 1]), TAR[:-6] + bytes([TAR[-6] ^ 1]) + TAR[-5:]):
        with pytest.raises(UserError, match="truncated, corrupt or unsafe"):
            fetch.fetch(corpus_of(server, content, checksum=None), tmp_path)
        assert list((tmp_path / "LibriSpeech").iterdir()) == []


def test_a_damaged_member_header_is_not_the_end(server, tmp_path):
    plain = bytearray(gzip.decompress(TAR))
    second = plain.index(b"LibriSpeech/dev-clean/19")
    plain[second + 150] ^= 0xFF  # in the header's own checksum
    damaged = bytearray(gzip.compress(bytes(plain)))
    damaged[-8:-4] = TAR[-8:-4]  # the checksum of what it was
    with pytest.raises(UserError, match="truncated, corrupt"):
        fetch.fetch(corpus_of(server, bytes(damaged), checksum=None), tmp_path)


def test_killed_between_download_and_unpacking(server, tmp_path, monkeypatch):
    corpus = corpus_of(server, TAR)
    monkeypatch.setattr(fetch, "install", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(corpus, tmp_path)
    assert_nothing_whole(tmp_path)
    monkeypatch.undo()
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)
    assert server.sent == len(TAR)


def test_killed_while_unpacking(server, tmp_path):
    left = tmp_path / "LibriSpeech" / ".dev-clean.12345.partial"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_fetched(tmp_path)


def test_killed_after_unpacking(server, tmp_path):
    corpus = corpus_of(server, TAR)
    fetch.fetch(corpus, tmp_path)
    (tmp_path / "LibriSpeech" / "dev-clean.tar.gz.partial").write_bytes(TAR)
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)


def test_disk_too_small(server, tmp_path, monkeypatch):
    corpus = corpus_of(server, TAR)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(TAR) * 2))
    with pytest.raises(UserError, match="GB free, dev-clean.tar.gz needs"):
        fetch.fetch(corpus, tmp_path)
    assert server.sent == 0 or not list((tmp_path / "LibriSpeech").iterdir())
    monkeypatch.undo()
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)


def test_disk_full_during_the_transfer(server, tmp_path, monkeypatch):
    corpus = corpus_of(server, TAR)

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "open_for_resume", lambda file, start: Full())
        with pytest.raises(UserError, match=r"dev-clean.tar.gz.partial: the disk is full; .*run again"):
            fetch.fetch(corpus, tmp_path)
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)


def test_disk_full_while_unpacking(server, tmp_path, monkeypatch):
    corpus = corpus_of(server, TAR)

    def full(self, member, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", full)
        with pytest.raises(UserError, match=r"dev-clean: .*No space left on device.*free some disk"):
            fetch.fetch(corpus, tmp_path)
    assert_nothing_whole(tmp_path)
    fetch.fetch(corpus, tmp_path)
    assert_fetched(tmp_path)
    assert server.sent == len(TAR)


def unsafe_tar(kind):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("../outside.txt" if kind == "name" else "link")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../../outside"
        archive.addfile(member, io.BytesIO())
    return packed.getvalue()


def unsafe_zip(kind):
    member = zipfile.ZipInfo("../outside.txt" if kind == "name" else "link")
    if kind == "link":
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, "../../outside")
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["name", "link"])
@pytest.mark.parametrize("how", ["tar", "tar of an older Python", "zip"])
def test_archives_that_lead_out_are_refused(server, tmp_path, monkeypatch, how, kind):
    if how == "tar of an older Python":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    content, file = (unsafe_zip(kind), "a.zip") if how == "zip" else (unsafe_tar(kind), "a.tar.gz")
    with pytest.raises(UserError, match="unsafe"):
        fetch.fetch(corpus_of(server, content, file=file), tmp_path / "root")
    assert not list(tmp_path.rglob("outside*"))
    assert not list((tmp_path / "root" / "LibriSpeech").iterdir())


def test_an_older_python_unpacks(server, tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    fetch.fetch(corpus_of(server, TAR), tmp_path)
    assert_fetched(tmp_path)


@pytest.fixture(params=["folder", "url"])
def mirror(request, server, tmp_path):
    """A function that makes a mirror of `files`, as a folder or behind a URL."""

    def make(files):
        if request.param == "url":
            server.files.update({f"mirror/{name}": content for name, content in files.items()})
            return f"{server.url}/mirror/"
        folder = tmp_path / "mirror"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return str(folder)

    return make


def sums(files):
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def test_mirror_with_sums_of_an_excerpt(server, mirror, tmp_path):
    corpus = corpus_of(server, TAR, checksum="sha256:" + "0" * 64)
    files = {"dev-clean.tar.gz": TAR}
    address = mirror({**files, "SHA256SUMS": sums(files)})
    fetch.fetch(corpus, tmp_path, address)
    assert_fetched(tmp_path)
    if not fetch.is_url(address):
        assert (tmp_path / "mirror" / "dev-clean.tar.gz").exists()


def test_mirror_with_wrong_sums(server, mirror, tmp_path):
    corpus = corpus_of(server, TAR)
    address = mirror({"dev-clean.tar.gz": TAR, "SHA256SUMS": sums({"dev-clean.tar.gz": b"other"})})
    with pytest.raises(UserError, match="dev-clean.tar.gz.*corrupt, its checksum"):
        fetch.fetch(corpus, tmp_path, address)
    assert_nothing_whole(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_mirror_without_sums(server, mirror, tmp_path, whole):
    corpus = corpus_of(server, TAR)
    address = mirror({"dev-clean.tar.gz": TAR if whole else TAR[:-1]})
    if whole:
        fetch.fetch(corpus, tmp_path, address)
        assert_fetched(tmp_path)
    else:
        with pytest.raises(UserError, match="corrupt, its checksum"):
            fetch.fetch(corpus, tmp_path, address)


def test_mirror_without_the_file(server, mirror, tmp_path):
    corpus = corpus_of(server, TAR)
    with pytest.raises(UserError, match=r"dev-clean.tar.gz: (not there|the server says 404)"):
        fetch.fetch(corpus, tmp_path, mirror({"other": b""}))


def test_no_such_mirror(server, tmp_path):
    with pytest.raises(UserError, match="no such folder; give --mirror"):
        fetch.fetch(corpus_of(server, TAR), tmp_path, str(tmp_path / "nowhere"))


def layouts():
    """Small files in the real layouts: source, kind, archives and the speakers to be found."""
    table = "filename,fold,target,category,esc10,src_file,take\n"
    table += "1-1-A-0.wav,1,0,dog,True,1,A\n1-2-A-9.wav,1,9,crow,False,2,A\n"
    wav = audio(format="WAV")
    esc50 = zipped(
        {
            "ESC-50-x/meta/esc50.csv": table.encode(),
            "ESC-50-x/audio/1-1-A-0.wav": wav,
            "ESC-50-x/audio/1-2-A-9.wav": wav,
        }
    )
    info = b"ID  AGE  GENDER  ACCENTS  REGION COMMENTS\np225  23  F    English    Southern  England\n"
    clip = "wav48_silence_trimmed/p225/p225_001_mic"
    vctk = zipped({"speaker-info.txt": info, f"{clip}1.flac": audio(), f"{clip}2.flac": audio()})
    ocean = {"speechocean762/WAVE/SPEAKER0001/000010011.WAV": wav, "speechocean762/train/spk2age": b"0001\t6\n"}
    rirs = {"RIRS_NOISES/pointsource_noises/noise-free-sound-0000.wav": wav}
    rirs["RIRS_NOISES/simulated_rirs/mediumroom/Room001/Room001-00001.wav"] = wav
    musan = {"musan/noise/free-sound/noise-free-sound-0000.wav": wav, "musan/music/fma/music-fma-0000.wav": wav}
    musan["musan/speech/librivox/speech-librivox-0000.wav"] = wav
    archives = {"dev-clean.tar.gz": TAR, "ESC-50-master.zip": esc50, "VCTK-Corpus-0.92.zip": vctk}
    archives |= {"speechocean762.tar.gz": tar_gz(ocean), "rirs_noises.zip": zipped(rirs), "musan.tar.gz": tar_gz(musan)}
    for archive in corpora.DEMAND:
        folder = archive.unpacked.removesuffix("_16k")
        archives[archive.file] = zipped({f"{folder}/ch01.wav": wav, f"{folder}/ch02.wav": wav})
    for corpus in corpora.CORPORA:
        if corpus.name == "librosa":
            archives |= {archive.file: audio(format="OGG") for archive in corpus.archives}
    return archives


@pytest.fixture(scope="module")
def mirror_of_all(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror")
    archives = layouts()
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    (folder / "SHA256SUMS").write_bytes(sums(archives))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "kind", "speakers"),
    [
        ("LibriSpeech/dev-clean", "speech", {"LibriSpeech/19", "LibriSpeech/26"}),
        ("VCTK", "speech", {"VCTK/p225"}),
        ("speechocean762", "speech", {"speechocean762/0001"}),
        ("DEMAND", "noise", {f"DEMAND/{name}" for name in ("DKITCHEN", "PCAFETER", "STRAFFIC", "TMETRO")}),
        ("ESC-10", "noise", {"ESC-10/dog"}),
        ("ESC-50", "noise", {"ESC-50/dog", "ESC-50/crow"}),
        ("RIRS_NOISES", "noise", {"RIRS_NOISES/pointsource_noises"}),
        ("RIRS_NOISES", "rooms", {"RIRS_NOISES/mediumroom/Room001"}),
        ("MUSAN", "noise", {"MUSAN/free-sound"}),
        ("MUSAN", "music", {"MUSAN/fma"}),
        ("librosa", "music", {"librosa/librosa"}),
    ],
)
def test_what_is_fetched_is_found(mirror_of_all, tmp_path, name, kind, speakers):
    (corpus,) = (corpus for corpus in corpora.CORPORA if corpus.name == name)
    with pytest.raises(UserError, match="not fetched yet; run python3 downloader.py"):
        corpora.find([name], kind, tmp_path)
    assert not corpora.is_fetched(name, tmp_path)
    assert fetch.disk_needed([corpus], tmp_path) > corpus.about_bytes
    fetch.fetch(corpus, tmp_path, mirror_of_all)
    assert corpora.is_fetched(name, tmp_path)
    assert fetch.disk_needed([corpus], tmp_path) == 0
    found = corpora.find([name], kind, tmp_path)
    assert {r.speaker for r in found} == speakers
    assert len(found) == (5 if name == "librosa" else len(speakers))
    assert all(r.kind == kind and r.seconds == pytest.approx(0.1, abs=1e-3) for r in found)
    if name == "VCTK":
        assert (found[0].gender, found[0].age, found[0].region) == ("f", 23, "English")
        assert found[0].path.name == "p225_001_mic1.flac"
    if name == "LibriSpeech/dev-clean":
        assert [r.gender for r in found] == ["f", "m"]
    if name == "speechocean762":
        assert (found[0].age, found[0].gender) == (6, "")


def test_disk_needed_counts_shared_archives_once():
    both = [corpus for corpus in corpora.CORPORA if corpus.name in ("ESC-10", "ESC-50")]
    assert fetch.disk_needed(both) == fetch.disk_needed(both[:1]) > corpora.ESC_50.about_bytes
    assert fetch.disk_needed([]) == 0
