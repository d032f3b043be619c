import json
import multiprocessing
import struct

import numpy as np
import pytest

from smartmoe import data

TEXT = "def f(x):\n    return {x: 'naïve 漢字 🙂'}\n" * 200


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def dataset(num_tokens=1000, seed=1):
    return data.TokenDataset([("made up", np.arange(num_tokens, dtype=np.uint16) % 300)], vocab_size=300, seed=seed)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_an_epoch_visits_every_window_once_and_epochs_differ():
    tokens = data.TokenDataset([("a", np.arange(1000)), ("b", 5000 + np.arange(333))], vocab_size=6000, seed=3)
    num = tokens.num_windows(64)
    assert num == 15 + 5
    epochs = [[int(tokens.sample(epoch * num + i, 64)[0]) for i in range(num)] for epoch in range(3)]
    expected = sorted([64 * i for i in range(15)] + [5000 + 64 * i for i in range(5)])
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != expected
    window = tokens.sample(0, 64)
    assert window.dtype == np.int64 and np.array_equal(window, window[0] + np.arange(65))


def test_samples_depend_on_seed_and_number_only():
    first, again, other = dataset(seed=1), dataset(seed=1), dataset(seed=2)
    order = [7, 30, 0, 7, 31]  # 31 lies in the third epoch: asking for it must not change what follows
    one = [first.sample(i, 64).tolist() for i in order]
    assert one == [again.sample(i, 64).tolist() for i in order] and one[0] == one[3]
    assert [other.sample(i, 64).tolist() for i in range(15)] != [first.sample(i, 64).tolist() for i in range(15)]
    # pinned: checkpoints of older runs resume on the same samples
    assert [int(dataset(10**6).sample(i, 10)[0]) for i in range(4)] == PINNED


PINNED = [280, 214, 84, 78]


def test_too_few_tokens_and_ids_outside_the_vocabulary_are_errors():
    with pytest.raises(ValueError, match="too few"):
        dataset(num_tokens=64).sample(0, 64)
    tokens = data.TokenDataset([("x.bin", np.array([1, 2, -1, 4]))], vocab_size=300)
    with pytest.raises(ValueError, match=r"x\.bin: token id -1 is outside"):
        tokens.sample(0, 3)
    with pytest.raises(ValueError, match="fractions"):
        data.TokenDataset([("x.bin", np.array([1, 2.5, 3, 4]))], vocab_size=300).sample(0, 3)


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_is_cached_by_content_and_rebuilt_for_another_vocabulary(tmp_path, text_file):
    folder = data.prepare([str(text_file)], 300, tmp_path / "cache")
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    assert data.prepare([str(text_file)], 300, tmp_path / "cache") == folder
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert data.prepare([str(text_file)], 320, tmp_path / "cache") != folder
    text_file.write_text(TEXT + "more")
    assert data.prepare([str(text_file)], 300, tmp_path / "cache") != folder
    assert not list((tmp_path / "cache").glob(".*"))


def test_tokens_decode_to_the_text(tmp_path, text_file):
    from tokenizers import Tokenizer

    folder = data.prepare([str(text_file)], 300, tmp_path / "cache")
    loaded = data.load_tokens([str(text_file)], 300, tmp_path / "cache")
    tokens = loaded.parts[0][1]
    assert int(tokens.max()) < 300 and tokens[-1] == json.loads((folder / "meta.json").read_text())["end_of_text"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == TEXT


def test_standard_library_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STDLIB_BYTES", 300_000)
    texts = data.read_texts()
    assert texts == data.read_texts() and 300_000 <= sum(len(text.encode()) for text in texts)
    tokenizer, again = data.train_tokenizer(texts, 400), data.train_tokenizer(texts, 400)
    assert tokenizer.to_str() == again.to_str() and tokenizer.get_vocab_size() == 400
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert data.load_tokens((), 400, tmp_path).num_tokens < 200_000


def _prepare(arguments):
    return str(data.prepare(*arguments))


def test_processes_that_build_at_once_end_with_one_cache(tmp_path, text_file):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_prepare, [([str(text_file)], 300, str(tmp_path / "cache"))] * 4, chunksize=1)
    assert len(set(folders)) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_build_that_fails_leaves_nothing(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(data, "_build", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        data.prepare([str(text_file)], 300, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreadable_text_names_the_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    for name, message in (("latin.txt", "not UTF-8"), ("empty.txt", "empty"), ("absent.txt", "cannot read")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            data.load_tokens([str(tmp_path / name)], 300, tmp_path / "cache")


# ----------------------------------------------------------------------------------------------- Megatron's .bin/.idx

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [100, 101]]
FLAT = [token for document in DOCUMENTS for token in document]


@pytest.mark.parametrize("code", sorted(data._INDEX_DTYPES))
def test_indexed_round_trip_of_every_dtype(tmp_path, code):
    prefix = str(tmp_path / "tokens")
    data.write_indexed(prefix, DOCUMENTS, code)
    for name in (prefix, prefix + ".bin", prefix + ".idx"):
        loaded = data.load_tokens([name], 300, tmp_path / "cache")
        assert loaded.num_tokens == len(FLAT) and loaded.sample(0, len(FLAT) - 1).tolist() == FLAT
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("code", "dtype"), [(6, "<f4"), (7, "<f8")])
def test_the_size_of_the_bin_tells_the_width_of_old_floating_point_codes(tmp_path, code, dtype):
    prefix, itemsize = str(tmp_path / "tokens"), np.dtype(dtype).itemsize
    data.write_indexed(prefix, DOCUMENTS, code)
    np.array(FLAT, dtype).tofile(prefix + ".bin")
    raw = bytearray((tmp_path / "tokens.idx").read_bytes())
    pointers = itemsize * np.concatenate([[0], np.cumsum([len(d) for d in DOCUMENTS])[:-1]])
    raw[34 + 16 : 34 + 16 + 32] = pointers.astype("<i8").tobytes()
    (tmp_path / "tokens.idx").write_bytes(raw)
    assert data.load_tokens([prefix], 300).sample(0, len(FLAT) - 1).tolist() == FLAT


def test_sequences_out_of_order_are_gathered(tmp_path):
    prefix = str(tmp_path / "tokens")
    data.write_indexed(prefix, DOCUMENTS, 4)
    raw = bytearray((tmp_path / "tokens.idx").read_bytes())
    sizes, pointers = np.array([2, 1], "<i4"), np.array([4 * 9, 0], "<i8")
    raw[18:26] = struct.pack("<Q", 2)
    (tmp_path / "tokens.idx").write_bytes(bytes(raw[:34]) + sizes.tobytes() + pointers.tobytes() + bytes(40))
    assert data.read_indexed(prefix).tolist() == [100, 101, 1]


def damage(raw, where, value):
    return raw[:where] + value + raw[where + len(value) :]


MALFORMED = {
    "empty": (lambda raw: b"", "not a Megatron index"),
    "other magic": (lambda raw: damage(raw, 0, b"TNTIDX"), "not a Megatron index"),
    "header cut": (lambda raw: raw[:20], "inside its header"),
    "version": (lambda raw: damage(raw, 9, struct.pack("<Q", 2)), "version 2"),
    "dtype": (lambda raw: damage(raw, 17, b"\x63"), "dtype code 99"),
    "body cut": (lambda raw: raw[:-1], "cut short"),
    "huge count": (lambda raw: damage(raw, 18, struct.pack("<Q", 1 << 62)), "cut short"),
    "no sequences": (lambda raw: damage(raw, 18, bytes(8)), "no tokens"),
    "negative size": (lambda raw: damage(raw, 34, struct.pack("<i", -5)), "negative size"),
    "pointer beyond": (lambda raw: damage(raw, 34 + 16, struct.pack("<q", 1 << 40)), "tokens.bin.*points to byte"),
    "pointer before": (lambda raw: damage(raw, 34 + 16, struct.pack("<q", -4)), "points to byte"),
    "pointer inside": (lambda raw: damage(raw, 34 + 16, struct.pack("<q", 2)), "inside a token"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_index_names_the_file(tmp_path, kind):
    change, message = MALFORMED[kind]
    data.write_indexed(tmp_path / "tokens", DOCUMENTS, 4)
    (tmp_path / "tokens.idx").write_bytes(change((tmp_path / "tokens.idx").read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        data.load_tokens([str(tmp_path / "tokens")], 300)
    assert str(tmp_path) in str(error.value)


def test_missing_and_truncated_bin_and_mixed_inputs(tmp_path, text_file):
    prefix = str(tmp_path / "tokens")
    data.write_indexed(prefix, DOCUMENTS, 4)
    with pytest.raises(ValueError, match="do not mix"):
        data.load_tokens([prefix, str(text_file)], 300)
    raw = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="tokens.bin.*cut short"):
        data.load_tokens([prefix], 300)
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(ValueError, match="tokens.bin: cannot read"):
        data.load_tokens([prefix], 300)
    with pytest.raises(ValueError, match="nothing.idx: cannot read"):
        data.load_tokens([str(tmp_path / "nothing.bin")], 300)


def test_main_prepares_exports_and_reports_errors(tmp_path, text_file, capsys):
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert data.main([str(text_file), "--vocab-size", "300", "--export", str(tmp_path / "out"), *cache]) == 0
    exported, cached = data.load_tokens([str(tmp_path / "out")], 300), data.load_tokens([str(text_file)], 300, cache[1])
    assert exported.sample(5, 8).tolist() == cached.sample(5, 8).tolist()
    assert data.main([str(tmp_path / "absent"), *cache]) == 2
    assert "absent" in capsys.readouterr().err
