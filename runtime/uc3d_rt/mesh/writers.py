"""Store a mesh: GLB, OBJ, PLY or STL, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from uc3d_rt.errors import OutputError

if TYPE_CHECKING:
    import trimesh

FORMATS: tuple[str, ...] = ("glb", "obj", "ply", "stl")
"""GLB is one file with its texture; OBJ puts a `.mtl` and a `.png` beside it; PLY and STL have no texture."""


def mesh_format(path: Path, format: str | None = None) -> str:
    """The format to write: `format`, else the ending of `path`, else GLB.

    Raises:
        OutputError: neither is one of `FORMATS`.
    """
    chosen = (format or path.suffix.lstrip(".") or "glb").lower()
    if chosen not in FORMATS:
        raise OutputError(f"cannot write format {chosen!r} ({path}); use one of {', '.join(FORMATS)}")
    return chosen


def export_mesh(mesh: trimesh.Trimesh, path: Path, format: str | None = None) -> None:
    """Write a mesh under a temporary name in the same folder, then rename it into place.

    Args:
        mesh: as from `build_mesh`.
        path: the file; an existing one is replaced.
        format: one of `FORMATS`; None = by the ending of `path`.

    Raises:
        OutputError: unknown format, missing folder, no permission or no space.
    """
    path = Path(path)
    chosen = mesh_format(path, format)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name such as {path / 'mesh.glb'}")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; create it or choose another output path")
    workspace: Path | None = None
    try:
        workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        written = _write(mesh, workspace, path.stem, chosen)
        for file in written[1:]:  # companions first: the mesh must not name files that are not there
            os.replace(file, path.parent / file.name)
        os.replace(written[0], path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path} ({reason}); check permissions and free space") from error
    finally:
        if workspace is not None:
            shutil.rmtree(workspace, ignore_errors=True)


def _write(mesh: trimesh.Trimesh, folder: Path, stem: str, format: str) -> list[Path]:
    """Write into `folder`; the mesh file first, then the files it names."""
    main = folder / f"{stem}.{format}"
    if format == "glb":
        mesh.export(main, file_type="glb", include_normals=True)
        return [main]
    if format == "obj":
        from trimesh.exchange.obj import export_obj

        text, companions = export_obj(mesh, include_normals=True, return_texture=True, mtl_name=f"{stem}.mtl")
        # trimesh names the image after the material; named after the mesh, two meshes can share a folder.
        images = {name: f"{stem}{Path(name).suffix}" for name in companions if not name.endswith(".mtl")}
        main.write_text(text, encoding="utf-8")
        written = [main]
        for name, data in companions.items():
            target = folder / images.get(name, name)
            if target.suffix == ".mtl":
                for old, new in images.items():
                    data = data.replace(f" {old}".encode(), f" {new}".encode())
            target.write_bytes(data)
            written.append(target)
        return written
    if format == "ply":
        mesh.export(main, file_type="ply", vertex_normal=True)
        return [main]
    mesh.export(main, file_type="stl")
    return [main]
