"""CLIP's tokenizer through the tokenizers library, with the token ids of transformers.

It is read from ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt`` alone, and always has
CLIP's own rules, as in transformers.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from limner.errors import InputError

# Of the tokenizer that CLIP was published with.
WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|"
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
# What tokenizer_config.json need not say.
DEFAULT_TOKENS = {
    "bos_token": START_TOKEN,
    "eos_token": END_TOKEN,
    "unk_token": END_TOKEN,
    "sep_token": None,
    "pad_token": END_TOKEN,
    "cls_token": None,
    "mask_token": None,
}
EXTRA_TOKENS = "extra_special_tokens"
UNLIMITED = 10**30  # tokens, where tokenizer_config.json has no limit

Token = str | AddedToken


class WordTokenizer:
    """Captions in, token ids out, each with its start and its end.

    Raises:
        InputError: for files that are no tokenizer.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        try:
            named, others = read_special_tokens(folder, config)
            self.inner = build_tokenizer(folder, named)
            self.inner.encode_special_tokens = bool(config.get("split_special_tokens", False))
            add_tokens(self.inner, named, others)
        # The tokenizers library raises plain exceptions, whatever is wrong.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            raise InputError(
                f"{folder}: it cannot be read as CLIP's tokenizer ({reason}). Fetch or copy the "
                "model again."
            ) from error
        self.limit = config.get("model_max_length", config.get("max_len")) or UNLIMITED
        if type(self.limit) is not int:
            raise InputError(
                f"{folder}: model_max_length is {str(self.limit)[:80]}, a whole number is "
                "expected. Fetch or copy the model again."
            )
        pad = self.inner.token_to_id(str(named["pad_token"]))
        if pad is None:
            raise InputError(
                f"{folder}: it has no pad_token, with which captions are filled up. Set it in "
                f"tokenizer_config.json; that of CLIP is {END_TOKEN}."
            )
        self.pad: int = pad

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, uncut."""
        return [encoding.ids for encoding in self.inner.encode_batch(texts)]


def read_special_tokens(
    folder: Path, config: dict[str, Any]
) -> tuple[dict[str, Token | None], list[list[Token]]]:
    """Read which tokens stand for themselves in a text.

    tokenizer_config.json says it all by ``added_tokens_decoder``. Where it does not,
    special_tokens_map.json says more than it, and added_tokens.json and tokenizer.json add others.

    Returns:
        Tokens by the names of their parts, such as ``pad_token``, and those without a part: what
        comes before the named ones in the order of their ids, and what comes after.
    """
    settings = {name: value for name, value in config.items() if is_token(name)}
    extra = list_extra_tokens(config)
    if "added_tokens_decoder" in config:
        records = config["added_tokens_decoder"].items()
        added = {int(index): AddedToken(**record) for index, record in records}
    else:
        special = read_json(folder / "special_tokens_map.json")
        settings |= {k: to_token(v, special=True) for k, v in special.items() if is_token(k)}
        extra += list_extra_tokens(special) if not extra or EXTRA_TOKENS in special else []
        # As in transformers, records of tokenizer_config.json do not count here.
        texts = {str(value) for value in settings.values() if not isinstance(value, dict)}
        added = read_added_tokens(folder, texts | {str(token) for token in extra})
    named = DEFAULT_TOKENS | {name: to_token(value) for name, value in settings.items()}
    by_text = {str(token): token for token in added.values()}
    named = {name: by_text.get(str(token), token) for name, token in named.items()}
    return named, [[added[index] for index in sorted(added)], extra]


def read_added_tokens(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    """Read the tokens that added_tokens.json and tokenizer.json add, by their ids.

    Args:
        special: the texts of those that are special.
    """
    added = {}
    for text, index in read_json(folder / "added_tokens.json").items():
        added[index] = AddedToken(text, normalized=text not in special, special=text in special)
    for record in read_json(folder / "tokenizer.json").get("added_tokens", []):
        added[record["id"]] = AddedToken(**{k: v for k, v in record.items() if k != "id"})
    return added


def is_token(name: str) -> bool:
    """Return whether a setting names a token; some have switches of similar names."""
    return name.endswith("_token") and not name.startswith("add_")


def to_token(value: Any, special: bool = False) -> Token | None:
    """Return a token, which files write as text or as a record."""
    if value is None or isinstance(value, str | AddedToken):
        return value
    record = {k: v for k, v in value.items() if k not in ("__type", "special" if special else "")}
    if "content" not in record:
        raise ValueError(f"a token is {value!s:.80}, its content is missing")
    return AddedToken(**record, special=True) if special else AddedToken(**record)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that need not be there."""
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    return content


def build_tokenizer(folder: Path, named: dict[str, Token | None]) -> Tokenizer:
    """Build the byte-pair encoding of a folder's vocabulary, with CLIP's rules."""
    path = folder / "tokenizer.json"
    if path.is_file():
        model = read_json(path)["model"]
        vocabulary = model["vocab"]
        merges = [split_pair(pair) for pair in model["merges"]]
    else:
        vocabulary, merges = models.BPE.read_file(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=str(named["unk_token"]),
            fuse_unk=False,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


def split_pair(pair: str | list[str]) -> tuple[str, str]:
    """Return a merge, which older files write as one text."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first, second


def add_tokens(
    tokenizer: Tokenizer, named: dict[str, Token | None], others: list[list[Token]]
) -> None:
    """Let the special tokens stand for themselves, in the order of transformers: the last wins."""
    tokens = order_tokens(named, others)
    names = {str(token) for token in named.values() if token is not None}
    for i, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[i] = AddedToken(token, special=True)
        elif str(token) in names:
            token.special = True
    tokenizer.add_tokens(tokens)
    start, end = (find_token(tokenizer, str(named[name])) for name in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, False, False)


def order_tokens(named: dict[str, Token | None], others: list[list[Token]]) -> list[Token]:
    """Return each token once, in the order of transformers."""
    before, after = others
    tokens = list(before)
    texts = {str(token) for token in tokens}
    for token in (*named.values(), *after):
        if token is not None and str(token) not in texts and token not in tokens:
            tokens.append(token)
    return tokens


def find_token(tokenizer: Tokenizer, text: str) -> tuple[str, int]:
    """Return a token with its id."""
    index = tokenizer.token_to_id(text)
    if index is None:
        raise ValueError(f"{text} is not in the vocabulary")
    return text, index


def list_extra_tokens(settings: dict[str, Any]) -> list[Token]:
    """Return the special tokens that have no part of their own."""
    extra = settings.get(EXTRA_TOKENS) or settings.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra
    return [token for value in values if (token := to_token(value)) is not None]
