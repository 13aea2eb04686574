"""The page of `latent_diffusion.serve` in a real browser: see `make browser`.

    python tests/browser.py WORKDIR FOLDER

needs Node, Chromium ($CHROMIUM, else /usr/bin/chromium) and playwright-core in runs/browser.
"""

import subprocess
import sys
import threading
from pathlib import Path

import latent_diffusion as ldm
from latent_diffusion.serve.handler import make_server

if __name__ == "__main__":
    workdir, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    server = make_server(ldm.load(workdir), workdir, ("127.0.0.1", 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    done = subprocess.run(["node", "tests/browser.mjs", address, folder], timeout=600)
    server.shutdown()
    server.server_close()
    sys.exit(done.returncode)
