"""The committed bundle is that of the committed sources, small, and asks nobody outside."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WEB = ROOT / "web"
BUNDLE = ROOT / "src" / "headscope" / "static" / "headscope.js"
MOST_BYTES = 96 * 1024


def sources(web: Path) -> dict[str, bytes]:
    """What the bundle is built from, by name, as `build.mjs` counts it."""
    built = [
        path.relative_to(web).as_posix()
        for path in (web / "src").rglob("*")
        if re.search(r"\.(tsx?|css)$", path.name) and not re.search(r"\.test\.tsx?$", path.name)
    ]
    return {name: (web / name).read_bytes() for name in sorted([*built, "build.mjs", "package-lock.json"])}


def fingerprint(files: dict[str, bytes]) -> str:
    found = hashlib.sha256()
    for name, content in files.items():
        found.update(name.encode() + b"\0" + content + b"\0")
    return found.hexdigest()


def outside(text: str) -> list[str]:
    """Addresses that something could be fetched from; names of XML vocabularies are none."""
    found = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z0-9.-]+[^\s\"'`)]*", text, re.IGNORECASE)
    return [address for address in found if not address.startswith("http://www.w3.org/")]


@pytest.mark.skipif(not WEB.exists(), reason="the front end's sources are not in the source distribution")
def test_bundle_is_fresh() -> None:
    banner = BUNDLE.read_text(encoding="utf-8").splitlines()[0]
    assert banner == f"// headscope web bundle; sources sha256:{fingerprint(sources(WEB))}", "stale: run `make web`"


@pytest.mark.skipif(not WEB.exists(), reason="the front end's sources are not in the source distribution")
def test_a_changed_source_would_be_noticed() -> None:
    files = sources(WEB)
    assert {"src/main.tsx", "src/style.css", "build.mjs", "package-lock.json"} <= files.keys()
    assert not any(".test." in name for name in files)
    for name in ("src/style.css", "package-lock.json"):
        assert fingerprint({**files, name: files[name] + b" "}) != fingerprint(files)


@pytest.mark.skipif(not WEB.exists(), reason="the front end's sources are not in the source distribution")
def test_lockfile_names_no_registry() -> None:
    text = (WEB / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in text
    assert '"resolved"' not in text


def test_bundle_is_small() -> None:
    assert 10_000 < BUNDLE.stat().st_size <= MOST_BYTES


def test_bundle_can_be_put_into_a_page() -> None:
    assert "</script" not in BUNDLE.read_text(encoding="utf-8").lower()


def test_bundle_fetches_nothing_from_outside() -> None:
    text = BUNDLE.read_text(encoding="utf-8")
    assert outside(text.split("\n", 1)[1]) == []
    assert not re.search(r"@import|\bimport\s*\(|\bimportScripts\b|\bfrom\s*[\"']", text)


def test_an_outside_address_would_be_seen() -> None:
    assert outside('fetch("https://cdn.example.org/x.js")') == ["https://cdn.example.org/x.js"]
    assert outside('src="//cdn.example.org/x.js"') == ["//cdn.example.org/x.js"]
    assert outside('ns="http://www.w3.org/2000/svg"') == []


def test_bundle_has_its_two_doors() -> None:
    exported = re.findall(r"\bexport\s*\{([^}]*)\}", BUNDLE.read_text(encoding="utf-8"))
    names = {part.split(" as ")[-1].strip() for group in exported for part in group.split(",")}
    assert names == {"mount", "httpSource"}
