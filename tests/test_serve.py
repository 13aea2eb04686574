"""The page and the HTTP API: what is asked for is what is answered, and nothing breaks it."""

import base64
import dataclasses
import http.client
import io
import json
import re
import struct
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from answers import CLASS, SIDE, TEXT, model
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_answers import LEVELS, reading
from test_image_folder import png
from test_prior_model import CLASSES, SIZES, VQ
from test_prompts import clip_model

from latent_diffusion.convert.adapters import Words
from latent_diffusion.core.rng import seed_key
from latent_diffusion.generation.model import Model
from latent_diffusion.models.first_stage import FirstStage, make_autoencoder
from latent_diffusion.models.prior import make_prior
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.serve import handler, parameters
from latent_diffusion.serve import jobs as jobs_module
from latent_diffusion.serve.describe import describe
from latent_diffusion.serve.handler import make_server
from latent_diffusion.serve.jobs import Busy, Job, Jobs
from latent_diffusion.serve.openai import read_form, request_of
from latent_diffusion.serve.parameters import from_png, from_text, to_png, to_text
from latent_diffusion.serve.requests import Limits, call, read, with_own_mask

JSON = {"Content-Type": "application/json"}
LIMITS = Limits(max_images=8, max_pixels=64, max_steps=100, max_waiting=8)


def png_of(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def in_base64(array):
    return base64.b64encode(png_of(array)).decode()


# The head of a picture, which is nothing but that.
HEAD = png((b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0)), (b"IDAT", b"nothing"))
HEAD = base64.b64encode(HEAD).decode()
WHITE = in_base64(np.full((SIDE, SIDE, 3), 255, np.uint8))


def serving(made, **options):
    server = make_server(made, "tiny", ("127.0.0.1", 0), LIMITS, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server():
    server = serving(model(TEXT))
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method, path, body=None, headers=None):
    """Status, content type and content."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    body = json.dumps(body) if isinstance(body, dict | list) else body
    connection.request(method, path, body, JSON if headers is None else headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers.get_content_type(), content


def ask_json(server, method, path, body=None, headers=None):
    status, kind, content = ask(server, method, path, body, headers)
    assert kind == "application/json"
    return status, json.loads(content)


def finished(server, request):
    """The last state of a job."""
    status, state = ask_json(server, "POST", "/api/jobs", request)
    assert status == 202, state
    while state["state"] in ("waiting", "running"):
        path = f"/api/jobs/{state['id']}?after={state['version']}"
        status, state = ask_json(server, "GET", path)
        assert status == 200
    return state


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def expected(made, seed, prompt, **options):
    return to_uint8(made.sample(seed_key(seed), prompt, **options))


def test_the_page_and_the_description_of_the_model(server):
    for path, kind, word in (
        ("/", "text/html", b"page.js"),
        ("/page.js", "text/javascript", b"/api/model"),
        ("/page.css", "text/css", b"color-scheme"),
    ):
        status, got, content = ask(server, "GET", path)
        assert (status, got) == (200, kind) and word in content
    status, description = ask_json(server, "GET", "/api/model")
    assert description["conditions"]["prompts"]["needed"] and description["size"] == [SIDE, SIDE]
    options = {option["name"]: option for option in description["options"]}
    assert options["sampler"]["default"] == "ddim" and "euler" in options["sampler"]["choices"]
    assert "progress" not in options


def test_the_description_is_of_this_model():
    made = reading(LEVELS)
    halving = made.first_stage.replace(module=make_autoencoder({**VQ, "regularization": "kl"}))
    told = describe(made.replace(image_size=(4, 8), first_stage=halving), "tiny", LIMITS, {})
    assert (told["size"], told["factor"]) == ([4, 8], 2) and not told["negative_prompts"]
    needed = {name: condition["needed"] for name, condition in told["conditions"].items()}
    assert needed == {"low_res": True, "noise_level": False}
    assert told["conditions"]["noise_level"]["max_noise_level"] == 30
    options = {option["name"]: option for option in told["options"]}
    assert options["num_steps"]["default"] == made.defaults["num_steps"] == 1
    assert options["guidance_scale"]["many"] and not options["num_steps"]["many"]
    assert options["guidance_rescale"]["range"] == "[0, 1]"
    sizes = describe(reading({"sizes": {"width": 6}}), "tiny", LIMITS, {})["conditions"]
    assert not any(condition["needed"] for condition in sizes.values())  # the picture's by default
    assert describe(model(TEXT), "tiny", LIMITS, {})["negative_prompts"]


@pytest.mark.parametrize("causal", [True, False])
def test_a_prior_takes_every_option_of_its_description(causal):
    codes = make_autoencoder(VQ)
    prior = make_prior({**SIZES, "causal": causal}, CLASSES, codes)
    made = Model(FirstStage({}, np.ones(()), np.zeros(()), codes), prior=prior, image_size=8)
    told = describe(made, "tiny", LIMITS, {})
    named = {option["name"]: option["default"] for option in told["options"]}
    request = read({"class_labels": 1, **named}, made, LIMITS)
    assert named and request.shared == named and ("num_steps" in named) != causal
    with pytest.raises(ValueError, match="unknown field 'sampler'"):
        read({"class_labels": 1, "sampler": "ddim"}, made, LIMITS)
    prompted = prior.replace(conditioner=make_conditioner(TEXT))
    told = describe(made.replace(prior=prompted), "tiny", LIMITS, {})
    assert "prompts" in told["conditions"] and not told["negative_prompts"]


def test_a_request_gets_the_pictures_of_model_sample_and_their_settings(server):
    request = {"prompts": "red cat", "seed": 2**40 + 7, "num_images": 2, "guidance_scale": 2.0}
    state = finished(server, request)
    assert state["state"] == "done" and state["seed"] == 2**40 + 7
    want = expected(server.jobs.model, 2**40 + 7, "red cat", num_images=2, guidance_scale=2.0)
    for i, path in enumerate(state["pictures"]):
        status, kind, content = ask(server, "GET", path)
        assert (status, kind) == (200, "image/png")
        np.testing.assert_array_equal(pixels(content), want[i])
        status, settings = ask_json(server, "POST", "/api/settings", content, {})
        assert settings == request  # which can be sent again
        theirs = from_text(
            Image.open(io.BytesIO(content)).info["parameters"]
        )  # for A1111's readers
        assert (theirs["num_steps"], theirs["image_size"]) == (1, [SIDE, SIDE])
    assert state["evaluations"] == 1 and state["preview"] is None and state["seconds"] > 0


def test_equal_requests_share_a_call_and_each_gets_its_pictures(server):
    jobs, before = server.jobs, server.jobs.counts["calls"]
    words = ["red", "blue", "green", "cat", "dog", "red cat", "blue dog", "green cat"]
    with jobs.changed:  # the thread that samples can't begin before all wait
        requests = [{"prompts": word, "seed": i} for i, word in enumerate(words)]
        queued = [jobs.submit(read(request, jobs.model, LIMITS)) for request in requests]
        with pytest.raises(Busy, match="8 requests wait already"):
            jobs.submit(queued[0].request)
    for i, job in enumerate(queued):
        assert jobs.wait(job, 60)
        want = expected(jobs.model, i, words[i])[0].astype(int)
        assert np.abs(pixels(job.pictures[0]) - want).max() <= 1
    assert jobs.counts["calls"] == before + 1


def test_other_options_are_another_call(server):
    jobs, before = server.jobs, server.jobs.counts["calls"]
    with jobs.changed:
        each = [{"prompts": "red", "seed": 1, "guidance_scale": scale} for scale in (1.0, 3.0)]
        queued = [jobs.submit(read(request, jobs.model, LIMITS)) for request in each]
    assert all(jobs.wait(job, 60) for job in queued)
    assert jobs.counts["calls"] == before + 2


def test_requests_with_layouts_share_a_call():
    """A layout is lists of unequal lengths."""
    made = model(TEXT)
    entries = [[[3, [0, 0, 1, 1]]], [[1, [0, 0, 0.5, 1]], [2, [0.5, 0, 1, 1]]]]
    first, second = (read({"layout": entry, "seed": 1}, made, LIMITS) for entry in entries)
    assert first.group == second.group
    assert call(made, [first, second])["layout"] == entries


def test_requests_with_weighted_prompts_share_a_call_if_their_numbers_of_chunks_are_equal():
    """Within a call all prompts are filled up to the longest."""
    made = clip_model()

    def group(**request):
        request = read({"prompt_weights": True, "seed": 1, **request}, made, LIMITS)
        assert call(made, [request])["prompt_weights"]
        return request.group

    short, long = group(prompts="(cat:1.2)"), group(prompts="cat BREAK a")
    assert short == group(prompts="a cat", seed=2) != long
    assert long == group(prompts="cat a a a a")
    with_negative = group(prompts="cat BREAK a", negative_prompts="a")
    assert with_negative == group(prompts="cat", negative_prompts="a BREAK a") != long
    with_more = group(prompts="cat", more_prompts=[["a BREAK a", 0.5]])
    assert with_more != group(prompts="cat", more_prompts=[["a", 0.5]])
    with pytest.raises(ValueError, match="prompt_weights needs a model with CLIP's text encoder"):
        read({"prompts": "red", "prompt_weights": True}, model(TEXT), LIMITS)


class Drawn:
    """`Model.sample` for tests of the queue: it waits for `go_on`, and paints images black."""

    def __init__(self):
        self.begun, self.go_on, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, rng, **given):
        self.calls.append({"images": len(rng), **given})
        self.begun.set()
        assert self.go_on.wait(60)
        return np.zeros((len(rng), SIDE, SIDE, 3), np.float32)


@pytest.fixture
def drawn(monkeypatch):
    made = Drawn()
    monkeypatch.setattr(Model, "sample", lambda self, **given: made(**given))
    yield made
    made.go_on.set()


def posted(server, **request):
    """The state of a request that has just begun or waits."""
    status, state = ask_json(server, "POST", "/api/jobs", {"prompts": "red", "seed": 1, **request})
    assert status == 202, state
    return state


def test_a_call_has_at_most_batch_size_images(drawn):
    server = serving(model(TEXT), batch_size=2)
    with server.jobs.changed:
        each = [{"prompts": "red", "seed": i, "num_images": n} for i, n in enumerate((1, 2, 1, 3))]
        queued = [server.jobs.submit(read(one, server.jobs.model, LIMITS)) for one in each]
    drawn.go_on.set()
    assert all(server.jobs.wait(job, 60) for job in queued)
    server.shutdown()
    server.server_close()
    # The first and the third share a call; the last has more alone, which `sample` divides.
    assert [call["images"] for call in drawn.calls] == [2, 2, 3]
    assert [call["batch_size"] for call in drawn.calls] == [2, 2, 2]
    assert [len(job.pictures) for job in queued] == [1, 2, 1, 3]


def test_a_request_that_is_cancelled_in_time_is_never_sampled(server, drawn):
    first, second = posted(server), posted(server, guidance_scale=2.0)
    assert drawn.begun.wait(60)
    for state in (second, first):
        path = f"/api/jobs/{state['id']}"
        assert ask(server, "DELETE", f"{path}/0.png")[0] == 404
        assert ask_json(server, "GET", path)[1]["state"] != "cancelled"
        assert ask_json(server, "DELETE", path)[1]["state"] == "cancelled"
    drawn.go_on.set()
    third = finished(server, {"prompts": "red", "seed": 1})
    assert len(drawn.calls) == 2 and third["state"] == "done"
    for state in (first, second):
        state = ask_json(server, "GET", f"/api/jobs/{state['id']}")[1]
        assert (state["state"], state["pictures"]) == ("cancelled", [])
    assert ask_json(server, "DELETE", f"/api/jobs/{third['id']}")[1]["state"] == "done"
    assert ask(server, "GET", f"{third['pictures'][0]}")[0] == 200
    assert ask(server, "GET", f"/api/jobs/{third['id']}/1.png")[0] == 404


def test_a_client_that_asks_for_a_change_waits_for_nothing_else(server, drawn, monkeypatch):
    monkeypatch.setattr(handler, "LONG_POLL_SECONDS", 10)
    state = posted(server)
    assert drawn.begun.wait(60)
    path, start = f"/api/jobs/{state['id']}?after=", time.monotonic()
    state = ask_json(server, "GET", f"{path}{state['version'] + 100}")[1]
    assert state["state"] == "running"  # the version is another one already
    server.jobs.find(state["id"]).preview = b"a picture"
    shown = ask_json(server, "GET", path.partition("?")[0])[1]["preview"]
    assert base64.b64decode(shown) == b"a picture"
    assert time.monotonic() - start < 5
    threading.Timer(0.2, drawn.go_on.set).start()
    assert ask_json(server, "GET", f"{path}{state['version']}")[1]["state"] == "done"


def test_a_job_may_end_while_its_state_is_told():
    previews = iter([b"a picture", None])
    facts = {"id": "1", "state": "running", "version": 3, "evaluations": 1, "seconds": 0.0}
    facts |= {"pictures": [], "error": "", "request": SimpleNamespace(seed=5)}
    job = type("Ending", (), {**facts, "preview": property(lambda _: next(previews))})()
    assert base64.b64decode(handler._state(job)["preview"]) == b"a picture"


def test_a_client_of_openai_that_leaves_cancels_and_one_that_is_cancelled_is_told(server, drawn):
    jobs = server.jobs
    body = json.dumps({"prompt": "red"})
    leaves, stays = (
        http.client.HTTPConnection(*server.server_address[:2], timeout=60) for _ in "ab"
    )
    for connection in (leaves, stays):
        connection.request("POST", "/v1/images/generations", body, JSON)
        while not (jobs.num_waiting or not drawn.begun.wait(60)) and connection is stays:
            time.sleep(0.01)
        assert drawn.begun.wait(60)
    first, second = list(jobs._jobs.values())[-2:]
    leaves.close()
    assert jobs.wait(first, 10) and first.state == "cancelled"
    assert ask(server, "DELETE", f"/api/jobs/{second.id}")[0] == 200
    assert stays.getresponse().status == 503
    stays.close()


def test_an_address_that_is_taken_is_named(server):
    host, port = server.server_address[:2]
    with pytest.raises(OSError, match=f"{host}:{port}: Address already in use"):
        make_server(model(TEXT), "tiny", (host, port))


def test_adapters_are_requested_by_their_names(drawn):
    drawn.go_on.set()
    adapters = {name: SimpleNamespace(argument="adapters", path=name) for name in ("style", "word")}
    server = serving(model(TEXT), adapters=adapters)
    asked = {"adapters": [["word", 0.5], ["style", 2]]}
    wanted = [(adapters["word"], 0.5), (adapters["style"], 2.0)]
    assert ask_json(server, "GET", "/api/model")[1]["adapters"] == ["style", "word"]
    assert finished(server, {"prompts": "red", **asked})["state"] == "done"
    assert ask(server, "POST", "/v1/images/generations", {"prompt": "red", **asked})[0] == 200
    assert [call["adapters"] for call in drawn.calls] == [wanted, wanted]
    made = server.jobs.model
    with server.jobs.changed:  # other adapters are another call
        each = [{"prompts": "red", "adapters": [[name, 1]]} for name in ("word", "style", "word")]
        queued = [server.jobs.submit(read(one, made, LIMITS, adapters)) for one in each]
    assert all(server.jobs.wait(job, 60) for job in queued)
    assert [call["images"] for call in drawn.calls[2:]] == [2, 1]
    server.shutdown()
    server.server_close()


def test_a_full_queue_asks_for_patience_and_is_counted():
    server = make_server(model(TEXT), "tiny", ("127.0.0.1", 0), Limits(max_waiting=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("POST", "/api/jobs", json.dumps({"prompts": "red"}), JSON)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
    # An error leaves the connection usable, even if a body was not read.
    connection.request("POST", "/nothing", json.dumps({"prompts": "red"}), JSON)
    connection.getresponse().read()
    connection.request("GET", "/metrics")
    counted = connection.getresponse().read().decode().split("\n")
    connection.close()
    server.shutdown()
    server.server_close()
    for line in ("refused_total 1", "status_503_total 1", "status_404_total 1", "waiting 0"):
        assert f"latent_diffusion_{line}" in counted


def test_a_request_that_fails_spoils_no_other(server, monkeypatch):
    jobs, sample = server.jobs, Model.sample

    def picky(self, rng, prompts, **options):
        if "dog" in prompts:
            raise ValueError("a dog can't be drawn\nreally")
        return sample(self, rng, prompts, **options)

    monkeypatch.setattr(Model, "sample", picky)
    with jobs.changed:
        each = [{"prompts": word, "seed": 1} for word in ("red", "dog", "blue")]
        queued = [jobs.submit(read(request, jobs.model, LIMITS)) for request in each]
    assert all(jobs.wait(job, 60) for job in queued)
    assert [job.state for job in queued] == ["done", "failed", "done"]
    assert queued[1].error == "a dog can't be drawn"


def test_a_cancelled_request_stops_at_its_next_step(server):
    jobs = server.jobs
    begun, go_on = threading.Event(), threading.Event()
    progress = jobs.progress

    def slowly(t):
        begun.set()
        assert go_on.wait(60)
        progress(t)

    jobs.progress = slowly
    try:
        request = {"prompts": "red", "num_steps": 50, "seed": 1}
        _, state = ask_json(server, "POST", "/api/jobs", request)
        assert begun.wait(60)
        _, state = ask_json(server, "DELETE", f"/api/jobs/{state['id']}")
        assert state["state"] == "cancelled"
        go_on.set()
        assert finished(server, {"prompts": "red", "seed": 1})["state"] == "done"
    finally:
        del jobs.progress
    job = jobs.find(state["id"])
    assert job.evaluations <= 2 and job.pictures == []


def test_a_request_that_is_cancelled_as_its_call_begins_takes_nothing_from_the_others(drawn):
    server = serving(model(TEXT))
    jobs, sample, queued = server.jobs, server.jobs._sample, []

    def late(batch):
        jobs.cancel(queued[0])
        sample(batch)

    jobs._sample = late
    with jobs.changed:
        each = [{"prompts": "red", "seed": i, "image": WHITE, "strength": 0.5} for i in range(2)]
        queued += [jobs.submit(read(request, jobs.model, LIMITS)) for request in each]
    drawn.go_on.set()
    assert jobs.wait(queued[1], 60)
    (call,) = drawn.calls
    assert call["prompts"] == ["red", "red"] and call["image"].shape == (2, SIDE, SIDE, 3)
    assert [job.state for job in queued] == ["cancelled", "done"]
    server.shutdown()
    server.server_close()


def test_after_a_failed_call_no_preview_is_of_another_request(monkeypatch):
    monkeypatch.setattr(Jobs, "_draw_previews", lambda self: None)
    jobs, seen = Jobs(model(TEXT), "tiny", LIMITS), []

    def picky(self, rng, preview, **options):
        seen.append(jobs._latents)
        preview(None, np.zeros((len(rng), SIDE, SIDE, 3)))
        raise ValueError("too much")

    monkeypatch.setattr(Model, "sample", picky)
    with jobs.changed:
        each = [{"prompts": "red", "seed": i} for i in range(2)]
        queued = [jobs.submit(read(request, jobs.model, LIMITS)) for request in each]
    assert all(jobs.wait(job, 60) for job in queued)
    jobs.close()
    assert seen == [None, None, None]


def test_a_preview_that_fails_is_not_the_last(monkeypatch):
    drawn, again = [], threading.Event()

    def draw(self, latents, running):
        drawn.append(latents)
        if len(drawn) == 1:
            raise MemoryError("out of memory")
        again.set()

    monkeypatch.setattr(Jobs, "_draw", draw)
    monkeypatch.setattr(jobs_module, "PREVIEW_SECONDS", 0)
    jobs = Jobs(model(TEXT), "tiny", LIMITS)
    for _ in range(2):
        jobs.preview(None, np.zeros((1, SIDE, SIDE, 3)))
        deadline = time.monotonic() + 5
        while jobs._latents is not None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert again.wait(5)
    jobs.close()


def test_the_latents_of_a_call_are_previewed(server):
    jobs, seen = server.jobs, []
    jobs.preview = lambda t, z_0: seen.append(np.shape(z_0))
    try:
        finished(server, {"prompts": "red", "seed": 1, "num_images": 2})
    finally:
        del jobs.preview
    ((count, *shape),) = seen  # rows of padding may follow those of the images
    assert count >= 2 and shape == [SIDE, SIDE, 3]


def test_previews_are_pictures_of_the_running_call(server, monkeypatch):
    jobs = server.jobs
    job = jobs.submit(read({"prompts": "red", "seed": 1}, jobs.model, LIMITS))
    assert jobs.wait(job, 60)
    job.state, job.preview = "running", None
    z_0 = np.asarray(jobs.model.encode(np.zeros((1, SIDE, SIDE, 3), np.float32)))
    jobs._draw(z_0, [job])
    assert np.abs(pixels(job.preview).astype(int) - 127).max() <= 1
    # Pictures that are made in tiles may be too large for a preview of the whole.
    decoded = []
    monkeypatch.setattr(Model, "decode", lambda *given, **tiles: decoded.append(tiles) or z_0)
    job.request = dataclasses.replace(job.request, shared={"tile_size": 2})
    jobs._draw(z_0, [job])
    assert decoded == [{"tile_size": 2, "tile_overlap": None}]
    job.state = "done"


def test_of_a_part_of_a_shared_call_nobody_gets_a_preview(server):
    jobs = server.jobs
    own = [Job(read({"prompts": "red"}, jobs.model, LIMITS)) for _ in range(2)]
    z_0 = np.zeros((1, SIDE, SIDE, 3), np.float32)
    jobs._draw(z_0, own)
    assert [job.preview for job in own] == [None, None]
    own[0].state = "cancelled"
    jobs._draw(np.concatenate([z_0, z_0]), own)
    assert own[0].preview is None and own[1].preview is not None


def test_a_preview_in_a_shared_call_is_of_its_own_request(server):
    jobs = server.jobs
    own = [Job(read({"prompts": "red", "num_images": 2}, jobs.model, LIMITS)) for _ in range(2)]
    grey = np.linspace(-0.9, 0.9, 4, dtype=np.float32)[:, None, None, None]
    jobs._draw(np.asarray(jobs.model.encode(np.tile(grey, (1, SIDE, SIDE, 3)))), own)
    for job, level in zip(own, (grey[0], grey[2]), strict=True):
        assert np.abs(pixels(job.preview) - 127.5 * (1 + level)).max() <= 1


def test_openai_clients_get_pictures(server):
    body = {"model": "any", "prompt": "red cat", "n": 2, "size": "4x4", "seed": 3}
    status, answer = ask_json(server, "POST", "/v1/images/generations", body)
    assert status == 200 and answer["created"] > 1e9
    want = expected(server.jobs.model, 3, "red cat", num_images=2)
    for entry, image in zip(answer["data"], want, strict=True):
        np.testing.assert_array_equal(pixels(base64.b64decode(entry["b64_json"])), image)


def form(**fields):
    """A body of multipart/form-data, and its type; bytes are files."""
    lines = []
    for name, value in fields.items():
        file = f'; filename="{name}.png"' if isinstance(value, bytes) else ""
        lines.append(f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}'.encode())
        lines[-1] += b"\r\n\r\n" + (value if isinstance(value, bytes) else str(value).encode())
    return b"\r\n".join([*lines, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"


def test_openai_clients_can_fill_the_holes_of_a_picture(server):
    """The transparent part of the mask is the hole; around it the picture stays."""
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    alpha = np.full((SIDE, SIDE, 4), 255, np.uint8)
    alpha[:2, :, 3] = 0
    alpha[..., :3] = 90
    body, kind = form(prompt="red", seed=5, image=png_of(image), mask=png_of(alpha))
    status, answer = ask_json(server, "POST", "/v1/images/edits", body, {"Content-Type": kind})
    assert status == 200, answer
    made = pixels(base64.b64decode(answer["data"][0]["b64_json"])).astype(int)
    assert np.abs(made[2:] - image[2:]).max() <= 1
    assert np.abs(made[:2] - image[:2]).max() > 10
    fields = read_form(kind, body)
    assert fields["seed"] == 5 and request_of(fields)["prompts"] == "red"


def test_a_picture_and_its_mask_are_cut_as_by_sample(server):
    """Of a wide picture the middle counts, which isn't squashed."""
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : SIDE + 2] = 255
    sent = {"prompts": "red", "image": in_base64(wide), "mask": in_base64(wide[..., 0])}
    values = read(sent, server.jobs.model, LIMITS).values
    middle = wide[:, SIDE : 2 * SIDE]
    np.testing.assert_array_equal(to_uint8(values["image"][0]), middle)
    np.testing.assert_array_equal(255 * values["mask"][0], middle[..., :1])
    # The size that is asked for decides, not that of the trained pictures.
    values = read({**sent, "image_size": [SIDE, 3 * SIDE]}, server.jobs.model, LIMITS).values
    np.testing.assert_array_equal(to_uint8(values["image"][0]), wide)
    np.testing.assert_array_equal(255 * values["mask"][0], wide[..., :1])
    maps = {"segmentation": in_base64(wide[..., 0])}  # which decide, too
    values = read({**sent, **maps}, server.jobs.model, LIMITS).values
    np.testing.assert_array_equal(to_uint8(values["image"][0]), wide)
    with pytest.raises(ValueError, match="mask has 4×4 pixels, but image has 12×4"):
        read({**sent, "mask": in_base64(middle)}, server.jobs.model, LIMITS)


BAD = [  # path, body, status, words of the message
    ("/api/jobs", {"prompts": "red", "sampler": "none"}, 400, "unknown sampler 'none'"),
    ("/api/jobs", {"prompts": "red", "sampler": ["ddim"]}, 400, r"sampler=\['ddim'\] must be a"),
    ("/api/jobs", {"prompts": "red", "steps": 3}, 400, "unknown field 'steps'"),
    ("/api/jobs", {"prompts": ["red"]}, 400, "prompts must be one text"),
    ("/api/jobs", {"prompts": "red", "num_images": 9}, 400, r"num_images=9 must .* in \[1, 8\]"),
    ("/api/jobs", {"prompts": "red", "num_images": True}, 400, "num_images=True must be a whole"),
    ("/api/jobs", {"prompts": "red", "seed": -1}, 400, "seed=-1 must be"),
    ("/api/jobs", {"prompts": "red", "num_steps": 101}, 400, r"num_steps=101 must .* \[1, 100\]"),
    ("/api/jobs", {"prompts": "red", "image_size": [4]}, 400, "image_size=.* must be .height, wid"),
    ("/api/jobs", {"prompts": "red", "image_size": [16, 16]}, 400, "16×16 are more than 64 pixels"),
    ("/api/jobs", {"prompts": "red", "image": "?"}, 400, "image must be a picture in base64"),
    ("/api/jobs", {"prompts": "red", "image": "aGFsbG8="}, 400, "image can't be .* file image$"),
    ("/api/jobs", {"prompts": "red", "image": in_base64(np.zeros((9, 9), np.uint8))}, 400, "9×9"),
    ("/api/jobs", {"prompts": "red", "image": HEAD}, 400, "image: 9×9 are more"),
    ("/api/jobs", {"prompts": "red", "image": WHITE}, 0, "image needs"),
    ("/api/jobs", {"prompts": "red", "adapters": [["x", 1]]}, 400, "unknown adapter 'x'"),
    ("/api/jobs", {"prompts": "red", "layout": []}, 400, "layout: write 1 to 100 objects"),
    ("/api/jobs", {"prompts": "red", "prompt_weights": 1}, 400, "prompt_weights=1 must be true"),
    ("/api/jobs", {"prompts": "red", "more_prompts": [1]}, 400, "more_prompts: write"),
    ("/api/jobs", {"prompts": "red", "more_prompts": {"a1": 2}}, 400, "more_prompts: write"),
    ("/api/jobs", {"prompts": "red", "adapters": ["s1"]}, 400, r"adapters: write \[\[text, weight"),
    ("/api/jobs", {"prompts": "red", "image_size": "\ud800"}, 400, r"image_size=\? must be"),
    ("/api/jobs", {"prompts": "\ud800"}, 400, "prompts has half of a surrogate pair"),
    (
        "/api/jobs",
        {"prompts": "red", "more_prompts": [["\ud800", 1]]},
        400,
        "more_prompts has half",
    ),
    ("/api/jobs", {"prompts": "red", "seed": "1e3"}, 400, "seed=1e3 must be a whole number"),
    ("/api/jobs", {"prompts": "red", "more_prompts": [["a", 1]] * 9}, 400, "9 pairs, at most 8"),
    ("/api/jobs", {"prompts": "a" * 10_001}, 400, "at most 10,000 characters"),
    ("/api/jobs", {"neighbours": [[0] * 65]}, 400, "neighbours: 65 numbers, at most 64"),
    ("/api/jobs", {"original_size": [1, -1]}, 400, "original_size=-1 must be a whole number"),
    ("/api/jobs", {"prompts": "red", "class_labels": 1}, 0, "class_labels given, but this model"),
    ("/api/jobs", {}, 0, "this model is conditioned on tokens: give prompts"),
    ("/api/jobs", [], 400, "a request is a JSON object, not list"),
    ("/api/jobs", b'{"prompts": "red", "eta": NaN}', 400, "NaN is no number"),
    ("/api/jobs", b"{", 400, "the request isn't JSON"),
    ("/api/jobs", b"[" * 100_000, 400, "nested too deeply|isn't JSON"),
    ("/api/settings", b"hello", 400, "not a PNG that can be read"),
    ("/api/settings", png_of(np.zeros((2, 2), np.uint8)), 400, "this PNG carries no settings"),
    ("/v1/images/generations", {"prompt": "red", "size": "big"}, 400, "must be WIDTHxHEIGHT"),
    ("/v1/images/generations", {"prompt": "red", "response_format": "url"}, 400, "b64_json"),
    ("/v1/images/generations", {"prompt": "red", "output_format": "webp"}, 400, "must be 'png'"),
    (
        "/v1/images/generations",
        {"prompt": "red", "background": "transparent"},
        400,
        "background='transparent' must be 'auto' or 'opaque'",
    ),
    ("/v1/images/generations", {"prompt": "red", "sampler": "none"}, 400, "unknown sampler"),
    ("/v1/images/edits", {"prompt": "red"}, 400, "not multipart/form-data"),
    ("/nothing", {}, 404, "there is nothing here"),
    ("/../../etc/passwd", {}, 404, "there is nothing here"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_request_gets_one_line(path, body, status, words, server):
    if status == 0:  # the model itself refuses it
        state = finished(server, body)
        assert state["state"] == "failed"
        message = state["error"]
    else:
        got, answer = ask_json(server, "POST", path, body)
        assert got == status, answer
        message = answer["error"]["message"]
    assert re.search(words, message), message
    assert "\n" not in message


def test_paths_that_lead_nowhere(server):
    for path in ("/x", "/page/index.html", "/..%2f..%2fetc/passwd", "/api/jobs/0123456789abcdef"):
        assert ask(server, "GET", path)[0] == 404
    assert ask(server, "DELETE", "/api/jobs/0123456789abcdef")[0] == 404
    state = finished(server, {"prompts": "red", "seed": 1})
    assert ask(server, "GET", f"/api/jobs/{state['id']}/7.png")[0] == 404


def test_bodies_are_bounded_and_typed(server):
    big = {"Content-Length": str(2**40), **JSON}
    assert ask(server, "POST", "/api/jobs", b"{}", big)[0] == 413
    assert ask(server, "POST", "/api/jobs", b"{}", {"Content-Type": "text/plain"})[0] == 415
    chunked = {"Transfer-Encoding": "chunked", **JSON}
    assert ask(server, "POST", "/api/jobs", b"0\r\n\r\n", chunked)[0] == 411


def test_a_body_that_is_not_read_is_not_the_next_request(server):
    """The connection is closed instead."""
    bodies = {"Content-Length": "2"}, {"Transfer-Encoding": "chunked"}
    for method, path in (("GET", "/api/model"), ("DELETE", "/api/jobs/0123456789abcdef")):
        for headers in bodies:
            assert closes(server, method, path, headers)
        assert not closes(server, method, path, {"Content-Length": "0"})
        assert not closes(server, method, path, {})
    assert closes(server, "POST", "/api/jobs", {"Transfer-Encoding": "chunked", **JSON})
    both = {"Transfer-Encoding": "chunked", "Content-Length": "2", **JSON}
    assert closes(server, "POST", "/api/jobs", both)


def closes(server, method, path, headers):
    """Whether the server closes the connection after its answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(b"{}" if headers.get("Content-Length") == "2" else None)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.headers["Connection"] == "close"


def test_head_is_answered_as_get_without_content(server):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    for path in ("/", "/api/model"):
        lengths = []
        for method in ("HEAD", "GET"):
            connection.request(method, path)
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200 and bool(content) == (method == "GET")
            lengths.append(answer.headers["Content-Length"])
        assert lengths[0] == lengths[1]
        # No browser guesses types, runs scripts of other sites, or shows the page inside of others.
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["Cache-Control"] == "no-store"
    connection.close()


def test_pages_of_other_sites_are_refused(server):
    host = f"127.0.0.1:{server.server_address[1]}"
    for origin, status in (("http://evil.example", 403), (f"http://{host}", 200)):
        assert ask(server, "GET", "/api/model", headers={"Origin": origin})[0] == status


def test_other_names_of_this_machine_are_refused_without_a_token(server, monkeypatch):
    """A site can make one of its names lead here (DNS rebinding): then the browser shares all."""
    rebound = {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}
    for method, path in (("GET", "/"), ("GET", "/api/model"), ("POST", "/api/jobs")):
        status, answer = ask_json(server, method, path, {}, {**JSON, **rebound})
        assert status == 403
        assert answer["error"]["message"].endswith(", localhost, not to 'evil.example:8188'")
    assert ask(server, "GET", "/", headers={"Host": "localhost.evil.example"})[0] == 403
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9000", "[::1]:80"):  # tunnels' ports
        own = {"Host": host, "Origin": f"http://{host}"}
        assert ask(server, "GET", "/api/model", headers=own)[0] == 200
    monkeypatch.setattr(server, "names", named("127.0.0.2", None))
    for host, status in (("127.0.0.2:1", 200), ("[::1", 400)):
        assert ask(server, "GET", "/", headers={"Host": host})[0] == status
    assert not named("127.0.0.1", "secret") and not named("0.0.0.0", None)


def named(host, token):
    """The names of a server at an address."""
    server = make_server(model(CLASS), "tiny", (host, 0), token=token)
    server.server_close()
    return server.names


def test_metrics_count(server):
    before = server.jobs.counts["images"]
    finished(server, {"prompts": "red", "seed": 1, "num_images": 3})
    _, _, content = ask(server, "GET", "/metrics")
    assert f"latent_diffusion_images_total {before + 3}\n".encode() in content


def test_a_token_guards_everything_but_the_page():
    server = serving(model(CLASS), token="secret")
    try:
        assert ask(server, "GET", "/")[0] == 200
        for headers in ({}, {"Authorization": "Bearer other"}):
            for method, path in (("GET", "/api/model"), ("GET", "/metrics")):
                assert ask(server, method, path, headers=headers)[0] == 401
            assert ask(server, "POST", "/api/jobs", b"{}", headers)[0] == 401
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
        connection.request("GET", "/api/model")
        assert connection.getresponse().headers["WWW-Authenticate"] == "Bearer"
        connection.close()
        right = {"Authorization": "Bearer secret"}
        status, description = ask_json(server, "GET", "/api/model", headers=right)
        assert status == 200 and description["conditions"]["class_labels"]["num_classes"] == 3
    finally:
        server.shutdown()
        server.server_close()


def test_few_of_the_finished_jobs_are_remembered(monkeypatch):
    monkeypatch.setattr(jobs_module, "REMEMBERED", 3)
    jobs = Jobs(model(CLASS), "tiny", LIMITS)
    try:
        done = []
        for seed in range(6):
            request = read({"class_labels": 1, "seed": seed}, jobs.model, LIMITS)
            done.append(jobs.submit(request))
            assert jobs.wait(done[-1], 60)
        found = [jobs.find(job.id) is not None for job in done]
        assert found == [False, False, False, True, True, True]
        with jobs.changed:  # those that wait are kept, however many they are
            waiting = [jobs.submit(read({"class_labels": 1}, jobs.model, LIMITS)) for _ in "12345"]
            assert all(jobs.find(job.id) is job for job in waiting)
    finally:
        jobs.close()


def test_large_pictures_make_room_for_later_ones(drawn, monkeypatch):
    drawn.go_on.set()
    monkeypatch.setattr(jobs_module, "REMEMBERED_BYTES", 2500)
    monkeypatch.setattr(jobs_module, "to_png", lambda *given: bytes(1000))
    server = serving(model(TEXT))
    asked = [finished(server, {"prompts": "red", "num_images": n}) for n in (1, 1, 1, 4)]
    with server.jobs.changed:  # one that has no pictures takes no room
        server.jobs.cancel(server.jobs.submit(read({"prompts": "red"}, model(TEXT), LIMITS)))
    for state in asked[:3]:  # the last one's are more than the bound, but nobody has had them
        for path in (f"/api/jobs/{state['id']}", *state["pictures"]):
            status, answer = ask_json(server, "GET", path)
            assert status == 404 and answer["error"]["message"].endswith("room for later ones")
    assert all(ask(server, "GET", path)[0] == 200 for path in asked[3]["pictures"])
    last = [finished(server, {"prompts": "red"}) for _ in "123"]
    kept = [ask(server, "GET", state["pictures"][0])[0] for state in (asked[3], *last)]
    assert kept == [404, 404, 200, 200]
    server.shutdown()
    server.server_close()


def test_the_jobs_that_ended_first_are_forgotten_first(drawn, monkeypatch):
    """One that waited for its call is the newest when it has been answered."""
    monkeypatch.setattr(jobs_module, "REMEMBERED", 1)
    jobs = Jobs(model(TEXT), "tiny", LIMITS)
    with jobs.changed:
        each = [{"prompts": "red", "guidance_scale": scale} for scale in (1.0, 3.0, 1.0)]
        queued = [jobs.submit(read(request, jobs.model, LIMITS)) for request in each]
    drawn.go_on.set()
    assert jobs.wait(queued[1], 60)
    assert [jobs.find(job.id) is not None for job in queued] == [False, True, False]
    jobs.close()


def test_the_words_of_a1111_are_read_and_written():
    settings = {
        "prompts": "a cat, (red:1.2)\nin rain",
        "negative_prompts": "dog",
        "sampler": "dpm_solver_pp_2m",
        "spacing": "karras",
        "num_steps": 20,
        "guidance_scale": 7.5,
        "seed": 12,
        "image_size": [512, 768],
        "strength": 0.6,
    }
    text = to_text(settings, "/models/mine")
    assert "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5" in text
    assert "Size: 768x512" in text and text.endswith("Model: mine")
    assert from_text(text) == settings
    old = 'cat\nSteps: 5, Sampler: DPM++ 2M Karras, Seed: 1, Lora hashes: "a: b, c: d", Model: x'
    want = {"prompts": "cat", "num_steps": 5, "seed": 1}
    assert from_text(old) == {**want, "sampler": "dpm_solver_pp_2m", "spacing": "karras"}
    of_a_second_pass = f"{text}, Hires upscale: 2, Hires upscaler: Latent"
    assert from_text(of_a_second_pass) == {k: v for k, v in settings.items() if k != "strength"}
    image = np.zeros((512, 768, 3), np.uint8)
    theirs = Image.open(io.BytesIO(to_png(image, settings, "m", {}))).info["parameters"]
    assert from_text(theirs) == settings
    assert from_png(io.BytesIO(to_png(image, settings, "m", {}))) == settings
    info, out = PngInfo(), io.BytesIO()
    info.add_text("parameters", theirs)  # alone, as A1111 writes it
    Image.new("L", (1, 1)).save(out, "PNG", pnginfo=info)
    assert from_png(out) == settings
    with pytest.raises(ValueError, match="Steps: 'many' is no number"):
        from_text("cat\nSteps: many, Seed: 1")


@pytest.mark.parametrize("noise", [" ", "a", "a: ", 'a: "'])
def test_a_text_of_any_kind_is_read_at_once(noise):
    start = time.process_time()
    text = f"cat\nSteps: 3, {2000 * noise}, Seed: 5"
    found = from_text(text)
    assert time.process_time() - start < 2
    assert (found["prompts"], found["num_steps"], found["seed"]) == ("cat", 3, 5)


def test_text_for_a1111_keeps_what_it_has_no_name_for():
    for settings in (
        {"prompts": "", "negative_prompts": "dog", "num_steps": 3},
        {"prompts": "cat", "sampler": "deis", "num_steps": 3, "seed": 1},
    ):
        assert from_text(to_text(settings, "C:\\models\\mine, Seed: 5")) == settings
    assert set(parameters.SAMPLERS.values()) <= set(SAMPLERS)
    assert len(set(parameters.SAMPLERS.values())) == len(parameters.SAMPLERS)


def test_a_picture_of_one_channel_is_grey():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    np.testing.assert_array_equal(pixels(to_png(grey, {}, "m", {})), grey[..., 0])


def test_the_fields_of_openai_become_ours():
    asked = {"prompt": "red", "n": 2, "size": "8x4", "quality": "high", "style": "vivid"}
    assert request_of(asked) == {"prompts": "red", "num_images": 2, "image_size": [4, 8]}
    assert request_of({"prompt": "red", "size": "auto"}) == {"prompts": "red"}
    sent = {"prompt": "red", "strength": "0.5", "num_steps": "3", "guidance_scale": "2"}
    body, kind = form(**sent, **{"image[]": b"picture"})
    picture = base64.b64encode(b"picture").decode()
    want = {"prompt": "red", "strength": 0.5, "num_steps": 3, "guidance_scale": 2.0}
    assert read_form(kind, body) == {**want, "image": picture}


def test_every_field_of_a_request_reaches_the_call():
    made = model(TEXT)
    levels = np.arange(16, dtype=np.uint8).reshape(SIDE, SIDE)
    deep = 1000 * levels.astype(np.uint16)
    sent = {
        "prompts": "red",
        "seed": 2**64 - 1,
        "num_images": 2,
        "eta": None,  # as if it weren't there
        "strength": 0.5,
        "image_size": [SIDE, 2 * SIDE],
        "image": f"data:image/png;base64,{WHITE}",
        "segmentation": in_base64(levels),
        "depth": in_base64(deep),
        "neighbours": [[1, 2], [3, 4]],
        "aesthetic_score": 6.5,
        "original_size": [5, 9],
        "more_prompts": [["blue", -0.5]],
        "prompt_weights": False,
    }
    request = read(sent, made, LIMITS)
    pictures = ("eta", "image", "segmentation", "depth")
    assert request.settings == {k: v for k, v in sent.items() if k not in pictures}
    arguments = call(made, [request])
    assert len(arguments.pop("rng")) == 2
    size = {"image_size": (SIDE, 2 * SIDE), "strength": 0.5}
    rest = {"prompts": ["red"] * 2, "more_prompts": [("blue", -0.5)], "prompt_weights": False}
    want = {
        "image": np.ones((2, SIDE, 2 * SIDE, 3)),
        "segmentation": np.stack([levels, levels]),
        "depth": np.stack([deep, deep])[..., None],
        "neighbours": np.array([[[1, 2], [3, 4]]] * 2),
        "aesthetic_score": np.full(2, 6.5),
        "original_size": np.array([[5, 9]] * 2),
    }
    for name, value in want.items():
        np.testing.assert_array_equal(arguments.pop(name), value)
    assert arguments == {**size, **rest}


def test_the_usual_steps_of_a_model_are_limited_too():
    made = model(TEXT)
    made = made.replace(defaults={**made.defaults, "num_steps": 101})
    with pytest.raises(ValueError, match=r"num_steps=101 must be .* in \[1, 100\]"):
        read({"prompts": "red"}, made, LIMITS)
    assert read({"prompts": "red", "num_steps": 100}, made, LIMITS).shared["num_steps"] == 100


def test_a_request_without_a_seed_gets_one_of_its_own():
    seeds = {read({"prompts": "red"}, model(TEXT), LIMITS).seed for _ in range(4)}
    assert len(seeds) == 4 and max(seeds) < 2**32


def test_a_model_without_conditions_is_told_the_number_of_images():
    made = reading({})
    requests = [read({"seed": i, "num_images": 2}, made, LIMITS) for i in range(3)]
    assert call(made, requests)["num_images"] == 6 == len(call(made, requests)["rng"])


def test_a_key_array_is_a_batch_of_calls():
    """The keys of a merged call are those of the requests' own calls."""
    made = model(CLASS)
    each = [{"class_labels": i, "seed": i, "num_images": 2} for i in range(2)]
    arguments = call(made, [read(request, made, LIMITS) for request in each])
    together = made.sample(**arguments)
    apart = [made.sample(seed_key(i), class_labels=i, num_images=2) for i in range(2)]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-6)
    assert jax.random.key_data(arguments["rng"]).shape[0] == 4


@pytest.mark.parametrize("grey", [90, 255])
def test_the_holes_of_an_openai_mask_are_its_transparent_parts_whatever_its_colour(grey):
    pixels_of = np.full((SIDE, SIDE, 4), grey, np.uint8)
    pixels_of[..., 3] = np.repeat([0, 255], 2)[:, None]
    file = png_of(pixels_of)
    head = b'--x\r\nContent-Disposition: form-data; name="'
    body = head + b'mask"; filename="a.png"\r\n\r\n' + file + b"\r\n"
    body += head + b'image"; filename="b.png"\r\n\r\n' + base64.b64decode(WHITE) + b"\r\n"
    body += head + b'prompt"\r\n\r\n123\r\n' + head + b'eta"\r\n\r\n0.5\r\n'
    body += head + b'prompt_weights"\r\n\r\nfalse\r\n--x--\r\n'
    fields = request_of(read_form("multipart/form-data; boundary=x", body))
    assert (fields["prompts"], fields["eta"], fields["prompt_weights"]) == ("123", 0.5, False)
    (hole,) = read(fields, model(TEXT), LIMITS).values["mask"]
    np.testing.assert_array_equal(hole[..., 0], np.repeat([[1], [1], [0], [0]], SIDE, 1))


def test_a_job_that_has_ended_holds_no_pictures(server):
    request = {"prompts": "red", "seed": 3, "image": WHITE, "strength": 0.5}
    job = server.jobs.submit(read(request, model(TEXT), LIMITS))
    assert server.jobs.wait(job, 60) and job.state == "done"
    assert not job.request.values and not job.request.pictured
    assert (job.request.seed, job.request.num_images) == (3, 1)


def test_a_long_answer_may_take_longer_than_an_idle_connection(server, monkeypatch):
    """A client that reads slowly, but never waits."""
    content = bytes(range(256)) * 160_000  # 41 MB, more than the buffers of a socket
    monkeypatch.setattr(handler.Handler, "timeout", 1)
    monkeypatch.setattr(
        handler.Handler, "_get", lambda self: self._send(content, "application/octet-stream")
    )
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("GET", "/slow")
    answer, read_so_far = connection.getresponse(), b""
    for _ in range(20):
        time.sleep(0.1)
        read_so_far += answer.read(len(content) // 20)
    assert read_so_far == content
    connection.close()


def test_the_text_in_a_png_has_the_size_of_the_picture():
    """Whatever determined it: a request, a hint, a small picture, or the model."""
    image = np.zeros((2, 6, 3), np.uint8)
    content = io.BytesIO(to_png(image, {"prompts": "red", "num_steps": 1}, "m", {}))
    assert "Size: 6x2" in Image.open(content).info["parameters"]
    assert "image_size" not in from_png(content)


def test_settings_that_are_nested_too_deeply_are_refused(server):
    info = PngInfo()
    info.add_itxt(parameters.JSON_KEY, "[" * 100_000)
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "PNG", pnginfo=info)
    status, answer = ask_json(server, "POST", "/api/settings", out.getvalue(), {})
    assert status == 400 and "is no JSON object" in answer["error"]["message"]


def test_a_large_seed_is_a_text_for_browsers(server):
    """Their numbers have 53 bits."""
    for seed, text in ((2**53 - 1, 2**53 - 1), (2**64 - 1, str(2**64 - 1))):
        state = finished(server, {"prompts": "red", "seed": text})
        assert state["seed"] == text
        content = ask(server, "GET", state["pictures"][0])[2]
        assert from_png(io.BytesIO(content))["seed"] == seed
        assert ask_json(server, "POST", "/api/settings", content, {})[1]["seed"] == text


def test_the_picture_that_a_small_one_implies_is_bounded(server):
    made = reading({"low_res": {}})
    halving = made.replace(
        first_stage=made.first_stage.replace(
            module=make_autoencoder({**VQ, "regularization": "kl"})
        )
    )
    small = in_base64(np.zeros((SIDE, 8, 3), np.uint8))
    assert read({"low_res": small}, made, LIMITS).values["low_res"].shape == (1, SIDE, 8, 3)
    with pytest.raises(ValueError, match="the picture of these conditions: 8×16 are more than 64"):
        read({"low_res": small}, halving, LIMITS)
    assert read({"low_res": small, "image_size": [8, 8]}, halving, LIMITS).num_images == 1


def test_words_of_adapters_count_in_the_chunks_of_weighted_prompts():
    adapters = {"it": Words(path="", word="<it>", vectors={"": np.zeros((9, 8), np.float32)})}
    asked = {"prompts": "<it>", "prompt_weights": True}
    assert read(asked, clip_model(), LIMITS).chunks == 1
    asked["adapters"] = [["it", 1]]
    assert read(asked, clip_model(), LIMITS, adapters).chunks == 3


def test_an_openai_form_takes_one_picture():
    head = b'--x\r\nContent-Disposition: form-data; name="image[]"; filename="a.png"\r\n\r\n'
    body = 2 * (head + b"picture\r\n") + b"--x--\r\n"
    with pytest.raises(ValueError, match="image: the form has several, but one picture is taken"):
        read_form("multipart/form-data; boundary=x", body)


def test_the_holes_of_an_openai_picture_without_a_mask_are_its_transparent_parts(server):
    pixels_of = np.full((SIDE, SIDE, 4), 255, np.uint8)
    opaque, given = (png_of(x) for x in (pixels_of, pixels_of[..., :3]))
    pixels_of[:2, :, 3] = 0
    for file, hole in ((opaque, False), (given, False), (png_of(pixels_of), True)):
        whole = {"image": base64.b64encode(file).decode()}
        varies = SimpleNamespace(conditioner=SimpleNamespace(keys=("image",)))
        assert with_own_mask(whole, varies, LIMITS) == whole  # as a condition
        fields = with_own_mask(whole, model(TEXT), LIMITS)
        assert ("mask" in fields) == hole
    (mask,) = read({**fields, "prompts": "red"}, model(TEXT), LIMITS).values["mask"]
    np.testing.assert_array_equal(mask[..., 0], np.repeat([[1], [1], [0], [0]], SIDE, 1))
    body, kind = form(prompt="red", seed=5, image=png_of(pixels_of))
    status, answer = ask_json(server, "POST", "/v1/images/edits", body, {"Content-Type": kind})
    assert status == 200, answer
    made = pixels(base64.b64decode(answer["data"][0]["b64_json"])).astype(int)
    assert (made[2:] >= 254).all() and (made[:2] < 245).any()
