"""CLIP's tokenizer through the tokenizers library.

It is read from ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt`` alone.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

# Of the tokenizer that CLIP was published with.
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


class WordTokenizer:
    """Captions in, token ids out, each with its start and its end."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        path = folder / "tokenizer.json"
        if path.is_file():
            self.inner = Tokenizer.from_file(str(path))
        else:
            self.inner = load_tokenizer(folder, config)
        self.inner.no_truncation()
        self.inner.no_padding()
        self.limit = int(min(config.get("model_max_length") or 77, 1 << 20))
        pad = read_token(config.get("pad_token", END_TOKEN))
        self.pad: int = self.inner.token_to_id(pad) or 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, uncut."""
        return [encoding.ids for encoding in self.inner.encode_batch(texts)]


def read_token(token: Any) -> str:
    """Return a special token's text, which configs write as text or as a record."""
    return str(token["content"] if isinstance(token, dict) else token)


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Build the byte-pair encoding of ``vocab.json`` and ``merges.txt``, with CLIP's rules."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    start = read_token(config.get("bos_token", START_TOKEN))
    end, unknown, pad = (
        read_token(config.get(name, END_TOKEN)) for name in ("eos_token", "unk_token", "pad_token")
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=read_merges(folder / "merges.txt"),
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=unknown,
            fuse_unk=False,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]),
        (start, vocabulary[start]),
        add_prefix_space=False,
        trim_offsets=False,
    )
    # As in transformers, only the start token is matched after normalization.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=True) if token == start else token
            for token in dict.fromkeys((start, end, unknown, pad))
        ]
    )
    return tokenizer


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs of a ``merges.txt``, in order."""
    merges = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#version"):
            first, second = line.split()
            merges.append((first, second))
    return merges
