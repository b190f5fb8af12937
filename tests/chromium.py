"""Installs Debian's Chromium for the browser tests, where that can be done; they are skipped otherwise."""

import os
import shutil
import subprocess


def find() -> str | None:
    """Where Chromium is, if it is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def main() -> None:
    """Installs it with apt if this is root on Debian; says what it does."""
    if find():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print("No Chromium: the browser tests are skipped. As root on Debian they install it by themselves.")
        return
    print("Installing chromium for the browser tests ...", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
    ):
        done = subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{' '.join(command)} failed, the browser tests are skipped: {done.stderr.strip()[-300:]}")
            return


if __name__ == "__main__":
    main()
