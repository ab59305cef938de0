"""Whatever happens to the files of a checkpoint is found before a tensor is touched, and named.

Nothing is listed here: the kind of damage, the file and the place in it are drawn, OPENMOE_DAMAGES of each.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.files import write_file
from openmoe.checkpoint.manager import load_checkpoint
from openmoe.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorEntry
from openmoe.checkpoint.shards import encode
from openmoe.checkpoint.storage import write_checkpoint

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis, which the environment for XLA lacks")
st = pytest.importorskip("hypothesis.strategies")
given = hypothesis.given

MODEL = {"d_model": 8, "layers": 2}
SHAPES: dict[str, tuple[int, ...]] = {
    "model/a": (6, 4),
    "model/b": (4, 6),
    "model/c": (12,),
    "optimizer/a/step": (),
    "model/empty": (0, 3),
}
TYPES = {"model/c": torch.int32, "model/b": torch.bfloat16}

generated = hypothesis.settings(
    max_examples=int(os.environ.get("OPENMOE_DAMAGES", "60")),
    deadline=None,
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


def values(salt: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(salt)
    return {
        name: (torch.randn(shape, generator=draw) * 100).to(TYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def manifest_for(folder: Path, files: dict[str, Any], **changes: Any) -> None:
    stated: dict[str, Any] = {
        "format": "openmoe-checkpoint",
        "version": 1,
        "step": 7,
        "tokens_seen": 7,
        "milestone": False,
        "model": MODEL,
        "metadata": {},
        "tensors": {name: TensorEntry.of(tensor) for name, tensor in values(0).items()},
        "files": files,
    }
    text = Manifest(**(stated | changes)).text()
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_file(folder / MANIFEST_NAME, [text.encode()])


def write_of_one(folder: Path, salt: int) -> None:
    counts = {"step": 7, "tokens_seen": 7, "milestone": False}
    write_checkpoint(folder, values(salt), **counts, model=MODEL, metadata={})


def write_of_three(folder: Path, salt: int) -> None:
    """As three processes would: the first dimension of `model/a` and `model/c` cut in three."""
    folder.mkdir()
    files = {}
    whole = values(salt)
    for rank in range(3):
        parts, offsets = {}, {}
        for name in ("model/a", "model/c"):
            third = SHAPES[name][0] // 3
            parts[name] = whole[name][rank * third :][:third]
            offsets[name] = [rank * third, 0][: len(SHAPES[name])]
        for name in [name for number, name in enumerate(SHAPES) if name not in parts and number % 3 == rank]:
            parts[name], offsets[name] = whole[name], [0] * len(SHAPES[name])
        file = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        files[file] = write_file(folder / file, encode(parts, offsets))
    manifest_for(folder, files)


WRITERS: dict[str, Callable[[Path, int], None]] = {"one": write_of_one, "three": write_of_three}


@pytest.fixture(scope="module", params=WRITERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint, and another of the same names with other values."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder / "step_7", 0)
    (folder / "other").mkdir()
    WRITERS[request.param](folder / "other" / "step_7", 1)
    target = {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}
    load_checkpoint(folder / "step_7", target, MODEL)
    assert all(torch.equal(target[name], tensor) for name, tensor in values(0).items())
    return folder


class Damaged:
    """A copy of the checkpoint, to be damaged inside the block and then refused with one of `names`."""

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.names: list[str] = []

    def __enter__(self) -> "Damaged":
        self._space = tempfile.TemporaryDirectory()
        self.folder = Path(self._space.name) / "step_7"
        shutil.copytree(self.whole / "step_7", self.folder)
        self.files = sorted(path.name for path in self.folder.iterdir())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._space.cleanup()

    def check(self) -> None:
        target = {name: torch.zeros_like(tensor) for name, tensor in values(0).items()}
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(self.folder, target, MODEL)
        message = str(caught.value)
        assert "\n" not in message
        assert any(name in message for name in self.names), (self.names, message)
        assert not any(tensor.any() for tensor in target.values())


@generated
@given(data=st.data())
def test_damage_to_the_bytes_of_a_file(whole: Path, data: Any) -> None:
    """A flipped bit, a cut, something behind the end, or the same file of another checkpoint."""
    with Damaged(whole) as damaged:
        name = data.draw(st.sampled_from(damaged.files))
        path = damaged.folder / name
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        bit = bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))])
        changed = {
            "flipped": content[:place] + bit + content[place + 1 :],
            "cut": content[:place],
            "longer": content + data.draw(st.binary(min_size=1, max_size=20)),
            "another's": (whole / "other" / "step_7" / name).read_bytes(),
        }
        path.write_bytes(changed[data.draw(st.sampled_from(sorted(changed)))])
        # A manifest that is whole, but another checkpoint's, states other digests of the files.
        damaged.names = [name] if name != MANIFEST_NAME else damaged.files


@generated
@given(data=st.data())
def test_damage_to_the_folder(whole: Path, data: Any) -> None:
    """A file that is missing, renamed, swapped with another, foreign, or not a plain file."""
    with Damaged(whole) as damaged:
        name = data.draw(st.sampled_from(damaged.files))
        path = damaged.folder / name
        aside = damaged.folder.parent / "aside"
        kind = data.draw(st.sampled_from(["missing", "renamed", "swapped", "foreign", "link", "dir", "pipe"]))
        letters = st.text("abc-_.0123456789", min_size=1, max_size=12).filter(lambda text: set(text) != {"."})
        damaged.names = [name]
        if kind == "missing":
            path.unlink()
        elif kind == "renamed":
            new = data.draw(letters) + data.draw(st.sampled_from(["", ".safetensors", ".json"]))
            path.rename(damaged.folder / new)
            damaged.names += [new]
        elif kind == "swapped":
            other = damaged.folder / data.draw(st.sampled_from([n for n in damaged.files if n != name]))
            path.rename(aside)
            other.rename(path)
            aside.rename(other)
            damaged.names += [other.name]
        elif kind == "foreign":
            new = data.draw(letters) + data.draw(st.sampled_from(["", ".safetensors", ".json"]))
            if data.draw(st.booleans()):
                shutil.copy(path, damaged.folder / new)
            else:
                (damaged.folder / new).mkdir()
            damaged.names = [new]
        elif kind == "link":
            path.rename(aside)
            path.symlink_to(aside if data.draw(st.booleans()) else damaged.folder / "nowhere")
        elif kind == "dir":
            path.unlink()
            path.mkdir()
        else:
            path.unlink()
            os.mkfifo(path)


@generated
@given(data=st.data())
def test_a_manifest_that_lies_with_a_digest_of_its_own(whole: Path, data: Any) -> None:
    """Shapes, types or names that are not those of the files, another step, and files left out."""
    with Damaged(whole) as damaged:
        manifest = json.loads((damaged.folder / MANIFEST_NAME).read_text())
        files, tensors = manifest["files"], manifest["tensors"]
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["shape", "dtype", "lost", "added", "step", "file"]))
        damaged.names = [f"tensor {name} "]
        changes: dict[str, Any] = {}
        if kind == "shape":
            tensors[name]["shape"] = data.draw(
                st.lists(st.integers(0, 13), max_size=3).filter(lambda shape: shape != tensors[name]["shape"])
            )
        elif kind == "dtype":
            dtypes = {"float32", "int32", "bfloat16", "float16", "float64"} - {tensors[name]["dtype"]}
            tensors[name]["dtype"] = data.draw(st.sampled_from(sorted(dtypes)))
        elif kind == "lost":
            del tensors[name]
        elif kind == "added":
            tensors["model/zero"] = tensors[name]
            damaged.names = ["tensor model/zero "]
        elif kind == "step":
            changes["step"] = data.draw(st.integers(8, 10**6))
            damaged.names = [MANIFEST_NAME]
        else:
            file = data.draw(st.sampled_from(sorted(files)))
            del files[file]
            if data.draw(st.booleans()):
                (damaged.folder / file).unlink()
                damaged.names = [f"tensor {name} " for name in tensors]
            else:
                damaged.names = [file]
        manifest_for(damaged.folder, files, tensors=tensors, **changes)


@generated
@given(data=st.data())
def test_a_file_that_lies_with_the_right_digest(whole: Path, data: Any) -> None:
    """Pieces that don't tile, at places or in types that are not theirs, and headers that nobody wrote."""
    with Damaged(whole) as damaged:
        path = damaged.folder / data.draw(st.sampled_from([n for n in damaged.files if n != MANIFEST_NAME]))
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        name = data.draw(st.sampled_from(sorted(places)))
        entry, offsets = header[name], places[name]["saved_offsets"]
        names = [f"tensor {name} ", path.name]
        kind = data.draw(
            st.sampled_from(["place", "shape", "data", "dtype", "name", "no place", "moved", "tail", "text"])
        )
        if kind == "place" and offsets:
            dim = data.draw(st.integers(0, len(offsets) - 1))
            offsets[dim] += data.draw(st.integers(1, 3) | st.integers(-3, -1))
        elif kind == "shape" and len(set(entry["shape"])) > 1:
            entry["shape"].reverse()
        elif kind == "data":
            entry["data_offsets"][data.draw(st.integers(0, 1))] += data.draw(st.sampled_from([-4, 4]))
        elif kind == "dtype":
            entry["dtype"] = data.draw(
                st.sampled_from(sorted({"F32", "I32", "BF16", "F16", "X"} - {entry["dtype"]}))
            )
        elif kind == "name":
            header["model/zero"], places["model/zero"] = header.pop(name), places.pop(name)
            names += ["tensor model/zero "]
        elif kind == "no place":
            del places[name]
        elif kind == "moved" and len(set(entry["data_offsets"])) == 2:  # nothing may lie between any two
            by = data.draw(st.sampled_from([-4, 4]))
            entry["data_offsets"] = [place + by for place in entry["data_offsets"]]
        elif kind == "tail":
            content += bytes(data.draw(st.integers(1, 8)))
        else:
            place = data.draw(st.integers(8, end - 1))
            header = content[8:place] + b"\0" + content[place + 1 : end]
        if isinstance(header, dict):
            header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
            header = json.dumps(header).encode()
        path.unlink()
        entry = write_file(path, [len(header).to_bytes(8, "little"), header, content[end:]])
        files = json.loads((damaged.folder / MANIFEST_NAME).read_text())["files"]
        manifest_for(damaged.folder, files | {path.name: entry.model_dump()})
        damaged.names = names
