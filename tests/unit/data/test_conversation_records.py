"""Conversations read straight are, bit for bit, what the MindRecord made of them holds."""

import json
import logging

import numpy as np
import pytest

from mixtral_ms.config.sections.data_section import DataLoaderSection, DatasetSection
from mixtral_ms.data.conversations.preprocess_conversations import QaOptions, preprocess_qa
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.log import LOGGER_NAME, get_logger

MODEL = str(find_example_tokenizer())
SEQ = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files, one row of which cannot be used and one of which is too long."""
    folder = tmp_path_factory.mktemp("conversations")
    rows = [
        {"instruction": f"Say {number} \u4f60</s>", "output": f"{number} <unk> " * (number % 9 + 1)}
        for number in range(23)
    ]
    rows[4]["output"] = ""
    rows[7]["output"] = "long " * 400
    (folder / "b.json").write_text(json.dumps(rows[11:]))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:11])))
    return folder


def loader(path, kind, **options):
    columns = options.pop("input_columns", ["input_ids", "labels"])
    conversation = {key: options.pop(key) for key in ("template", "packing") if key in options}
    section = DatasetSection(
        data_loader=DataLoaderSection(type=kind, dataset_dir=str(path), **conversation),
        input_columns=columns,
    )
    defaults = {"seq_length": SEQ, "batch_size": 3, "seed": 7, "shuffle": True}
    ids = {"ignore_token_id": -100, "pad_token_id": 0, "vocab_size": 32000, "tokenizer_file": MODEL}
    return RecordLoader(section, **{**defaults, **ids, **options})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("template", ["vicuna", "mistral"])
def test_both_ways_give_the_same_batches(folder, tmp_path, packing, template):
    preprocess_qa(
        QaOptions(MODEL, SEQ, template, packing=packing, input_glob=str(folder / "[ab].json*"),
                  output_file=str(tmp_path / "q.mindrecord"))
    )  # fmt: skip
    assert (
        tmp_path / "q.mindrecord.rows.jsonl"
    ).is_file()  # and the folder can be read all the same
    options = {"keep_partial": True, "batch_size": 2}
    recorded = loader(tmp_path, "MindDataset", **options)
    straight = loader(folder, "ConversationDataset", template=template, packing=packing, **options)
    assert len(recorded) == len(straight) > 1
    assert recorded.data.facts == straight.data.facts
    assert recorded.data.facts["chat_template"]["name"].startswith(template)
    for start in (0, 1):
        pairs = zip(recorded.batches(3, start), straight.batches(3, start), strict=True)
        for one, other in pairs:
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert (one.segment_ids is None) == (other.segment_ids is None) == (not packing)
            if packing:
                np.testing.assert_array_equal(one.segment_ids, other.segment_ids)
    assert not packing or max(one.segment_ids.max() for one in straight.batches(0)) > 1


def test_records_made_with_two_templates_are_said(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    for template in ("vicuna", "mistral"):
        preprocess_qa(
            QaOptions(MODEL, SEQ, template, input_glob=str(folder / "a.jsonl"),
                      output_file=str(tmp_path / f"{template}.mindrecord"))
        )  # fmt: skip
    assert loader(tmp_path / "vicuna.mindrecord", "MindDataset").data.facts and not caplog.text
    assert loader(tmp_path, "MindDataset").data.facts == {}
    assert "vicuna.mindrecord were made in different ways" in caplog.text


def test_segment_ids_are_read_without_being_named(folder, tmp_path):
    preprocess_qa(
        QaOptions(MODEL, SEQ, packing=True, input_glob=str(folder / "a.jsonl"),
                  output_file=str(tmp_path / "q.mindrecord"))
    )  # fmt: skip
    for columns in (["input_ids", "labels"], ["input_ids", "labels", "segment_ids"]):
        batch = next(
            loader(tmp_path, "MindDataset", input_columns=columns, batch_size=1).batches(0)
        )
        assert batch.segment_ids is not None
    with pytest.raises(UserError, match="input_columns"):
        loader(tmp_path, "MindDataset", input_columns=["labels"])


def test_rows_are_accounted_for_in_the_log(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(LOGGER_NAME), "propagate", True)
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        loader(folder, "ConversationDataset")
    assert "23 read, 22 taken; 1 left out, 1 cut" in caplog.text
    assert "row 4 of a.jsonl: left out: no output" in caplog.text


def test_the_fingerprint_knows_the_data_and_not_its_place(folder, tmp_path):
    (tmp_path / "moved.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    first = loader(folder / "a.jsonl", "ConversationDataset").fingerprint
    assert loader(tmp_path, "ConversationDataset").fingerprint == first
    assert loader(tmp_path, "ConversationDataset", template="mistral").fingerprint != first
    with open(tmp_path / "moved.jsonl", "r+", encoding="utf-8") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace("Say 5", "Say 6"))
    assert loader(tmp_path, "ConversationDataset").fingerprint != first


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, {}, "no conversations in"),
        ("", {}, "none of the 0 rows"),
        ('{"a": 1}', {}, "none of the 1 rows.*\n.*row 0 of a.jsonl: left out: neither"),
        ('{"a": 1}', {"tokenizer_file": None}, "processor.tokenizer.vocab_file"),
        ('{"a": 1}', {"pad_token_id": 2}, "neither bos"),
        ('{"a": 1}', {"pad_token_id": -1}, "pad_token_id -1 says that nothing is padded"),
        ('{"a": 1}', {"template": "none"}, "data_loader.template. 'none'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        loader(tmp_path, "ConversationDataset", **options)
