"""Many clients of one server, some of which cancel, leave or send nonsense: see `make crowd`.

    python tests/crowd.py --requests=1000 --clients=16 --seed=0

Every request is one of KINDS, in an order that the seed decides. It fails if the server answers
with an error that isn't the client's, if a picture isn't that of its seed, or if the process's
memory grows by more than MOST_GROWTH after the first quarter of the requests.
"""

import base64
import http.client
import io
import json
import random
import resource
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from absl import app, flags
from answers import SIDE, TEXT, model
from PIL import Image

from latent_diffusion.core.rng import seed_key
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.serve.handler import make_server
from latent_diffusion.serve.requests import Limits

REQUESTS = flags.DEFINE_integer("requests", 1000, "Of all clients together.")
CLIENTS = flags.DEFINE_integer("clients", 16, "Threads that ask at the same time.")
SEED = flags.DEFINE_integer("seed", 0, "Of the order of the kinds.")

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
LIMITS = Limits(max_images=4, max_pixels=4096, max_steps=50, max_waiting=12)
MOST_GROWTH = 16  # MiB
PROMPTS = ("red", "blue", "green cat", "dog")
SEEDS = 8  # of pictures, which are compared with those of `Model.sample`


def bomb() -> str:
    """A small PNG that claims 100,000 × 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
    return base64.b64encode(png + chunk(b"IEND", b"")).decode()


class Client:
    """A thread's requests to the server; `seen` counts what it met."""

    def __init__(self, address, expected):
        self.address, self.expected, self.seen = address, expected, Counter()

    def ask(self, method, path, body=None, headers=JSON):
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        connection.request(
            method, path, json.dumps(body) if isinstance(body, dict) else body, headers
        )
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def submitted(self, draw):
        """A job's state, its prompt and seed; a busy server is asked again."""
        number, prompt = draw.randrange(SEEDS), draw.choice(PROMPTS)
        request = {"prompts": prompt, "seed": number, "num_steps": draw.choice((1, 4))}
        while True:
            status, content = self.ask("POST", "/api/jobs", request)
            if status != 503:
                assert status == 202, (status, content)
                return json.loads(content), request
            self.seen["busy"] += 1
            time.sleep(0.05)

    def ended(self, state):
        """The last state of a job; None if it has left the history."""
        while state["state"] in ("waiting", "running"):
            path = f"/api/jobs/{state['id']}?after={state['version']}"
            status, content = self.ask("GET", path)
            if status == 404:
                return None
            assert status == 200, (status, content)
            state = json.loads(content)
        return state

    def picture(self, draw):
        """A job, waited for; its picture is that of its seed."""
        state, request = self.submitted(draw)
        state = self.ended(state)
        assert state and state["state"] == "done", state
        status, content = self.ask("GET", state["pictures"][0])
        if status == 404:  # more than 128 requests have ended since
            return
        assert status == 200
        got = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        want = self.expected[request["prompts"], request["seed"], request["num_steps"]]
        assert np.abs(got - want).max() <= 1, request

    def cancelled(self, draw):
        """A job that is cancelled, soon or late."""
        state, _ = self.submitted(draw)
        time.sleep(draw.random() * 0.02)
        status, _ = self.ask("DELETE", f"/api/jobs/{state['id']}")
        assert status in (200, 404)
        state = self.ended(state) if status == 200 else None
        assert state is None or state["state"] in ("cancelled", "done"), state

    def openai(self, draw):
        """OpenAI's endpoint."""
        body = {"prompt": draw.choice(PROMPTS), "n": 2, "size": f"{SIDE}x{SIDE}"}
        status, content = self.ask("POST", "/v1/images/generations", body)
        assert status in (200, 503), (status, content)
        if status == 200:
            assert len(json.loads(content)["data"]) == 2

    def left(self, draw):
        """A client of OpenAI's endpoint that closes its connection at once."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        connection.request("POST", "/v1/images/generations", json.dumps({"prompt": "red"}), JSON)
        connection.close()

    def cut_short(self, draw):
        """An upload that ends before its length."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        connection.putrequest("POST", "/api/jobs")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        connection.send(b'{"prompts": "re')
        connection.close()

    def nonsense(self, draw):
        """A request that is the client's mistake: status 4xx."""
        path, body, headers = draw.choice(
            [
                ("/api/jobs", b"{", JSON),
                ("/api/jobs", b"\xff\xfe", JSON),
                ("/api/jobs", {"prompts": 7}, JSON),
                ("/api/jobs", {"prompts": "red", "num_images": 10**9}, JSON),
                ("/api/jobs", {"prompts": "red", "sampler": "none"}, JSON),
                ("/api/jobs", {"prompts": "red", "image": "AAAA", "strength": 0.5}, JSON),
                ("/api/jobs", {"prompts": "red", "image": bomb(), "strength": 0.5}, JSON),
                ("/api/jobs", b"[" * 100_000, JSON),
                ("/api/jobs", b"x", {"Content-Type": "text/plain"}),
                ("/api/settings", b"no PNG", {}),
                (
                    "/v1/images/edits",
                    b"--x\r\n",
                    {"Content-Type": "multipart/form-data; boundary=x"},
                ),
                ("/../../etc/passwd", b"", {}),
            ]
        )
        status, content = self.ask("POST", path, body, headers)
        assert 400 <= status < 500, (path, status, content)
        assert json.loads(content)["error"]["message"]


KINDS = {"picture": 8, "cancelled": 3, "openai": 2, "left": 1, "cut_short": 1, "nonsense": 3}


def memory():
    """The process's memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(_):
    """Run all clients and print what they met."""
    made = model(TEXT)
    expected = {
        (prompt, seed, steps): to_uint8(made.sample(seed_key(seed), prompt, num_steps=steps))[0]
        for prompt in PROMPTS
        for seed in range(SEEDS)
        for steps in (1, 4)
    }
    ignored = {"progress": lambda *_: None, "preview": lambda *_: None}
    for steps in (1, 4, None):  # the server's programs, which take memory once
        for images in (1, 2, 4, 8, 16):
            made.sample(seed_key(0), ["red"] * images, num_steps=steps, **ignored)
    server = make_server(made, "tiny", ("127.0.0.1", 0), LIMITS)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    draw = random.Random(SEED.value)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=REQUESTS.value)
    todo, lock, failures, sizes = iter(enumerate(kinds)), threading.Lock(), [], []

    def work(client):
        while True:
            with lock:
                number, kind = next(todo, (None, None))
            if number is None:
                return
            try:
                getattr(client, kind)(random.Random(1000 * SEED.value + number))
                client.seen[kind] += 1
            except Exception as error:
                failures.append(f"request {number}, {kind}: {error!r}"[:300])
            if number % 50 == 0:
                sizes.append((number, memory()))  # list.append is one step for all threads

    clients = [Client(server.server_address[:2], expected) for _ in range(CLIENTS.value)]
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    clients[0].picture(draw)  # the server is as it was
    server.shutdown()
    server.server_close()
    print(dict(sum((client.seen for client in clients), Counter())))
    print(dict(server.jobs.counts))
    settled = [size for number, size in sizes if number >= REQUESTS.value / 4]
    growth = max(settled[1:], default=0) - settled[0]
    print(f"{REQUESTS.value} requests in {seconds:.1f} s; memory grew by {growth:.1f} MiB")
    if server.jobs.counts["status_500"]:
        failures.append("the server failed")
    if growth > MOST_GROWTH:
        failures.append(f"memory grew by {growth:.1f} MiB, at most {MOST_GROWTH}")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    app.run(main)
