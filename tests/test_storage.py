"""Remote shards through a real HTTP server on this machine that fails in the ways real ones do."""

import http.server
import multiprocessing
import os
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made import numbered_images

from acn_scale.config import Config, RemoteConfig
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.remote_folder import RemoteFolder
from acn_scale.data.shards import ShardIndex
from acn_scale.errors import BadData, UserError

STALL = 3.0  # seconds; clients in these tests wait for one


class Server:
    """Serves a folder. `trouble[name]` lists what happens to the next requests for a file, in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trouble: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)  # HTTPServer would ask for our name
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/data"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/data/")
        self.requests[name] += 1
        trouble = self.trouble.get(name) or ["none"]
        kind = trouble.pop(0)
        path = self.folder / name
        if kind.isdigit() or not path.is_file():
            request.send_error(int(kind) if kind.isdigit() else 404)
            return
        if kind == "silent":
            time.sleep(STALL)
        content = path.read_bytes()
        request.send_response(200)
        if kind != "cut without a word":
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if kind == "wrong":
            content = bytes(len(content))
        half = len(content) // 2
        request.wfile.write(content[:half])
        if kind == "stalls":
            request.wfile.flush()
            time.sleep(STALL)
        if not kind.startswith("cut"):
            request.wfile.write(content[half:])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(numbered_images(tmp_path / "shards", [20] * 5))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def folder(server: Server, tmp_path: Path) -> Callable[..., RemoteFolder]:
    def make(**remote: Any) -> RemoteFolder:
        cfg = RemoteConfig(**{"cache_dir": str(tmp_path / "cache"), "timeout": 1.0, "retries": 3} | remote)
        return RemoteFolder(server.url, ShardIndex.load(server.folder).shards, cfg)

    return make


def remote(cfg: Callable[..., Config], server: Server, tmp_path: Path, **data: Any) -> Config:
    values = {"train": server.url, "eval": server.url, "remote": {"cache_dir": str(tmp_path / "cache"), "timeout": 1.0}}
    return cfg(data=values | data)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches(
    vit: Callable[..., Config], server: Server, tmp_path: Path, workers: int
) -> None:
    """And each is downloaded once, though loader processes and the prefetching threads all want it."""
    local = build_stream(vit(data={"train": str(server.folder), "eval": str(server.folder)}))
    server.trouble = {"shard-000001.tar": ["500"], "shard-000003.tar": ["cut"]}
    cfg = remote(vit, server, tmp_path, workers=workers)
    stream = build_stream(cfg)
    for _ in range(13):
        assert torch.equal(next(stream)["images"], next(local)["images"])
    evaluated = sum(int(counts.sum()) for _, counts in build_evaluation(cfg))
    assert evaluated == 100
    shards = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert shards == {f"shard-00000{number}.tar": 2 if number in (1, 3) else 1 for number in range(5)}


@pytest.mark.parametrize("kind", ["500", "503", "429", "silent", "stalls", "cut", "cut without a word", "wrong"])
def test_what_fails_is_tried_again(server: Server, folder: Callable[..., RemoteFolder], kind: str) -> None:
    server.trouble["shard-000000.tar"] = [kind]
    path = folder().path(0)
    assert path.read_bytes() == (server.folder / "shard-000000.tar").read_bytes()
    assert server.requests["shard-000000.tar"] == 2
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == [path.name]


@pytest.mark.parametrize(
    ("kind", "retries", "requests", "expected"),
    [
        ("500", 1, 2, r"cannot be had: 500.*\(2 attempts\)"),
        ("stalls", 1, 2, r"cannot be had: .*\(2 attempts\)"),
        ("cut", 1, 2, r"cannot be had: .*\(2 attempts\)"),
        ("wrong", 1, 2, r"cannot be had: wrong checksum: .*\(2 attempts\)"),
        ("404", 9, 1, "cannot be had: not found"),
        ("403", 9, 1, "cannot be had: .*403"),
    ],
)
def test_what_goes_on_failing_is_given_up(
    server: Server, folder: Callable[..., RemoteFolder], kind: str, retries: int, requests: int, expected: str
) -> None:
    server.trouble["shard-000000.tar"] = [kind] * 20
    remote_folder = folder(retries=retries)
    with pytest.raises(BadData, match=expected):
        remote_folder.path(0)
    assert server.requests["shard-000000.tar"] == requests
    assert not [file for file in remote_folder.cache.iterdir() if file.is_file()]


def test_a_store_that_is_down(vit: Callable[..., Config], server: Server, tmp_path: Path) -> None:
    cfg = remote(vit, server, tmp_path)
    cfg = Config.model_validate(
        cfg.model_dump() | {"data": cfg.data.model_dump() | {"remote": {"cache_dir": str(tmp_path), "retries": 1}}}
    )
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"index.json: .*\(2 attempts\)"):
        build_stream(cfg)


def test_a_bad_remote_shard_is_skipped_and_not_asked_for_again(
    vit: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    (server.folder / "shard-000002.tar").unlink()
    stream = build_stream(remote(vit, server, tmp_path, on_bad_sample="skip", streams=1))
    for _ in range(13):
        next(stream)
    assert stream.bad.known == set(range(40, 60))
    assert server.requests["shard-000002.tar"] <= 6  # by whoever reads, and ahead of each epoch; not for each sample


def fetch(folder: RemoteFolder, shards: list[int]) -> None:
    for shard in shards:
        folder.path(shard)


def test_a_node_downloads_once(server: Server, folder: Callable[..., RemoteFolder]) -> None:
    shared = folder()
    processes = [multiprocessing.get_context("fork").Process(target=fetch, args=(shared, [0, 1])) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert server.requests["shard-000000.tar"] == server.requests["shard-000001.tar"] == 1


def test_a_process_that_dies_while_it_downloads_leaves_no_trace(
    server: Server, folder: Callable[..., RemoteFolder]
) -> None:
    """No lock is left behind, and no half of a file is taken for the whole."""
    server.trouble["shard-000000.tar"] = ["stalls"]
    shared = folder(timeout=60.0)
    process = multiprocessing.get_context("fork").Process(target=fetch, args=(shared, [0]))
    process.start()
    while not list(shared.cache.glob("*.part")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert shared.path(0).read_bytes() == (server.folder / "shard-000000.tar").read_bytes()
    assert not list(shared.cache.glob("*.part"))


def test_the_cache_keeps_to_its_size(server: Server, folder: Callable[..., RemoteFolder]) -> None:
    """What was used longest ago goes, also where another process used it."""
    shards = ShardIndex.load(server.folder).shards
    shared = folder(cache_gib=2.5 * max(shard.bytes for shard in shards) / 2**30)
    paths = []
    for shard in (0, 1, 0, 2):
        paths.append(shared.path(shard))
        time.sleep(0.02)
    kept = {path.name for path in shared.cache.glob("*.tar")}
    assert kept == {f"{shards[shard].sha256}.tar" for shard in (0, 2)}
    assert shared.path(1).exists()  # brought again


def test_training_goes_on_with_a_cache_that_is_too_small(
    vit: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    cache = {"cache_dir": str(tmp_path / "cache"), "timeout": 1.0, "cache_gib": 1e-6}
    local = build_stream(vit(data={"train": str(server.folder), "eval": str(server.folder)}))
    stream = build_stream(remote(vit, server, tmp_path, remote=cache, workers=2))
    for _ in range(13):
        assert torch.equal(next(stream)["images"], next(local)["images"])


def test_shards_are_brought_ahead_of_their_use(server: Server, folder: Callable[..., RemoteFolder]) -> None:
    shared = folder()
    shared.prefetch([3, 1])
    deadline = time.monotonic() + 20
    while len(list(shared.cache.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(server.requests) == {"shard-000001.tar", "shard-000003.tar"}


def test_a_stream_brings_the_next_window_while_one_is_read(
    vit: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    cfg = remote(vit, server, tmp_path, streams=1, shuffle_window=20)
    stream = build_stream(cfg)
    next(stream)
    order = stream.samples.order
    window = order.window_of(0, 0)
    shards = {*order.shards_in(*window), *order.shards_in(*order.next_window(*window))}
    wanted = {f"{stream.samples.index.shards[shard].sha256}.tar" for shard in shards}
    cache, deadline = Path(tmp_path / "cache"), time.monotonic() + 20
    while not wanted <= (here := {path.name for path in cache.rglob("*.tar")}) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted == here
    assert len(wanted) == 2


def test_folders_that_cannot_be_a_cache(folder: Callable[..., RemoteFolder], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.remote.cache_dir = .*file/x: Not a directory"):
        folder(cache_dir=str(tmp_path / "file" / "x"))
    os.chown(folder(cache_dir=str(tmp_path / "other")).cache / "locks", 1234, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        folder(cache_dir=str(tmp_path / "other"))


def test_a_store_whose_package_is_missing(vit: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^s3://bucket/data: .*s3fs"):
        build_stream(vit(data={"train": "s3://bucket/data"}))
