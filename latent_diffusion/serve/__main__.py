"""A page to sample on, and an HTTP API.

    python -m latent_diffusion.serve --workdir=DIR|--model=PATH

Then open the address that is printed. See docs/serving.md for the API. Nothing is written to disk.
"""

import re

from absl import flags

from latent_diffusion.runtime import flags as shared_flags

read_model = shared_flags.model()
ADAPTER = flags.DEFINE_multi_string(
    "adapter", [], "An adapter of any kind that requests can name: NAME=FILE; repeatable."
)
IMAGE_ENCODER = flags.DEFINE_string(
    "image_encoder", None, "Folder of the IP-Adapters' image encoder, if it isn't beside them."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all interfaces.")
PORT = flags.DEFINE_integer(
    "port", 8188, "Port to listen on; 0 takes a free port.", lower_bound=0, upper_bound=65535
)
TOKEN = flags.DEFINE_string("token", None, "Bearer token that requests must have.")
MAX_IMAGES = flags.DEFINE_integer("max_images", 16, "Images of one request, at most.", 1)
MAX_WAITING = flags.DEFINE_integer("max_waiting", 64, "Requests that may wait; others get 503.", 1)
MAX_PIXELS = flags.DEFINE_integer("max_pixels", 2**22, "Pixels of any picture, at most.", 1)
MAX_STEPS = flags.DEFINE_integer("max_steps", 1000, "Steps of one request, at most.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images sampled at once, at most.", 1)


def main(argv: list[str]) -> None:
    """Load the model and answer until the process is ended."""
    from latent_diffusion.generation.adapters import load_adapter
    from latent_diffusion.generation.loading import load
    from latent_diffusion.runtime import processes
    from latent_diffusion.runtime.startup import quiet_and_cached
    from latent_diffusion.serve.handler import make_server
    from latent_diffusion.serve.requests import Limits

    quiet_and_cached()
    path, loading = read_model()
    try:
        if TOKEN.value is not None and not re.fullmatch("[!-~]+", TOKEN.value):
            raise ValueError("--token has letters, digits and signs of ASCII, without spaces")
        pairs = [entry.partition("=") for entry in ADAPTER.value]
        if wrong := [name for name, equals, file in pairs if not (name and equals and file)]:
            raise ValueError(f"--adapter={wrong[0]}: write NAME=FILE")
        names = [name for name, *_ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--adapter={twice[0]}=…: two adapters have this name")
        model = load(path, **loading)
        limits = Limits(MAX_IMAGES.value, MAX_PIXELS.value, MAX_STEPS.value, MAX_WAITING.value)
        encoder = IMAGE_ENCODER.value
        adapters = {n: load_adapter(file, image_encoder=encoder) for n, _, file in pairs}
        server = make_server(
            model,
            path,
            (HOST.value, PORT.value),
            limits,
            adapters=adapters,
            batch_size=BATCH_SIZE.value,
            token=TOKEN.value,
        )
    except (ValueError, OSError) as error:
        processes.exit_with(f"error: {error}")
    host, port = server.server_address[:2]
    print(f"{path} on http://{host!s}:{port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def run() -> None:
    """The command."""
    shared_flags.run(main, config=False)


if __name__ == "__main__":
    run()
