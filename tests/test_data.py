"""Bundled texts and every form of `data`."""

from __future__ import annotations

import json
import sys
from importlib.resources import files

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tinycomp.data import batches, calibration_text, evaluation_text, for_model, token_ids

WORDS = ["[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(1000))]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def hf_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), unk_token="[UNK]", **special)


def plain_words() -> Tokenizer:
    """Without [CLS] and [SEP], as a causal model's tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS) if w[1] not in "CS"}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_bundled_texts_are_whole_disjoint_and_small():
    calibration, evaluation = calibration_text(), evaluation_text()
    assert len(calibration) == 46
    assert min(map(len, calibration)) > 9_000
    assert not any(text != text.strip() or "\f" in text for text in calibration)
    assert evaluation.startswith("Please, everybody, have a seat. Mr. Speaker, Mr. Vice President")
    assert len(evaluation) == 80_156
    sentences = {s for text in calibration for s in text.split(". ") if len(s) > 80}
    assert not sentences & set(evaluation.split(". "))
    sizes = [
        len((files("tinycomp.data") / f"sotu_{part}.txt.gz").read_bytes()) for part in ("calibration", "evaluation")
    ]
    assert sum(sizes) < 700_000


def test_bundled_archives_carry_no_time_or_name():
    for part in ("calibration", "evaluation"):
        archive = (files("tinycomp.data") / f"sotu_{part}.txt.gz").read_bytes()
        assert archive[:4] == b"\x1f\x8b\x08\x00"  # gzip, deflate, no file name
        assert archive[4:8] == bytes(4)  # no time stamp
    assert "public domain" in (files("tinycomp.data") / "NOTICE").read_text()


def test_evaluation_text_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'wikitext'.*sotu-2013-2014"):
        evaluation_text("wikitext")


def test_default_is_48_windows_of_512_bundled_tokens():
    made = batches(None, plain_words())
    ids = torch.cat([batch["input_ids"] for batch in made])
    assert ids.shape == (48, 512)
    assert [len(batch["input_ids"]) for batch in made] == [8] * 6
    assert ids.dtype == torch.int64
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in made)


def test_windows_do_not_overlap_and_follow_the_seed():
    text = [words(0, 500), words(500, 500)]
    first = batches(text, plain_words(), num_calibration_samples=50, max_seq_length=20, batch_size=7)
    ids = torch.cat([batch["input_ids"] for batch in first])
    assert [len(batch["input_ids"]) for batch in first] == [7] * 7 + [1]
    assert len(ids.unique()) == ids.numel() == 1000  # every token once: windows tile the joined text
    assert bool((ids.diff(dim=1) == 1).all())
    again = batches(text, plain_words(), num_calibration_samples=50, max_seq_length=20, batch_size=7)
    other = batches(text, plain_words(), num_calibration_samples=50, max_seq_length=20, batch_size=7, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["bare", "transformers"])
def test_encoders_get_their_frame_inside_the_length(kind):
    tokenizer = word_tokenizer() if kind == "bare" else hf_tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    (batch,) = batches([words(0, 100)], tokenizer, num_calibration_samples=4, max_seq_length=12)
    assert batch["input_ids"].shape == (4, 12)
    assert batch["input_ids"][:, 0].tolist() == [1] * 4
    assert batch["input_ids"][:, -1].tolist() == [2] * 4
    assert bool((batch["input_ids"][:, 1:-1] > 2).all())


def test_no_frame_without_both_tokens():
    (batch,) = batches([words(0, 100)], hf_tokenizer(cls_token="[CLS]"), num_calibration_samples=4, max_seq_length=12)
    assert bool((batch["input_ids"] > 2).all())


def test_token_ids_ignore_truncation_and_padding_settings():
    tokenizer = plain_words()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    assert len(token_ids(tokenizer, words(0, 40))) == 40
    assert len(tokenizer.encode(words(0, 40)).ids) == 5  # the caller's object keeps its settings
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=7)
    assert len(token_ids(wrapped, words(0, 40))) == 40
    with pytest.raises(TypeError, match=r"tokenizers.Tokenizer"):
        token_ids(object(), "x")


def test_short_text_gives_what_it_has_and_says_so():
    with pytest.warns(UserWarning, match="3 windows of 10; 48 were asked for"):
        made = batches([words(0, 35)], plain_words(), max_seq_length=10)
    assert made[0]["input_ids"].shape == (3, 10)
    with pytest.warns(UserWarning, match="1 windows of 4"):
        (one,) = batches(["w1 w2 w3 w4"], plain_words())
    assert one["input_ids"].shape == (1, 4)


def test_windows_respect_the_tokenizers_limit():
    tokenizer = hf_tokenizer()
    tokenizer.model_max_length = 16
    with pytest.warns(UserWarning, match="takes 16 tokens"):
        (batch,) = batches([words(0, 100)], tokenizer, num_calibration_samples=2, max_seq_length=64)
    assert batch["input_ids"].shape == (2, 16)


def texts_of(made) -> set[int]:
    return set(torch.cat([batch["input_ids"].flatten() for batch in made]).tolist())


def test_files(tmp_path):
    rows = [{"body": words(0, 30), "n": 1}, {"body": words(30, 30), "n": 2}]
    (tmp_path / "a.txt").write_text(words(0, 60))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = {"num_calibration_samples": 6, "max_seq_length": 10}
    wanted = texts_of(batches([words(0, 60)], plain_words(), **options))
    assert len(wanted) == 60
    assert texts_of(batches(str(tmp_path / "a.txt"), plain_words(), **options)) == wanted
    assert texts_of(batches(tmp_path / "a.jsonl", plain_words(), text_column="body", **options)) == wanted


def test_parquet_and_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    column = [words(0, 30), words(30, 30)]
    parquet.write_table(pyarrow.table({"body": column, "n": [1, 2]}), tmp_path / "a.parquet")
    options = {"num_calibration_samples": 6, "max_seq_length": 10}
    assert len(texts_of(batches(tmp_path / "a.parquet", plain_words(), text_column="body", **options))) == 60
    with pytest.raises(ValueError, match=r"no column 'text', it has \['body', 'n'\]"):
        batches(tmp_path / "a.parquet", plain_words())
    dataset = datasets.Dataset.from_dict({"body": column, "n": [1, 2]})
    assert len(texts_of(batches(dataset, plain_words(), text_column="body", **options))) == 60
    with pytest.raises(ValueError, match=r"no column 'text', it has \['body', 'n'\]"):
        batches(dataset, plain_words())
    with pytest.raises(ValueError, match=r"splits \['train'\]"):
        batches(datasets.DatasetDict({"train": dataset}), plain_words())
    with pytest.raises(TypeError, match="streaming"):
        batches(dataset.to_iterable_dataset(), plain_words())


def test_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pyarrow.*tinycomp\[data\]"):
        batches(tmp_path / "a.parquet", plain_words())


def test_dicts_of_tensors_pass_through():
    given = [{"pixel_values": torch.randn(2, 3, 4, 4)} for _ in range(40)]
    made = batches(given, num_calibration_samples=10)
    assert len(made) == 40  # a list is used whole
    assert all(a["pixel_values"] is b["pixel_values"] for a, b in zip(given, made, strict=True))
    loader = torch.utils.data.DataLoader([{"input_ids": torch.tensor([i])} for i in range(100)], batch_size=4)
    made = batches(loader, num_calibration_samples=10)
    assert sum(len(batch["input_ids"]) for batch in made) == 12  # whole batches up to the number of rows
    endless = ({"input_ids": torch.ones(1, 3)} for _ in iter(int, 1))
    assert len(batches(endless, num_calibration_samples=5)) == 5


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], ValueError, "text is empty"),
        (["", "  \n"], ValueError, "text is empty"),
        (["a", 3], TypeError, "a int among the texts"),
        ("nowhere.txt", FileNotFoundError, r"nowhere\.txt"),
        (7, TypeError, "got int"),
        ({"input_ids": torch.ones(1)}, TypeError, "one dict"),
        ([{}], TypeError, "item 0"),
        ([torch.ones(2)], TypeError, "item 0 is a Tensor"),
        ([{"input_ids": [1, 2]}], TypeError, "'input_ids' as list"),
        ([{"loss": torch.tensor(1.0)}], TypeError, "batch dimension"),
        (iter(()), ValueError, "no batches"),
    ],
)
def test_bad_data(data, error, match):
    with pytest.raises(error, match=match):
        batches(data, plain_words())


def test_bad_files(tmp_path):
    for name, content, match in (
        ("a.csv", "x", r"\.csv file"),
        ("empty.txt", " \n", "empty"),
        ("a.jsonl", '{"text": "a"}\n{bad', "line 2 is not JSON"),
        ("b.jsonl", "[1]", "line 1 is a list"),
        ("c.jsonl", '{"body": "a"}', r"line 1 has no column 'text', it has \['body'\]"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=match):
            batches(tmp_path / name, plain_words())


def test_text_needs_a_tokenizer_and_sizes_are_checked():
    with pytest.raises(ValueError, match="without a tokenizer"):
        batches(None)
    for name in ("num_calibration_samples", "max_seq_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            batches(["w1"], plain_words(), **{name: 0})


class Stub(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)()


def test_for_model_shifts_for_encoder_decoders():
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    out = for_model(batch, Stub(is_encoder_decoder=True, decoder_start_token_id=None, pad_token_id=0), labels=True)
    assert out["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
    assert out["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]
    assert set(batch) == {"input_ids", "attention_mask"}
    start = for_model(batch, Stub(is_encoder_decoder=True, decoder_start_token_id=4, pad_token_id=0))
    assert start["decoder_input_ids"][:, 0].tolist() == [4, 4]
    assert for_model(batch, Stub(is_encoder_decoder=False)) == batch
    kept = {"input_ids": ids, "decoder_input_ids": ids[:, :1]}
    assert for_model(kept, Stub(is_encoder_decoder=True))["decoder_input_ids"].shape == (2, 1)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        for_model(batch, Stub(is_encoder_decoder=True))


def test_for_model_leaves_images_alone():
    batch = {"pixel_values": torch.ones(1, 3, 2, 2)}
    assert for_model(batch, nn.Linear(2, 2), labels=True) == batch
