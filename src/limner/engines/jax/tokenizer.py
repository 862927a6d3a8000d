"""CLIP's tokenizer through the tokenizers library: from ``tokenizer.json``, or from ``vocab.json``
and ``merges.txt`` alone."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

# of the tokenizer that CLIP was published with
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class WordTokenizer:
    """Captions in, token ids out, each with its start and its end."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        known = folder / "tokenizer.json"
        self.inner = (
            Tokenizer.from_file(str(known)) if known.is_file() else load_tokenizer(folder, config)
        )
        self.inner.no_truncation()
        self.inner.no_padding()
        self.limit = int(min(config.get("model_max_length") or 77, 1 << 20))
        self.start, self.end = self.inner.encode("").ids
        self.pad: int = (
            self.inner.token_to_id(read_token(config.get("pad_token", "<|endoftext|>"))) or 0
        )

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Ids of each caption, uncut."""
        return [one.ids for one in self.inner.encode_batch(captions)]


def read_token(token: Any) -> str:
    """A special token's text, which configs write in two ways."""
    return str(token["content"] if isinstance(token, dict) else token)


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The byte-pair encoding of ``vocab.json`` and ``merges.txt``, with the rules that belong to
    CLIP."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [
        (a, b)
        for a, b in (line.split() for line in lines if line and not line.startswith("#version"))
    ]
    start, end, unknown, pad = (
        read_token(config.get(f"{kind}_token", usual)) for kind, usual in SPECIAL.items()
    )
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=unknown,
            fuse_unk=False,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ends = ((end, vocabulary[end]), (start, vocabulary[start]))
    made.post_processor = processors.RobertaProcessing(
        *ends, add_prefix_space=False, trim_offsets=False
    )
    made.add_special_tokens(
        [
            AddedToken(name, normalized=True) if name == start else name
            for name in dict.fromkeys((start, end, unknown, pad))
        ]
    )
    return made


SPECIAL = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "unk": "<|endoftext|>",
    "pad": "<|endoftext|>",
}
