"""Token data: text turned into byte-pair tokens once and cached, Megatron-LM's .bin/.idx files, and sampling.

Layer 5. Without data of the user's the corpus is the source text of the running Python's standard library. Samples
depend on the tokens, the seed and the sample's number only: never on how many ranks read them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
CACHE_DIR = ".cache/smartmoe"
STDLIB_BYTES = 8_000_000
_FORMAT = 1
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's writers gave the two floating-point codes different widths over time: the size of the .bin tells which.
_INDEX_DTYPES = {
    1: ("<u1",), 2: ("<i1",), 3: ("<i2",), 4: ("<i4",), 5: ("<i8",), 6: ("<f8", "<f4"), 7: ("<f4", "<f8"), 8: ("<u2",),
}  # fmt: skip


class TokenDataset:
    """Windows of seq_len + 1 tokens, in an order shuffled anew each epoch.

    `parts` are one-dimensional integer arrays (memory-mapped files as a rule) with their names; no window crosses from
    one part to the next. A token id outside [0, vocab_size) is an error that names the part.
    """

    def __init__(self, parts: Sequence[tuple[str, np.ndarray]], vocab_size: int, seed: int = 1234):
        self.parts, self.vocab_size, self.seed = list(parts), vocab_size, seed
        self._order = (None, None)

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(len(tokens) for _, tokens in self.parts)

    def num_windows(self, seq_len: int) -> int:
        """Samples of one epoch."""
        return sum(max(0, len(tokens) - 1) // seq_len for _, tokens in self.parts)

    def sample(self, sample_idx: int, seq_len: int) -> np.ndarray:
        """The tokens of sample `sample_idx`, counted from the start of training over all epochs.

        Returns `[seq_len + 1] int64` (inputs are the first seq_len, targets the last). Raises ValueError when the data
        is shorter than one window or holds an id outside the vocabulary. Neither collective nor synchronising.
        """
        num_windows = self.num_windows(seq_len)
        if num_windows == 0:
            raise ValueError(
                f"{', '.join(name for name, _ in self.parts)}: {self.num_tokens} tokens are too few for one sample of "
                f"{seq_len} + 1 tokens: give more data or a smaller model.seq_len"
            )
        epoch, place = divmod(sample_idx, num_windows)
        window_idx = int(self._epoch_order(epoch, num_windows)[place])
        for name, tokens in self.parts:
            windows = max(0, len(tokens) - 1) // seq_len
            if window_idx < windows:
                start = window_idx * seq_len
                return self._checked(name, tokens[start : start + seq_len + 1])
            window_idx -= windows
        raise AssertionError("window index beyond the last part")

    def _epoch_order(self, epoch: int, num_windows: int) -> np.ndarray:
        key = (epoch, num_windows)
        if self._order[0] != key:
            self._order = (key, epoch_order(self.seed, epoch, num_windows))
        return self._order[1]

    def _checked(self, name: str, tokens: np.ndarray) -> np.ndarray:
        tokens_S = tokens.astype(np.int64)
        low, high = int(tokens_S.min()), int(tokens_S.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name}: token id {bad} is outside model.vocab_size = {self.vocab_size}")
        if tokens.dtype.kind == "f" and not np.array_equal(tokens_S, tokens):
            raise ValueError(f"{name}: holds fractions, not token ids")
        return tokens_S


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of an epoch's samples: a permutation [num_samples] int64."""
    # A hash of the sample's number, not a library's random stream, which may change from version to version.
    salt = mix(np.array([seed % (1 << 64)], np.uint64) + mix(np.array([epoch], np.uint64)))
    return np.argsort(mix(np.arange(num_samples, dtype=np.uint64) + salt), kind="stable")


def mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser of each element: `[..] uint64` -> `[..] uint64` (Steele et al., OOPSLA'14)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def load_tokens(
    data: Sequence[str] = (), vocab_size: int = 512, cache_dir: str | Path = CACHE_DIR, seed: int = 1234
) -> TokenDataset:
    """The tokens of `data`: text files, or prefixes of Megatron .bin/.idx pairs; empty = the standard library's source.

    Text becomes a byte-level BPE vocabulary of at most `vocab_size` and a token file, made once under `cache_dir` and
    found again by content. Raises ValueError naming the file when it is missing, malformed or not UTF-8.
    """
    prefixes = [prefix for name in data if (prefix := indexed_prefix(name)) is not None]
    if prefixes and len(prefixes) != len(data):
        raise ValueError(f"data {list(data)}: text files and .bin/.idx prefixes do not mix")
    if prefixes:
        return TokenDataset([(prefix, read_indexed(prefix)) for prefix in prefixes], vocab_size, seed)
    folder = prepare(data, vocab_size, cache_dir)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    return TokenDataset([(str(folder), tokens)], vocab_size, seed)


# ---------------------------------------------------------------------------------------------------------------- text


def prepare(data: Sequence[str] = (), vocab_size: int = 512, cache_dir: str | Path = CACHE_DIR) -> Path:
    """Build the tokenizer and the token file of text `data` unless they are there; return their folder.

    Safe when several processes call it at once: each builds in a folder of its own, and the first rename wins.
    """
    texts = read_texts(data)
    folder = Path(cache_dir, f"bpe{vocab_size}-{_content_key(texts, vocab_size)}")
    if (folder / "meta.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _build(texts, vocab_size, scratch)
        os.rename(scratch, folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def read_texts(data: Sequence[str] = ()) -> list[str]:
    """The documents of `data`, one a file. Raises ValueError naming a file that is missing, empty or not UTF-8."""
    if not data:
        return _stdlib_texts()
    texts = []
    for name in data:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise ValueError(
                f"{name}: cannot read this file: {error.strerror}; data takes text files or .bin/.idx prefixes"
            ) from None
        if not texts[-1]:
            raise ValueError(f"{name}: this file is empty")
    return texts


def _stdlib_texts() -> list[str]:
    """Python's own library in sorted order, up to STDLIB_BYTES; no tests, which not every distribution ships."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - skipped  # not even entered: site-packages may be large
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    texts, size = [], 0
    for path in sorted(paths):
        raw = path.read_bytes()
        texts.append(raw.decode("utf-8", errors="replace"))
        size += len(raw)
        if size >= STDLIB_BYTES:
            break
    if not texts:
        raise ValueError(f'{root}: this Python has no library source to train on: give workload.data = ["FILE", ..]')
    return texts


def _content_key(texts: Iterable[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {vocab_size}".encode())
    for text in texts:
        raw = text.encode()
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return digest.hexdigest()[:16]


def _build(texts: list[str], vocab_size: int, folder: Path) -> None:
    tokenizer = train_tokenizer(texts, vocab_size)
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    num_tokens = 0
    with (folder / "tokens.bin").open("wb") as file:
        for start in range(0, len(texts), 64):
            for encoding in tokenizer.encode_batch(texts[start : start + 64]):
                ids = np.array([*encoding.ids, end_id], dtype=dtype)
                num_tokens += len(ids)
                file.write(ids.tobytes())
    tokenizer.save(str(folder / "tokenizer.json"))
    meta = {
        "dtype": dtype, "num_tokens": num_tokens, "num_documents": len(texts), "end_of_text": end_id,
        "vocab_size": vocab_size, "num_used": tokenizer.get_vocab_size(),
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE `tokenizers.Tokenizer`: all 256 bytes, end-of-text and merges; encoding loses nothing."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "text data needs the package tokenizers: pip install tokenizers, or give workload.data a .bin/.idx prefix"
        ) from None
    if vocab_size < 257:
        raise ValueError(f"vocab_size = {vocab_size} must be at least 257 (256 bytes and end-of-text)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ----------------------------------------------------------------------------------------------- Megatron's .bin/.idx


def indexed_prefix(name: str) -> str | None:
    """The prefix when `name` (with or without .bin or .idx) is a pair of Megatron files, else None."""
    prefix = name[:-4] if name.endswith((".bin", ".idx")) else name
    if Path(f"{prefix}.idx").exists() or prefix != name:
        return prefix
    return None


def read_indexed(prefix: str) -> np.ndarray:
    """All tokens of `prefix`.bin in the order of `prefix`.idx: memory-mapped when they lie in order, else gathered.

    Raises ValueError naming the file when either is missing, cut short or inconsistent.
    """
    index, path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        raw, bin_bytes = index.read_bytes(), path.stat().st_size
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot read this file: {error.strerror}") from None
    code, sizes, pointers = _parse_index(index, raw)
    dtype = np.dtype(next((name for name in code if sizes.sum() * np.dtype(name).itemsize == bin_bytes), code[0]))
    ends = pointers + sizes * dtype.itemsize
    if len(sizes) == 0 or sizes.sum() == 0:
        raise ValueError(f"{index}: holds no tokens")
    if pointers.min() < 0 or ends.max() > bin_bytes:
        raise ValueError(f"{path}: {bin_bytes} bytes, but {index.name} points to byte {int(ends.max())}: cut short?")
    if (pointers % dtype.itemsize).any():
        raise ValueError(f"{index}: a sequence starts inside a token of {dtype.itemsize} bytes")
    tokens = np.memmap(path, dtype=dtype, mode="r", shape=(bin_bytes // dtype.itemsize,))
    starts = pointers // dtype.itemsize
    if starts[0] == 0 and np.array_equal(starts[1:], np.cumsum(sizes)[:-1]):
        return tokens[: int(sizes.sum())]
    return np.concatenate([tokens[start : start + size] for start, size in zip(starts, sizes, strict=True)])


def _parse_index(index: Path, raw: bytes) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """The possible dtypes, sequence sizes `[N] int64` and byte offsets `[N] int64` of an .idx file."""
    if raw[:9] != _INDEX_MAGIC:
        raise ValueError(f"{index}: not a Megatron index (it does not begin with MMIDIDX)")
    header = len(_INDEX_MAGIC) + struct.calcsize("<QBQQ")
    if len(raw) < header:
        raise ValueError(f"{index}: cut short inside its header")
    version, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", raw, len(_INDEX_MAGIC))
    if version != 1:
        raise ValueError(f"{index}: version {version}, only 1 is known")
    if code not in _INDEX_DTYPES:
        raise ValueError(f"{index}: unknown dtype code {code}")
    needed = header + 12 * num_sequences + 8 * num_documents
    if len(raw) < needed:
        raise ValueError(f"{index}: {len(raw)} bytes, but {num_sequences} sequences need {needed}: cut short?")
    sizes = np.frombuffer(raw, "<i4", num_sequences, header).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", num_sequences, header + 4 * num_sequences)
    if num_sequences and sizes.min() < 0:
        raise ValueError(f"{index}: sequence {int(sizes.argmin())} has a negative size")
    return _INDEX_DTYPES[code], sizes, pointers


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], dtype_code: int) -> None:
    """Write `documents` (one sequence each) as `prefix`.bin and `prefix`.idx; `dtype_code` is Megatron's number."""
    dtype = np.dtype(_INDEX_DTYPES[dtype_code][0])
    sizes = []
    with Path(f"{prefix}.bin").open("wb") as file:
        for tokens in documents:
            file.write(np.asarray(tokens).astype(dtype).tobytes())
            sizes.append(len(tokens))
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * dtype.itemsize
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(_INDEX_MAGIC + struct.pack("<QBQQ", 1, dtype_code, len(sizes), len(sizes) + 1))
        file.write(np.array(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m smartmoe.data`: prepare the token cache before several ranks ask for it."""
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.data", description="Build the cached tokens of a training run."
    )
    parser.add_argument(
        "data", nargs="*", help="text files, or prefixes of Megatron .bin/.idx pairs (default: Python's library)"
    )
    parser.add_argument("--vocab-size", type=int, default=512, help="vocabulary, at least 257 (default: %(default)s)")
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="where caches live (default: %(default)s)")
    parser.add_argument("--export", metavar="PREFIX", help="also write the tokens as PREFIX.bin and PREFIX.idx")
    args = parser.parse_args(argv)
    try:
        dataset = load_tokens(args.data, args.vocab_size, args.cache_dir)
        if args.export:
            code = 8 if args.vocab_size <= 1 << 16 else 4
            write_indexed(args.export, [tokens for _, tokens in dataset.parts], code)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{dataset.num_tokens} tokens in {', '.join(name for name, _ in dataset.parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
