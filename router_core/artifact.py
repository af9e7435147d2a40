"""A cluster map as a folder: manifest.json, and clusters.npz whose digest it has. Nothing is pickled."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.clustering import (
    ClusterMap,
    FittedPrompts,
    LearnedClusters,
    ReferenceModels,
    array_names,
    to_arrays,
)
from router_core.documents import (
    MAX_ARRAYS_BYTES,
    MAX_MANIFEST_BYTES,
    DocumentTooLarge,
    parse_json,
    read_bounded,
    short_repr,
)
from router_core.errors import InvalidArtifact
from router_core.learned_clusters import ErrorClusters, LearnedMap
from router_core.surface import SURFACE_VERSION

# Maps that read surface features have the format 3, which earlier versions refuse.
FORMAT, SURFACE_FORMAT = 2, 3
MANIFEST = "manifest.json"
ARRAYS = "clusters.npz"
# Kinds of learned clusters, as the manifest and the names of their arrays call them.
LEARNED_KINDS: Mapping[str, type[ErrorClusters | LearnedMap]] = {"response": ErrorClusters, "learned": LearnedMap}
REFERENCE_ARRAYS = ("overlap", "error_sums", "labels")
BUILTIN_MAP = Path(__file__).parent / "assets" / "map"
BUILTIN_MAPS = {"static": BUILTIN_MAP, "multilingual": BUILTIN_MAP.with_name("multilingual_map")}


def save_map(cluster_map: ClusterMap, folder: Path) -> None:
    """Write `folder` so that `load_map` reads the same map, with the same id. The manifest is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **_arrays(cluster_map))
    arrays = buffer.getvalue()
    (folder / ARRAYS).write_bytes(arrays)
    manifest = {
        "format": SURFACE_FORMAT if cluster_map.reads_surface else FORMAT,
        **({"surface": SURFACE_VERSION} if cluster_map.reads_surface else {}),
        "id": cluster_map.id,
        "embedder": cluster_map.embedder_id,
        "clusters": cluster_map.size,
        "taught": [{"kind": _kind(clusters), "top": clusters.top} for clusters in cluster_map.learned_clusters],
        "dimension": cluster_map.dimension,
        "top": cluster_map.top,
        "temperature": cluster_map.temperature,
        "names": list(cluster_map.names),
        "known_models": list(cluster_map.reference_models.models) if cluster_map.reference_models else None,
        **({"prompts": _prompts(fitted)} if (fitted := cluster_map.fitted_prompts) else {}),
        "sha256": hashlib.sha256(arrays).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prompts(fitted: FittedPrompts) -> dict[str, Any]:
    return {"count": fitted.count, "novel_below": fitted.novel_below}


def _arrays(cluster_map: ClusterMap) -> dict[str, Any]:
    arrays: dict[str, Any] = {"centroids": cluster_map.centroids}
    for clusters in cluster_map.learned_clusters:
        arrays |= {f"{_kind(clusters)}_{name}": array for name, array in to_arrays(clusters).items()}
    if reference := cluster_map.reference_models:
        arrays |= {f"history_{name}": getattr(reference, name) for name in REFERENCE_ARRAYS}
    if fitted := cluster_map.fitted_prompts:
        arrays["prompt_shares"] = fitted.shares
    return arrays


def load_map(folder: Path) -> ClusterMap:
    """Read a folder that `save_map` wrote.

    Raises:
        InvalidArtifact: a file is missing or broken, the format is unknown, or a digest does not match.
    """
    manifest = _read_manifest(folder / MANIFEST)
    try:
        arrays = read_bounded(folder / ARRAYS, MAX_ARRAYS_BYTES)
    except OSError as exc:
        raise InvalidArtifact(f"{folder / ARRAYS} cannot be read: {exc.strerror}") from exc
    except DocumentTooLarge as exc:
        raise InvalidArtifact(f"{folder / ARRAYS} {exc}") from exc
    if hashlib.sha256(arrays).hexdigest() != manifest.get("sha256"):
        raise InvalidArtifact(f"{folder / ARRAYS} does not match the digest in its manifest; make the map again")
    cluster_map = _assemble(folder, arrays, manifest)
    if cluster_map.id != manifest.get("id") or cluster_map.reads_surface != (manifest["format"] == SURFACE_FORMAT):
        raise InvalidArtifact(f"{folder / MANIFEST} was changed: its id does not match its content")
    return cluster_map


@lru_cache(maxsize=len(BUILTIN_MAPS))
def builtin_map(embedder: str = "static") -> ClusterMap:
    """Load the map that ships with the package for this embedder; that of the static one for those that have none."""
    return load_map(BUILTIN_MAPS.get(embedder, BUILTIN_MAP))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_bounded(path, MAX_MANIFEST_BYTES).decode())
    except OSError as exc:
        raise InvalidArtifact(
            f"{path} cannot be read: {exc.strerror}; a map is a folder made by `uniroute fit`"
        ) from exc
    except DocumentTooLarge as exc:
        raise InvalidArtifact(f"{path} {exc}") from exc
    except ValueError as exc:
        raise InvalidArtifact(f"{path} is not JSON: {exc}") from exc
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, SURFACE_FORMAT):
        raise InvalidArtifact(f"{path} is not a cluster map of format {FORMAT} or {SURFACE_FORMAT}")
    if manifest["format"] == SURFACE_FORMAT and manifest.get("surface") != SURFACE_VERSION:
        raise InvalidArtifact(
            f"{path} reads surface features of version {short_repr(manifest.get('surface'))}, and this program has"
            f" version {SURFACE_VERSION}; fit the map again"
        )
    return manifest


def _assemble(folder: Path, arrays: bytes, manifest: dict[str, Any]) -> ClusterMap:
    try:
        _check_sizes(arrays)
        with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
            return ClusterMap(
                loaded["centroids"],
                embedder_id=manifest["embedder"],
                names=manifest["names"],
                top=manifest["top"],
                temperature=manifest["temperature"],
                learned_clusters=[_learned_clusters(loaded, **stated) for stated in manifest["taught"]],
                reference_models=_reference_models(loaded, manifest),
                fitted_prompts=_fitted_prompts(loaded, manifest),
            )
    except (KeyError, TypeError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as exc:
        raise InvalidArtifact(f"{folder} is not a complete cluster map: {exc}") from exc


def _check_sizes(arrays: bytes) -> None:
    """Refuse arrays that would unpack to more than the bound, or that claim to be larger than they are."""
    with zipfile.ZipFile(io.BytesIO(arrays)) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_ARRAYS_BYTES:
            raise ValueError(f"its arrays are larger than {MAX_ARRAYS_BYTES:,} bytes")
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, kind = read_header[version](file)
            if math.prod(shape) * kind.itemsize > member.file_size:
                raise ValueError(f"{member.filename} says that it is larger than it is")


def _learned_clusters(loaded: Mapping[str, NDArray[Any]], *, kind: str, top: int) -> LearnedClusters:
    cls = LEARNED_KINDS[kind]
    return cls(**{name: loaded[f"{kind}_{name}"] for name in array_names(cls)}, top=top)


def _kind(clusters: LearnedClusters) -> str:
    return next(kind for kind, cls in LEARNED_KINDS.items() if isinstance(clusters, cls))


def _reference_models(loaded: Mapping[str, NDArray[Any]], manifest: dict[str, Any]) -> ReferenceModels | None:
    if manifest["known_models"] is None:
        return None
    overlap, error_sums, labels = (loaded[f"history_{name}"] for name in REFERENCE_ARRAYS)
    return ReferenceModels(overlap, tuple(manifest["known_models"]), error_sums, labels)


def _fitted_prompts(loaded: Mapping[str, NDArray[Any]], manifest: dict[str, Any]) -> FittedPrompts | None:
    """Return None for a map that was fitted before maps kept them."""
    if (stated := manifest.get("prompts")) is None:
        return None
    return FittedPrompts(int(stated["count"]), loaded["prompt_shares"], float(stated["novel_below"]))
