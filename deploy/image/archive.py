"""A directory as a layer, and a layer as an image that container engines load."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tarfile
import time
from pathlib import Path

from base import SOURCE, Architecture, BuildError, run


@functools.cache
def source_date() -> int:
    """The time that all files of the image have, Unix time: SOURCE_DATE_EPOCH, or that of the last commit, or 0."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    try:
        return int(run(["git", "-C", SOURCE, "log", "-1", "--format=%ct"], "find the last commit"))
    except BuildError:
        return 0


def write_layer(root: Path, layer: Path) -> None:
    """All of `root` as a tar file: sorted by name, owned by root, with one time."""
    with tarfile.open(layer, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(root.rglob("*"), key=lambda it: it.relative_to(root).parts):
            entry = archive.gettarinfo(path, str(path.relative_to(root)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = source_date()
            # Whoever unpacked it may have had another umask.
            entry.mode = 0o1777 if entry.name == "tmp" else 0o755 if entry.mode & 0o111 else 0o644
            if entry.issym() or entry.isdir():
                archive.addfile(entry)
                continue
            # A second name of a file is a file.
            entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)


def write_image(layer: Path, name: str, arch: Architecture, containerfile: Path, out: Path) -> None:
    """The image `name` of one layer, as `docker save` writes it, with what `containerfile` says."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(source_date()))
    with layer.open("rb") as file:
        diff_id = hashlib.file_digest(file, "sha256").hexdigest()
    config = json.dumps(
        {
            "architecture": arch.name,
            "config": settings_of(containerfile.read_text()),
            "created": created,
            "history": [{"created": created, "created_by": "deploy/image/build.py"}],
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        }
    ).encode()
    config_name, layer_name = f"{hashlib.sha256(config).hexdigest()}.json", f"{diff_id}.tar"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as archive, layer.open("rb") as file:
        for file_name, content in ((config_name, config), ("manifest.json", json.dumps(manifest).encode())):
            archive.addfile(_entry(file_name, len(content)), io.BytesIO(content))
        archive.addfile(_entry(layer_name, layer.stat().st_size), file)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = size, source_date()
    return entry


def settings_of(containerfile: str) -> dict[str, object]:
    """The settings of a Containerfile that adds root.tar to nothing.  Raises BuildError for whatever else it says."""
    environ: list[str] = []
    settings: dict[str, object] = {"Env": environ}
    for line in containerfile.splitlines():
        match line.split(maxsplit=1):
            case [] | ["#", _] | ["FROM", "scratch"] | ["ADD", "root.tar /"]:
                pass
            case ["ENV", assignment] if re.fullmatch(r"\w+=\S+", assignment):
                environ.append(assignment)
            case ["ENTRYPOINT", command]:
                settings["Entrypoint"] = json.loads(command)
            case _:
                raise BuildError(f"the Containerfile says what build.py does not know: {line}")
    return settings
