"""The page of `latent_diffusion.serve` in a real browser: see `make browser`.

    python tests/browser.py WORKDIR CONTROL FOLDER

with the workdirs of a denoiser and of its control net. It needs Node, Chromium ($CHROMIUM, else
/usr/bin/chromium) and playwright-core in runs/browser.
"""

import subprocess
import sys
import threading
from pathlib import Path

import latent_diffusion as ldm
from latent_diffusion.serve.handler import make_server

if __name__ == "__main__":
    workdir, control, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    adapters = {"edges": ldm.load_adapter(control)}
    server = make_server(ldm.load(workdir), workdir, ("127.0.0.1", 0), adapters=adapters)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    done = subprocess.run(["node", "tests/browser.mjs", address, folder], timeout=600)
    server.shutdown()
    server.server_close()
    sys.exit(done.returncode)
