"""Join the parts of a latent cache that were built apart: the verb."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..data.files import CACHE_INFO
from ..data.plan import Plan
from ..storage import (
    check_own_folder,
    disk_errors,
    folder_taken,
    hash_json,
    link_or_copy,
    locked_beside,
    new_folder,
    partial_folder,
    write_manifest,
)
from .cache import check_same_identity, finished_identity, identity_differences, read_cache_info
from .card import write_cache_card
from .faces import FACES_GRID, describe_faces
from .finish import content_hash, count_rows, statistics, write_index, write_left_out
from .parts import Part, parse_part, read_part
from .shards import ShardNotes, check_name, load_rows, shard_files


def merge_latents(parts: list[str], output_dir: str) -> Path:
    """Join the parts of a latent cache, which `dit-hf prepare-latents --part` built on several machines.

    Rows and values are those of a cache that was built at once, in the same order. The parts stay as they are; their
    files are linked where the file system has links.

    Args:
        parts: the folders of all parts, in any order.
        output_dir: the folder of the whole cache.

    Returns:
        The folder.

    Raises:
        FileExistsError: if `output_dir` holds something else, or another cache.
        ValueError: if a part is missing, given twice, damaged, or of other images, labels, VAE or geometry (the
            message names the difference).
        OSError: if the folder cannot be written, or the disk is full.
    """
    final = Path(output_dir)
    check_name(final)
    check_own_folder(final, CACHE_INFO)
    # An interrupted merge has at most a folder in it.
    if any(path.is_file() for path in (partial_folder(final) / "building").glob("*")):
        raise FileExistsError(folder_taken(f"output_dir {final}", "belongs to a build that is not finished"))
    folders, infos = _in_order([Path(folder) for folder in parts])
    identity = {name: value for name, value in infos[0]["identity"].items() if name != "part"}
    shards = {path.name: path for path in sorted(shard for folder in folders for shard in shard_files(folder))}
    with disk_errors(f"output_dir {final}"), locked_beside(final):
        if _is_merged(final, identity, infos):
            print(f"{final} already holds these parts", flush=True)
            return final
        with new_folder(final) as partial:
            for name in sorted(shards):
                link_or_copy(shards[name], partial / name)
            shutil.copytree(folders[0] / "vae", partial / "vae")
            _write_rest(partial, folders, infos, identity)
    counts = read_cache_info(final)["counts"]
    left_out = counts.pop("left_out")
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    print(f"{final}: {len(folders)} parts, {text} images, {left_out} left out", flush=True)
    return final


def _in_order(folders: list[Path]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the folders of all parts and what their `latents.json` says, in the order of their numbers.

    Raises:
        ValueError: if they are not the parts of one cache, each once.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        info = read_cache_info(folder, hashes=True)
        if "part" not in info["identity"]:
            raise ValueError(f"{folder} is not a part: it was built without --part")
        part, (first, other) = parse_part(info["identity"]["part"]), next(iter(found.values()), (folder, info))
        one = {**other["identity"], "part": f"of {parse_part(other['identity']['part']).of}"}
        differences = identity_differences(one, {**info["identity"], "part": f"of {part.of}"})
        if differences:
            raise ValueError(f"{folder} is not of the same cache as {first}: {'; '.join(differences)}")
        if part.number in found:
            raise ValueError(f"part {part} is given twice: {found[part.number][0]} and {folder}")
        found[part.number] = folder, info
    of = part.of
    missing = [str(Part(number, of)) for number in range(1, of + 1) if number not in found]
    if missing:
        raise ValueError(f"{'part' if len(missing) == 1 else 'parts'} {', '.join(missing[:8])} missing of {of}")
    return [found[number][0] for number in sorted(found)], [found[number][1] for number in sorted(found)]


def _is_merged(final: Path, identity: dict[str, Any], infos: list[dict[str, Any]]) -> bool:
    """Check whether `final` holds the cache of these parts already.

    Raises:
        FileExistsError: if it holds another one.
    """
    before = finished_identity(final, verify=True)
    if before is None:
        return False
    check_same_identity(before, identity, f"output_dir {final}", "a cache")
    there = read_cache_info(final)["files"]
    shards = {name: file for info in infos for name, file in info["files"].items() if name.endswith(".arrow")}
    if any(there.get(name) != file for name, file in shards.items()):
        raise FileExistsError(folder_taken(f"output_dir {final}", "holds a cache of other images"))
    return True


def _write_rest(partial: Path, folders: list[Path], infos: list[dict[str, Any]], identity: dict[str, Any]) -> None:
    """Write everything beside the shards; the grids of images are those of the first part."""
    contents = [read_part(folder) for folder in folders]
    notes = _interleaved([content["notes"] for content in contents])
    broken = [(image_id, reason) for shard in notes for image_id, reason in shard.left_out]
    left_out = contents[0]["left_out"] + broken
    write_left_out(partial, left_out)
    features = load_rows(folders[0]).features
    write_index(partial, sorted(path.name for path in partial.glob("*.arrow")), features, hash_json(identity))
    shutil.rmtree(partial / "building")

    plan = Plan.from_dict(contents[0]["plan"], contents[0]["examples"])
    if any(shard.faces for shard in notes):
        describe_faces(plan, identity["source"]["num_images"], list(infos[0]["conditions"]), notes)
    for name in ("reconstructions.png", FACES_GRID):
        source = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, partial / name)
    cache = load_rows(partial)
    info = {name: value for name, value in infos[0].items() if name != "files"}
    info |= {"identity": identity, **content_hash(identity, cache), "plan": plan.as_dict()}
    info |= {"statistics": statistics(notes), **count_rows(cache, len(left_out))}
    write_cache_card(partial, info, left_out, plan.lines())
    write_manifest(partial, CACHE_INFO, **info)


def _interleaved(notes: list[list[ShardNotes]]) -> list[ShardNotes]:
    """Return the notes of all shards in their order: part k of n has the shards k - 1, k - 1 + n, ..."""
    total = sum(map(len, notes))
    return [notes[number % len(notes)][number // len(notes)] for number in range(total)]
