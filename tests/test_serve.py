"""The page and the HTTP API: what is asked for is what is answered, and nothing breaks it."""

import base64
import http.client
import io
import json
import re
import threading

import jax
import numpy as np
import pytest
from answers import CLASS, SIDE, TEXT, model
from PIL import Image

from latent_diffusion.core.rng import seed_key
from latent_diffusion.generation.model import Model
from latent_diffusion.runtime.metrics import to_uint8
from latent_diffusion.serve import jobs as jobs_module
from latent_diffusion.serve.handler import make_server
from latent_diffusion.serve.jobs import Busy, Job, Jobs
from latent_diffusion.serve.openai import read_form, request_of
from latent_diffusion.serve.parameters import from_png, from_text, to_png, to_text
from latent_diffusion.serve.requests import Limits, call, read

JSON = {"Content-Type": "application/json"}
LIMITS = Limits(max_images=8, max_pixels=64, max_steps=100, max_waiting=8)


def png_of(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def in_base64(array):
    return base64.b64encode(png_of(array)).decode()


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
        assert settings == {**request, "image_index": i}
    assert state["evaluations"] >= 1


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


def test_previews_are_pictures_of_the_running_call(server, monkeypatch):
    jobs = server.jobs
    job = jobs.submit(read({"prompts": "red", "seed": 1}, jobs.model, LIMITS))
    assert jobs.wait(job, 60)
    job.state, job.preview = "running", None
    z_0 = np.asarray(jobs.model.encode(np.zeros((1, SIDE, SIDE, 3), np.float32)))
    jobs._draw(z_0, [job])
    assert np.abs(pixels(job.preview).astype(int) - 127).max() <= 1
    job.state = "done"


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
    with pytest.raises(ValueError, match="mask has 4×4 pixels, but image has 12×4"):
        read({**sent, "mask": in_base64(middle)}, server.jobs.model, LIMITS)


BAD = [  # path, body, status, words of the message
    ("/api/jobs", {"prompts": "red", "sampler": "none"}, 400, "unknown sampler 'none'"),
    ("/api/jobs", {"prompts": "red", "steps": 3}, 400, "unknown field 'steps'"),
    ("/api/jobs", {"prompts": ["red"]}, 400, "prompts must be one text"),
    ("/api/jobs", {"prompts": "red", "num_images": 9}, 400, r"num_images=9 must .* in \[1, 8\]"),
    ("/api/jobs", {"prompts": "red", "num_images": True}, 400, "num_images=True must be a whole"),
    ("/api/jobs", {"prompts": "red", "seed": -1}, 400, "seed=-1 must be"),
    ("/api/jobs", {"prompts": "red", "num_steps": 101}, 400, r"num_steps=101 must .* \[1, 100\]"),
    ("/api/jobs", {"prompts": "red", "image_size": [4]}, 400, "image_size=.* must be .height, wid"),
    ("/api/jobs", {"prompts": "red", "image_size": [16, 16]}, 400, "16×16 are more than 64 pixels"),
    ("/api/jobs", {"prompts": "red", "image": "?"}, 400, "image must be a picture in base64"),
    ("/api/jobs", {"prompts": "red", "image": "aGFsbG8="}, 400, "image can't be read as a picture"),
    ("/api/jobs", {"prompts": "red", "image": in_base64(np.zeros((9, 9), np.uint8))}, 400, "9×9"),
    ("/api/jobs", {"prompts": "red", "image": WHITE}, 0, "image needs"),
    ("/api/jobs", {"prompts": "red", "adapters": [["x", 1]]}, 400, "unknown adapter 'x'"),
    ("/api/jobs", {"prompts": "red", "layout": []}, 400, "layout: write 1 to 100 objects"),
    ("/api/jobs", {"prompts": "red", "prompt_weights": 1}, 400, "prompt_weights=1 must be true"),
    ("/api/jobs", {"prompts": "red", "more_prompts": [1]}, 400, "more_prompts: write"),
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


def test_pages_of_other_sites_are_refused(server):
    host = f"127.0.0.1:{server.server_address[1]}"
    for origin, status in (("http://evil.example", 403), (f"http://{host}", 200)):
        assert ask(server, "GET", "/api/model", headers={"Origin": origin})[0] == status


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
        assert found == [False, False, True, True, True, True]
    finally:
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
    image = np.zeros((2, 2, 3), np.uint8)
    theirs = Image.open(io.BytesIO(to_png(image, settings, "m", {}))).info["parameters"]
    assert from_text(theirs) == settings
    assert from_png(io.BytesIO(to_png(image, settings, "m", {}))) == settings
    with pytest.raises(ValueError, match="Steps: 'many' is no number"):
        from_text("cat\nSteps: many, Seed: 1")


def test_a_key_array_is_a_batch_of_calls():
    """The keys of a merged call are those of the requests' own calls."""
    made = model(CLASS)
    each = [{"class_labels": i, "seed": i, "num_images": 2} for i in range(2)]
    arguments = call(made, [read(request, made, LIMITS) for request in each])
    together = made.sample(**arguments)
    apart = [made.sample(seed_key(i), class_labels=i, num_images=2) for i in range(2)]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-6)
    assert jax.random.key_data(arguments["rng"]).shape[0] == 4
