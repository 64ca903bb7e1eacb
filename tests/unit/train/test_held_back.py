"""Evaluation data that is training data too is said."""

import shutil

import pytest
import yaml
from helpers.runs import tiny_config, write_records

from mixtral_ms.config import load_config
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_eval_loader, build_loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_back")
    for seed, name in enumerate(("train/a", "train/b", "eval/c")):
        (folder / name).parent.mkdir(exist_ok=True)
        write_records(folder / f"{name}.mindrecord", 9, seed)
    shutil.copytree(folder / "train", folder / "copied")
    (folder / "linked").symlink_to("train")
    return folder


@pytest.mark.parametrize(
    ("train", "held_back", "said"),
    [
        ("train", "eval", ""),
        ("train/a.mindrecord", "train/b.mindrecord", ""),
        ("train", "train", "2 files are in train_dataset too"),
        ("train", "train/b.mindrecord", "b.mindrecord is in train_dataset too"),
        ("train/a.mindrecord", "train", "a.mindrecord is in train_dataset too"),
        ("train", "linked", "2 files are in train_dataset too"),
        ("train", "copied", "all files are in train_dataset too"),
    ],
)
def test_evaluation_data_among_training_data(folder, caplog, monkeypatch, train, held_back, said):
    monkeypatch.setattr(get_logger(), "propagate", True)
    tree = tiny_config(folder)
    tree["train_dataset"]["data_loader"]["dataset_dir"] = str(folder / train)
    tree["eval_dataset"]["data_loader"]["dataset_dir"] = str(folder / held_back)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "run.yaml")
    loader = build_loader(config, config.train_dataset, Mesh(), training=True)
    caplog.clear()
    assert len(build_eval_loader(config, Mesh(), loader)) > 0
    assert said in caplog.text and bool(said) == bool(caplog.text)
