"""Folders that are not what they should be, and how they are told."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan21.errors import CheckpointError
from wan21.models import MODELS, DitConfig, ModelSpec, TextEncoderConfig, VaeConfig
from wan21.weights.inspect import (
    CONFIG_FILE,
    DIT_FILE,
    DIT_INDEX_FILE,
    T5_FILE,
    VAE_FILE,
    inspect_folder,
)
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

MINI = replace(
    MODELS["tiny"],
    name="mini",
    dit=DitConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32),
    text=TextEncoderConfig(vocab_size=300, dim=32, ffn_dim=48, num_heads=2, num_layers=2),
    vae=VaeConfig(base_dim=4),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    weights = RandomWeights(MINI, 0, torch.Generator().manual_seed)
    write_folder(root / "whole", MINI, weights)
    write_folder(root / "sharded", MINI, weights, num_shards=3)
    return root


@pytest.fixture
def whole(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "whole", tmp_path / "whole"))


@pytest.fixture
def sharded(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "sharded", tmp_path / "sharded"))


def refusal(folder: Path, spec: ModelSpec = MINI) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_folder(folder, spec)
    return str(caught.value)


def cut(path: Path, num_bytes: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-num_bytes])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_folder_tells_its_kind_sizes_formats_and_bytes(whole: Path) -> None:
    facts = inspect_folder(whole, MINI)
    assert ("t2v", MINI.dit) == (facts.kind, facts.dit)
    assert facts.stored_dtypes == {"t5": ("BF16",), "dit": ("F32",), "vae": ("F32",)}
    assert facts.stored_bytes["dit"] == sum(t.numel() * 4 for t in load_file(whole / DIT_FILE).values())
    t5 = torch.load(whole / T5_FILE, weights_only=True)
    assert facts.stored_bytes["t5"] == sum(tensor.numel() * 2 for tensor in t5.values())
    assert (whole / DIT_FILE,) == facts.dit_shards
    assert (whole / "google/umt5-xxl/tokenizer.json").is_file()


def test_a_sharded_folder_holds_the_same_tensors(whole: Path, sharded: Path) -> None:
    one, many = inspect_folder(whole, MINI), inspect_folder(sharded, MINI)
    assert len(many.dit_shards) == 3
    assert {n: (t.shape, t.dtype) for n, t in one.dit_tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in many.dit_tensors.items()
    }


def test_config_json_may_be_missing(whole: Path) -> None:
    (whole / CONFIG_FILE).unlink()
    assert inspect_folder(whole, MINI).dit == MINI.dit


def test_the_fingerprint_stays_in_a_copy_and_changes_with_one_value(whole: Path, written: Path) -> None:
    before = inspect_folder(written / "whole", MINI).fingerprint
    assert before == inspect_folder(whole, MINI).fingerprint
    vae = torch.load(whole / VAE_FILE, weights_only=True)
    vae["conv2.bias"][3] += 1
    torch.save(vae, whole / VAE_FILE)
    assert before != inspect_folder(whole, MINI).fingerprint


def test_the_fingerprint_differs_between_trainings_of_one_layout(whole: Path, written: Path) -> None:
    tensors = load_file(whole / DIT_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, whole / DIT_FILE, {"format": "pt"})
    assert inspect_folder(whole, MINI).fingerprint != inspect_folder(written / "whole", MINI).fingerprint


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"ckpt_dir={tmp_path / 'none'} is not a folder" in refusal(tmp_path / "none")


@pytest.mark.parametrize("name", [DIT_FILE, T5_FILE, VAE_FILE, "google/umt5-xxl/tokenizer.json"])
def test_a_missing_file_is_named(whole: Path, name: str) -> None:
    (whole / name).unlink()
    message = refusal(whole)
    assert f"lacks {name}" in message
    assert str(whole) in message


def test_a_truncated_safetensors_tells_how_many_bytes_are_missing(whole: Path) -> None:
    cut(whole / DIT_FILE, 100)
    message = refusal(whole)
    assert f"{whole / DIT_FILE} is cut short" in message
    assert "100 are missing" in message


def test_a_safetensors_cut_inside_its_header_tells_so(whole: Path) -> None:
    path = whole / DIT_FILE
    path.write_bytes(path.read_bytes()[:50])
    assert f"{path} is cut short inside its header" in refusal(whole)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_named(whole: Path, content: Any) -> None:
    (whole / DIT_FILE).write_bytes(content)
    assert f"{whole / DIT_FILE} is not a safetensors file" in refusal(whole)


def test_bytes_behind_the_last_tensor_are_refused(whole: Path) -> None:
    with (whole / DIT_FILE).open("ab") as file:
        file.write(b"12345")
    assert f"{whole / DIT_FILE} has 5 bytes that no tensor" in refusal(whole)


def fake_safetensors(path: Path, entries: dict[str, Any], num_bytes: int) -> None:
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "gives tensor a the bytes 0 to 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "gives tensor a the bytes 0 to 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "overlap or leave gaps at byte 4"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "stores tensor a as F8_E4M3"),
        ({"dtype": "F32"}, "describes tensor a incompletely"),
        ("F32", "describes tensor a incompletely"),
    ],
)
def test_a_header_that_does_not_describe_its_data_is_refused(whole: Path, entry: Any, expected: Any) -> None:
    fake_safetensors(whole / DIT_FILE, {"a": entry}, 4)
    message = refusal(whole)
    assert expected in message
    assert str(whole / DIT_FILE) in message


def test_a_header_that_is_no_json_is_refused(whole: Path) -> None:
    (whole / DIT_FILE).write_bytes((4).to_bytes(8, "little") + b"{{{{")
    assert f"{whole / DIT_FILE} has a header that is no JSON" in refusal(whole)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    name = "diffusion_pytorch_model-00002-of-00003.safetensors"
    (sharded / name).unlink()
    message = refusal(sharded)
    assert f"lacks {name}" in message
    assert DIT_INDEX_FILE in message


def test_shards_without_their_index_are_told(sharded: Path) -> None:
    (sharded / DIT_INDEX_FILE).unlink()
    assert f"lacks {DIT_INDEX_FILE}" in refusal(sharded)


def test_an_index_that_names_a_tensor_which_is_not_there_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / DIT_INDEX_FILE).read_text())
    index["weight_map"]["blocks.9.extra"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    (sharded / DIT_INDEX_FILE).write_text(json.dumps(index))
    message = refusal(sharded)
    assert "puts tensor blocks.9.extra into diffusion_pytorch_model-00001-of-00003.safetensors" in message
    assert str(sharded / DIT_INDEX_FILE) in message


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_point_outside_its_folder(sharded: Path, shard: Any) -> None:
    edit_json(sharded / DIT_INDEX_FILE, weight_map={"a": shard})
    assert "puts tensor a into" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / DIT_INDEX_FILE, weight_map=weight_map)
    assert f"{sharded / DIT_INDEX_FILE} has no weight_map" in refusal(sharded)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_json_that_is_no_json_object_is_refused(whole: Path, content: Any) -> None:
    (whole / CONFIG_FILE).write_text(content)
    assert f"{whole / CONFIG_FILE}" in refusal(whole)


@pytest.mark.parametrize("name", [T5_FILE, VAE_FILE])
@pytest.mark.parametrize("num_bytes", [1, 100, 5000])
def test_a_truncated_pth_is_named(whole: Path, name: str, num_bytes: int) -> None:
    cut(whole / name, num_bytes)
    assert f"{whole / name} is cut short or damaged" in refusal(whole)


def test_an_unreadable_file_is_told(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_fails(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", open_fails)
    assert "cannot be read" in refusal(whole)


def test_another_models_folder_says_what_it_holds(whole: Path) -> None:
    message = refusal(whole, MODELS["t2v-1.3B"])
    assert "holds t2v with dim 32, 2 blocks" in message
    assert "model=t2v-1.3B needs t2v with dim 1536, 30 blocks" in message


def test_inspecting_imports_no_torch(written: Path) -> None:
    code = (
        "import sys, wan21.weights.inspect, wan21.models; from dataclasses import replace\n"
        "try: wan21.weights.inspect.inspect_folder(sys.argv[1], wan21.models.MODELS['tiny'])\n"
        "except wan21.errors.CheckpointError: pass\n"
        "else: raise SystemExit('accepted')\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'safetensors' not in sys.modules"
    )
    root = Path(__file__).parents[2] / "Wan2.1"
    subprocess.run(
        [sys.executable, "-c", code, str(written / "whole")],
        env={"PYTHONPATH": str(root)},
        check=True,
        timeout=240,
    )
